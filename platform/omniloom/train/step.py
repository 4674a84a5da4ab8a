"""One optimizer step, and one validation: the loss of a whole global batch, whatever the ranks and micro batches.

B batch, T tokens, M targets, E experts, L mixture-of-experts layers, S sources.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from omniloom.data.loader import Batch
from omniloom.model.decoder import Decoder, Output
from omniloom.model.moe import MixtureOfExperts, update_expert_bias
from omniloom.model.position import WHOLE_ROWS, Rows
from omniloom.objective.balance import count_documents, sequence_balance
from omniloom.objective.next_token import next_token_nll, shifted_targets
from omniloom.train.config import TrainConfig
from omniloom.train.engine import Engine


@dataclass
class StepResult:
    """What one step measured, already over the whole global batch."""

    next_token: float
    mtp: float | None  # mean over the multi-token-prediction modules, where there are any
    balance: float
    grad_norm: float
    tokens: int  # positions that hold a token, padding excluded
    tokens_per_expert_LE: Tensor


class Targets(NamedTuple):
    """What a batch predicts, a number of tokens ahead."""

    predict_at_BT: Tensor
    ids_M: Tensor
    weight_M: Tensor


def training_step(
    engine: Engine, model: Decoder, batches: list[Batch], loss_weight_S: Tensor, config: TrainConfig, rate_share: float
) -> StepResult:
    """loss = Σ w·nll / Σ w + λ · mean over depths of the same ahead + α · mean balance; then the optimizer, the bias.

    All sums are over the whole global batch.
    """
    depths = model.config.num_nextn_predict_layers
    rows = model.rows
    targets = [[_targets(batch, loss_weight_S, rows, 1 + depth) for depth in range(1 + depths)] for batch in batches]
    totals = [sum(float(of_batch[depth].weight_M.sum()) for of_batch in targets) for depth in range(1 + depths)]
    totals.append(sum(count_documents(batch.fields["document"]) for batch in batches) / rows.parts)
    totals.append(float(sum(int((rows.cut(batch.fields["document"]) >= 0).sum()) for batch in batches)))
    held = torch.tensor(totals, dtype=torch.float64, device=engine.device)
    *total_weights, total_documents, total_tokens = engine.sum_over_ranks(held).tolist()

    sums = torch.zeros(2 + depths, dtype=torch.float64, device=engine.device)
    counts_LE = None
    for batch, ahead in zip(batches, targets, strict=True):
        loss, parts, counts = _micro_batch(engine, model, batch, ahead, total_weights, total_documents, config)
        engine.backward(loss)
        sums += parts
        counts_LE = counts if counts_LE is None or counts is None else counts_LE + counts
    grad_norm = engine.step(rate_share)

    mean_nll, mean_balance, *mean_mtp = engine.sum_over_ranks(sums).tolist()
    counts_LE = torch.zeros(0, 0) if counts_LE is None else engine.sum_over_ranks(counts_LE)
    if not engine.skipped:
        _move_biases(model, counts_LE, config)
    mtp_mean = sum(mean_mtp) / depths if depths else None
    return StepResult(mean_nll, mtp_mean, mean_balance, grad_norm, int(total_tokens), counts_LE)


def _micro_batch(
    engine: Engine,
    model: Decoder,
    batch: Batch,
    targets: list[Targets],
    total_weights: list[float],
    total_documents: float,
    config: TrainConfig,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One forward pass: its share of the loss, of next-token, balance and each module's loss, and the experts' counts.

    The logits end with this function: the backward pass does not need them.
    """
    output: Output = engine.forward(
        **batch.model_inputs(),
        predict_at=targets[0].predict_at_BT,
        predict_ahead_at=[t.predict_at_BT for t in targets[1:]],
    )
    assert output.logits is not None
    next_token, *mtp = (
        _share(logits, target, total)
        for logits, target, total in zip((output.logits, *output.mtp), targets, total_weights, strict=True)
    )
    balance = _balance(output, batch.fields["document"], model) / total_documents
    loss = next_token + config.balance_loss_weight * balance
    if mtp:
        loss = loss + config.mtp_loss_weight * torch.stack(mtp).mean()  # Eq. 25
    counts_LE = torch.stack([router.tokens_per_expert_E for router in output.router]) if output.router else None
    return loss, torch.stack([next_token, balance, *mtp]).detach().double(), counts_LE


def _targets(batch: Batch, loss_weight_S: Tensor, rows: Rows, ahead: int) -> Targets:
    """Those of the tokens that are computed here."""
    fields = batch.fields
    predict_at, ids = shifted_targets(fields["input_ids"], fields["document"], fields["loss_mask"], ahead)
    if rows.parts > 1:
        is_ours = torch.zeros_like(predict_at)
        rows.cut(is_ours).fill_(True)
        predict_at, ids = predict_at & is_ours, ids[is_ours[predict_at]]
    return Targets(predict_at, ids, loss_weight_S[fields["source"][predict_at].long()])


def _share(logits_MV: Tensor, target: Targets, total_weight: float) -> Tensor:
    """This micro batch's share of Σ w·nll / Σ w; a global batch without a target has no loss, not a division by 0."""
    return (target.weight_M * next_token_nll(logits_MV, target.ids_M)).sum() / max(total_weight, 1e-12)


def _balance(output: Output, document: Tensor, model: Decoder) -> Tensor:
    """Mean over layers of the sequence-wise balance loss, summed over the batch's documents."""
    chosen, rows = model.config.num_experts_per_tok, model.rows
    per_layer = [
        sequence_balance(router.scores_BTE, document, chosen, rows.cut, rows.total) for router in output.router
    ]
    return torch.stack(per_layer).mean() if per_layer else output.hidden.sum() * 0.0


def sparse_layers(model: Decoder) -> list[tuple[int, MixtureOfExperts]]:
    """The mixture-of-experts layers with their index in the decoder; the modules of multi-token prediction go on."""
    layers = [*model.layers, *(module.layer for module in model.mtp)]
    return [(i, layer.mlp) for i, layer in enumerate(layers) if isinstance(layer.mlp, MixtureOfExperts)]


@torch.no_grad()
def _move_biases(model: Decoder, counts_LE: Tensor, config: TrainConfig) -> None:
    for (_, moe), counts_E in zip(sparse_layers(model), counts_LE, strict=True):
        bias_E = moe.router.bias_E
        if bias_E is None:  # softmax routing balances by the loss alone
            continue
        bias_E.copy_(update_expert_bias(bias_E, counts_E, config.expert_bias_rate, config.expert_bias_tolerance))


@torch.no_grad()
def validation_loss(
    engine: Engine,
    batches: Iterable[list[Batch]],
    loss_weight_S: Tensor,
    source_names: list[str],
    rows: Rows = WHOLE_ROWS,
) -> dict[str, float]:
    """Held-out loss: `val/loss` = Σ w·nll / Σ w as in training, and each source's own mean."""
    engine.train(False)
    sums = torch.zeros(2, len(source_names), dtype=torch.float64, device=engine.device)  # Σ nll and targets
    for (batch,) in batches:
        batch.to(engine.device)
        predict_at, target_ids, _ = _targets(batch, loss_weight_S, rows, 1)
        output: Output = engine.forward(**batch.model_inputs(), predict_at=predict_at)
        assert output.logits is not None
        source = batch.fields["source"][predict_at].long()
        nll = next_token_nll(output.logits, target_ids).double()
        sums.index_add_(1, source, torch.stack([nll, torch.ones_like(nll)]))
    engine.train(True)
    nll_S, targets_S = engine.sum_over_ranks(sums)
    weight_S = loss_weight_S.double()
    losses = {"val/loss": float((weight_S * nll_S).sum() / (weight_S * targets_S).sum())}
    for name, nll, targets in zip(source_names, nll_S.tolist(), targets_S.tolist(), strict=True):
        if targets:
            losses[f"val/loss/{name}"] = nll / targets
    return losses
