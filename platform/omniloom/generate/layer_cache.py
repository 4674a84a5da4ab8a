"""What one layer caches of several sequences: which of their positions, and what of each.

B sequences, T new tokens of each, N = Σ T, S cached tokens, H heads, d what queries and keys meet in, R recent queries.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from omniloom.generate.config import MOST_TAKEN_BACK
from omniloom.generate.storage import Plain
from omniloom.model.config import ModelConfig
from omniloom.model.past import Seen
from omniloom.model.position import apply_rope, rope_table
from omniloom.model.sparse_attention import visible_keys

# Mass is shared with so many neighbours: what is attended to is seldom one token, and the next query wants the next.
CLUSTER_TOKENS = 7
SLACK = 8  # one of so many positions more may stay, so that moving them is rare


class Group(NamedTuple):
    """Slots side by side that have as many new tokens."""

    documents: range  # of the packed row
    first: int  # slot
    tokens: int


class LayerCache:
    """Positions and what is kept of them, by slots.

    `index` holds each kept position's place in its sequence, ascending, −1 behind the last; `held` how many there are.
    """

    def __init__(self, config: ModelConfig, kept: list[Plain], slots: int, observes: int, scale: float) -> None:
        self.config, self.kept, self.observes, self.scale = config, kept, observes, scale
        device = kept[0].data.device
        self.index = torch.full((slots, 0), -1, device=device)
        self.pinned = torch.zeros(slots, 0, dtype=torch.bool, device=device)
        self.held = [0] * slots
        self.groups: list[Group] = []
        self.queries: list[Tensor | None] = [None] * slots  # (R, H, d) of each, the last ones
        self.begins: list[int] = [0] * slots  # each sequence's next index
        self.pins: list[list[tuple[int, int]]] = [[] for _ in range(slots)]  # indices that are pinned as they come

    # What attention asks of it (model.past.Past).

    def extend(self, *kept_1N: Tensor) -> Iterator[Seen]:
        """Keep this of each new token; what is cached then, slots alike together."""
        done = 0
        for group in self.groups:
            count, tokens = len(group.documents), group.tokens
            last = group.first + count
            held = self.held[group.first : last]
            most = max(held) + tokens
            self._make_room(most)
            part = slice(done, done + count * tokens)
            slot, at, steps = self._places(group, held)
            for storage, x_1N in zip(self.kept, kept_1N, strict=True):
                storage.write(slot, at, x_1N[0, part].unflatten(0, (count, tokens)) if count > 1 else x_1N[0, part])
            self.index[slot, at] = steps
            for pinned in range(group.first, last):
                self._mark(pinned)
            self.held[group.first : last] = [number + tokens for number in held]
            yield Seen(
                group.documents,
                done,
                tokens,
                self.index[group.first : last, :most],
                tuple(storage.read(group.first, last, most) for storage in self.kept),
                is_fresh=not any(held),
                is_even=len(set(held)) == 1,
            )
            done += count * tokens

    def observe(self, seen: Seen, query_BTHd: Tensor) -> None:
        """Remember the last queries of each slot."""
        if not self.observes:
            return
        group = next(group for group in self.groups if group.documents == seen.documents)
        for row, query_THd in enumerate(query_BTHd):
            slot = group.first + row
            before = self.queries[slot]
            joined = query_THd if before is None else torch.cat([before, query_THd])
            self.queries[slot] = joined[-self.observes :].clone()

    def _places(self, group: Group, held: list[int]) -> tuple[Tensor | int, Tensor | slice, Tensor]:
        device, tokens, count = self.index.device, group.tokens, len(group.documents)
        begins = self.begins[group.first : group.first + count]
        if count == 1:
            steps = torch.arange(begins[0], begins[0] + tokens, device=device)
            return group.first, slice(held[0], held[0] + tokens), steps
        step = torch.arange(tokens, device=device)
        slots = torch.arange(group.first, group.first + count, device=device)
        at, steps = (torch.tensor(each, device=device)[:, None] + step for each in (held, begins))
        return slots[:, None], at, steps

    def _make_room(self, tokens: int) -> None:
        capacity = self.index.shape[1]
        if tokens <= capacity:
            return
        capacity = max(tokens, capacity + capacity // 2)
        for storage in self.kept:
            storage.grow(capacity)
        more = (0, capacity - self.index.shape[1])
        self.index, self.pinned = F.pad(self.index, more, value=-1), F.pad(self.pinned, more)

    # What goes.

    def truncate(self, slot: int, tokens: int) -> None:
        """Forget what came at index `tokens` or later."""
        query, back = self.queries[slot], self.begins[slot] - tokens
        if query is not None and back > 0:
            self.queries[slot] = query[: max(0, len(query) - back)]
        kept = int((self.index[slot, : self.held[slot]] < tokens).sum())
        self.index[slot, kept : self.held[slot]] = -1
        self.pinned[slot, kept : self.held[slot]] = False
        self.held[slot] = kept

    def keep_visible(self, slot: int, lazily: bool = True) -> None:
        """Forget what sparse attention sees no more from the next token on; lazily, not even where the newest are taken
        back."""
        config, held = self.config, self.held[slot]
        most = config.window_tokens + config.max_global_tokens
        most += most // SLACK + MOST_TAKEN_BACK
        if lazily and (held <= most or held <= most + int(self.pinned[slot].sum())):
            return
        next_index = max(0, self.begins[slot] - MOST_TAKEN_BACK) if lazily else self.begins[slot]
        index, after = self.index[slot, :held], self.index.new_tensor([next_index])
        limits = (config.window_tokens, config.global_stride, config.max_global_tokens)
        seen = visible_keys(after, index, *limits)[0] | (index > next_index)
        self._keep(slot, seen | self.pinned[slot, :held])

    def keep_heavy(self, slot: int, heavy_tokens: int, recent_tokens: int, pinned_too: bool = False) -> None:
        """Forget all but the newest `recent_tokens`, the pinned, and of the others those that recent queries attend to
        most, `heavy_tokens`; with `pinned_too` the pinned count among these, first of all."""
        held = self.held[slot]
        newest, pinned = torch.zeros_like(self.pinned[slot, :held]), self.pinned[slot, :held]
        newest[max(0, held - recent_tokens) :] = True
        stays = newest if pinned_too else newest | pinned
        others = (~stays).nonzero().flatten()
        if len(others) > heavy_tokens:
            weight_S = self.mass(slot)
            if pinned_too:
                weight_S = weight_S.masked_fill(pinned, torch.inf)
            stays[others[weight_S[others].topk(heavy_tokens).indices]] = True
            self._keep(slot, stays)

    def mass(self, slot: int) -> Tensor:
        """m_r = Σ over heads of softmax(scale · q_r·k); max over recent queries + the newest's own, float32 (S,).

        Shared with neighbours. The most and not the sum: what one query looks up is as heavy as what all of them look
        at. Where no query is remembered, all having been taken back, the newer is the heavier.
        """
        held, query_RHd = self.held[slot], self.queries[slot]
        if query_RHd is None or not len(query_RHd):
            return self.index[slot, :held].float()
        key_SKd = self._keys(slot)
        grouped_RKGd = query_RHd.float().unflatten(1, (key_SKd.shape[1], -1))
        scores = torch.einsum("rkgd,skd->rkgs", grouped_RKGd, key_SKd) * self.scale
        index = self.index[slot, :held]
        asked = torch.arange(self.begins[slot] - len(query_RHd), self.begins[slot], device=index.device)
        scores = scores.masked_fill((index > asked[:, None])[:, None, None], -torch.inf)
        mass_RS = scores.softmax(dim=-1).sum(dim=(1, 2))
        mass_S = mass_RS.amax(dim=0) + mass_RS[-1]
        return F.max_pool1d(mass_S[None], CLUSTER_TOKENS, stride=1, padding=CLUSTER_TOKENS // 2)[0]

    def _keys(self, slot: int) -> Tensor:
        """(S, K, d) as queries meet them, float32."""
        kept = [storage.read(slot, slot + 1, self.held[slot])[0].float() for storage in self.kept]
        return torch.cat(kept, dim=-1)[:, None] if self.config.attention == "latent" else kept[0]

    def _keep(self, slot: int, stays_S: Tensor) -> None:
        kept, held = stays_S.nonzero().flatten(), self.held[slot]
        for storage in self.kept:
            storage.move(slot, kept)
        for marks, empty in ((self.index, -1), (self.pinned, False)):
            marks[slot, : len(kept)] = marks[slot, kept]
            marks[slot, len(kept) : held] = empty
        self.held[slot] = len(kept)

    def pin(self, slot: int, begin: int, end: int) -> None:
        """Keep what stands, or will stand, at indices `begin` … `end` − 1, whatever goes."""
        self.pins[slot].append((begin, end))
        self._mark(slot)

    def _mark(self, slot: int) -> None:
        index = self.index[slot]
        for begin, end in self.pins[slot]:
            self.pinned[slot] |= (index >= begin) & (index < end)

    def renumber(self, slot: int, places: Tensor) -> None:
        """Give the kept positions other indices, (S,) ascending; keys are turned to them.

        A key was turned to index i by RoPE; turning it on by j − i is turning it to j. Recent queries are forgotten:
        they were asked from the old places.
        """
        held = self.held[slot]
        storage = self.kept[1 if self.config.attention == "latent" else 0]
        key_1Sd = storage.read(slot, slot + 1, held).float()
        width = self.config.rotary_width
        turned, rest = key_1Sd.split([width, key_1Sd.shape[-1] - width], dim=-1)
        table = rope_table((places - self.index[slot, :held])[None], self.config)
        table = table / table.abs()  # YaRN's factor is in the key already
        on = apply_rope(turned.reshape(1, held, -1, width), table, self.config.rope_interleave).view_as(turned)
        storage.write(slot, slice(0, held), torch.cat([on, rest], dim=-1)[0])
        self.index[slot, :held] = places
        self.queries[slot], self.pins[slot] = None, []  # the marks stay

    # Slots.

    def copy(self, source: int, target: int) -> None:
        """Give a slot all that another has."""
        held = self.held[source]
        for storage in self.kept:
            storage.copy(source, target, held)
        for marks, empty in ((self.index, -1), (self.pinned, False)):
            marks[target] = empty
            marks[target, :held] = marks[source, :held]
        self.held[target], self.begins[target] = held, self.begins[source]
        self.queries[target], self.pins[target] = self.queries[source], [*self.pins[source]]

    def reorder(self, first: int, sources: list[int]) -> None:
        """Give slots `first`, `first` + 1, … what these slots have, all at once."""
        order, most = torch.tensor(sources, device=self.index.device), max(self.held[slot] for slot in sources)
        for storage in self.kept:
            storage.reorder(first, order, most)
        targets = slice(first, first + len(sources))
        self.index[targets], self.pinned[targets] = self.index[order], self.pinned[order]
        self.held[targets] = [self.held[slot] for slot in sources]
        self.begins[targets] = [self.begins[slot] for slot in sources]
        self.queries[targets] = [self.queries[slot] for slot in sources]

    @property
    def bytes_per_token(self) -> int:
        """Of one kept position."""
        return sum(storage.bytes_per_token for storage in self.kept)

    def state(self, slot: int) -> dict[str, Tensor]:
        """A slot's positions, to be kept elsewhere."""
        held, query = self.held[slot], self.queries[slot]
        parts = {f"{number}.{name}": x for number, s in enumerate(self.kept) for name, x in s.state(slot, held).items()}
        marks = {"index": self.index[slot, :held].clone(), "pinned": self.pinned[slot, :held].clone()}
        return parts | marks | ({} if query is None else {"queries": query})

    def restore(self, slot: int, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        held = len(state["index"])
        self._make_room(held)
        for number, storage in enumerate(self.kept):
            storage.restore(slot, {name: state[f"{number}.{name}"] for name in storage.parts})
        self.index[slot], self.pinned[slot] = -1, False
        self.index[slot, :held], self.pinned[slot, :held] = state["index"], state["pinned"]
        query = state.get("queries")
        self.held[slot], self.queries[slot] = held, None if query is None else query.to(self.index.device)
        self.pins[slot] = []  # the marks came along
