"""Conversations as text: plain role headers before each turn.

A conversation reads

    user: Which colour?

    assistant: red

    user: And this one?

    assistant: blue

Plain headers, and not ChatML's `<|im_start|>`: those are special tokens of other vocabularies, in ours they would be
ordinary text of seven tokens that no other text holds, while `user:` is one or two tokens of any vocabulary and a base
model has met such dialogues. The blank after `assistant:` belongs to what the assistant says, for byte-level BPE joins
a blank to the word behind it; a document ends with the last turn, so that the end that is learned is the document's
own. `lay_out` is the only place that knows the template: training and prompts have it from here.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from omniloom.errors import did_you_mean

ASSISTANT = "assistant"
# By the names that Hugging Face's messages and ShareGPT have for them.
ROLES = {
    **{role: role for role in ("system", "developer", "user", ASSISTANT, "tool")},
    **{"human": "user", "gpt": ASSISTANT, "model": ASSISTANT, "function": "tool", "observation": "tool"},
}
# What begins a next turn: an answer ends before it.
STOPS = [f"\n\n{role}:" for role in dict.fromkeys(ROLES.values())]
MEDIA = ("image", "audio", "video")
JSON_NAMES = {dict: "a mapping", list: "a list", bool: "a truth value", int: "a number", float: "a number"}

Medium = TypeVar("Medium")


def lay_out(
    turns: Sequence[tuple[str, Sequence[str | Medium]]], is_target: Callable[[int], bool], continues: bool = False
) -> list[tuple[str | Medium, bool]]:
    """The template: a header before each turn (role, parts), and whether a part is a target, as `is_target` says of the
    turn's number. Where they continue a conversation, a blank line stands before the first, too.

    Text is joined to the text before it where both are targets or neither is: words are not cut at the seam.
    """
    laid: list[tuple[str | Medium, bool]] = []
    for number, (role, parts) in enumerate(turns):
        _append(laid, f"{role}:" if number == 0 and not continues else f"\n\n{role}:", False)
        for place, part in enumerate(parts):
            if isinstance(part, str):
                _append(laid, f" {part}" if place == 0 else part, is_target(number))
            else:
                laid.append((part, False))
    return laid


def _append(laid: list[tuple[str | Medium, bool]], text: str, is_target: bool) -> None:
    last, was_target = laid[-1] if laid else (None, False)
    if isinstance(last, str) and was_target == is_target:
        laid[-1] = (last + text, is_target)
    else:
        laid.append((text, is_target))


def turns_of(
    messages: Any,
    key: str,
    medium: Callable[[str, Any], Medium],
    text: Callable[[str], list[str | Medium]] | None = None,
) -> Iterator[tuple[str, list[str | Medium]]]:
    """Messages of role and content, or ShareGPT's of from and value, as turns; `medium` reads what names one of a kind.

    `text` finds media in a content that is text; without it there are none. Raises ValueError, with the place inside
    `key`.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{key} is no list of turns, or an empty one")
    for number, message in enumerate(messages):
        where = f"{key}[{number}]"
        if not isinstance(message, dict):
            raise ValueError(f"{where} is no mapping of role and content")
        role_key, content_key = ("from", "value") if "from" in message else ("role", "content")
        role = text_of(message.get(role_key), f"{where}.{role_key}")
        if role not in ROLES:
            raise ValueError(f"{where}.{role_key} {role[:50]!r} is no role; {did_you_mean(role[:50], ROLES)}")
        content, place = message.get(content_key), f"{where}.{content_key}"
        if isinstance(content, list):
            yield ROLES[role], _parts(content, place, medium)
        else:
            plain = text_of(content, place)
            yield ROLES[role], [plain] if text is None else text(plain)


def _parts(content: list[Any], where: str, medium: Callable[[str, Any], Medium]) -> list[str | Medium]:
    if not content:
        raise ValueError(f"{where} is empty")
    return [_part(part, f"{where}[{number}]", medium) for number, part in enumerate(content)]


def _part(part: Any, where: str, medium: Callable[[str, Any], Medium]) -> str | Medium:
    """A part by its type: text; image, audio, video, or these with _url or input_ before or behind, as they are."""
    if not isinstance(part, dict):
        raise ValueError(f"{where} is no mapping of type and content")
    kind = text_of(part.get("type"), f"{where}.type")
    if kind in ("text", "input_text", "output_text"):
        return text_of(part.get("text"), f"{where}.text", may_be_empty=True)
    plain = kind.removesuffix("_url").removeprefix("input_")
    if plain not in MEDIA:
        raise ValueError(f"{where}.type {kind[:50]!r} is none; {did_you_mean(kind[:50], ('text', *MEDIA))}")
    # {"image_url": {"url": …}}, {"image_url": "…"}, {"image": "…"}, {"path": "…"}, {"url": "…"}
    named = next((part[key] for key in (kind, plain, "path", "url") if part.get(key) is not None), None)
    if isinstance(named, dict):
        if named.get("data") is not None:  # {"input_audio": {"data": …, "format": …}}
            return medium(plain, f"data:;base64,{text_of(named['data'], where)}")
        named = next((named[key] for key in ("url", "path") if named.get(key) is not None), None)
    if named is None:
        raise ValueError(f"{where} names no {plain}")
    return medium(plain, named)


def text_of(value: Any, key: str, may_be_empty: bool = False) -> str:
    """A record's text; raises ValueError where it is none, or empty and may not be."""
    if not isinstance(value, str):
        raise ValueError(
            f"{key} is {'null' if value is None else JSON_NAMES.get(type(value), 'no text')}, not a string"
        )
    value.encode()  # half of a surrogate pair is no text
    if not may_be_empty and not value.strip():
        raise ValueError(f"{key} is empty" if key else "empty")
    return value
