"""A conversation: its turns, laid out for the model as they are for training (`modality.dialogue`)."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def _as_part(part: Part) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    is_file = part.name[:5].lower() != "data:"
    return {"type": part.kind, part.kind: str(Path(os.path.expanduser(part.name)).absolute()) if is_file else part.name}


class Conversation:
    """What was said up to here."""

    def __init__(self, prompter: Prompter, system: str | None = None, turns: list[Turn] | None = None) -> None:
        self._prompter, self.system, self.turns = prompter, system, turns or []

    @property
    def all_turns(self) -> list[Turn]:
        """What the model was told first, and the turns."""
        return [*([] if self.system is None else [Turn("system", [self.system])]), *self.turns]

    def prompt(self) -> Document:
        """All of it, and the header that the assistant goes on from."""
        return laid_out(self._prompter, self.all_turns)

    def answered(self, answer: Answer) -> None:
        """Add what was written, up to here if it was cut short."""
        text = answer.text.removeprefix(" ")
        self.turns.append(Turn(ASSISTANT, [text], written_ids(self._prompter.text, answer)))

    def forget_until(self, tokens: int) -> int:
        """Drop the oldest exchanges until the prompt has at most so many tokens, the last turn never; how many turns
        went."""
        turns = len(self.turns)
        while len(self.turns) > 1 and len(self.prompt()) > tokens:
            del self.turns[0]
            while len(self.turns) > 1 and self.turns[0].role == ASSISTANT:
                del self.turns[0]
        return turns - len(self.turns)


def laid_out(prompter: Prompter, turns: list[Turn]) -> Document:
    """Turns as a prompt, which ends in the assistant's header."""
    opened: list[tuple[str, list[str | Medium | Segment]]] = [*(turn.laid() for turn in turns), (ASSISTANT, [])]
    return prompter.woven(prompter.encoded(lay_out(opened, lambda number: opened[number][0] == ASSISTANT)))


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
