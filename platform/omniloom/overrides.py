"""Words of the command line in Hydra's grammar: what sweeps, and plain values spelled so that Hydra reads them back."""

import re
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException

from omniloom.cluster.config import Choice, Interval, Space
from omniloom.errors import ConfigError


def split_sweeps(words: list[str]) -> tuple[list[str], Space]:
    """The overrides of one value, and the keys of several, which Hydra's own syntax gives.

    choice(a,b) or a,b; range(start,stop,step); interval(low,high), by ratio as tag(log,interval(low,high)), of whole
    numbers as int(interval(low,high)). Raises ConfigError where a word cannot be parsed or its range is empty.
    """
    fixed: list[str] = []
    space: Space = {}
    parser = OverridesParser.create()
    for word in words:
        if "=glob(" in word:
            raise ConfigError(f"{word}: glob() is not for sweeps: name the options with choice(…)")
        try:
            override = None if word.startswith("-") else parser.parse_override(word)
        except HydraException as error:
            raise ConfigError(f"{word} is no override: {str(error).splitlines()[0]}") from error
        if override is None or not override.is_sweep_override():
            fixed.append(word)
        else:
            space[word.split("=", 1)[0]] = _values_of(override, word)
    return fixed, space


def _values_of(override: Override, word: str) -> Choice | Interval:
    sweep = override.value()
    if not isinstance(sweep, IntervalSweep):
        values = tuple(override.sweep_string_iterator())
        if not values:
            raise ConfigError(f"{word} is an empty range")
        return Choice(values)
    low, high, log = sweep.start, sweep.end, "log" in sweep.tags
    if low is None or high is None or not low < high:
        raise ConfigError(f"{word} is an empty range: {low} is not under {high}")
    if log and low <= 0:
        raise ConfigError(f"{word}: a range by ratio begins above 0, not at {low}")
    return Interval(low, high, log, whole=isinstance(low, int) and isinstance(high, int))


def absolute_paths(settings: Any) -> list[str]:
    """Overrides that name a job's folders from anywhere: it runs in another directory, perhaps on another machine.

    A run that is named (init, draft, like, fork, with @step or not) is one in runs_dir, else a folder.
    """
    words = []
    for key in ("runs_dir", "corpus", "manifest", "prompts", "out"):
        value = getattr(settings, key, None)
        if value is not None:
            words.append(f"{key}={quoted(str(Path(value).absolute()))}")
    for key in ("init", "draft", "like", "fork"):
        name, at, step = (getattr(settings, key, None) or "").partition("@")
        places = [Path(settings.runs_dir) / name, Path(name)] if name else []
        words += [f"{key}={quoted(f'{place.absolute()}{at}{step}')}" for place in places if place.exists()][:1]
    return words


def plain(word: str) -> str:
    """A value as it stands, of one that may be quoted."""
    return str(OverridesParser.create().parse_override(f"key={word}").value()) if word[:1] in ("'", '"') else word


def quoted(word: str) -> str:
    """A word that Hydra takes as it stands.

    To its parser a backslash is one but before a quote or the end, to its interpolation but before ${.
    """
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", word)
    escaped = re.sub(r"(\\*)'", r"\1\1\'", escaped)
    return "'" + re.sub(r"(\\+)\Z", r"\1\1", escaped) + "'"


def literal(value: Any) -> str:
    """A plain value as Hydra's grammar writes it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(literal, value)) + "]"
    return quoted(value) if isinstance(value, str) else "null" if value is None else str(value).lower()
