"""The symmetric contrastive loss and retrieval against literal loops over pairs."""

import math

import pytest
import torch
from torch import Tensor
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from omniloom.objective.contrastive import alike, retrieval_at_1, similarity, symmetric_contrastive

torch.set_num_threads(1)


def sides(pairs: int, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(pairs, width, generator=generator) * 3, torch.randn(pairs, width, generator=generator)


def apart(pairs: int) -> Tensor:
    return torch.eye(pairs, dtype=torch.bool)


def literal(left: Tensor, right: Tensor, alike: Tensor, temperature: float) -> Tensor:
    """Each pair's loss in float64, one exponential after the other; differentiable."""
    pairs = range(len(left))

    def score(n: int, m: int) -> Tensor:
        return left[n] @ right[m] / (left[n].norm() * right[m].norm()) / temperature

    losses = []
    for n in pairs:
        others = [m for m in pairs if m == n or not alike[n, m]]
        right_given_left = score(n, n).exp() / sum(score(n, m).exp() for m in others)
        left_given_right = score(n, n).exp() / sum(score(m, n).exp() for m in others)
        losses.append(-right_given_left.log() - left_given_right.log())
    return torch.stack(losses)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("some_alike", [False, True])
def test_losses_and_gradients_equal_a_literal_loop(temperature: float, some_alike: bool) -> None:
    held = sides(7)
    same = alike(torch.tensor([1, 2, 1, 4, 5, 6, 7]), torch.tensor([1, 2, 3, 2, 5, 6, 1])) if some_alike else apart(7)
    ours = [side.clone().requires_grad_() for side in held]
    theirs = [side.double().requires_grad_() for side in held]
    losses = symmetric_contrastive(*ours, same, temperature)
    expected = literal(*theirs, same, temperature)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    losses.mean().backward()
    expected.mean().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert other.grad.abs().max() > 1e-3
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-6)


def test_it_is_twice_the_loss_of_clip() -> None:
    left, right = sides(9)
    losses = symmetric_contrastive(left, right, apart(9), 0.07)
    theirs = image_text_contrastive_loss(similarity(right, left) / 0.07)
    assert float(losses.mean()) == pytest.approx(2 * float(theirs), rel=1e-6)


def test_a_pair_alone_or_with_none_but_alike_costs_nothing_and_has_no_gradient() -> None:
    for pairs, same in ((1, apart(1)), (3, torch.ones(3, 3, dtype=torch.bool))):
        left, right = (side.requires_grad_() for side in sides(pairs))
        losses = symmetric_contrastive(left, right, same, 0.07)
        assert torch.equal(losses, torch.zeros(pairs))
        losses.sum().backward()
        assert not left.grad.any()
        assert not right.grad.any()


def test_what_cannot_be_told_apart_costs_twice_the_logarithm_of_the_pairs() -> None:
    left, right = torch.ones(5, 4), torch.ones(5, 4)
    losses = symmetric_contrastive(left, right, apart(5), 0.07)
    torch.testing.assert_close(losses, torch.full((5,), 2 * math.log(5)))


def test_the_length_of_an_embedding_says_nothing_and_bf16_is_read_in_float32() -> None:
    left, right = sides(6)
    losses = symmetric_contrastive(left, right, apart(6), 0.07)
    torch.testing.assert_close(symmetric_contrastive(left * 50, right / 50, apart(6), 0.07), losses)
    assert symmetric_contrastive(left.bfloat16(), right.bfloat16(), apart(6), 0.07).dtype == torch.float32


def test_pairs_are_alike_by_either_side() -> None:
    same = alike(torch.tensor([1, 1, 3, 4]), torch.tensor([5, 6, 6, 8]))
    assert same.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


def test_retrieval_by_hand() -> None:
    left = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.1], [0.6, 0.7]])
    right = torch.tensor([[2.0, 0.1], [0.1, 9.0], [0.0, -1.0], [-5.0, 0.0]])
    # left finds right 0, 1, 3, 1; right finds left 0, 1, 0, 2.
    assert retrieval_at_1(left, right, apart(4)) == (0.5, 0.5, 0.25)
    same = alike(torch.arange(4), torch.tensor([5, 6, 7, 6]))  # the second and the fourth have one text
    assert retrieval_at_1(left, right, same) == (0.75, 0.5, 6 / 16)


def test_retrieval_finds_by_chance_what_chance_finds() -> None:
    left, right = sides(400, width=16)
    there, back, chance = retrieval_at_1(left, right, apart(400))
    assert chance == pytest.approx(1 / 400)
    assert there < 0.02
    assert back < 0.02
    assert retrieval_at_1(left, left, apart(400))[:2] == (1.0, 1.0)
