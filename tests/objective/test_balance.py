"""The sequence-wise balance loss against a literal loop over documents."""

import pytest
import torch
from torch import Tensor

from omniloom.objective.balance import count_documents, sequence_balance

torch.set_num_threads(1)

PACKED = torch.tensor(
    [[0, 0, 0, 1, 1, 1, 1, -1, -1], [0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 2, 2, 2, 2, 2, 3, -1], [-1] * 9],
    dtype=torch.int32,
)


def literal_balance(scores: Tensor, documents: Tensor, chosen: int) -> tuple[Tensor, int]:
    """Σ_documents Σ_i f_i P_i and the number of documents; float64, differentiable."""
    experts, total, count = scores.shape[-1], scores.new_zeros(()), 0
    for row in range(len(documents)):
        for name in sorted({int(d) for d in documents[row] if d >= 0}):
            tokens = [t for t in range(documents.shape[1]) if documents[row, t] == name]
            count += 1
            for i in range(experts):
                hits, probability = 0, scores.new_zeros(())
                for t in tokens:
                    s = scores[row, t]
                    rank = sorted(range(experts), key=lambda j, s=s: -s[j].item())
                    hits += i in rank[:chosen]
                    probability = probability + s[i] / s.sum()
                f = experts / (chosen * len(tokens)) * hits
                total = total + f * probability / len(tokens)
    return total, count


@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_loss_and_gradient_equal_a_literal_loop_on_packed_rows_with_padding(chosen):
    scores = torch.rand(4, 9, 5, generator=torch.Generator().manual_seed(chosen))
    ours, theirs = scores.clone().requires_grad_(), scores.double().requires_grad_()
    loss = sequence_balance(ours, PACKED, chosen)
    expected, documents = literal_balance(theirs, PACKED, chosen)
    assert loss.dtype == torch.float32
    assert documents == count_documents(PACKED) == 7
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-6)
    loss.backward()
    expected.backward()  # the loop's f is a plain number: its gradient flows through P only
    assert theirs.grad.abs().max() > 1e-2
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-6, rtol=1e-5)
    assert not ours.grad[PACKED < 0].any()


def test_perfectly_uniform_routing_costs_exactly_one_a_document():
    experts, chosen = 4, 2
    scores = torch.full((1, 4, experts), 0.5)
    for t in range(4):  # every expert chosen equally often, every score near 0.5
        scores[0, t, [t, (t + 1) % experts]] += 1e-6
    assert float(sequence_balance(scores, torch.zeros(1, 4), chosen)) == pytest.approx(1.0, abs=1e-6)
    one_each = torch.tensor([[0, 0, 1, 1]])
    scores = torch.full((1, 4, 2), 0.5)
    scores[0, [0, 2], 0] += 1e-6
    scores[0, [1, 3], 1] += 1e-6
    assert float(sequence_balance(scores, one_each, 1)) == pytest.approx(2.0, abs=1e-6)


def test_the_worst_routing_costs_the_number_of_experts():
    scores = torch.zeros(1, 6, 8)
    scores[..., 3] = 1.0
    assert float(sequence_balance(scores, torch.zeros(1, 6), 1)) == pytest.approx(8.0)


def test_padding_may_hold_anything():
    scores = torch.rand(4, 9, 5, generator=torch.Generator().manual_seed(7))
    expected = sequence_balance(scores, PACKED, 2)
    scores[PACKED < 0] = 1e6
    assert float(sequence_balance(scores, PACKED, 2)) == float(expected)


def test_a_batch_of_padding_alone_costs_nothing_and_keeps_its_gradient():
    scores = torch.rand(2, 3, 4, requires_grad=True)
    padding = torch.full((2, 3), -1)
    loss = sequence_balance(scores, padding, 2)
    loss.backward()
    assert loss.item() == 0
    assert count_documents(padding) == 0
    assert scores.grad is not None
    assert not scores.grad.any()


def test_documents_are_counted_over_rows():
    assert count_documents(torch.zeros(3, 4, dtype=torch.int32)) == 3
    assert count_documents(torch.tensor([[0, 1, 2, -1], [0, 0, 0, 0], [-1, -1, -1, -1]])) == 4


def test_sums_over_micro_batches_are_the_sum_over_the_batch():
    scores = torch.rand(4, 9, 5, generator=torch.Generator().manual_seed(8))
    parts = sum(float(sequence_balance(scores[i : i + 1], PACKED[i : i + 1], 2)) for i in range(4))
    assert float(sequence_balance(scores, PACKED, 2)) == pytest.approx(parts, rel=1e-6)
