"""Latent attention against a literal loop in float64."""

import math

import pytest
import torch
from torch import Tensor

from omniloom.model.config import ModelConfig
from omniloom.model.mla import LatentAttention
from tiny_decoders import enliven, text_places, tiny_config

DOCUMENTS = [[0, 0, 0, 0, 1, 1, 1, 2, 2, -1, -1], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return gain * x / math.sqrt(sum(float(v) ** 2 for v in x) / len(x) + eps)


def turn(x: Tensor, index: int, theta: float) -> Tensor:
    """RoPE on the pairs (x₀, x₁), (x₂, x₃), …"""
    turned = x.clone()
    for pair in range(len(x) // 2):
        angle = index / theta ** (2 * pair / len(x))
        a, b = x[2 * pair], x[2 * pair + 1]
        turned[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        turned[2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
    return turned


def literal_attention(
    module: LatentAttention,
    config: ModelConfig,
    hidden: Tensor,
    document: list[int],
    scale_tokens: int | None = None,
) -> Tensor:
    """One row, (T, D) → (T, D): a loop over heads, queries and keys."""
    weight = {name: tensor.double() for name, tensor in module.state_dict().items()}
    nope, rope, value, heads = (
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
        config.num_attention_heads,
    )
    index = [sum(document[s] == document[t] >= 0 for s in range(t)) for t in range(len(document))]
    queries, keys, values = [], [], []
    for t, h in enumerate(hidden):
        if config.q_lora_rank is None:
            query = weight["q_proj.weight"] @ h
        else:
            latent = rms_norm(weight["q_a_proj.weight"] @ h, weight["q_a_layernorm.weight"], config.norm_eps)
            query = weight["q_b_proj.weight"] @ latent
        compressed = weight["kv_a_proj_with_mqa.weight"] @ h
        latent = rms_norm(compressed[: config.kv_lora_rank], weight["kv_a_layernorm.weight"], config.norm_eps)
        up = weight["kv_b_proj.weight"] @ latent
        key_rope = turn(compressed[config.kv_lora_rank :], index[t], config.rope_theta)
        query = query.view(heads, nope + rope)
        up = up.view(heads, nope + value)
        queries.append([torch.cat([q[:nope], turn(q[nope:], index[t], config.rope_theta)]) for q in query])
        keys.append([torch.cat([u[:nope], key_rope]) for u in up])
        values.append([u[nope:] for u in up])
    out = []
    for t in range(len(hidden)):
        read = []
        for head in range(heads):
            seen = [s for s in range(t + 1) if document[s] == document[t]]
            scale = max(0.3, math.log(index[t] + 1) / math.log(scale_tokens)) if scale_tokens else 1.0
            scores = [scale * float(queries[t][head] @ keys[s][head]) / math.sqrt(nope + rope) for s in seen]
            peak = max(scores)
            shares = [math.exp(score - peak) for score in scores]
            read.append(sum(share / sum(shares) * values[s][head] for share, s in zip(shares, seen, strict=True)))
        out.append(weight["o_proj.weight"] @ torch.cat(read))
    return torch.stack(out)


@pytest.mark.parametrize("q_lora_rank", [None, 10])
@pytest.mark.parametrize(("v_head_dim", "scale_tokens"), [(4, None), (10, None), (16, None), (10, 3), (4, 64)])
def test_latent_attention_equals_a_literal_loop_on_packed_rows(q_lora_rank, v_head_dim, scale_tokens):
    # The key is 6 + 4 wide.
    config = tiny_config(q_lora_rank=q_lora_rank, v_head_dim=v_head_dim, attention_log_scale_tokens=scale_tokens)
    module = LatentAttention(config)
    enliven(module)
    hidden = torch.randn(2, 11, config.hidden_size, generator=torch.Generator().manual_seed(1))
    out = module(hidden, text_places(torch.tensor(DOCUMENTS), config)).double()
    expected = torch.stack(
        [literal_attention(module, config, hidden[row].double(), DOCUMENTS[row], scale_tokens) for row in range(2)]
    )
    assert expected.std() > 0.5
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("q_lora_rank", [None, 10])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"yarn_factor": 4.0, "yarn_original_tokens": 16, "yarn_mscale_all_dim": 1.0},
        {"attention_pattern": "sparse", "window_tokens": 3, "global_stride": 2, "max_global_tokens": 2},
    ],
    ids=["full", "yarn", "sparse"],
)
@torch.no_grad()
def test_the_absorbed_form_equals_the_training_form(more, q_lora_rank, interleave):
    """A prompt of 7 at once, one token at a time, three at once: each answer as in one pass over all."""
    config = tiny_config(q_lora_rank=q_lora_rank, rope_interleave=interleave, attention_log_scale_tokens=16, **more)
    module = LatentAttention(config)
    enliven(module)
    hidden = torch.randn(2, 13, config.hidden_size, generator=torch.Generator().manual_seed(1))
    places = text_places(torch.zeros(2, 13, dtype=torch.long), config)
    expected = module(hidden, places)
    assert expected.std() > 0.5
    latent, key_rope = module.compress(hidden, places)
    assert latent.shape[-1] + key_rope.shape[-1] == config.kv_lora_rank + config.qk_rope_head_dim
    for begin, end in [(0, 7), (7, 8), (8, 9), (9, 10), (10, 13)]:
        here = places._replace(rope=places.rope[:, begin:end], query_scale_BT=places.query_scale_BT[:, begin:end])
        sees = torch.tensor([[[_sees(config, query, key) for key in range(end)] for query in range(begin, end)]])
        queries = module._queries(hidden[:, begin:end], here)
        out = module.absorbed(*queries, latent[:, :end], key_rope[:, :end], sees.expand(2, -1, -1))
        torch.testing.assert_close(module.o_proj(out.flatten(-2)), expected[:, begin:end], atol=2e-5, rtol=1e-5)


def _sees(config: ModelConfig, query: int, key: int) -> bool:
    if config.attention_pattern == "full":
        return key <= query
    stride = config.global_stride
    while query // stride >= config.max_global_tokens:
        stride *= 2
    return key <= query and (key > query - config.window_tokens or key % stride == 0)
