"""Figures as a reader of a dashboard writes them, and what must not be written at all."""

import math
import re
from typing import Any

# A name that promises a secret; `tokenizer` is none, and `tokens` is a number.
_SECRET = re.compile(r"key|token(?!i[sz])|secret|passw|credential", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
REDACTED = "(redacted)"


def count(number: float | None) -> str:
    """950, 12.3k, 1.4 M, 3.2 B."""
    if number is None or not math.isfinite(number):
        return "–"
    for limit, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, "k")):
        if abs(number) >= limit:
            return f"{number / (1e3 if unit == 'k' else limit):.1f}{unit}"
    return f"{number:,.0f}" if abs(number) >= 100 or number == int(number) else f"{number:.1f}"


def duration(seconds: float | None) -> str:
    """45 ms, 0.21 s, 3 m 12 s, 2 h 5 m, 3 d 4 h."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        if seconds < 0.1:
            return f"{seconds * 1000:.0f} ms"
        digits = 0 if seconds >= 10 else 1 if seconds >= 1 else 2
        return f"{seconds:.{digits}f} s"
    if seconds < 3600:
        large, small, units = *divmod(round(seconds), 60), ("m", "s")
    elif seconds < 48 * 3600:
        large, small, units = *divmod(round(seconds / 60), 60), ("h", "m")
    else:
        large, small, units = *divmod(round(seconds / 3600), 24), ("d", "h")
    return f"{large} {units[0]} {small} {units[1]}" if small else f"{large} {units[0]}"


def size(byte_count: float | None) -> str:
    """820 B, 12.5 KiB, 1.2 MiB, 3.4 GiB."""
    if byte_count is None:
        return "–"
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if byte_count >= 1024**power:
            return f"{byte_count / 1024**power:.1f} {unit}"
    return f"{byte_count:.0f} B"


def figure(value: float | None) -> str:
    """Four digits that matter: 22,822, 3.091, 0.0003."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"


def share(value: float | None) -> str:
    """94.4%."""
    return "–" if value is None else f"{value:.1%}"


def split_middle(text: str, head: int, tail: int) -> tuple[str, int, str]:
    """A text's beginning, how many characters of its middle are left out, its end."""
    if len(text) <= head + tail:
        return text, 0, ""
    return text[:head], len(text) - head - tail, text[-tail:]


def middle_cut(text: str, limit: int = 400) -> str:
    """A text of at most about `limit` characters: a longer one loses its middle."""
    head, left_out, tail = split_middle(text, limit * 2 // 3, limit // 3)
    return f"{head} … {tail}" if left_out else head


def flat_redacted(value: Any, name: str = "", secret: bool = False) -> list[tuple[str, str]]:
    """A configuration's leaves by dotted key; what stands under a secret's name, and a URL's user, is not shown."""
    if isinstance(value, dict) and value:
        parts = {f"{name}.{key}" if name else str(key): (key, part) for key, part in value.items()}
        return [
            leaf for path, (key, part) in parts.items() for leaf in flat_redacted(part, path, secret or _is_secret(key))
        ]
    if isinstance(value, list) and any(isinstance(part, dict | list) for part in value):
        return [leaf for i, part in enumerate(value) for leaf in flat_redacted(part, f"{name}[{i}]", secret)]
    # Numbers are no secrets: `train.tokens` and the placeholder tokens' ids stay.
    if secret and (isinstance(value, str) or (isinstance(value, list) and any(isinstance(v, str) for v in value))):
        return [(name, REDACTED if value else "")]
    return [(name, _USER_IN_URL.sub("…@", _plain(value)))]


def _is_secret(key: Any) -> bool:
    return bool(_SECRET.search(str(key)))


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return "" if value is None else str(value)
