"""Decoding with a cache against decoding without one, token by token."""

import pytest
import torch
from writing import KINDS, mixed_prompts, prompt, uncached, words

from omniloom.errors import ConfigError
from omniloom.generate.config import MOST_TAKEN_BACK, CacheConfig
from omniloom.generate.forward import Piece, forward, read
from omniloom.generate.kv_cache import KVCache
from omniloom.model.sparse_attention import visible_keys
from tiny_decoders import tiny_decoder

STEPS = 20


@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_decoding_equals_uncached_alone_and_together(kind, chunk):
    """Prompts of unequal lengths and all modalities, read whole or in chunks; logits too."""
    decoder = tiny_decoder(**KINDS[kind])
    prompts = mixed_prompts()
    cache = KVCache(decoder, CacheConfig(), len(prompts))
    expected = [uncached(decoder, one, STEPS) for one in prompts]
    logits = [read(decoder, cache, slot, one, chunk) for slot, one in enumerate(prompts)]
    for step in range(STEPS):
        for (ids, rows), row in zip(expected, logits, strict=True):
            assert int(row.argmax()) == ids[step]
            torch.testing.assert_close(row, rows[step], atol=5e-5, rtol=1e-4)
        if step < STEPS - 1:
            passed = forward(decoder, cache, [Piece(slot, [ids[step]]) for slot, (ids, _) in enumerate(expected)])
            logits = [one[0] for one in passed.logits]
            for slot in range(len(prompts)):
                cache.settle(slot, lazily=False)


def test_prompts_and_answers_share_a_pass():
    decoder = tiny_decoder()
    first, second = prompt(words(9, 1)), prompt(words(11, 2))
    cache = KVCache(decoder, CacheConfig(), 2)
    (a, rows_a), (_, rows_b) = uncached(decoder, first, 3), uncached(decoder, second, 1)
    read(decoder, cache, 0, first, 100)
    read(decoder, cache, 1, second.window(0, 4), 100)
    passed = forward(decoder, cache, [Piece(0, a[:2], predicts=2), Piece(1, second.window(4, 12))])
    torch.testing.assert_close(passed.logits[0], rows_a[1:], atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(passed.logits[1], rows_b, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["grouped", "latent", "convolution", "learned"])
def test_what_is_taken_back_leaves_no_trace(kind):
    decoder = tiny_decoder(**KINDS[kind])
    start = prompt(words(9, 1))
    ids, rows = uncached(decoder, start, 4)
    cache = KVCache(decoder, CacheConfig(), 1)
    read(decoder, cache, 0, start, 100)
    forward(decoder, cache, [Piece(0, [ids[0], 7, 8, 9])])
    cache.truncate(0, len(start) + 1)
    passed = forward(decoder, cache, [Piece(0, ids[1:3], predicts=2)])
    torch.testing.assert_close(passed.logits[0], rows[2:4], atol=5e-5, rtol=1e-4)


def test_sparse_attention_keeps_what_it_may_still_see_and_no_more():
    decoder = tiny_decoder(**KINDS["sparse latent"])
    cache = KVCache(decoder, CacheConfig(), 1)
    read(decoder, cache, 0, prompt(words(49, 1)), 7)
    cache.settle(0, lazily=False)
    # Of 50 tokens the next sees 46 … 49 and, its stride 32 by then, 0 and 32.
    assert all(layer.index[0, : layer.held[0]].tolist() == [0, 32, 46, 47, 48, 49] for layer in cache.layers)


def test_what_is_seen_from_as_far_back_as_can_be_gone_is_kept():
    """However many of the newest are taken back: guesses, or what an answer's stop string cuts off."""
    decoder = tiny_decoder(**KINDS["sparse latent"] | {"max_position_embeddings": 400})
    cache, whole = KVCache(decoder, CacheConfig(), 1), prompt(words(390, 1))
    for begin in range(0, 390, 3):
        forward(decoder, cache, [Piece(0, whole.window(begin, begin + 3))])
        cache.settle(0)
        held = set(cache.layers[1].index[0, : cache.layers[1].held[0]].tolist())
        for back in (0, 1, 7, MOST_TAKEN_BACK):
            length = max(0, begin + 3 - back)
            seen = visible_keys(torch.tensor([length]), torch.arange(length), 5, 2, 3)[0]
            assert set(seen.nonzero().flatten().tolist()) <= held
    assert len(held) < 100


def test_linear_attention_has_no_cache():
    with pytest.raises(ConfigError, match="attention_pattern=linear"):
        KVCache(tiny_decoder(attention_pattern="linear"), CacheConfig(), 1)
