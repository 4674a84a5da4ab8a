"""Speculative decoding: several tokens are guessed ahead, one pass of the model judges them all.

What comes out is distributed as without it (Leviathan et al. 2023, section 2.3), and is the same where decoding is
greedy. Guesses come from the model's own prediction modules (DeepSeek-V3, section 2.2) or from a smaller model.

V vocabulary, D model width.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from omniloom.errors import ConfigError
from omniloom.generate.config import CacheConfig, SamplingConfig
from omniloom.generate.forward import Passed, Piece, forward
from omniloom.generate.kv_cache import KVCache, groups_of
from omniloom.generate.sampling import distributions, draw, uniform
from omniloom.modality.sequence import Document
from omniloom.model.decoder import Decoder
from omniloom.model.position import find_places

JUDGED, GUESSED = 1, 2  # uses of `uniform` beside the draw itself


class Asked(NamedTuple):
    """Who wants guesses: a slot, its answer's ids, of which the last is not cached yet, and how it draws."""

    slot: int
    ids: list[int]
    occurred: Tensor | None
    decoding: SamplingConfig


class Drafter(Protocol):
    """Who guesses."""

    def check(self, prompt: Document) -> None:
        """Raise ConfigError for a prompt that it cannot read."""

    def follow(self, pieces: list[Piece], passed: Passed) -> None:
        """Take note of what the model was given and made of it."""

    def propose(self, asked: list[Asked]) -> list[list[int]]:
        """The next tokens of each."""

    def shares(self, slot: int) -> list[Tensor]:
        """The distributions (V,) that a slot's guesses were drawn from."""

    def clear(self, slot: int) -> None:
        """Forget a slot's sequence."""


def accept(
    logits_TV: Tensor,
    drafts: list[int],
    guessed: list[Tensor],
    config: SamplingConfig,
    occurred: Tensor | None,
    first: int,
) -> list[int]:
    """The tokens that come of guesses: those accepted, and one more.

    A guess d from q is accepted with probability min(1, p(d) / q(d)); the first that is not is drawn anew from
    max(0, p − q), normalised; after the last comes a draw from p. `logits_TV` are those after the token before and
    after each guess, `first` the index of the first guess in the answer.
    """
    before = [_with(occurred, drafts[:step]) for step in range(len(logits_TV))]
    share_TV = distributions(logits_TV, [config] * len(logits_TV), before)
    for step, (guess, guessed_V, share_V) in enumerate(zip(drafts, guessed, share_TV, strict=False)):
        if uniform(config.seed, first + step, JUDGED) * float(guessed_V[guess]) >= float(share_V[guess]):
            rest_V = (share_V - guessed_V).clamp(min=0)
            # Rounding can leave nothing where p and q are one.
            anew_V = rest_V if rest_V.any() else share_V
            return [*drafts[:step], *draw(anew_V[None], [uniform(config.seed, first + step)])]
    return [*drafts, *draw(share_TV[-1:], [uniform(config.seed, first + len(drafts))])]


def _with(occurred_V: Tensor | None, ids: list[int]) -> Tensor | None:
    """What occurred, and these."""
    if occurred_V is None or not ids:
        return occurred_V
    return occurred_V.index_fill(0, torch.tensor(ids, device=occurred_V.device), True)


class _Guesses:
    """Guesses under way, of several slots."""

    def __init__(self, asked: list[Asked]) -> None:
        self.asked = asked
        self.ids: list[list[int]] = [[] for _ in asked]
        self.shares: list[list[Tensor]] = [[] for _ in asked]

    def add(self, logits_BV: Tensor) -> None:
        """Draw one more of each."""
        occurred = [_with(one.occurred, ids) for one, ids in zip(self.asked, self.ids, strict=True)]
        share_BV = distributions(logits_BV, [one.decoding for one in self.asked], occurred)
        numbers = [
            uniform(one.decoding.seed, len(one.ids) + len(ids), GUESSED)
            for one, ids in zip(self.asked, self.ids, strict=True)
        ]
        for id, share_V, ids, shares in zip(draw(share_BV, numbers), share_BV, self.ids, self.shares, strict=True):
            ids.append(id)
            shares.append(share_V)


class ModelDrafter:
    """A smaller model guesses `tokens` ahead; its vocabulary is the model's."""

    def __init__(self, decoder: Decoder, of: Decoder, tokens: int, slots: int) -> None:
        if decoder.config.vocab_size != of.config.vocab_size:
            raise ConfigError(
                f"the draft model's vocabulary has {decoder.config.vocab_size} tokens, the model's "
                f"{of.config.vocab_size}: one tokenizer must serve both"
            )
        if decoder.config.max_position_embeddings < of.config.max_position_embeddings:
            raise ConfigError(
                f"the draft model's context of {decoder.config.max_position_embeddings:,} tokens is under the model's "
                f"{of.config.max_position_embeddings:,}"
            )
        self.decoder, self.tokens = decoder, tokens
        self._reads_media = decoder.config.widths == of.config.widths
        self.cache = KVCache(decoder, CacheConfig(), slots)
        self._prompts = [0] * slots  # tokens
        self._shares: dict[int, list[Tensor]] = {}

    def check(self, prompt: Document) -> None:
        """Raise ConfigError for a prompt with media that the model alone can read."""
        if prompt.modality.any() and not self._reads_media:
            raise ConfigError(
                "the draft model does not read pictures, sound and video as the model does, and this prompt has some: "
                "leave out draft, or give it text alone"
            )

    def follow(self, pieces: list[Piece], passed: Passed) -> None:
        """Read what is of a prompt; answers are read when guesses are wanted."""
        read = [piece for piece in pieces if piece.is_prompt]
        if read:
            forward(self.decoder, self.cache, read)
        for piece in read:
            self.cache.settle(piece.slot)
            self._prompts[piece.slot] += len(piece.tokens)

    @torch.no_grad()
    def propose(self, asked: list[Asked]) -> list[list[int]]:
        """`tokens` for each."""
        guesses, pieces = _Guesses(asked), []
        for one in asked:
            # Of its own guesses the last was not read, and those after a wrong one are none of the answer.
            agreed = min(self.cache.lengths[one.slot], self._prompts[one.slot] + len(one.ids) - 1)
            self.cache.truncate(one.slot, agreed)
            self.cache.settle(one.slot)
            pieces.append(Piece(one.slot, one.ids[agreed - self._prompts[one.slot] :]))
        for step in range(self.tokens if asked else 0):
            if step:
                pieces = [Piece(one.slot, ids[-1:]) for one, ids in zip(asked, guesses.ids, strict=True)]
            guesses.add(torch.cat(forward(self.decoder, self.cache, pieces).logits))
        self._shares |= {one.slot: shares for one, shares in zip(asked, guesses.shares, strict=True)}
        return guesses.ids

    def shares(self, slot: int) -> list[Tensor]:
        """What a slot's guesses were drawn from."""
        return self._shares[slot]

    def clear(self, slot: int) -> None:
        """Forget a slot's sequence."""
        self.cache.clear(slot)
        self._prompts[slot] = 0


class _Rows:
    """Rows (n, D) of a sequence's tokens `start` … `end` − 1."""

    def __init__(self) -> None:
        self.start, self.rows = 0, torch.zeros(0, 0)

    @property
    def end(self) -> int:
        return self.start + len(self.rows)

    def append(self, rows: Tensor) -> None:
        self.rows = torch.cat([self.rows, rows]) if len(self.rows) else rows

    def part(self, start: int, end: int) -> Tensor:
        return self.rows[start - self.start : end - self.start]

    def keep(self, start: int, end: int) -> None:
        """Forget what lies outside."""
        end = max(self.start, min(end, self.end))
        start = min(max(start, self.start), end)
        self.rows, self.start = self.part(start, end).clone(), start


class ModulesDrafter:
    """The model's own prediction modules guess, one token each.

    Module k reads, at token i, the state after k − 1 modules there and the embedding of token i + k; it caches keys and
    values as any layer does. What it reads of guessed tokens is taken back afterwards.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, tokens: int) -> None:
        if not 0 < tokens <= len(decoder.mtp):
            raise ConfigError(
                f"draft_tokens={tokens}: the model has {len(decoder.mtp)} modules that predict ahead "
                "(model.num_nextn_predict_layers), each guesses one token; or name a draft model"
            )
        self.decoder, self.cache, self.tokens = decoder, cache, tokens
        self._embedded = [_Rows() for _ in range(cache.slots)]
        self._states = [[_Rows() for _ in range(cache.slots)] for _ in range(tokens)]  # what module k + 1 reads
        self._shares: dict[int, list[Tensor]] = {}

    def check(self, prompt: Document) -> None:
        """They read what the model read."""

    def follow(self, pieces: list[Piece], passed: Passed) -> None:
        """Keep states and embeddings; a prompt's are read at once."""
        for piece, hidden_ND, embedded_ND in zip(pieces, passed.hidden, passed.embedded, strict=True):
            self._states[0][piece.slot].append(hidden_ND)
            self._embedded[piece.slot].append(embedded_ND)
        read = [piece.slot for piece in pieces if piece.is_prompt]
        for module in range(self.tokens):
            self._read(module, read)
        for slot in read:
            self._forget_read(slot)

    @torch.no_grad()
    def propose(self, asked: list[Asked]) -> list[list[int]]:
        """As many as there are modules, for each."""
        slots, guesses = [one.slot for one in asked], _Guesses(asked)
        if not asked:
            return []
        tails = self.cache.tails[:]
        for slot in slots:  # of guesses that were wrong nothing stays
            self._states[0][slot].keep(0, self.cache.lengths[slot])
            self._embedded[slot].keep(0, self.cache.lengths[slot])
        newest = [one.ids[-1] for one in asked]
        for module in range(self.tokens):
            self._embed(slots, newest)
            states = self._read(module, slots)
            guesses.add(self.decoder.lm_head(torch.stack([states[slot][-1] for slot in slots])))
            newest = [ids[-1] for ids in guesses.ids]
        self.cache.tails[:] = tails
        for slot in slots:
            self._take_back(slot, self.cache.lengths[slot])
        self._shares |= {one.slot: shares for one, shares in zip(asked, guesses.shares, strict=True)}
        return guesses.ids

    def _read(self, module: int, slots: list[int]) -> dict[int, Tensor]:
        """Run a module on all that it can read now: the new states (n, D) of each slot."""
        layer, batch, states, ahead = self.cache.ahead[module], [], [], []
        for slot in slots:
            begin, state, embedded = layer.begins[slot], self._states[module][slot], self._embedded[slot]
            end = min(state.end, embedded.end - module - 1)
            if end > begin:
                batch.append((slot, end - begin))
                states.append(state.part(begin, end))
                ahead.append(embedded.part(begin + module + 1, end + module + 1))
        if not batch:
            return {}
        layer.groups, counts = groups_of(batch), [tokens for _, tokens in batch]
        document = torch.arange(len(batch)).repeat_interleave(torch.tensor(counts))[None].to(states[0].device)
        zeros, begins = torch.zeros_like(document), [layer.begins[slot] for slot, _ in batch]
        # One way only, as in training: no picture's span is told.
        places = find_places(document, zeros, zeros[..., None].expand(-1, -1, 3), self.decoder.config, begins)
        out_1ND, _ = self.decoder.mtp[module](torch.cat(states)[None], torch.cat(ahead)[None], places, layer)
        given: dict[int, Tensor] = {}
        for (slot, tokens), out_ND in zip(batch, out_1ND[0].split(counts), strict=True):
            layer.begins[slot] += tokens
            given[slot] = out_ND
            if module + 1 < self.tokens:
                self._states[module + 1][slot].append(out_ND)
        return given

    def _embed(self, slots: list[int], ids: list[int]) -> None:
        """Put the embedding of each slot's next token behind the others, as the model embeds it."""
        device = self.decoder.embed_tokens.weight.device
        document, zeros = torch.arange(len(ids), device=device)[None], torch.zeros(1, len(ids), 3, device=device)
        lengths = [self._embedded[slot].end for slot in slots]
        self.cache.next_batch([(slot, 1) for slot in slots])
        places = find_places(document, document * 0, zeros, self.decoder.config, lengths)
        embedded_1BD = self.decoder.embed(torch.tensor([ids], device=device), document * 0, zeros, places, self.cache)
        for slot, embedded_D in zip(slots, embedded_1BD[0], strict=True):
            self._embedded[slot].append(embedded_D[None])

    def _take_back(self, slot: int, cached: int) -> None:
        """Forget what was read of guesses: token `cached` is the last that is no guess, and the model embeds it yet."""
        self._embedded[slot].keep(0, cached)
        for module, layer in enumerate(self.cache.ahead[: self.tokens]):
            kept = min(layer.begins[slot], cached - module)
            layer.truncate(slot, kept)
            layer.begins[slot] = kept
            if module:
                self._states[module][slot].keep(0, cached - module + 1)
        self._forget_read(slot)

    def _forget_read(self, slot: int) -> None:
        """Forget states and embeddings that no module will read again."""
        layers = self.cache.ahead[: self.tokens]
        for layer, states in zip(layers, self._states, strict=True):
            states[slot].keep(layer.begins[slot], states[slot].end)
        wanted = min(layer.begins[slot] + module + 1 for module, layer in enumerate(layers))
        self._embedded[slot].keep(wanted, self._embedded[slot].end)

    def shares(self, slot: int) -> list[Tensor]:
        """What a slot's guesses were drawn from."""
        return self._shares[slot]

    def clear(self, slot: int) -> None:
        """Forget a slot's sequence; its cache the engine clears."""
        for rows in (self._embedded, *self._states):
            rows[slot] = _Rows()
