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
from omniloom.generate.config import CacheConfig, DecodingConfig, EngineConfig
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
        heavy = config.cache.heavy_tokens
        self._kept = (part, part) if heavy is None else (heavy, config.cache.recent_tokens)
        self._before: tuple[State, dict[str, Tensor]] | None = None  # the last exchange

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
        turn, is_new = Turn("user", parts), not self.cache.lengths[0]
        before = replace(self.state, turns=[*self.turns]), self.cache.state(0)
        prompt = self._prompt([*self._told(), turn] if is_new else [turn], continues=not is_new)
        self._make_room(len(prompt), decoding.max_new_tokens)
        begins = self.cache.lengths[0]
        answer: Answer | None = None
        try:
            for event in self._engine.stream([Request(prompt, decoding, goes_on=True)]):
                answer = event.answer
                yield event
        finally:
            if answer is None:
                self._restore(*before)
            else:
                self._before = before
                self._heard(turn, answer, begins + len(prompt))
                told = self._told_tokens() if is_new else 0
                self.cache.pin(0, begins, begins + (len(prompt) if keep else told))

    def _told(self) -> list[Turn]:
        return [] if self.system is None else [Turn("system", [self.system])]

    def _told_tokens(self) -> int:
        """Of bos and the system prompt."""
        return 1 + sum(map(len, self.model.prompter.encoded(opened(self._told()))))

    def _prompt(self, turns: list[Turn], continues: bool) -> Document:
        """What was written and is not cached yet, the turns, and the header that the assistant goes on from."""
        ids = np.asarray(self.state.pending, np.int32)
        pending = [text_segment(ids, is_target=False)] if len(ids) else []
        prompter = self.model.prompter
        laid = prompter.encoded(opened([*turns, Turn(ASSISTANT, [])], continues))
        return prompter.woven([*pending, *laid], begins=not continues)

    def _heard(self, turn: Turn, answer: Answer, begins: int) -> None:
        """Keep an exchange; what was written behind the answer's end is taken out of the cache again."""
        text = self.model.prompter.text
        ids = written_ids(text, answer)
        kept = text.encode(answer.text).tolist() if ids is None else ids
        cached = answer.ids[: self.cache.lengths[0] - begins]
        alike = [a == b for a, b in zip(kept, cached, strict=False)]
        common = alike.index(False) if False in alike else len(alike)
        self.cache.truncate(0, begins + common)
        turns = [*self.turns, turn, Turn(ASSISTANT, [answer.text.removeprefix(" ")], ids)]
        self.state = replace(self.state, turns=turns, pending=kept[common:], answers=self.state.answers + 1)

    def take_back(self) -> list[Part]:
        """Unsay the last exchange: what was asked. Another answer will be drawn anew."""
        if self._before is None:
            raise ConfigError("nothing was answered yet")
        parts, answers = self.turns[-2].parts, self.state.answers
        self._restore(*self._before)
        self.state, self._before = replace(self.state, answers=answers), None
        return parts

    def _restore(self, state: State, cached: dict[str, Tensor]) -> None:
        self.cache.clear(0)
        self.state = state
        self.cache.restore(0, cached)

    def begin_again(self, system: str | None, turns: Iterable[Turn] = ()) -> None:
        """Tell the model something else first of all; these turns are read again behind it."""
        self.cache.clear(0)
        self.system, self._before, said = system, None, list(turns)
        self.state = replace(self.state, turns=said, pending=[])
        if said:
            read = [replace(turn, parts=[self._read(part) for part in turn.parts]) for turn in said]
            self._engine.read(self.model.prompter.woven(self.model.prompter.encoded(opened([*self._told(), *read]))))
            self.cache.pin(0, 0, self._told_tokens())

    def _read(self, part: Part) -> Part:
        """A file that was only named up to now."""
        is_unread = isinstance(part, Medium) and not part.segments
        return self.model.prompter.medium(part.kind, part.name) if is_unread else part  # type: ignore[union-attr]

    def _make_room(self, tokens: int, answer_tokens: int) -> None:
        """Where the context would not hold turn and answer: forget what is neither pinned nor heavy nor new, or where
        keys cannot be moved, the oldest exchanges."""
        context = self.model.prompter.context
        wanted = tokens + min(answer_tokens, context // ROOM_SHARE)
        if self.cache.lengths[0] and self.cache.lengths[0] + wanted > context:
            if self.model.config.position == "rope":
                self.cache.condense(0, *self._kept)
            else:
                self._forget_oldest(context - wanted)
            self.state = replace(self.state, condensed=self.state.condensed + 1)
        if (cached := self.cache.lengths[0]) + tokens >= context:
            raise ConfigError(
                f"a turn of {tokens:,} tokens leaves no room in the model's context, model.max_position_embeddings="
                f"{context:,}, beside the {cached:,} that are kept"
            )

    def _forget_oldest(self, tokens: int) -> None:
        turns = self.turns
        while self.cache.lengths[0] > tokens and turns:
            turns = turns[2:]
            self.begin_again(self.system, turns)

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
            self._engine.config.cache,
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
        turns = [Turn.of(message, ids) for message, ids in zip(kept.messages, kept.ids, strict=True)]
        session._restore(State(turns, kept.pending, kept.answers, kept.condensed), cached)
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


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
