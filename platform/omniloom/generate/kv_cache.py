"""What a decoder caches of several sequences: one `LayerCache` a layer and prediction module, and how far each came.

B sequences, N new tokens of all, D model width, K tokens of the embeddings' convolution.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from omniloom.errors import ConfigError
from omniloom.generate.config import MOST_TAKEN_BACK, CacheConfig
from omniloom.generate.layer_cache import Group, LayerCache
from omniloom.generate.storage import Int8, Plain
from omniloom.model.attention import GroupedAttention
from omniloom.model.decoder import Decoder
from omniloom.model.mla import LatentAttention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class KVCache:
    """The cache of a decoder's layers for `slots` sequences (model.past.DecoderPast).

    What is kept of a token (`CacheConfig.precision`): keys and values of each head, or for latent attention the
    normalised c_KV and k_R alone. Of which tokens: all; with sparse attention those that it may still see; with
    `heavy_tokens` those that recent queries attend to most, and the newest. Raises ConfigError for linear attention.
    """

    def __init__(self, decoder: Decoder, config: CacheConfig, slots: int, observes: bool = False) -> None:
        config.check()
        if decoder.config.attention_pattern == "linear":
            raise ConfigError(
                "model.attention_pattern=linear has no keys to cache, it keeps a state, which generation does not have "
                "yet; full and sparse attention it has"
            )
        weight = decoder.embed_tokens.weight
        self.config, self.model, self.slots = config, decoder.config, slots
        self._dtype, self._device = weight.dtype, weight.device
        observed = config.observed_queries if observes or config.heavy_tokens else 0

        def layer_cache(attention: nn.Module) -> LayerCache:
            assert isinstance(attention, GroupedAttention | LatentAttention)
            return LayerCache(self.model, self._storages(), slots, observed, attention.scale)

        self.layers = [layer_cache(layer.get_submodule("self_attn")) for layer in decoder.layers]
        self.ahead = [layer_cache(module.get_submodule("layer.self_attn")) for module in decoder.mtp]
        self.lengths = [0] * slots  # tokens that each sequence has had; the next one's index
        self.tails: list[Tensor | None] = [None] * slots  # the newest embeddings, before the convolution
        self._batch: list[tuple[int, int]] = []

    def _storages(self) -> list[Plain]:
        sizes, precision = self.model, self.config.precision
        dtype = DTYPES.get(precision, self._dtype)
        shapes: list[tuple[int, ...]]
        if sizes.attention == "latent":
            shapes = [(sizes.kv_lora_rank,), (sizes.qk_rope_head_dim,)]
        else:
            shapes = [(sizes.key_value_heads, sizes.head_width)] * 2
        if precision != "int8":
            return [Plain(self.slots, shape, dtype, self._device) for shape in shapes]
        eight: list[Plain] = [Int8(self.slots, shape, self._dtype, self._device) for shape in shapes]
        if sizes.attention == "latent":
            eight[1] = Plain(self.slots, shapes[1], torch.bfloat16, self._device)
        return eight

    # One forward pass: `next_batch` says which slots the packed row's documents are, `settle` what may go after it.

    def next_batch(self, batch: Sequence[tuple[int, int]]) -> None:
        """(slot, new tokens) of each document of the packed row that comes, in its order."""
        self._batch, groups = list(batch), groups_of(batch)
        for layer in self.layers:
            layer.groups = groups

    @property
    def begins(self) -> list[int]:
        """Of each document of the packed row, its first token's index in its sequence."""
        return [self.lengths[slot] for slot, _ in self._batch]

    def before(self, embedded_1ND: Tensor, tokens: int) -> Tensor:
        """The `tokens` embeddings before each document's new ones, (B, tokens, D), zero where there is none."""
        parts, befores = embedded_1ND[0].split([count for _, count in self._batch]), []
        for (slot, _), part in zip(self._batch, parts, strict=True):
            tail = self.tails[slot]
            if tail is None:
                tail = part.new_zeros(tokens + MOST_TAKEN_BACK, part.shape[1])
            befores.append(tail[len(tail) - tokens :])
            self.tails[slot] = torch.cat([tail, part])[-(tokens + MOST_TAKEN_BACK) :]
        return torch.stack(befores)

    def advance(self) -> None:
        """The forward pass is over: each sequence is longer by its new tokens."""
        for slot, tokens in self._batch:
            self.lengths[slot] += tokens
        self._tell_layers(slot for slot, _ in self._batch)

    def _tell_layers(self, slots: Iterable[int]) -> None:
        for slot in slots:
            for layer in self.layers:
                layer.begins[slot] = self.lengths[slot]

    def settle(self, slot: int, lazily: bool = True) -> None:
        """Let go what the slot's next tokens will not want; what it had is final from now on."""
        for layer in [*self.layers, *self.ahead]:
            if self.model.attention_pattern == "sparse":
                layer.keep_visible(slot, lazily)
            heavy, recent = self.config.heavy_tokens, self.config.recent_tokens
            if heavy is not None and layer.held[slot] > heavy + recent + int(layer.pinned[slot].sum()):
                # Half of the newest go at once, so that it is seldom.
                layer.keep_heavy(slot, heavy, max(1, recent // 2) if lazily else recent)

    def pin(self, slot: int, begin: int, end: int) -> None:
        """Keep what stands at indices `begin` … `end` − 1 of a slot's sequence, whatever goes."""
        for layer in self.layers:
            layer.pin(slot, begin, end)

    def condense(self, slot: int, heavy_tokens: int, recent_tokens: int) -> None:
        """Make room in the context: of a slot's sequence stay what is pinned, the heavy and the newest, which close
        ranks.

        Full attention sees all of them, next to each other. Sparse attention sees beyond its window multiples of its
        stride alone: there the older ones are put, in half of the context, pinned ones first where not all find a
        place. Raises ConfigError unless positions are RoPE's, whose keys can turn.
        """
        sizes = self.model
        if sizes.position != "rope":
            raise ConfigError(
                f"a conversation over the context of {sizes.max_position_embeddings:,} tokens cannot go on with "
                f"model.position={sizes.position}: only RoPE's keys can be moved"
            )
        stride = 1
        if sizes.attention_pattern == "sparse":
            # That of the context's last token: whatever comes, multiples of it stay in sight.
            last, unit = sizes.max_position_embeddings - 1, sizes.global_stride * sizes.max_global_tokens
            stride = sizes.global_stride << (last // unit).bit_length()
            recent_tokens = min(recent_tokens, sizes.window_tokens - 1)
            heavy_tokens = max(0, sizes.max_position_embeddings // 2 - recent_tokens) // stride
        for layer in self.layers:
            layer.keep_heavy(slot, heavy_tokens, recent_tokens, pinned_too=stride > 1)
        most = max(layer.held[slot] for layer in self.layers)
        older = max(0, most - recent_tokens)
        for layer in self.layers:
            closed = torch.arange(most - layer.held[slot], most, device=self._device)
            layer.renumber(slot, torch.where(closed < older, closed * stride, closed + older * (stride - 1)))
        self.lengths[slot] = max(int(layer.index[slot, layer.held[slot] - 1]) for layer in self.layers) + 1
        self._tell_layers([slot])

    # Slots.

    def truncate(self, slot: int, tokens: int, before_KD: Tensor | None = None) -> None:
        """Forget what came after the first `tokens`, of what nothing was let go meanwhile.

        `before_KD` are the embeddings up to there, where a convolution wants them and over MOST_TAKEN_BACK tokens go.
        """
        tail, back = self.tails[slot], self.lengths[slot] - tokens
        if tail is not None and back:
            joined = torch.cat([torch.zeros_like(tail), tail[: max(0, len(tail) - back)]])
            self.tails[slot] = (joined if before_KD is None else torch.cat([joined, before_KD]))[-len(tail) :]
        self.lengths[slot] = tokens
        for layer in self.layers:
            layer.truncate(slot, tokens)
            layer.begins[slot] = tokens

    def clear(self, slot: int) -> None:
        """Make a slot free for another sequence."""
        self.lengths[slot], self.tails[slot] = 0, None
        for layer in [*self.layers, *self.ahead]:
            layer.truncate(slot, 0)
            layer.begins[slot], layer.queries[slot], layer.pins[slot] = 0, None, []

    def copy(self, source: int, target: int) -> None:
        """Give a slot all that another has."""
        for layer in [*self.layers, *self.ahead]:
            layer.copy(source, target)
        self.lengths[target], self.tails[target] = self.lengths[source], self.tails[source]

    def reorder(self, first: int, sources: list[int]) -> None:
        """Give slots `first`, `first` + 1, … what these slots have, all at once."""
        for layer in [*self.layers, *self.ahead]:
            layer.reorder(first, sources)
        targets = slice(first, first + len(sources))
        self.lengths[targets] = [self.lengths[slot] for slot in sources]
        self.tails[targets] = [self.tails[slot] for slot in sources]

    def is_whole(self, slot: int) -> bool:
        """Whether nothing of the slot's sequence was let go."""
        return all(layer.held[slot] == self.lengths[slot] for layer in self.layers)

    # What it takes.

    def bytes_held(self, slot: int) -> int:
        """Of a slot's sequence, in the decoder's layers."""
        return sum(layer.held[slot] * layer.bytes_per_token for layer in self.layers)

    def bytes_per_token(self, slot: int) -> float:
        """What a token of a slot's sequence has left there, on average: the planner's figure."""
        return self.bytes_held(slot) / self.lengths[slot]

    def state(self, slot: int) -> dict[str, Tensor]:
        """All that a slot has, to be kept elsewhere."""
        layers = {
            f"layer.{number}.{name}": x for number, one in enumerate(self.layers) for name, x in one.state(slot).items()
        }
        tail = self.tails[slot]
        length = {"length": torch.tensor(self.lengths[slot])}
        return layers | length | ({} if tail is None else {"tail": tail.clone()})

    def restore(self, slot: int, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave, into a cache of the same model and configuration."""
        for number, layer in enumerate(self.layers):
            begin = f"layer.{number}."
            layer.restore(slot, {name.removeprefix(begin): x for name, x in state.items() if name.startswith(begin)})
        tail = state.get("tail")
        self.lengths[slot], self.tails[slot] = int(state["length"]), None if tail is None else tail.to(self._device)
        self._tell_layers([slot])


def groups_of(batch: Sequence[tuple[int, int]]) -> list[Group]:
    """(slot, new tokens) of each document of a packed row, those together whose slots follow each other and that have
    as many."""
    groups: list[Group] = []
    document = 0
    for _, run in groupby(enumerate(batch), key=lambda one: (one[1][0] - one[0], one[1][1])):
        alike = [slot_and_tokens for _, slot_and_tokens in run]
        groups.append(Group(range(document, document + len(alike)), *alike[0]))
        document += len(alike)
    return groups
