"""Rotary positions, running index and the 2-D encoding."""

import math

import pytest
import torch

from omniloom.model.position import apply_rope, encoding_2d, rope_table, running_index


@pytest.mark.parametrize(("width", "theta"), [(2, 10_000.0), (8, 10_000.0), (6, 50.0)])
def test_rope_equals_a_literal_loop(width, theta):
    index = torch.tensor([[0, 1, 2, 0, 1], [0, 7, 300, 4_000, 5]])
    x = torch.randn(2, 5, 3, width, generator=torch.Generator().manual_seed(0))
    out = apply_rope(x, rope_table(index, width, theta))
    expected = torch.empty(2, 5, 3, width, dtype=torch.float64)
    for b, t, h, pair in torch.cartesian_prod(*map(torch.arange, (2, 5, 3, width // 2))).tolist():
        angle = int(index[b, t]) / theta ** (2 * pair / width)
        first, second = x[b, t, h, 2 * pair : 2 * pair + 2].tolist()
        expected[b, t, h, 2 * pair] = first * math.cos(angle) - second * math.sin(angle)
        expected[b, t, h, 2 * pair + 1] = first * math.sin(angle) + second * math.cos(angle)
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=0)  # float32 angles up to 4,000
    torch.testing.assert_close(out[0].double(), expected[0], atol=1e-6, rtol=0)


def test_rope_gives_back_the_dtype_and_the_length_of_a_vector():
    x = torch.randn(1, 4, 2, 8).bfloat16()
    turned = apply_rope(x, rope_table(torch.arange(4)[None], 8, 100.0))
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned.float().norm(dim=-1), x.float().norm(dim=-1), atol=0.03, rtol=0.02)


def test_the_score_depends_on_the_distance_only():
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 8, generator=generator)

    def score(query_at: int, key_at: int) -> float:
        turned = apply_rope(
            torch.stack([query, key])[None, :, None], rope_table(torch.tensor([[query_at, key_at]]), 8, 100.0)
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


def test_the_2d_encoding_equals_its_formula():
    row, column = torch.tensor([0, 3, 15]), torch.tensor([2, 0, 7])
    encoding = encoding_2d(row, column, 16)
    assert encoding.dtype == torch.float32
    for n in range(3):
        for i in range(4):
            frequency = 10_000 ** (-i / 4)
            r, c = float(row[n]) * frequency, float(column[n]) * frequency
            expected = [math.sin(r), math.cos(r), math.sin(c), math.cos(c)]
            assert encoding[n, i::4].tolist() == pytest.approx(expected, abs=1e-5)


def test_the_2d_encoding_tells_every_patch_of_a_picture_apart():
    row, column = torch.cartesian_prod(torch.arange(16), torch.arange(16)).T
    encoding = encoding_2d(row, column, 32)
    distance = torch.cdist(encoding, encoding) + torch.eye(256) * 10
    assert distance.min() > 0.1
    at = encoding.view(16, 16, 32)
    assert (at[2, 5] - at[5, 2]).norm() > 0.5  # row and column do not change places
