"""The four errors a user can meet; each carries one message that says the rule, the figures, the key to change."""

import difflib
from collections.abc import Iterable

LEAST_LIKENESS, OF_A_PART = 0.5, 0.95


class OmniloomError(Exception):
    """Base of every error whose message is meant for the user; the command line prints it without a traceback."""


class ConfigError(OmniloomError):
    """The configuration asks for something unknown or contradictory."""


class DataError(OmniloomError):
    """An input file, a corpus or a manifest cannot be used."""


class CheckpointError(OmniloomError):
    """A checkpoint is missing, incomplete, damaged or of another shape."""


class ClusterError(OmniloomError):
    """Ray, a worker or a node failed."""


class Interrupted(KeyboardInterrupt):
    """The work was told to make room, by a signal or a cluster's notice, and is saved: the same command goes on.

    The command line ends with EX_TEMPFAIL, 75, which tells a scheduler to repeat it.
    """


def refuse_unless_one_of(key: str, value: str, valid: Iterable[str]) -> None:
    """Raise ConfigError where `key`'s value is none of `valid`."""
    names = list(valid)
    if value not in names:
        raise ConfigError(f"{key}={value} is none of {', '.join(names)}; {did_you_mean(value, names)}")


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Say which valid name is nearest to `name`, or list them all when none is near."""
    names = sorted(set(valid))
    near = max(names, key=lambda other: (_likeness(name, other), -len(other), other), default="")
    if near and _likeness(name, near) >= LEAST_LIKENESS:
        return f"did you mean '{near}'?"
    return f"valid: {', '.join(names)}" if names else "there is none"


def _likeness(name: str, valid: str) -> float:
    """From 0 to 1, whatever the case; who wrote a name's beginning alone (h100, for h100_sxm) meant that name.

    Or its last part alone (device, for cluster/device).
    """
    name, valid = name.casefold(), valid.casefold()
    parts = (valid, valid[: len(name)], valid.replace(".", "/").rpartition("/")[2])
    whole, *some = (difflib.SequenceMatcher(None, part, name).ratio() for part in parts)
    return max(whole, *(OF_A_PART * likeness for likeness in some))
