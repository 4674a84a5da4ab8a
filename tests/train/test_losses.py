"""Every objective of a step has its weight and its own figure; validation has one of each source."""

import pytest
import torch
from test_alignment import OneRank, batches, decoder
from test_step import WEIGHTS, literal_loss, rows_of_pieces
from test_step import batches as batches_of_sources
from test_step import decoder as decoder_of_depth
from tiny_rows import WIDTHS
from torch import Tensor

from omniloom.modality.batch import MODEL_INPUTS, stack_rows
from omniloom.modality.sequence import lay_row
from omniloom.train.groups import AlignConfig, TrainConfig
from omniloom.train.step import training_step, validation_loss


def test_each_loss_is_weighted_by_its_key_and_measured_whatever_its_weight() -> None:
    """The gradient of the sum is the weighted sum of the gradients of each loss alone."""
    weights = {"next_token": 0.5, "mtp": 0.25, "balance": 2.0, "align": 3.0}

    def step(used: dict[str, float]) -> tuple[dict[str, float], dict[str, Tensor]]:
        model = decoder()
        config = TrainConfig(
            next_token_loss_weight=used.get("next_token", 0.0),
            mtp_loss_weight=used.get("mtp", 0.0),
            balance_loss_weight=used.get("balance", 0.0),
        )
        align = AlignConfig(weight=used.get("align", 0.0), temperature=0.2)
        result = training_step(OneRank(model), model, batches(2), torch.ones(1), config, 1.0, align=align)
        told = {"next_token": result.next_token, "mtp": result.mtp, "balance": result.balance} | result.alignment
        return told, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    told, together = step(weights)
    alone = {name: step({name: 1.0}) for name in weights}
    assert {"next_token", "mtp", "balance", "loss/contrastive", "loss/contrastive/image_text"} <= told.keys()
    for name, (measured, _) in alone.items():
        common = {key: value for key, value in told.items() if key in measured}
        assert measured == pytest.approx(common), name
        assert ("loss/contrastive" in measured) == (name == "align"), "at weight 0 no pair is run"
    for parameter, gradient in together.items():
        expected = sum(w * alone[name][1].get(parameter, torch.zeros(())) for name, w in weights.items())
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5, msg=parameter)


def test_validation_tells_the_mean_loss_of_each_sources_targets_and_the_weighted_one_of_all() -> None:
    model = decoder_of_depth(0)
    losses: dict[int, list[float]] = {}
    for held, source in (piece for pieces in rows_of_pieces() for piece in pieces):
        fields = stack_rows([lay_row([(held, 0)], len(held), 0, WIDTHS)])
        inputs = {name: fields[name] for name in MODEL_INPUTS}
        logits = model(**inputs, predict_at=torch.ones(1, len(held), dtype=torch.bool)).logits.double()
        for at in range(len(held) - 1):
            if held.loss_mask[at + 1]:
                losses.setdefault(source, []).append(-logits[at].log_softmax(-1)[int(held.input_ids[at + 1])].item())
    told = validation_loss(OneRank(model), [[batch] for batch in batches_of_sources(2)], WEIGHTS, ["a", "b", "c"])
    means = [sum(losses[source]) / len(losses[source]) for source in range(3)]
    assert [told[f"val/loss/{name}"] for name in "abc"] == pytest.approx(means, rel=1e-5)
    assert len({round(mean, 3) for mean in means}) == 3
    assert told["val/loss"] == pytest.approx(literal_loss(model, 1).item(), rel=1e-5)
