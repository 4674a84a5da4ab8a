"""Operations and cache bytes against torch's own counter, the sparse rule in words, and published figures."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_params import PRESETS, preset
from torch.utils.flop_counter import FlopCounterMode

from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder, text_fields
from omniloom.plan.cache import kv_cache_bytes_per_token
from omniloom.plan.flops import (
    attention_flops_per_token,
    forward_flops_per_token,
    matmul_parameters,
    mtp_flops_per_token,
    train_flops,
    train_flops_6nd,
    visible_keys,
)

TINY = [name for name in PRESETS if name.startswith("tiny") or name == "smoke"]
TOKENS = 24


def grouped_mm_flops(
    rows: torch.Size, weight: torch.Size, *rest: object, out_shape: object = None, **more: object
) -> int:
    return 2 * rows[0] * weight[1] * weight[2]


def product_flops(config: ModelConfig) -> tuple[int, int]:
    """What torch counts of a forward pass over one document, attention left out: the main model, and its modules."""
    torch.manual_seed(0)
    decoder = Decoder(config)
    fields = text_fields(torch.randint(0, config.vocab_size, (1, TOKENS)), config)
    everywhere = torch.ones_like(fields["document"], dtype=torch.bool)
    counts = []
    for modules in (0, config.num_nextn_predict_layers):
        mapping = {torch.ops.aten._grouped_mm: grouped_mm_flops}
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
            decoder(**fields, predict_at=everywhere, predict_ahead_at=[everywhere] * modules)
        by_operation = counter.get_flop_counts()["Global"]
        counts.append(sum(count for operation, count in by_operation.items() if "attention" not in str(operation)))
    return counts[0], counts[1] - counts[0]


@pytest.mark.parametrize("name", TINY)
def test_matrix_products_are_those_that_torch_counts(name: str) -> None:
    config = replace(preset(name), attention_pattern="full")
    main, ahead = product_flops(config)
    assert 2 * matmul_parameters(config) * TOKENS == main
    attention = config.num_nextn_predict_layers * attention_flops_per_token(config, TOKENS)
    assert round((mtp_flops_per_token(config, TOKENS) - attention) * TOKENS) == ahead


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 400), st.integers(1, 40), st.integers(1, 9), st.integers(1, 12))
def test_visible_keys_are_the_mean_of_the_sparse_rule_in_words(
    tokens: int, window: int, stride: int, most: int
) -> None:
    config = replace(
        preset("tiny_omni"),
        window_tokens=window,
        global_stride=stride,
        max_global_tokens=most,
        attention_pattern="sparse",
    )
    seen = 0
    for t in range(tokens):
        step = stride
        while len(range(0, t + 1, step)) > most:
            step *= 2
        seen += len({*range(max(0, t - window + 1), t + 1), *range(0, t + 1, step)})
    assert visible_keys(config, tokens) == pytest.approx(seen / tokens, rel=1e-12)
    assert visible_keys(replace(config, attention_pattern="full"), tokens) == (tokens + 1) / 2


def test_a_million_tokens_cost_sparse_attention_a_hundredth() -> None:
    config = preset("omni_large")
    assert visible_keys(config, 1_000_000) <= config.window_tokens + config.max_global_tokens
    full = replace(config, attention_pattern="full")
    assert attention_flops_per_token(full, 1_000_000) > 100 * attention_flops_per_token(config, 1_000_000)


def test_a_forward_pass_of_one_small_model_by_hand() -> None:
    config = ModelConfig(
        vocab_size=10, hidden_size=8, num_hidden_layers=2, attention="grouped", num_attention_heads=2,
        num_key_value_heads=1, attention_bias=True, n_routed_experts=0, intermediate_size=16, activation="relu",
        mlp_bias=True, image_patch_pixels=None, video_patch_pixels=None, audio_mels=None,
    )  # fmt: skip
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 2 * 8 * 16
    keys = (5 + 1) / 2
    assert forward_flops_per_token(config, 5) == 2 * (2 * layer + 10 * 8) + 2 * (2 * 2 * 2 * 4 * keys)
    assert train_flops(config, 5, 100) == 3 * 100 * forward_flops_per_token(config, 5)
    assert kv_cache_bytes_per_token(config) == 2 * 2 * 2 * 1 * 4
    assert kv_cache_bytes_per_token(replace(config, attention_pattern="linear")) == 0


def test_published_training_figures_follow_from_the_sizes() -> None:
    gpt3, deepseek = preset("gpt3_175b"), preset("deepseek_v3")
    assert train_flops_6nd(gpt3, 300 * 10**9) == pytest.approx(3.14e23, rel=0.01)
    hours = train_flops_6nd(deepseek, 14_800 * 10**9) / 340e12 / 3600
    assert hours == pytest.approx(2.664e6, rel=0.01)
    assert 2.0 * (hours + 0.119e6 + 0.005e6) == pytest.approx(5.576e6, rel=0.01)
    assert train_flops(gpt3, 2_048, 10**9) > train_flops_6nd(gpt3, 10**9)  # attention is counted
    wider = replace(deepseek, moe_intermediate_size=2_304)
    assert train_flops_6nd(wider, 1) > 1.05 * train_flops_6nd(deepseek, 1)


def test_the_latent_cache_is_576_numbers_a_token_and_layer() -> None:
    deepseek = preset("deepseek_v3")
    assert kv_cache_bytes_per_token(deepseek) == 70_272 == (512 + 64) * 61 * 2
    assert kv_cache_bytes_per_token(preset("llama_8b")) == 2 * 8 * 128 * 32 * 2
