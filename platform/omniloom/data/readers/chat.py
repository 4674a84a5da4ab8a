"""Conversations and preference pairs become text by `modality.dialogue`; the assistant's turns are targets."""

from functools import partial
from typing import Any

from omniloom.data.config import Reading
from omniloom.data.readers.record import Place, mapping_of, medium
from omniloom.data.source import RawDocument, RawSegment
from omniloom.modality.dialogue import ASSISTANT, lay_out, text_of, turns_of

CHAT_KEYS = "messages, or conversations, or instruction and output"
Turn = tuple[str, list[str | RawSegment]]


def chat_document(record: Any, place: Place, reading: Reading) -> list[RawDocument]:
    """A conversation: `messages`, ShareGPT's `conversations` or Alpaca's instruction, input and output."""
    record = mapping_of(record, CHAT_KEYS)
    if record.get("messages") is not None:
        turns = _turns(record["messages"], "messages", place)
    elif record.get("conversations") is not None:
        turns = _turns(record["conversations"], "conversations", place)
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
        return _turns(value, key, place)
    return [(role, [text_of(value, key)])]


def _turns(messages: Any, key: str, place: Place) -> list[Turn]:
    return list(turns_of(messages, key, partial(medium, place=place)))


def _alpaca(record: dict[str, Any]) -> list[Turn]:
    asked = text_of(record["instruction"], "instruction")
    if record.get("input") is not None:
        more = text_of(record["input"], "input", may_be_empty=True)
        asked = f"{asked}\n\n{more}" if more.strip() else asked
    answer = text_of(record["output"], "output")
    return [("user", [asked]), (ASSISTANT, [answer])]


def _rendered(turns: list[Turn], only_last: bool = False) -> list[RawSegment]:
    """The assistant's text a target, or that of the last turn alone."""

    def is_target(number: int) -> bool:
        return turns[number][0] == ASSISTANT and (not only_last or number == len(turns) - 1)

    laid = lay_out(turns, is_target)
    return [part if isinstance(part, RawSegment) else RawSegment("text", part, target) for part, target in laid]
