"""Conversations and preference pairs become text with plain role headers; the assistant's turns are targets.

A conversation reads

    user: Which colour?

    assistant: red

    user: And this one?

    assistant: blue

Plain headers, and not ChatML's `<|im_start|>`: those are special tokens of other vocabularies, in ours they would be
ordinary text of seven tokens that no other text holds, while `user:` is one or two tokens of any vocabulary and a base
model has met such dialogues. The blank after `assistant:` belongs to the target, for byte-level BPE joins a blank to
the word behind it; a document ends with the last turn, so that the end that is learned is the document's own.
`_rendered` is the only place that knows the template.
"""

from collections.abc import Iterator
from typing import Any

from omniloom.data.config import Reading
from omniloom.data.readers.record import Place, decoded, mapping_of, medium, text_of
from omniloom.data.source import RawDocument, RawSegment
from omniloom.errors import did_you_mean

ASSISTANT = "assistant"
# By the names that Hugging Face's messages and ShareGPT have for them.
ROLES = {
    **{role: role for role in ("system", "developer", "user", ASSISTANT, "tool")},
    **{"human": "user", "gpt": ASSISTANT, "model": ASSISTANT, "function": "tool", "observation": "tool"},
}
MEDIA = ("image", "audio", "video")
CHAT_KEYS = "messages, or conversations, or instruction and output"
Turn = tuple[str, list[RawSegment]]


def chat_document(record: Any, place: Place, reading: Reading) -> list[RawDocument]:
    """A conversation: `messages`, ShareGPT's `conversations` or Alpaca's instruction, input and output."""
    record = mapping_of(record, CHAT_KEYS)
    if record.get("messages") is not None:
        turns = list(_turns(record["messages"], "messages", place))
    elif record.get("conversations") is not None:
        turns = list(_turns(record["conversations"], "conversations", place))
    elif "instruction" in record:
        turns = _alpaca(record)
    else:
        raise ValueError(f"neither {CHAT_KEYS.replace(', or', ' nor')}; its keys: {', '.join(map(str, record))[:100]}")
    if not any(role == ASSISTANT for role, _ in turns):
        raise ValueError("no turn of the assistant: nothing to learn")
    return [RawDocument(place.name, _rendered(turns))]


def preference_document(record: Any, place: Place, reading: Reading) -> list[RawDocument]:
    """A prompt with a chosen and a rejected answer: two documents of one name, the answers alone are targets.

    Answers are strings, messages that follow the prompt, or whole conversations, of which all but the last turn is the
    prompt.
    """
    record = mapping_of(record, "prompt, chosen and rejected")
    chosen, rejected = (_answered(record, key, place) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected answer different prompts")
    if not chosen[:-1]:
        raise ValueError("no prompt: neither the key nor turns before the answer")
    return [
        RawDocument(place.name, _rendered(chosen, only_last=True), kind="chosen"),
        RawDocument(place.name, _rendered(rejected, only_last=True), kind="rejected"),
    ]


def _answered(record: dict[str, Any], key: str, place: Place) -> list[Turn]:
    """The turns that end in the answer `key`."""
    prompt, answer = record.get("prompt"), record[key]
    before = [] if prompt is None else _turns_or_text(prompt, "prompt", "user", place)
    turns = _turns_or_text(answer, key, ASSISTANT, place)
    if turns[: len(before)] != before:  # else the answer repeats its prompt
        turns = before + turns
    if turns[-1][0] != ASSISTANT:
        raise ValueError(f"{key} ends in a turn of the {turns[-1][0]}, not of the assistant")
    return turns


def _turns_or_text(value: Any, key: str, role: str, place: Place) -> list[Turn]:
    if isinstance(value, list):
        return list(_turns(value, key, place))
    return [(role, [RawSegment("text", text_of(value, key), is_target=False)])]


def _turns(messages: Any, key: str, place: Place) -> Iterator[Turn]:
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
        yield ROLES[role], _content(message.get(content_key), f"{where}.{content_key}", place)


def _content(content: Any, where: str, place: Place) -> list[RawSegment]:
    """The text of a turn, or its parts in order."""
    if not isinstance(content, list):
        return [RawSegment("text", text_of(content, where), is_target=False)]
    parts = [_part(part, f"{where}[{number}]", place) for number, part in enumerate(content)]
    if not parts:
        raise ValueError(f"{where} is empty")
    return parts


def _part(part: Any, where: str, place: Place) -> RawSegment:
    """A part by its type: text; image, audio, video, or these with _url or input_ before or behind, as they are."""
    if not isinstance(part, dict):
        raise ValueError(f"{where} is no mapping of type and content")
    kind = text_of(part.get("type"), f"{where}.type")
    if kind in ("text", "input_text", "output_text"):
        return RawSegment("text", text_of(part.get("text"), f"{where}.text", may_be_empty=True), is_target=False)
    plain = kind.removesuffix("_url").removeprefix("input_")
    if plain not in MEDIA:
        raise ValueError(f"{where}.type {kind[:50]!r} is none; {did_you_mean(kind[:50], ('text', *MEDIA))}")
    # {"image_url": {"url": …}}, {"image_url": "…"}, {"image": "…"}, {"path": "…"}, {"url": "…"}
    named = next((part[key] for key in (kind, plain, "path", "url") if part.get(key) is not None), None)
    if isinstance(named, dict):
        if named.get("data") is not None:  # {"input_audio": {"data": …, "format": …}}
            return RawSegment(plain, decoded(text_of(named["data"], where), f"{place.name}:{plain}"), is_target=False)
        named = next((named[key] for key in ("url", "path") if named.get(key) is not None), None)
    if named is None:
        raise ValueError(f"{where} names no {plain}")
    return medium(plain, named, place)


def _alpaca(record: dict[str, Any]) -> list[Turn]:
    asked = text_of(record["instruction"], "instruction")
    if record.get("input") is not None:
        more = text_of(record["input"], "input", may_be_empty=True)
        asked = f"{asked}\n\n{more}" if more.strip() else asked
    answer = text_of(record["output"], "output")
    return [
        ("user", [RawSegment("text", asked, is_target=False)]),
        (ASSISTANT, [RawSegment("text", answer, is_target=False)]),
    ]


def _rendered(turns: list[Turn], only_last: bool = False) -> list[RawSegment]:
    """The template: a header before each turn, the assistant's text a target, or that of the last turn alone."""
    segments: list[RawSegment] = []
    for number, (role, parts) in enumerate(turns):
        header = f"{role}:" if number == 0 else f"\n\n{role}:"
        is_target = role == ASSISTANT and (not only_last or number == len(turns) - 1)
        _append(segments, RawSegment("text", header, is_target=False))
        for place, part in enumerate(parts):
            if isinstance(part.content, str):
                text = f" {part.content}" if place == 0 else part.content
                _append(segments, RawSegment("text", text, is_target))
            else:
                segments.append(part)
    return segments


def _append(segments: list[RawSegment], added: RawSegment) -> None:
    """Add text to the text before it where both are targets or neither is: words are not cut at the seam."""
    last = segments[-1] if segments else None
    if last is not None and isinstance(last.content, str) and last.is_target == added.is_target:
        segments[-1] = RawSegment("text", f"{last.content}{added.content}", added.is_target)
    else:
        segments.append(added)
