"""One training step against the literal sums, document by document, without packing."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from tiny_rows import SEQ_LEN, TINY, WIDTHS, document
from torch import Tensor

from omniloom.data.loader import Batch
from omniloom.modality.batch import MODEL_INPUTS, stack_rows
from omniloom.modality.sequence import Document, lay_row
from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder, Output
from omniloom.train.groups import TrainConfig
from omniloom.train.step import training_step, validation_loss

WEIGHTS = torch.tensor([1.0, 0.25, 3.0])  # of the three sources
QUIET = TrainConfig(balance_loss_weight=0.0, mtp_loss_weight=0.3, expert_bias_rate=0.0)
Pieces = list[tuple[Document, int]]


class OneRank:
    """What the step needs of an engine, without DeepSpeed."""

    device, skipped, rank, ranks = torch.device("cpu"), False, 0, 1

    def __init__(self, model: Decoder) -> None:
        self.model, self.rate_share = model, 0.0

    def timed(self, part: str) -> AbstractContextManager[None]:
        return nullcontext()

    def forward(self, **inputs: Any) -> Output:
        return self.model(**inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, rate_share: float, norm_limit: float) -> float:
        self.rate_share = rate_share
        return float(torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]))

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values


def decoder(depths: int) -> Decoder:
    torch.manual_seed(0)
    changed = vars(TINY) | {"num_nextn_predict_layers": depths, "initializer_range": 0.3}
    return Decoder(ModelConfig(**changed))


def rows_of_pieces() -> list[Pieces]:
    rng = np.random.default_rng(3)
    kinds = [("image",), (), ("audio", "image"), ("video",), ("audio",), ()]
    documents = [document(kind, rng) for kind in kinds]
    rows = [[(documents[0], 0), (documents[1], 1)], [(documents[2], 2)], [(documents[3], 1), (documents[4], 0)]]
    return [*rows, [(documents[5], 2)]]


def batches(micro: int) -> list[Batch]:
    rows = [lay_row(pieces, SEQ_LEN, 0, WIDTHS) for pieces in rows_of_pieces()]
    return [Batch(rows[start : start + micro]) for start in range(0, len(rows), micro)]


def literal_loss(model: Decoder, ahead: int) -> Tensor:
    """Σ w·nll / Σ w of the tokens `ahead` further on, one document at a time, one position at a time."""
    losses, weights = [], []
    for held, source in (piece for pieces in rows_of_pieces() for piece in pieces):
        fields = stack_rows([lay_row([(held, 0)], len(held), 0, WIDTHS)])
        everywhere = torch.ones(1, len(held), dtype=torch.bool)
        inputs = {name: fields[name] for name in MODEL_INPUTS}
        output = model(**inputs, predict_at=everywhere, predict_ahead_at=[everywhere] * len(model.mtp))
        logits = (output.logits, *output.mtp)[ahead - 1].double()
        for at in range(len(held) - ahead):
            if held.loss_mask[at + ahead]:
                losses.append(-logits[at].log_softmax(-1)[int(held.input_ids[at + ahead])])
                weights.append(float(WEIGHTS[source]))
    return sum(w * nll for w, nll in zip(weights, losses, strict=True)) / sum(weights)


@pytest.mark.parametrize("depths", [0, 1, 2])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_loss_is_the_literal_sum_with_each_depth_of_mtp(depths: int, micro: int) -> None:
    model = decoder(depths)
    expected = [literal_loss(model, ahead) for ahead in range(1, 2 + depths)]
    total = expected[0] + (QUIET.mtp_loss_weight * sum(expected[1:]) / depths if depths else 0)
    total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    engine = OneRank(model)
    result = training_step(engine, model, batches(micro), WEIGHTS, QUIET, rate_share=0.7)
    assert result.next_token == pytest.approx(expected[0].item(), rel=1e-5)
    assert result.mtp == (pytest.approx(sum(expected[1:]).item() / depths, rel=1e-5) if depths else None)
    assert engine.rate_share == 0.7
    assert result.tokens == sum(len(held) for pieces in rows_of_pieces() for held, _ in pieces)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() >= gradients.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient, gradients.get(name, torch.zeros_like(gradient)), rtol=1e-3, atol=1e-6, msg=name
        )


def test_the_mtp_loss_weight_scales_its_share_alone() -> None:
    """At weight 0 the module learns nothing and the rest what it learns without; its loss is measured all the same."""
    grown = {}
    for weight in (0.0, 1.0):
        model = decoder(1)
        config = TrainConfig(balance_loss_weight=0.0, mtp_loss_weight=weight, expert_bias_rate=0.0)
        result = training_step(OneRank(model), model, batches(2), WEIGHTS, config, 1.0)
        grown[weight] = result, model.mtp[0].junction.eh_proj.weight.grad.abs().max()
    assert grown[0.0][0].mtp == pytest.approx(grown[1.0][0].mtp)
    assert grown[0.0][1] == 0
    assert grown[1.0][1] > 1e-6


def test_the_bias_of_every_router_moves_the_mtp_modules_too() -> None:
    model = decoder(1)
    config = TrainConfig(expert_bias_rate=0.5)
    result = training_step(OneRank(model), model, batches(2), WEIGHTS, config, 1.0)
    assert result.routing.choices_LE.shape == (2, 4)
    for moe, counts in zip((model.layers[1].mlp, model.mtp[0].layer.mlp), result.routing.choices_LE, strict=True):
        assert counts.sum() == 2 * result.tokens
        assert torch.equal(moe.router.bias_E, 0.5 * torch.sign(counts.float().mean() - counts))


def test_a_batch_without_a_target_has_no_loss_and_no_division_by_zero() -> None:
    model = decoder(1)
    empty = Batch([lay_row([], SEQ_LEN, 0, WIDTHS)])
    result = training_step(OneRank(model), model, [empty], WEIGHTS, QUIET, 1.0)
    assert (result.next_token, result.mtp, result.tokens) == (0.0, 0.0, 0)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_validation_is_the_next_token_loss_without_mtp() -> None:
    model = decoder(2)
    losses = validation_loss(OneRank(model), [[batch] for batch in batches(2)], WEIGHTS, ["a", "b", "c"])
    assert losses["val/loss"] == pytest.approx(literal_loss(model, 1).item(), rel=1e-5)
    assert losses.keys() == {"val/loss", "val/loss/a", "val/loss/b", "val/loss/c"}
