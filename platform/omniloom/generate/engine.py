"""Many requests take turns: prompts chunk by chunk, answers token by token, a free place is taken at once.

B sequences, V vocabulary.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from omniloom.errors import ConfigError
from omniloom.generate.config import EngineConfig
from omniloom.generate.forward import Piece, chunk_end, forward, glued, read
from omniloom.generate.kv_cache import KVCache
from omniloom.generate.request import Answer, Event, Request, Stopper, contents, refuse_no_room
from omniloom.generate.sampling import distributions, draw, log_shares, uniform
from omniloom.generate.speculative import Asked, Drafter, accept
from omniloom.modality.sequence import TEXT, Document
from omniloom.modality.text import TextTokenizer
from omniloom.model.decoder import Decoder

LEAST_SHARED = 16  # tokens of a prefix that are worth a copy


@dataclass
class Running:
    """A request that holds a slot."""

    number: int
    request: Request
    slot: int
    contents: np.ndarray
    glued: np.ndarray
    answer: Answer
    stopper: Stopper
    begins: int = 0  # tokens of the conversation before it
    read: int = 0  # tokens of the prompt that are cached
    waits_for: "Running | None" = None  # until that one has read the prefix that both share
    waits_until: int = 0
    drafts: list[int] = field(default_factory=list)
    occurred: Tensor | None = None  # bool (V,), where a penalty wants to know

    @property
    def is_reading(self) -> bool:
        return self.read < len(self.request.prompt)


class Engine:
    """Decodes requests with one model; holds `batch_size` of them at once.

    Each gets what it would get alone: nothing that is drawn for it depends on the others (but what a selective cache
    lets go, which hangs on how prompts were cut into chunks). A prompt that begins as another does that is being read,
    or was, takes that one's cache over.
    """

    def __init__(
        self, decoder: Decoder, text: TextTokenizer, config: EngineConfig | None = None, observes: bool = False
    ) -> None:
        self.config = config or EngineConfig()
        self.config.check()
        self.decoder, self.text = decoder, text
        self.draft: Drafter | None = None
        self.cache = KVCache(decoder, self.config.cache, self.config.batch_size, observes)
        self._running: dict[int, Running] = {}  # by slot
        self._left: dict[int, np.ndarray] = {}  # contents of free slots, of prompts that were read whole

    def generate(self, requests: Iterable[Request]) -> list[Answer]:
        """The answers, in the requests' order."""
        answers: dict[int, Answer] = {}
        for event in self.stream(requests):
            answers[event.number] = event.answer
        return [answers[number] for number in sorted(answers)]

    def stream(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Every token as it comes, of all requests; raises ConfigError for one that the context has no room for."""
        waiting = deque(enumerate(requests))
        for _, request in waiting:
            self._check(request)
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self.config.batch_size:
                    self._admit(*waiting.popleft())
                yield from self._step()
        finally:  # also where nobody reads on
            for slot in list(self._running):
                self._release(slot, keep=False)

    def read(self, document: Document) -> Tensor:
        """Put a document behind what the first slot holds: what comes next, (V,)."""
        return read(self.decoder, self.cache, 0, document, self.config.prefill_tokens)

    def _check(self, request: Request) -> None:
        request.decoding.check()
        if self.draft is not None:
            self.draft.check(request.prompt)
        before = self.cache.lengths[0] if request.goes_on else 0
        refuse_no_room(request.prompt, self.decoder.config.max_position_embeddings, before)
        if request.decoding.beams is not None:
            raise ConfigError(f"beams={request.decoding.beams}: beam search is one request's: beam.search")

    def _admit(self, number: int, request: Request) -> None:
        free = [slot for slot in range(self.config.batch_size) if slot not in self._running]
        slot = 0 if request.goes_on else min(free, key=lambda slot: slot in self._left)  # what may be wanted goes last
        # With guesses nothing is shared: a drafter would have to take over what it read, too.
        shares = self.draft is None and not request.goes_on
        one = Running(
            number,
            request,
            slot,
            contents(request.prompt) if shares else np.zeros(0, np.int64),
            glued(request.prompt, self.decoder.config),
            Answer(prompt_tokens=len(request.prompt)),
            Stopper(request.decoding.stop, self.text.decoding()),
            self.cache.lengths[slot] if request.goes_on else 0,
        )
        if request.decoding.repetition_penalty != 1.0:
            one.occurred = self._occurred(request.prompt)
        if shares:
            self._share_prefix(one)
        elif not request.goes_on:
            self.cache.clear(slot)
        self._running[slot] = one

    def _step(self) -> Iterator[Event]:
        """One forward pass, and what it completes."""
        self._take_over()
        pieces, taking = self._pieces()
        passed = forward(self.decoder, self.cache, pieces)
        if self.draft is not None:
            self.draft.follow(pieces, passed)
        choosing: list[tuple[Running, Tensor]] = []
        for piece, one, logits in zip(pieces, taking, passed.logits, strict=True):
            if one.is_reading:
                one.read += len(piece.tokens)
                if one.is_reading:
                    self.cache.settle(one.slot)
                    continue
            choosing.append((one, logits))
        yield from self._choose(choosing)

    def _pieces(self) -> tuple[list[Piece], list[Running]]:
        """What the next pass takes: a token of each answer, and of prompts as much as there is room for."""
        room, pieces, taking = self.config.prefill_tokens, [], []
        for slot in sorted(self._running):
            one = self._running[slot]
            if not one.is_reading:
                tokens = [one.answer.ids[-1], *one.drafts]
                pieces.append(Piece(slot, tokens, predicts=len(tokens)))
            elif one.waits_for is None and room > 0:
                end = chunk_end(one.glued, one.read, room)
                room -= end - one.read
                pieces.append(Piece(slot, one.request.prompt.window(one.read, end), is_prompt=True))
            else:
                continue
            taking.append(one)
        return pieces, taking

    def _choose(self, choosing: list[tuple[Running, Tensor]]) -> Iterator[Event]:
        """The next token of each, and with guesses those after it that were guessed right."""
        if not choosing:
            return
        plain = [(one, logits_TV) for one, logits_TV in choosing if not one.drafts]
        chosen = {one.slot: [id] for (one, _), id in zip(plain, self._draw(plain), strict=True)}
        for one, logits_TV in choosing:
            if one.drafts:
                chosen[one.slot] = self._judge(one, logits_TV)
        log_NV, entropy_N = log_shares(torch.cat([logits_TV for _, logits_TV in choosing]))
        taken = [id for one, logits in choosing for id in _filled(chosen[one.slot], len(logits))]
        logprobs = log_NV.gather(-1, torch.tensor(taken, device=log_NV.device)[:, None])[:, 0].tolist()
        entropies, at = entropy_N.tolist(), 0
        for one, logits_TV in choosing:
            self.cache.settle(one.slot)
            for step, id in enumerate(chosen[one.slot], start=at):
                text = self._append(one, id, logprobs[step], entropies[step])
                yield Event(one.number, text, one.answer)
                if one.answer.finish:
                    self._release(one.slot, keep=True)
                    break
            at += len(logits_TV)
        if self.draft is not None:
            self._guess([one for one, _ in choosing if self._running.get(one.slot) is one], self.draft)

    def _draw(self, plain: list[tuple[Running, Tensor]]) -> list[int]:
        if not plain:
            return []
        decodings = [one.request.decoding for one, _ in plain]
        occurred = [one.occurred for one, _ in plain]
        share_BV = distributions(torch.cat([logits_1V for _, logits_1V in plain]), decodings, occurred)
        return draw(share_BV, [uniform(one.request.decoding.seed, len(one.answer.ids)) for one, _ in plain])

    def _judge(self, one: Running, logits_TV: Tensor) -> list[int]:
        """Guesses that were right and one token more; what the cache has of wrong ones is taken back."""
        assert self.draft is not None
        first, drafts = len(one.answer.ids), one.drafts
        guessed = self.draft.shares(one.slot)
        chosen = accept(logits_TV, drafts, guessed, one.request.decoding, one.occurred, first)
        one.answer.drafted += len(drafts)
        one.answer.accepted += len(chosen) - 1
        if len(chosen) <= len(drafts):
            self.cache.truncate(one.slot, self.cache.lengths[one.slot] - len(drafts) + len(chosen) - 1)
        one.drafts = []
        return chosen

    def _guess(self, going: list[Running], draft: Drafter) -> None:
        """Have the next tokens guessed, as many as may still come."""
        last = self.decoder.config.max_position_embeddings - 1 - self.config.draft_tokens
        going = [one for one in going if self.cache.lengths[one.slot] <= last]  # guesses are embedded at their places
        asked = [Asked(one.slot, one.answer.ids, one.occurred, one.request.decoding) for one in going]
        for one, guessed in zip(going, draft.propose(asked), strict=True):
            one.drafts = guessed[: one.request.decoding.max_new_tokens - len(one.answer.ids) - 1]

    def _append(self, one: Running, id: int, logprob: float, entropy: float) -> str:
        """Put a token behind the answer and say how it ends, if it does; the text it completes."""
        answer, decoding = one.answer, one.request.decoding
        answer.ids.append(id)
        if one.occurred is not None:
            one.occurred[id] = True
        answer.logprobs.append(logprob)
        answer.entropies.append(entropy)
        if id == self.text.eos_id and not decoding.ignore_eos:
            answer.finish = "eos"
            text = one.stopper.rest()
        else:
            text = one.stopper.take(id)
            whole = one.begins + len(one.request.prompt) + len(answer.ids)
            if one.stopper.stopped:
                answer.finish = "stop"
            elif len(answer.ids) == decoding.max_new_tokens or whole == self.decoder.config.max_position_embeddings:
                answer.finish = "length"
                text += one.stopper.rest()
        answer.text += text
        return text

    def _occurred(self, prompt: Document) -> Tensor:
        """Which ids a prompt's text has, bool (V,)."""
        occurred_V = torch.zeros(self.decoder.config.vocab_size, dtype=torch.bool)
        occurred_V[torch.from_numpy(prompt.input_ids[prompt.modality == TEXT]).long()] = True
        return occurred_V.to(self.decoder.embed_tokens.weight.device)

    # Prefixes.

    def _share_prefix(self, one: Running) -> None:
        """Take over what a free slot still has of this prompt, or wait for who reads the same."""
        best, shared, left_from = None, LEAST_SHARED - 1, None
        for slot, of in self._left.items():
            if (common := self._common(one, of)) > shared:
                best, shared, left_from = None, common, slot
        for other in self._running.values():
            if (common := self._common(one, other.contents)) > shared:
                best, shared, left_from = other, common, None
        if best is not None:
            one.waits_for, one.waits_until = best, shared
        elif left_from is not None and self._may_cut(left_from, shared):
            self._copy(left_from, one, shared)
            return
        self._left.pop(one.slot, None)
        self.cache.clear(one.slot)

    def _take_over(self) -> None:
        """Give prefixes that were waited for."""
        for one in self._running.values():
            other = one.waits_for
            if other is None:
                continue
            if self._running.get(other.slot) is not other or (
                other.read >= one.waits_until and not self._may_cut(other.slot, one.waits_until)
            ):
                one.waits_for = None  # gone, or let go of some: read it oneself
            elif other.read >= one.waits_until:
                one.waits_for = None
                self._copy(other.slot, one, one.waits_until)

    def _may_cut(self, slot: int, tokens: int) -> bool:
        """Whether a slot has all that its first `tokens` left, as if nothing had come after them."""
        cache = self.cache
        return cache.is_whole(slot) or (cache.lengths[slot] == tokens and self.config.cache.heavy_tokens is None)

    def _copy(self, source: int, one: Running, tokens: int) -> None:
        self._left.pop(one.slot, None)
        if source != one.slot:
            self.cache.clear(one.slot)
            self.cache.copy(source, one.slot)
        ids = one.request.prompt.input_ids[max(0, tokens - self._reach) : tokens]
        table = self.decoder.embed_tokens
        with torch.no_grad():
            self.cache.truncate(one.slot, tokens, table(torch.from_numpy(ids).long().to(table.weight.device)))
        one.read = one.answer.shared_tokens = tokens

    @property
    def _reach(self) -> int:
        return (self.decoder.config.embedding_conv_tokens or 1) - 1

    def _common(self, one: Running, of: np.ndarray) -> int:
        """Tokens that both begin with: less than the whole prompt, and cut where it may be cut and embeddings before
        are text's."""
        most = min(len(one.contents) - 1, len(of))
        differ = np.flatnonzero(one.contents[:most] != of[:most])
        common = int(differ[0]) if len(differ) else most
        modality = one.request.prompt.modality
        while common and (one.glued[common] or modality[max(0, common - self._reach) : common].any()):
            common -= 1
        return common

    def _release(self, slot: int, keep: bool) -> None:
        one = self._running.pop(slot)
        if one.request.goes_on:
            return
        if keep and not one.is_reading and self.config.cache.heavy_tokens is None and self.draft is None:
            cached = self.cache.lengths[slot]
            self._left[slot] = np.concatenate([one.contents, np.asarray(one.answer.ids, np.int64)])[:cached]
        else:
            self.cache.clear(slot)
        if self.draft is not None:
            self.draft.clear(slot)


def _filled(ids: list[int], length: int) -> list[int]:
    """Ids, and any one for what is not chosen."""
    return [*ids, *[0] * (length - len(ids))]
