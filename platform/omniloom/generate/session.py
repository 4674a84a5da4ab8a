"""A conversation whose cache outlives its process, and which may be longer than the model's context.

What was said is cached once and never read again. On disk a session is a folder: session.json, its text and how it is
decoded, and a safetensors file, its cache. Where the context is full, pinned facts, the heavy positions and the newest
stay, and everything else is forgotten (the text keeps all).
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from omniloom.errors import CheckpointError, ConfigError
from omniloom.generate.config import CacheConfig, DecodingConfig, EngineConfig
from omniloom.generate.model import WritingModel
from omniloom.generate.request import Event, Request
from omniloom.modality.sequence import Segment
from omniloom.modality.text import text_segment

FILE, FORMAT = "session.json", 1
BETWEEN = "\n\n"  # turns
SAMPLED_NUMBERS = 256  # of each tensor, that tell one model from another


@dataclass
class Turn:
    """What one side said, files named as they were."""

    role: str
    text: str


@dataclass
class Kept:
    """What session.json holds."""

    model: str  # fingerprint
    cache_file: str
    sha256: str  # of that file
    format: int = FORMAT
    turns: list[Turn] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)  # ids that were said and are not cached yet
    cache: CacheConfig = field(default_factory=CacheConfig)
    condensed: int = 0  # how often the context was full
    said: int = 0  # tokens in all


class Session:
    """One conversation with one model."""

    def __init__(self, model: WritingModel, cache: CacheConfig | None = None, prefill_tokens: int = 2_048) -> None:
        self.model, self.turns, self.condensed, self.said = model, list[Turn](), 0, 0
        self._pending: list[int] = []
        config = EngineConfig(batch_size=1, prefill_tokens=prefill_tokens, cache=cache or CacheConfig())
        self._engine = model.engine(config, observes=True)
        context = model.config.max_position_embeddings
        # Where nothing was asked for, a quarter of the context each.
        self._heavy = config.cache.heavy_tokens or max(1, context // 4)
        self._recent = config.cache.recent_tokens if config.cache.heavy_tokens else max(1, context // 4)

    @property
    def cached_tokens(self) -> int:
        """Where the next token stands in the context."""
        return self._engine.cache.lengths[0]

    @property
    def bytes_held(self) -> int:
        """Of the cache."""
        return self._engine.cache.bytes_held(0)

    def say(
        self, text: str, decoding: DecodingConfig, role: str = "user", reply: str = "assistant", pinned: bool = False
    ) -> Iterator[Event]:
        """Hand in a turn, text with files in it, and stream what comes back; `pinned` turns are never forgotten.

        Laid out as training lays conversations out: `user: …`, a blank line, `assistant:`. Raises ConfigError for a
        turn that the context has no room for.
        """
        header = f"{'' if self._is_new else BETWEEN}{role}: "
        segments = self.model.prompter.segments(f"{header}{text}\n\n{reply}:")
        yield from self._go_on(segments, decoding, pinned, [Turn(role, text)], reply)

    def tell(self, text: str, role: str = "system") -> None:
        """Hand in a turn that nobody answers, and never forget it."""
        header = f"{'' if self._is_new else BETWEEN}{role}: "
        self._read(self.model.prompter.segments(header + text), pinned=True)
        self.turns.append(Turn(role, text))

    @property
    def _is_new(self) -> bool:
        return not self.said

    def _go_on(
        self, segments: list[Segment], decoding: DecodingConfig, pinned: bool, turns: list[Turn], reply: str
    ) -> Iterator[Event]:
        stops = [*decoding.stop, f"\n\n{turns[0].role}:"]
        decoding = DecodingConfig(**{f.name: getattr(decoding, f.name) for f in fields(decoding)} | {"stop": stops})
        decoding.check()
        if decoding.beams is not None:
            raise ConfigError(f"beams={decoding.beams}: a conversation is drawn token by token")
        # Seeds go by what was said: a turn draws otherwise than the same one before it.
        decoding.seed += self.said
        prompt = self._prompt(segments)
        self._make_room(len(prompt), decoding.max_new_tokens)
        begins, event = self.cached_tokens, None
        self.turns += [*turns, Turn(reply, "")]
        try:
            for event in self._engine.stream([Request(prompt, decoding, goes_on=True)]):
                self.turns[-1].text = event.answer.text.removeprefix(" ")
                yield event
        finally:  # also where the answer is cut short
            written = [] if event is None else event.answer.ids
            cached = self.cached_tokens - begins - len(prompt)
            self._pending = written[max(0, cached) :]
            self.said += len(prompt) + len(written)
            if pinned:
                self._engine.cache.pin(0, begins, begins + len(prompt))

    def _prompt(self, segments: list[Segment]) -> Any:
        """What was said and not cached yet, then this."""
        ids = torch.tensor(self._pending, dtype=torch.int32).numpy()
        pending = [text_segment(ids, is_target=False)] if self._pending else []
        return self.model.prompter.woven([*pending, *segments], begins=self._is_new)

    def _read(self, segments: list[Segment], pinned: bool) -> None:
        prompt = self._prompt(segments)
        self._make_room(len(prompt), 1)
        begins = self.cached_tokens
        self._engine.read(prompt)
        self._pending = []
        self.said += len(prompt)
        if pinned:
            self._engine.cache.pin(0, begins, begins + len(prompt))

    def _make_room(self, tokens: int, answer_tokens: int) -> None:
        """Forget what is neither pinned nor heavy nor new, where the context would not hold turn and answer."""
        context = self.model.config.max_position_embeddings
        wanted = tokens + min(answer_tokens, context // 4)
        if self.cached_tokens + wanted <= context or not self.cached_tokens:
            return
        self._engine.cache.condense(0, self._heavy, self._recent)
        self.condensed += 1
        if self.cached_tokens + tokens >= context:
            raise ConfigError(
                f"a turn of {tokens:,} tokens is over what is left of the context, model.max_position_embeddings="
                f"{context:,}, beside {self.cached_tokens:,} tokens that are kept: cache.heavy_tokens and "
                "cache.recent_tokens say how many"
            )

    # On disk.

    def save(self, folder: Path) -> None:
        """Write the session, whole or not at all; what stood there before is replaced."""
        folder.mkdir(parents=True, exist_ok=True)
        others = set(folder.glob("cache-*.safetensors"))
        waiting = folder / "cache.partial"
        save_file({name: x.contiguous() for name, x in self._engine.cache.state(0).items()}, waiting)
        digest = _sha256(waiting)
        cache_file = folder / f"cache-{digest[:16]}.safetensors"
        os.replace(waiting, cache_file)
        kept = Kept(
            fingerprint(self.model), cache_file.name, digest, turns=self.turns, pending=self._pending,
            cache=self._engine.config.cache, condensed=self.condensed, said=self.said,
        )  # fmt: skip
        partial = folder / f"{FILE}.partial"
        partial.write_text(json.dumps(asdict(kept), indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(partial, folder / FILE)  # names the file that belongs to it: from here on it is the session
        for old in others - {cache_file}:
            old.unlink()

    @classmethod
    def open(cls, folder: Path, model: WritingModel, prefill_tokens: int = 2_048) -> "Session":
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
            state = load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"session {folder} is damaged: {error}") from error
        session = cls(model, kept.cache, prefill_tokens)
        session._engine.cache.restore(0, state)
        session.turns, session._pending = kept.turns, kept.pending
        session.condensed, session.said = kept.condensed, kept.said
        return session


def _read_kept(folder: Path) -> Kept:
    from pydantic import TypeAdapter, ValidationError

    if not (folder / FILE).is_file():
        raise CheckpointError(f"no session at {folder}: it has no {FILE}")
    try:
        kept = TypeAdapter(Kept).validate_json((folder / FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"session {folder} is damaged: {FILE} is none: {error}") from error
    if kept.format != FORMAT or Path(kept.cache_file).name != kept.cache_file:
        raise CheckpointError(f"session {folder} is of format {kept.format}, this version reads {FORMAT}")
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
