"""Evaluation samples as cards: the prompt with its media inside the page, the right answer, the model's answer."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omniloom.track.report.text import middle_cut, size, split_middle
from omniloom.track.samples import LIMIT_BYTES, MIME, choose_samples, pieces_of

PAGE_LIMIT_BYTES = 40 * 2**20  # all of them
HEAD_CHARACTERS, TAIL_CHARACTERS = 420, 260  # of a long text
ANSWER_CHARACTERS = 200


@dataclass
class Part:
    """One piece of a prompt: text, or a medium inside the page, or why it is not there."""

    kind: str  # text, image, audio, video
    text: str = ""  # or a text's beginning
    left_out: int = 0  # characters of its middle
    tail: str = ""
    uri: str = ""
    name: str = ""  # the media file's
    problem: str = ""


@dataclass
class Choice:
    """One possible answer."""

    text: str
    is_answer: bool
    is_given: bool


@dataclass
class Card:
    """One sample."""

    doc_id: str
    mark: Literal["right", "wrong", "unknown"]
    parts: list[Part]
    choices: list[Choice]
    answer: str | None
    given: str | None
    facts: list[str]


@dataclass
class TaskSamples:
    """What is shown of one task's samples."""

    task: str
    cards: list[Card]
    total: int
    right: int


@dataclass
class Budget:
    """How many bytes of media may still go into the page."""

    left_bytes: int = PAGE_LIMIT_BYTES


def read_samples(task: str, path: Path, budget: Budget) -> TaskSamples | None:
    """A few samples of one task, right and wrong ones, spread over the file; None where there are none."""
    chosen = choose_samples(path)
    if chosen is None:
        return None
    cards = [_card(sample, path.parent, budget) for sample in chosen.samples]
    return TaskSamples(task, cards, chosen.total, chosen.right)


def _card(sample: dict[str, Any], folder: Path, budget: Budget) -> Card:
    answer, given, right = _text(sample.get("answer")), _text(sample.get("given")), sample.get("right")
    choices = sample.get("choices")
    facts = []
    if isinstance(sample.get("length"), int | float):
        facts.append(f"{sample['length']:,} tokens")
    if isinstance(sample.get("depth"), int | float):
        facts.append(f"depth {sample['depth']:.0%}")
    return Card(
        doc_id=str(sample.get("doc_id", "")),
        mark="unknown" if not isinstance(right, bool) else "right" if right else "wrong",
        parts=[_part(piece, folder, budget) for piece in pieces_of(sample)],
        choices=[
            Choice(middle_cut(str(choice), ANSWER_CHARACTERS), str(choice) == answer, str(choice) == given)
            for choice in (choices if isinstance(choices, list) else [])
        ],
        answer=None if answer is None else middle_cut(answer, ANSWER_CHARACTERS),
        given=None if given is None else middle_cut(given, ANSWER_CHARACTERS),
        facts=facts,
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _part(piece: dict[str, Any], folder: Path, budget: Budget) -> Part:
    for kind in MIME:
        if isinstance(piece.get(kind), str):
            return _medium(kind, folder / piece[kind], budget)
    head, left_out, tail = split_middle(str(piece.get("text", piece)), HEAD_CHARACTERS, TAIL_CHARACTERS)
    return Part("text", head, left_out, tail)


def _medium(kind: str, path: Path, budget: Budget) -> Part:
    part = Part(kind, name=path.name)
    subtype = MIME[kind].get(path.suffix.lower().lstrip("."))
    if subtype is None:
        part.problem = f"not shown: {path.suffix or 'no ending'} is none of {', '.join(MIME[kind])}"
        return part
    try:
        length = path.stat().st_size if path.is_file() else None
        if length is None:
            part.problem = f"no such file any more: {path}"
        elif length > LIMIT_BYTES:
            part.problem = f"not shown: {size(length)}, the limit of a file in this page is {size(LIMIT_BYTES)}"
        elif length > budget.left_bytes:
            part.problem = f"not shown: the page already holds its limit of {size(PAGE_LIMIT_BYTES)} of media"
        else:
            with path.open("rb") as stream:
                content = stream.read(length)  # no more, should it be growing
            budget.left_bytes -= len(content)
            part.uri = f"data:{kind}/{subtype};base64,{base64.b64encode(content).decode()}"
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        part.problem = f"cannot be read: {error}"
    return part
