"""A conversation: its turns, laid out for the model as they are for training (`modality.dialogue`)."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from omniloom.errors import DataError
from omniloom.generate.prompt import HERE, Medium, Prompter
from omniloom.generate.request import Answer
from omniloom.modality.dialogue import ASSISTANT, lay_out, turns_of
from omniloom.modality.sequence import Document, Segment
from omniloom.modality.text import TextTokenizer, text_segment

Part = str | Medium


@dataclass
class Turn:
    """What one says; of an answer also the ids as they were written, so that what is cached of them serves again."""

    role: str
    parts: list[Part]
    ids: list[int] | None = None

    def laid(self) -> tuple[str, list[Part | Segment]]:
        """For the template."""
        if self.ids is None:
            return self.role, [*self.parts]
        return self.role, [text_segment(np.asarray(self.ids, np.int32), is_target=True)]

    def message(self) -> dict[str, Any]:
        """As Hugging Face's messages have it: what `format: chat` reads; files by absolute paths."""
        if all(isinstance(part, str) for part in self.parts):
            return {"role": self.role, "content": "".join(map(str, self.parts))}
        return {"role": self.role, "content": [_as_part(part) for part in self.parts]}

    @classmethod
    def of(cls, message: dict[str, Any], ids: list[int] | None = None) -> "Turn":
        """What `message` gave; files are named, and not read yet."""
        content = message["content"]
        if isinstance(content, str):
            return cls(message["role"], [content], ids)
        parts: list[Part] = [
            part["text"] if part["type"] == "text" else Medium(part["type"], part[part["type"]], []) for part in content
        ]
        return cls(message["role"], parts, ids)


def _as_part(part: Part) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    is_file = part.name[:5].lower() != "data:"
    return {"type": part.kind, part.kind: str(Path(os.path.expanduser(part.name)).absolute()) if is_file else part.name}


def opened(turns: list[Turn], continues: bool = False) -> list[tuple[Part | Segment, bool]]:
    """Turns by the template, each part with whether it is a target."""
    laid: list[tuple[str, list[str | Medium | Segment]]] = [turn.laid() for turn in turns]
    parts = lay_out(laid, lambda number: turns[number].role == ASSISTANT, continues)
    return cast(list[tuple[Part | Segment, bool]], parts)


def laid_out(prompter: Prompter, turns: list[Turn]) -> Document:
    """Turns as a prompt, which ends in the assistant's header."""
    return prompter.woven(prompter.encoded(opened([*turns, Turn(ASSISTANT, [])])))


def read_turns(prompter: Prompter, messages: Any, folder: Path = HERE) -> list[Turn]:
    """Messages as turns, with files of their parts and inline; raises DataError, ConfigError for what cannot be
    answered."""
    try:
        read = turns_of(
            messages,
            "messages",
            medium=lambda kind, name: prompter.medium(kind, str(name), folder),
            text=lambda text: prompter.parts(text, folder),
        )
        turns = [Turn(role, parts) for role, parts in read]
    except ValueError as error:
        raise DataError(str(error)) from error
    if turns[-1].role == ASSISTANT:
        raise DataError("the last turn is the assistant's: there is nothing to answer")
    return turns


def written_ids(text: TextTokenizer, answer: Answer) -> list[int] | None:
    """The ids of exactly an answer's text; None where it was cut inside of one."""
    ids = answer.ids[:-1] if answer.finish == "eos" else answer.ids
    if answer.finish != "stop":
        return ids
    for end in range(len(ids), -1, -1):  # back over what it stopped at
        shown = text.decode(ids[:end])
        if shown == answer.text:
            return ids[:end]
        if len(shown) < len(answer.text):
            break
    return None
