"""What is asked for, and what comes back."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from omniloom.errors import ConfigError
from omniloom.generate.config import DecodingConfig
from omniloom.modality.sequence import AUDIO, IMAGE, VIDEO, Document


@dataclass(frozen=True)
class Request:
    """A prompt, bos and all, and how it goes on; or what comes behind a conversation that the first slot holds."""

    prompt: Document
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    goes_on: bool = False


@dataclass
class Answer:
    """What was written, token by token; log-probabilities and entropies (nats) are the model's own, before anything
    was cut or made hotter."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    text: str = ""
    finish: str = ""  # eos, stop or length
    prompt_tokens: int = 0
    shared_tokens: int = 0  # of the prompt, that another request had computed
    drafted: int = 0  # tokens that were guessed ahead
    accepted: int = 0  # of those, that were right

    @property
    def score(self) -> float:
        """The sum of log-probabilities."""
        return sum(self.logprobs)


@dataclass(frozen=True)
class Event:
    """One more token of one request; the last says how it ended."""

    number: int  # of the request, in the order they were handed in
    text: str  # what it completes
    answer: Answer  # up to here


def refuse_no_room(prompt: Document, context: int, before: int = 0) -> None:
    """Raise ConfigError for an empty prompt, and one that, `before` other tokens, leaves no room in the context."""
    if not len(prompt):
        raise ConfigError("the prompt is empty: a model goes on from something, if only from bos")
    if (tokens := before + len(prompt)) >= context:
        raise ConfigError(
            f"a prompt of {tokens:,} tokens leaves no room in the model's context: model.max_position_embeddings="
            f"{context:,}"
        )


def first_stop(text: str, stops: list[str]) -> int | None:
    """Where the first of the stop strings begins."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


class Stopper:
    """Text that comes in parts, cut before the first of some stop strings; what may begin one is held back."""

    def __init__(self, stops: list[str], decode: Callable[[int], str]) -> None:
        self._stops, self._decode = stops, decode
        self._held, self.stopped = "", False

    def take(self, id: int) -> str:
        """The text that can be shown now."""
        self._held += self._decode(id)
        if (at := first_stop(self._held, self._stops)) is not None:
            shown, self._held, self.stopped = self._held[:at], "", True
            return shown
        may_begin = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown = self._held[: len(self._held) - may_begin]
        self._held = self._held[len(shown) :]
        return shown

    def rest(self) -> str:
        """What was held back, once nothing more comes."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def contents(document: Document) -> np.ndarray:
    """A number a token that says what stands there: its id, or what is seen where, or heard; int64 (N,).

    Two prompts share a prefix where these are equal.
    """
    numbers = document.input_ids.astype(np.int64)
    for kind, rows in ((IMAGE, document.image), (VIDEO, document.video)):
        at = document.modality == kind
        numbers[at] = [_digest(row, place) for row, place in zip(rows, document.position[at], strict=True)]
    clip = 0
    starts = [*document.segment_starts.tolist(), len(document)]
    first = np.concatenate([[0], document.audio_frames.cumsum()])
    for start, stop in pairwise(starts):
        if document.modality[start] == AUDIO:
            numbers[start:stop] = _digest(document.audio[first[clip] : first[clip + 1]])
            clip += 1
    return numbers


def _digest(*rows: np.ndarray) -> int:
    """Below 0, as no id is."""
    digest = hashlib.blake2b(b"".join(np.ascontiguousarray(one).tobytes() for one in rows), digest_size=7).digest()
    return -1 - int.from_bytes(digest, "big")
