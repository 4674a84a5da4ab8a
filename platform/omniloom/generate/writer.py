"""A model at work: its events, and what they took."""

import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import Any

from omniloom.generate.config import EngineConfig
from omniloom.generate.kv_cache import KVCache
from omniloom.generate.model import WritingModel
from omniloom.generate.request import Answer, Event, Request
from omniloom.model.load import Model


@dataclass
class Figures:
    """What answers took, all together."""

    prompt_tokens: int = 0
    shared_tokens: int = 0  # of the prompts, that were cached already
    tokens: int = 0  # new ones
    seconds: float = 0.0
    first_token_s: float = 0.0  # until the first new one
    cache_bytes_per_token: float | None = None  # of what is cached at the end; None: beam search
    drafted: int = 0
    accepted: int = 0

    @property
    def tokens_per_s(self) -> float:
        """After the first token, which the prompts are read for; with one alone, that one."""
        if self.tokens > 1 and self.seconds > self.first_token_s:
            return (self.tokens - 1) / (self.seconds - self.first_token_s)
        return self.tokens / self.seconds if self.seconds else 0.0

    def plus(self, later: "Figures") -> "Figures":
        """Both, one after the other."""
        return Figures(
            self.prompt_tokens + later.prompt_tokens,
            self.shared_tokens + later.shared_tokens,
            self.tokens + later.tokens,
            self.seconds + later.seconds,
            self.first_token_s or later.first_token_s,
            later.cache_bytes_per_token,
            self.drafted + later.drafted,
            self.accepted + later.accepted,
        )

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self) | {"tokens_per_s": self.tokens_per_s}

    def told(self) -> str:
        """In a line."""
        read = f"{self.prompt_tokens:,} tokens read"
        if self.shared_tokens:
            read += f", {self.shared_tokens:,} of them cached before"
        told = [read, f"{self.tokens:,} written, {self.tokens_per_s:,.1f} a second"]
        if self.cache_bytes_per_token is not None:
            told.append(f"{self.cache_bytes_per_token:,.0f} bytes cached of each")
        if self.drafted:
            told.append(f"{self.accepted:,} of {self.drafted:,} guesses accepted")
        return "; ".join(told)


class Meter:
    """What events that are watched took."""

    def __init__(self) -> None:
        self.figures = Figures()

    def watch(self, events: Generator[Event], cache: KVCache) -> Generator[Event]:
        """The events, as they come; `figures` are of these."""
        self.figures, began = Figures(), time.monotonic()
        try:
            for event in events:
                self._count(event, time.monotonic() - began, cache)
                yield event
        finally:  # also where nobody reads on
            events.close()

    def _count(self, event: Event, seconds: float, cache: KVCache) -> None:
        figures, answer = self.figures, event.answer
        figures.first_token_s = figures.first_token_s or seconds
        figures.seconds = seconds
        if not answer.finish:
            return
        figures.prompt_tokens += answer.prompt_tokens
        figures.shared_tokens += answer.shared_tokens
        figures.tokens += len(answer.ids)
        figures.drafted += answer.drafted
        figures.accepted += answer.accepted
        if tokens := sum(cache.lengths):
            figures.cache_bytes_per_token = sum(map(cache.bytes_held, range(cache.slots))) / tokens


class Writer(Meter):
    """Answers requests with one model, and keeps one cache for all of them."""

    def __init__(self, model: WritingModel, config: EngineConfig, draft: Model | None = None) -> None:
        super().__init__()
        self.model, self._config = model, config
        self._engine = model.engine(config, draft)

    def stream(self, requests: list[Request]) -> Generator[Event]:
        """Every token as it comes, of beam search whole answers; `figures` are of these requests."""
        return self.watch(self._events(requests), self._engine.cache)

    def _events(self, requests: list[Request]) -> Generator[Event]:
        if all(request.decoding.beams is None for request in requests):
            yield from self._engine.stream(requests)
            return
        for number, request in enumerate(requests):
            (answer,) = self.model.answers([request], self._config)
            yield Event(number, answer.text, answer)


def record(answers: list[Answer]) -> dict[str, Any]:
    """Answers to one prompt as one line has them: the one, or all of several as `samples`."""
    samples = [
        {"text": one.text, "finish": one.finish, "tokens": len(one.ids), "prompt_tokens": one.prompt_tokens}
        | {"ids": one.ids, "logprobs": one.logprobs, "entropies": one.entropies}
        for one in answers
    ]
    return samples[0] if len(samples) == 1 else {"samples": samples}
