"""Rotary positions, running index, the scale of queries and the encodings of places inside a medium."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from omniloom.model.config import ModelConfig
from omniloom.model.decoder import text_fields
from omniloom.model.position import (
    apply_rope,
    axial_encoding,
    log_scale,
    rope_frequencies,
    rope_table,
    running_index,
)
from tiny_decoders import tiny_config, tiny_decoder


def rotary(width: int, theta: float, **changes: Any) -> ModelConfig:
    return tiny_config(qk_rope_head_dim=width, rope_theta=theta, **changes)


@pytest.mark.parametrize(("width", "theta"), [(2, 10_000.0), (8, 10_000.0), (6, 50.0)])
def test_rope_equals_a_literal_loop(width, theta):
    index = torch.tensor([[0, 1, 2, 0, 1], [0, 7, 300, 4_000, 5]])
    x = torch.randn(2, 5, 3, width, generator=torch.Generator().manual_seed(0))
    out = apply_rope(x, rope_table(index, rotary(width, theta)))
    expected = torch.empty(2, 5, 3, width, dtype=torch.float64)
    for b, t, h, pair in torch.cartesian_prod(*map(torch.arange, (2, 5, 3, width // 2))).tolist():
        angle = int(index[b, t]) / theta ** (2 * pair / width)
        first, second = x[b, t, h, 2 * pair : 2 * pair + 2].tolist()
        expected[b, t, h, 2 * pair] = first * math.cos(angle) - second * math.sin(angle)
        expected[b, t, h, 2 * pair + 1] = first * math.sin(angle) + second * math.cos(angle)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)


def test_rope_gives_back_the_dtype_and_the_length_of_a_vector():
    x = torch.randn(1, 4, 2, 8).bfloat16()
    turned = apply_rope(x, rope_table(torch.arange(4)[None], rotary(8, 100.0)))
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned.float().norm(dim=-1), x.float().norm(dim=-1), atol=0.03, rtol=0.02)


def test_the_score_depends_on_the_distance_only():
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 8, generator=generator)

    def score(query_at: int, key_at: int) -> float:
        turned = apply_rope(
            torch.stack([query, key])[None, :, None], rope_table(torch.tensor([[query_at, key_at]]), rotary(8, 100.0))
        )
        return float(turned[0, 0, 0] @ turned[0, 1, 0])

    for distance in (0, 1, 5, 30):
        scores = [score(distance + shift, shift) for shift in (0, 1, 17, 200)]
        assert max(scores) - min(scores) < 1e-4
    assert abs(score(1, 0) - score(5, 0)) > 0.01
    assert abs(score(5, 0) - score(0, 5)) > 0.01  # before and after are not the same


def test_the_running_index_starts_again_at_each_document_and_at_padding():
    document = torch.tensor([[0, 0, 0, 1, 2, 2, -1, -1], [0, 1, 1, 1, 1, 1, 1, 1], [-1] * 8], dtype=torch.int32)
    assert running_index(document).tolist() == [
        [0, 1, 2, 0, 0, 1, 0, 1],
        [0, 0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 3, 4, 5, 6, 7],
    ]


@pytest.mark.parametrize("tokens", [2, 16, 512])
def test_the_log_scale_equals_its_formula(tokens):
    index = torch.tensor([[0, 1, 2, 3, 15, 511, 5_000], [6, 0, 7, 1, 100, 31, 2]])
    scale = log_scale(index, tokens)
    assert scale.dtype == torch.float32
    expected = [[max(0.3, math.log(t + 1) / math.log(tokens)) for t in row] for row in index.tolist()]
    torch.testing.assert_close(scale.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-6)
    assert float(log_scale(torch.tensor([[tokens - 1]]), tokens)) == pytest.approx(1.0)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("width", [12, 16, 32])
def test_the_axial_encoding_equals_a_literal_loop(width, axes):
    place = torch.tensor([[0, 2, 9], [3, 0, 1], [15, 7, 0], [59, 15, 15]], dtype=torch.int32)[:, :axes]
    encoding = axial_encoding(place, width)
    count = width // (2 * axes)
    expected = torch.zeros(4, width, dtype=torch.float64)
    for n in range(4):
        for axis in range(axes):
            for i in range(count):
                angle = int(place[n, axis]) * 10_000 ** (-i / count)
                expected[n, 2 * count * axis + i] = math.sin(angle)
                expected[n, 2 * count * axis + count + i] = math.cos(angle)
    assert encoding.dtype == torch.float32
    torch.testing.assert_close(encoding.double(), expected, atol=1e-5, rtol=0)
    assert axial_encoding(place[:0], width).shape == (0, width)


@pytest.mark.parametrize("sizes", [(300,), (16, 16), (6, 7, 7)])
def test_the_axial_encoding_tells_every_place_apart(sizes):
    place = torch.cartesian_prod(*map(torch.arange, sizes)).view(-1, len(sizes))
    encoding = axial_encoding(place, 32)
    distance = torch.cdist(encoding, encoding, compute_mode="donot_use_mm_for_euclid_dist")
    assert (distance + 10 * torch.eye(len(place))).min() > 0.1
    at = encoding.view(*sizes, 32)
    if len(sizes) == 2:
        assert (at[2, 5] - at[5, 2]).norm() > 0.5  # row and column do not change places
    if len(sizes) == 3:
        assert (at[2, 5, 1] - at[5, 2, 1]).norm() > 0.5  # nor do frame and row


YARN = {"yarn_factor": 8.0, "yarn_original_tokens": 64, "yarn_beta_fast": 4.0, "yarn_beta_slow": 1.0}


@pytest.mark.parametrize(("width", "theta"), [(8, 100.0), (64, 10_000.0), (2, 500.0)])
def test_yarn_keeps_fast_frequencies_divides_slow_ones_and_runs_linearly_between(width, theta):
    ours = rope_frequencies(rotary(width, theta, max_position_embeddings=512, **YARN))

    def index_that_turns(times: float) -> float:
        """i with 64 · theta^(−2i/width) / 2π = times."""
        return width / 2 * math.log(64 / (2 * math.pi * times)) / math.log(theta)

    low, high = max(math.floor(index_that_turns(4.0)), 0), min(math.ceil(index_that_turns(1.0)), width - 1)
    for i, frequency in enumerate(ours.tolist()):
        plain = theta ** (-2 * i / width)
        share = 0.0 if i <= low else 1.0 if i >= high else (i - low) / (high - low)
        assert frequency == pytest.approx(plain * (1 - share) + plain / 8 * share, rel=1e-12)
    assert ours[-1] < theta ** (2 / width - 1) or width == 2


@pytest.mark.parametrize("mscale", [{}, {"yarn_mscale": 0.7, "yarn_mscale_all_dim": 1.0}])
@pytest.mark.parametrize(("width", "theta"), [(8, 100.0), (64, 10_000.0)])
def test_yarn_equals_transformers(width, theta, mscale):
    config = rotary(width, theta, max_position_embeddings=512, **YARN, **mscale)
    parameters = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        **{name.removeprefix("yarn_"): value for name, value in mscale.items()},
    }
    theirs = LlamaConfig(head_dim=width, max_position_embeddings=512, rope_parameters=parameters)
    frequency, length = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    torch.testing.assert_close(rope_frequencies(config).float(), frequency, atol=0, rtol=1e-5)
    table = rope_table(torch.arange(5)[None], config)
    torch.testing.assert_close(table.abs(), torch.full_like(table.abs(), length), atol=1e-6, rtol=0)
    expected = torch.arange(5)[:, None] * frequency
    torch.testing.assert_close(table[0, :, 0].imag, length * expected.sin(), atol=1e-5, rtol=0)


def test_angles_of_a_million_tokens_are_exact():
    index = 1_000_003
    table = rope_table(torch.tensor([[index]]), rotary(8, 10_000.0))
    for pair in range(4):
        angle = index / 10_000 ** (pair / 4)
        assert complex(table[0, 0, 0, pair]) == pytest.approx(complex(math.cos(angle), math.sin(angle)), abs=1e-6)


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
@torch.no_grad()
def test_positions_are_added_to_the_embeddings_by_the_index_in_the_document(kind):
    decoder = tiny_decoder(attention="grouped", position=kind, num_hidden_layers=1)
    seen = []
    decoder.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    fields = text_fields(torch.arange(10, 22).view(2, 6), decoder.config)
    fields["document"] = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, 0, 0]])
    decoder(**fields)
    grown = math.sqrt(32) if kind == "sinusoidal" else 1.0
    added = seen[0] - grown * decoder.embed_tokens(fields["input_ids"])
    for row, places in enumerate([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]):
        for t, index in enumerate(places):
            if kind == "learned":
                expected = decoder.embed_positions.weight[index]
            else:
                angles = [index * 10_000 ** (-i / 16) for i in range(16)]
                expected = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])
            torch.testing.assert_close(added[row, t], expected, atol=1e-5, rtol=0)
