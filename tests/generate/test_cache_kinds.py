"""What caches weigh, what they let go, how far int8 is from the numbers themselves."""

import pytest
import torch
from writing import KINDS, prompt, words

from omniloom.compose import preset
from omniloom.generate.config import CacheConfig
from omniloom.generate.forward import Piece, forward, read
from omniloom.generate.kv_cache import KVCache
from omniloom.generate.layer_cache import CLUSTER_TOKENS
from omniloom.generate.storage import Int8
from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder
from omniloom.plan.cache import SELECTED_SHARE, kv_cache_bytes_by_kind
from tiny_decoders import all_logits, batch_of, tiny_decoder

CPU = torch.device("cpu")


def one_layer_of(name: str) -> tuple[Decoder, ModelConfig]:
    """A decoder with the preset's attention in its one layer, everything else small; and the preset."""
    whole = preset(name)
    slim = {"num_hidden_layers": 1, "hidden_size": 256, "vocab_size": 64, "num_nextn_predict_layers": 0}
    slim |= {"first_k_dense_replace": 1, "n_routed_experts": 0, "intermediate_size": 8}
    return Decoder(ModelConfig(**vars(whole) | slim)).eval(), whole


def test_a_token_of_deepseek_v3_leaves_70272_bytes():
    """Counted from the live tensors of one layer, times the 61 that there are; int8 with its scale, and bf16's k_R."""
    decoder, whole = one_layer_of("deepseek_v3")
    for precision, each in (("bf16", 2 * (512 + 64)), ("int8", 512 + 4 + 2 * 64)):
        cache = KVCache(decoder, CacheConfig(precision=precision), 1)
        read(decoder, cache, 0, prompt(words(11, 1)), 100)
        live = sum(x.nbytes for s in cache.layers[0].kept for x in s.state(0, 12).values())
        assert live == 12 * each
        assert cache.bytes_per_token(0) == each
        kind = {"bf16": "latent", "int8": "int8"}[precision]
        assert kv_cache_bytes_by_kind(whole)[kind] == 61 * each
    assert 61 * 2 * (512 + 64) == 70_272
    assert 61 * (512 + 4 + 2 * 64) == 39_284


@pytest.mark.parametrize("kind", ["multi-head", "grouped", "latent"])
def test_bytes_per_token_are_the_planners(kind):
    decoder = tiny_decoder(**KINDS[kind])
    plan = kv_cache_bytes_by_kind(decoder.config)
    start = prompt(words(39, 1))
    own = "latent" if kind == "latent" else "full"
    for config, name in ((CacheConfig("bf16"), own), (CacheConfig("int8"), "int8")):
        cache = KVCache(decoder, config, 1)
        read(decoder, cache, 0, start, 100)
        assert cache.bytes_per_token(0) == plan[name]
    selective = KVCache(decoder, CacheConfig("bf16", heavy_tokens=6, recent_tokens=4), 1)
    read(decoder, selective, 0, start, 100)
    selective.settle(0, lazily=False)
    assert all(layer.held[0] <= SELECTED_SHARE * 40 for layer in selective.layers)
    assert selective.bytes_per_token(0) <= plan["selective"]


@pytest.mark.parametrize("context", [4, 30, 64])
def test_bytes_per_token_of_the_window_are_the_planners(context):
    decoder = tiny_decoder(**KINDS["sparse latent"] | {"max_position_embeddings": context})
    cache = KVCache(decoder, CacheConfig("bf16"), 1)
    read(decoder, cache, 0, prompt(words(context - 1, 1)), 100)
    cache.settle(0, lazily=False)
    assert cache.bytes_per_token(0) == pytest.approx(kv_cache_bytes_by_kind(decoder.config)["windowed"])


def test_int8_is_off_by_half_a_scale_at_most():
    storage = Int8(2, (3, 5), torch.float32, CPU)
    x = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 7)[:, None, None]
    x[2] = 0
    storage.grow(9)
    storage.write(1, slice(1, 8), x)
    back = storage.read(1, 2, 8)[0, 1:]
    scale = x.abs().amax(dim=(1, 2), keepdim=True) / 127
    assert ((back - x).abs() <= scale / 2 * 1.001).all()
    assert storage.bytes_per_token == 15 + 4
    assert not storage.read(0, 1, 9).any()


@pytest.mark.parametrize("kind", ["grouped", "latent"])
@pytest.mark.parametrize(("precision", "off"), [("bf16", 0.05), ("int8", 0.15)])
@torch.no_grad()
def test_coarser_caches_change_little(kind, precision, off):
    decoder = tiny_decoder(**KINDS[kind])
    start = prompt(words(40, 1))
    exact = all_logits(decoder, batch_of([[start]], len(start)))[0, -1]
    cache = KVCache(decoder, CacheConfig(precision), 1)
    logits = read(decoder, cache, 0, start, 5)
    assert 0 < float((logits - exact).abs().max() / exact.std()) < off


@pytest.mark.parametrize("kind", ["grouped", "latent", "sparse grouped"])
def test_heavy_positions_are_those_that_recent_queries_attend_to(kind):
    """Against a literal softmax over the layer's own keys and its last queries."""
    decoder = tiny_decoder(**KINDS[kind])
    start = prompt(words(40, 1))
    config = CacheConfig(heavy_tokens=5, recent_tokens=50, observed_queries=3)
    cache = KVCache(decoder, config, 1)
    asked: list[torch.Tensor] = []
    attention = decoder.layers[1].self_attn
    project = attention.project
    attention.project = lambda *inputs: asked.append(project(*inputs)) or asked[-1]
    read(decoder, cache, 0, start, 100)
    layer = cache.layers[1]
    index = layer.index[0, : layer.held[0]].tolist()
    mass = torch.zeros(len(index))
    if kind == "latent":  # keys of every head, as training has them
        hidden = _input_of(decoder, start)
        query, key, _ = project(*hidden)
    else:
        query, key, _ = asked[-1]
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    for t in range(len(start) - 3, len(start)):
        mine = torch.zeros(len(index))
        for head in range(query.shape[2]):
            scores = [float(query[0, t, head] @ key[0, s, head]) * attention.scale for s in index if s <= t]
            peak = max(scores)
            weights = [2.718281828459045 ** (x - peak) for x in scores]
            for at, weight in enumerate(weights):
                mine[at] += weight / sum(weights)
        mass = torch.maximum(mass, mine)
    mass = mass + mine  # the newest once more
    side = CLUSTER_TOKENS // 2
    pooled = torch.stack([mass[max(0, at - side) : at + side + 1].max() for at in range(len(mass))])
    torch.testing.assert_close(layer.mass(0), pooled, atol=1e-4, rtol=1e-4)
    layer.pin(0, 2, 4)
    layer.keep_heavy(0, 5, 6)
    held = layer.index[0, : layer.held[0]].tolist()
    others = [at for at in range(len(index) - 6) if index[at] not in (2, 3)]
    heaviest = sorted(others, key=lambda at: -float(pooled[at]))[:5]
    stays = {index[at] for at in heaviest} | {2, 3} & set(index) | set(index[-6:])
    # Of clusters of one mass any may stay.
    assert len(held) == len(stays)
    assert {2, 3} & set(index) | set(index[-6:]) <= set(held)
    least = min(float(pooled[at]) for at in heaviest)
    assert all(float(pooled[index.index(i)]) >= least - 1e-4 for i in set(held) - set(index[-6:]) - {2, 3})


@torch.no_grad()
def _input_of(decoder, start):
    seen = []
    hook = decoder.layers[1].self_attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[:2]))
    all_logits(decoder, batch_of([[start]], len(start)))
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("kind", ["grouped", "latent", "multi-query", "latent with yarn and log scale"])
@torch.no_grad()
def test_keys_that_are_moved_are_those_of_their_new_places(kind):
    """A whole sequence moved 7 to the right and back, and a layer's keys as RoPE makes them there."""
    decoder = tiny_decoder(**KINDS[kind])
    cache = KVCache(decoder, CacheConfig(), 2)
    start = prompt(words(20, 1))
    read(decoder, cache, 0, start, 100)
    cache.copy(0, 1)
    first = cache.layers[0]  # what it caches hangs on the embeddings and the place alone
    first.renumber(1, torch.arange(21) + 7)
    attention = decoder.layers[0].self_attn
    seen = []
    hook = attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    forward(decoder, cache, [Piece(0, start.input_ids.tolist())])  # the same ids at 21 … 41
    hook.remove()
    first.renumber(1, torch.arange(21) + 21)
    which = 1 if decoder.config.attention == "latent" else 0
    moved, there = (first.kept[which].read(slot, slot + 1, 42)[0] for slot in (1, 0))
    torch.testing.assert_close(moved[:21], there[21:42], atol=1e-5, rtol=1e-5)
    assert first.index[1, :21].tolist() == list(range(21, 42))


def test_without_a_recent_query_the_newest_are_heaviest():
    decoder = tiny_decoder(**KINDS["latent"])
    cache = KVCache(decoder, CacheConfig(heavy_tokens=5, recent_tokens=50, observed_queries=3), 1)
    read(decoder, cache, 0, prompt(words(40, 1)), 100)
    cache.truncate(0, 30)
    cache.layers[0].keep_heavy(0, 4, 6)
    assert cache.layers[0].index[0, : cache.layers[0].held[0]].tolist() == list(range(20, 30))
