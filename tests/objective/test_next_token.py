"""Targets of packed rows, and their negative log-likelihood."""

import math

import pytest
import torch

from omniloom.objective.next_token import next_token_nll, shifted_targets

torch.set_num_threads(1)


def test_targets_by_hand():
    #                        document 0      | 1       | padding
    ids = torch.tensor([[1, 10, 11, 12, 2, 1, 20, 2, 9, 9]], dtype=torch.int32)
    document = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, -1, -1]], dtype=torch.int32)
    loss_mask = torch.tensor([[0, 1, 0, 1, 1, 0, 1, 1, 0, 0]], dtype=torch.uint8)
    predict_at, targets = shifted_targets(ids, document, loss_mask)
    assert predict_at.dtype == torch.bool
    assert targets.dtype == torch.int64
    assert predict_at.int().tolist() == [[1, 0, 1, 1, 0, 1, 1, 0, 0, 0]]
    assert targets.tolist() == [10, 12, 2, 20, 2]


def test_a_document_border_is_never_crossed_even_where_the_next_token_is_a_target():
    ids = torch.arange(6)[None]
    document = torch.tensor([[0, 0, 1, 1, 2, -1]])
    predict_at, targets = shifted_targets(ids, document, torch.ones_like(ids))
    assert predict_at.int().tolist() == [[1, 0, 1, 0, 0, 0]]
    assert targets.tolist() == [1, 3]


def test_padding_is_no_target_even_where_the_mask_says_so():
    ids = torch.arange(4)[None]
    predict_at, targets = shifted_targets(ids, torch.tensor([[0, 0, -1, -1]]), torch.ones_like(ids))
    assert predict_at.int().tolist() == [[1, 0, 0, 0]]
    assert targets.tolist() == [1]


def test_the_last_column_predicts_nothing_and_nothing_wraps_round_to_another_row():
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    predict_at, targets = shifted_targets(ids, torch.zeros_like(ids), torch.ones_like(ids))
    assert not predict_at[:, -1].any()
    assert targets.tolist() == [6, 7, 9, 10]


@pytest.mark.parametrize("ahead", [1, 2, 3, 29, 30, 40])
def test_rows_equal_a_loop_over_positions(ahead):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 99, (5, 30), generator=generator)
    document = (torch.rand(5, 30, generator=generator) < 0.15).cumsum(1)
    document[:3, 25:] = -1
    document[4] = 0
    loss_mask = torch.randint(0, 2, (5, 30), generator=generator)
    loss_mask[:, 29] = 1
    predict_at, targets = shifted_targets(ids, document, loss_mask, ahead)
    expected = [
        (row, t, int(ids[row, t + ahead]))
        for row in range(5)
        for t in range(30 - ahead)
        if document[row, t + ahead] == document[row, t] and document[row, t + ahead] >= 0 and loss_mask[row, t + ahead]
    ]
    assert len(expected) >= {1: 20, 2: 20, 3: 20, 29: 1}.get(ahead, 0)
    assert predict_at.shape == ids.shape
    assert predict_at.nonzero().tolist() == [[row, t] for row, t, _ in expected]
    assert targets.tolist() == [target for *_, target in expected]


def test_two_ahead_by_hand():
    #                       document 0      | 1       | padding
    ids = torch.tensor([[1, 10, 11, 12, 2, 1, 20, 2, 9, 9]], dtype=torch.int32)
    document = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, -1, -1]], dtype=torch.int32)
    loss_mask = torch.tensor([[0, 1, 0, 1, 1, 0, 1, 1, 0, 0]], dtype=torch.uint8)
    predict_at, targets = shifted_targets(ids, document, loss_mask, ahead=2)
    assert predict_at.int().tolist() == [[0, 1, 1, 0, 0, 1, 0, 0, 0, 0]]
    assert targets.tolist() == [12, 2, 2]


def test_a_row_of_one_token_has_no_target():
    predict_at, targets = shifted_targets(torch.ones(2, 1), torch.zeros(2, 1), torch.ones(2, 1))
    assert predict_at.shape == (2, 1)
    assert not predict_at.any()
    assert targets.shape == (0,)


def test_the_loss_equals_a_literal_log_softmax():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(12, 23, generator=generator) * 5
    targets = torch.randint(0, 23, (12,), generator=generator)
    nll = next_token_nll(logits, targets)
    expected = []
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        peak = max(row)
        expected.append(peak + math.log(sum(math.exp(value - peak) for value in row)) - row[target])
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=1e-6)


def test_the_loss_is_float32_on_bf16_logits_and_empty_where_nothing_is_asked():
    logits = torch.tensor([[100.0, 100.0, 100.0, -100.0]]).bfloat16()
    nll = next_token_nll(logits, torch.tensor([2]))
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, torch.tensor([math.log(3)]))
    assert next_token_nll(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)).shape == (0,)
