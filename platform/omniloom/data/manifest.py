"""A manifest names sources: their files by patterns, their formats and their weights."""

import math
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from omniloom.data.config import Manifest, SourceSpec
from omniloom.data.index import MOST_SOURCES
from omniloom.errors import DataError, did_you_mean


def read_manifest(path: Path) -> Manifest:
    """Read a manifest; raises DataError naming the wrong key and the nearest valid one."""
    if not path.is_file():
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.yaml"))) if path.parent.is_dir() else ""
        raise DataError(f"no manifest at {path} {near}: set manifest=<yaml file>".replace(" :", ":"))
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, a date that is none
        raise DataError(f"manifest {path} is not YAML: {error}") from error
    _refuse_unknown_keys(path, content)
    try:
        manifest = TypeAdapter(Manifest).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"manifest {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if not 1 <= len(manifest.sources) <= MOST_SOURCES:
        raise DataError(f"manifest {path} names {len(manifest.sources)} sources; 1 to {MOST_SOURCES} are possible")
    for name, source in manifest.sources.items():
        if source.weight < 0 or source.loss_weight < 0:
            raise DataError(f"manifest {path}: the weights of source {name} must not be negative")
        if not (math.isfinite(source.weight) and math.isfinite(source.loss_weight)):
            raise DataError(f"manifest {path}: the weights of source {name} must be finite")
        if source.limit_document_bytes < 1:
            raise DataError(f"manifest {path}: limit_document_bytes of source {name} must be at least 1")
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise DataError(f"manifest {path}: source name {name!r} begins file names: letters, digits, _ . - only")
    return manifest


def _refuse_unknown_keys(path: Path, content: Any) -> None:
    if not isinstance(content, dict) or not isinstance(content.get("sources"), dict):
        raise DataError(f"manifest {path} must have a mapping `sources:` of name to source")
    levels: list[tuple[dict[Any, Any], Any, str]] = [(content, Manifest, "")]
    levels += [(s, SourceSpec, f"sources.{n}.") for n, s in content["sources"].items() if isinstance(s, dict)]
    for mapping, spec, prefix in levels:
        valid = spec.__dataclass_fields__
        for key in mapping:
            if key not in valid:
                raise DataError(f"manifest {path}: unknown key {prefix}{key}; {did_you_mean(str(key), valid)}")
