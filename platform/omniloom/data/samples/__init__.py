"""Sample corpora made on this machine from installed packages alone, as ordinary files: nothing is downloaded.

`demo` needs the `demo` extra: the standard library's help topics, handwritten digits, digits spoken by synthetic
voices, moving digits, pairs of a spoken and a pictured digit, and needles in haystacks. `library` needs nothing: the
standard library's own modules as text. Nor does `smoke`: generated words, colours, tones and fades, for tests.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from omniloom.data.samples.demo import write_demo
from omniloom.data.samples.library import write_library
from omniloom.data.samples.smoke import write_smoke
from omniloom.errors import ConfigError, did_you_mean

KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "demo": write_demo,
    "library": write_library,
    "smoke": write_smoke,
}


def write_samples(kind: str, folder: Path) -> Path:
    """Write the sample files of `kind` under `folder` and return their manifest; finished ones are kept."""
    if kind not in KINDS:
        raise ConfigError(f"unknown samples={kind}; {did_you_mean(kind, KINDS)}")
    manifest = folder / "manifest.yaml"
    if not manifest.is_file():
        sources = KINDS[kind](folder)
        manifest.write_text(yaml.safe_dump({"sources": sources}, sort_keys=False))  # written last: the commit
    return manifest
