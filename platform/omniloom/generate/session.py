"""A conversation: what was said is cached once, outlives its process, and may be longer than the model's context.

On disk a session is a folder: session.json, its turns, and a safetensors file, its cache. Where the context is full,
what is pinned (the system prompt, facts told to be kept), the heavy positions and the newest stay cached, and all else
is forgotten; the turns keep everything.
"""

import hashlib
import json
import os
from collections.abc import Generator, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from omniloom.errors import CheckpointError, ConfigError
from omniloom.generate.chat import Part, Turn, opened, written_ids
from omniloom.generate.config import MOST_TAKEN_BACK, CacheConfig, DecodingConfig, EngineConfig
from omniloom.generate.kv_cache import KVCache
from omniloom.generate.model import WritingModel
from omniloom.generate.prompt import Medium
from omniloom.generate.request import Answer, Event, Request
from omniloom.modality.dialogue import ASSISTANT, STOPS
from omniloom.modality.sequence import Document
from omniloom.modality.text import text_segment

FILE, FORMAT = "session.json", 1
SAMPLED_NUMBERS = 256  # of each tensor, that tell one model from another
ROOM_SHARE = 4  # of the context at most a fourth is made free for an answer, and as much stays of each kind


@dataclass
class State:
    """Where a conversation stands, beside its cache."""

    turns: list[Turn] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)  # ids that were written and are not cached yet
    answers: int = 0  # number i draws with seed + i
    condensed: int = 0  # how often the context was full


@dataclass
class Snapshot:
    """Where a conversation can go back to."""

    state: State
    length: int  # tokens cached
    tail: Tensor | None
    pins: list[tuple[int, int]]
    cached: dict[str, Tensor] | None  # all of the cache; None where cutting it back to `length` will do


@dataclass
class Kept:
    """What session.json holds."""

    model: str  # fingerprint
    cache_file: str
    sha256: str  # of that file
    messages: list[dict[str, Any]]
    ids: list[list[int] | None]  # of each message, as it was written
    system: str | None
    pending: list[int]
    answers: int
    condensed: int
    cache: CacheConfig
    dtype: str  # of the weights
    format: int = FORMAT


class Session:
    """One conversation with one model."""

    def __init__(
        self,
        model: WritingModel,
        cache: CacheConfig | None = None,
        system: str | None = None,
        prefill_tokens: int = EngineConfig.prefill_tokens,
    ) -> None:
        self.model, self.system, self.state = model, system, State()
        config = EngineConfig(batch_size=1, prefill_tokens=prefill_tokens, cache=cache or CacheConfig())
        self._engine = model.engine(config, observes=True)
        part = max(1, model.prompter.context // ROOM_SHARE)
        heavy, recent = config.cache.heavy_tokens, config.cache.recent_tokens
        self._kept = (part, part) if heavy is None else (min(heavy, part), min(recent, part))
        self._before: tuple[Snapshot, bool] | None = None  # the last exchange, and whether to keep it

    @property
    def cache(self) -> KVCache:
        """What is cached, in its one slot."""
        return self._engine.cache

    @property
    def turns(self) -> list[Turn]:
        """What was said, in order; but for the system prompt."""
        return self.state.turns

    def messages(self) -> list[dict[str, Any]]:
        """All of it as Hugging Face's messages have it."""
        return [turn.message() for turn in [*self._told(), *self.turns]]

    def ask(self, parts: list[Part], decoding: DecodingConfig, keep: bool = False) -> Generator[Event]:
        """Hand in a turn, text and files, and stream the answer; a turn to `keep` is never forgotten.

        An answer that is left before its end stays as far as it came; where none came, nothing was said. Raises
        ConfigError for a turn that the context has no room for.
        """
        if decoding.beams is not None:
            raise ConfigError(f"beams={decoding.beams}: a conversation is drawn token by token")
        stops = [*decoding.stop, *(stop for stop in STOPS if stop not in decoding.stop)]
        decoding = replace(decoding, stop=stops, seed=decoding.seed + self.state.answers)
        decoding.check()
        turn, before = Turn("user", parts), self._snapshot()
        answer: Answer | None = None
        try:
            prompt = self._make_room(turn, decoding.max_new_tokens, before)
            begins = self.cache.lengths[0]
            kept = len(prompt) if keep else 0 if begins else self._told_tokens()
            self.cache.pin(0, begins, begins + kept)
            for event in self._engine.stream([Request(prompt, decoding, goes_on=True)]):
                answer = event.answer
                yield event
        finally:
            if answer is None:
                self._restore(before)
            else:
                self._before = before, keep
                self._heard(turn, answer, begins, prompt, kept)

    def _told(self) -> list[Turn]:
        return [] if self.system is None else [Turn("system", [self.system])]

    def _told_tokens(self) -> int:
        """Of bos and the system prompt."""
        return 1 + sum(map(len, self.model.prompter.encoded(opened(self._told()))))

    def _next(self, turn: Turn) -> Document:
        """What was written and is not cached yet, the turn, and the header that the assistant goes on from."""
        prompter, is_new = self.model.prompter, not self.cache.lengths[0]
        ids = np.asarray(self.state.pending, np.int32)
        pending = [text_segment(ids, is_target=False)] if len(ids) else []
        turns = [*self._told(), turn] if is_new else [turn]
        laid = prompter.encoded(opened([*turns, Turn(ASSISTANT, [])], continues=not is_new))
        return prompter.woven([*pending, *laid], begins=is_new)

    def _heard(self, turn: Turn, answer: Answer, begins: int, prompt: Document, pinned: int) -> None:
        """Keep an exchange; what was written behind the answer's end is taken out of the cache again."""
        text, base = self.model.prompter.text, begins + len(prompt)
        ids = written_ids(text, answer)
        said = answer.text.removeprefix(" ")
        kept = text.encode(f" {said}").tolist() if ids is None else ids  # as the template has it
        cached = answer.ids[: self.cache.lengths[0] - base]
        alike = [a == b for a, b in zip(kept, cached, strict=False)]
        common = alike.index(False) if False in alike else len(alike)
        if len(cached) - common > MOST_TAKEN_BACK and self._before is not None:
            self._restore(self._before[0])  # too far to go back: the prompt is read again
            self.cache.pin(0, begins, begins + pinned)
            self._engine.read(prompt)
            common = 0
        self.cache.truncate(0, base + common)
        # Of files the names stay: what was read of them is cached.
        parts = [replace(part, segments=[]) if isinstance(part, Medium) else part for part in turn.parts]
        turns = [*self.turns, Turn(turn.role, parts), Turn(ASSISTANT, [said], ids)]
        self.state = replace(self.state, turns=turns, pending=kept[common:], answers=self.state.answers + 1)

    def take_back(self) -> tuple[list[Part], bool]:
        """Unsay the last exchange: what was asked, and whether to keep it. Another answer will be drawn anew."""
        if self._before is None:
            raise ConfigError("nothing was answered here yet")
        parts, answers = [self._read(part) for part in self.turns[-2].parts], self.state.answers
        before, keep = self._before
        self._restore(before)
        self.state, self._before = replace(self.state, answers=answers), None
        return parts, keep

    def _snapshot(self) -> Snapshot:
        """What `_restore` needs: of a cache that only grows, how far it came, else all of it."""
        grows = self.model.config.attention_pattern == "full" and self.cache.config.heavy_tokens is None
        cached = None if grows else self.cache.state(0)
        state, pins = replace(self.state, turns=[*self.turns]), [*self.cache.layers[0].pins[0]]
        return Snapshot(state, self.cache.lengths[0], self.cache.tails[0], pins, cached)

    def _restore(self, snapshot: Snapshot) -> None:
        self.state = snapshot.state
        if snapshot.cached is None:
            self.cache.truncate(0, snapshot.length)
            self.cache.tails[0] = snapshot.tail
        else:
            self.cache.clear(0)
            self.cache.restore(0, snapshot.cached)
        for layer in self.cache.layers:
            layer.pins[0] = [*snapshot.pins]

    def begin_again(self, system: str | None, turns: Iterable[Turn] = ()) -> None:
        """Tell the model something else first of all; these turns are read again behind it, but for the oldest where
        the context has no room for all."""
        prompter, told = self.model.prompter, [] if system is None else [Turn("system", [system])]
        read = [replace(turn, parts=[self._read(part) for part in turn.parts]) for turn in turns]
        room, document = prompter.context - prompter.context // ROOM_SHARE, None
        while read:
            document = prompter.woven(prompter.encoded(opened([*told, *read])))
            if len(document) <= room:
                break
            read, document = read[2:], None
        # Nothing can go wrong from here on.
        self.cache.clear(0)
        self.system, self._before = system, None
        self.state = replace(self.state, turns=read, pending=[])
        if document is not None:
            self.cache.pin(0, 0, self._told_tokens())
            self._engine.read(document)

    def _read(self, part: Part) -> Part:
        """A file that is only named."""
        if isinstance(part, Medium) and not part.segments:
            return self.model.prompter.medium(part.kind, part.name)
        return part

    def _make_room(self, turn: Turn, answer_tokens: int, before: Snapshot) -> Document:
        """The turn as it comes next. Where the context would not hold it and an answer, forget what is neither pinned
        nor heavy nor new, or where keys cannot be moved, the oldest exchanges."""
        context, prompt = self.model.prompter.context, self._next(turn)
        wanted = len(prompt) + min(answer_tokens, context // ROOM_SHARE)
        if self.cache.lengths[0] and self.cache.lengths[0] + wanted > context:
            before.cached = before.cached or self.cache.state(0)
            if self.model.config.position == "rope":
                self.cache.condense(0, *self._kept)
            else:
                self.begin_again(self.system, self.turns[2:])
                prompt = self._next(turn)  # nothing is pending any more, and all may be gone
            self.state = replace(self.state, condensed=self.state.condensed + 1)
        tokens, cached = len(prompt), self.cache.lengths[0]
        if cached + tokens >= context:
            raise ConfigError(
                f"a turn of {tokens:,} tokens leaves no room in the model's context, model.max_position_embeddings="
                f"{context:,}, beside the {cached:,} that are kept"
            )
        return prompt

    # On disk.

    def save(self, folder: Path) -> None:
        """Write the session, whole or not at all; what stood there before is replaced."""
        folder.mkdir(parents=True, exist_ok=True)
        others = set(folder.glob("cache-*.safetensors"))
        waiting = folder / "cache.partial"
        save_file({name: x.contiguous() for name, x in self.cache.state(0).items()}, waiting)
        digest = _sha256(waiting)
        cache_file = folder / f"cache-{digest[:16]}.safetensors"
        os.replace(waiting, cache_file)
        state = self.state
        kept = Kept(
            fingerprint(self.model), cache_file.name, digest, [turn.message() for turn in state.turns],
            [turn.ids for turn in state.turns], self.system, state.pending, state.answers, state.condensed,
            self._engine.config.cache, _dtype(self.model),
        )  # fmt: skip
        partial = folder / f"{FILE}.partial"
        partial.write_text(json.dumps(asdict(kept), indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(partial, folder / FILE)  # names the file that belongs to it: from here on it is the session
        for old in others - {cache_file}:
            old.unlink()

    @classmethod
    def open(cls, folder: Path, model: WritingModel, prefill_tokens: int = EngineConfig.prefill_tokens) -> "Session":
        """Take a session up again; raises CheckpointError for none, a damaged one, one of another model."""
        kept = _read_kept(folder)
        if (dtype := _dtype(model)) != kept.dtype:
            raise CheckpointError(
                f"session {folder} was saved with weights in {kept.dtype}, these are {dtype}: set precision= as it was"
            )
        if kept.model != fingerprint(model):
            raise CheckpointError(
                f"session {folder} was saved by another model than {model.folder}: its cache means nothing to this "
                "one; name that model as init=, or another session"
            )
        file = folder / kept.cache_file
        try:
            if _sha256(file) != kept.sha256:
                raise CheckpointError(f"session {folder} is damaged: {file.name} is not what {FILE} says it is")
            cached = load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"session {folder} is damaged: {error}") from error
        session = cls(model, kept.cache, kept.system, prefill_tokens)
        try:
            turns = [Turn.of(message, ids) for message, ids in zip(kept.messages, kept.ids, strict=True)]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"session {folder} is damaged: a message in {FILE} lacks {error}") from error
        session.state = State(turns, kept.pending, kept.answers, kept.condensed)
        session.cache.restore(0, cached)
        return session


def _read_kept(folder: Path) -> Kept:
    if not (folder / FILE).is_file():
        raise CheckpointError(f"no session at {folder}: it has no {FILE}")
    try:
        kept = TypeAdapter(Kept).validate_json((folder / FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"session {folder} is damaged: {FILE} is none: {error}") from error
    if kept.format != FORMAT or Path(kept.cache_file).name != kept.cache_file or len(kept.messages) != len(kept.ids):
        raise CheckpointError(f"session {folder} is damaged, or not of format {FORMAT}: {FILE} says {kept.format}")
    return kept


def fingerprint(model: WritingModel) -> str:
    """Tells one model from another: of its sizes, its vocabulary and some numbers of every tensor."""
    digest = hashlib.sha256(json.dumps(asdict(model.config), sort_keys=True).encode())
    digest.update((model.folder / "tokenizer.json").read_bytes())
    for name, tensor in sorted(model.decoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.flatten()[:SAMPLED_NUMBERS].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _dtype(model: WritingModel) -> str:
    return str(model.decoder.embed_tokens.weight.dtype).removeprefix("torch.")


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
