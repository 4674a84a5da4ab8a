"""One optimizer step, and one validation: the loss of a whole global batch, whatever the ranks and micro batches.

B batch, T tokens, M targets, E experts, L mixture-of-experts layers, S sources.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from omniloom.data.loader import Batch
from omniloom.model.decoder import Decoder, Output
from omniloom.model.moe import update_expert_bias
from omniloom.model.position import WHOLE_ROWS, Rows
from omniloom.objective.balance import count_documents, sequence_balance
from omniloom.objective.next_token import next_token_nll, shifted_targets
from omniloom.train.alignment import Alignment
from omniloom.train.engine import Engine
from omniloom.train.groups import AlignConfig, TrainConfig
from omniloom.train.health import Routing, add_up, sparse_layers

NO_ALIGNMENT = AlignConfig()
MODALITIES = ("text", "image", "audio", "video")  # by the number that a position holds


@dataclass
class StepResult:
    """What one step measured, already over the whole global batch."""

    next_token: float
    mtp: float | None  # mean over the multi-token-prediction modules, where there are any
    balance: float
    grad_norm: float
    tokens_by_modality: list[int]  # positions that hold a token, padding excluded
    row_tokens: int  # positions of a row
    routing: Routing
    skipped: bool  # neither weights nor biases have moved
    alignment: dict[str, float] = field(default_factory=dict)  # by the keys of metrics.jsonl

    @property
    def tokens(self) -> int:
        """Of all modalities."""
        return sum(self.tokens_by_modality)


class Targets(NamedTuple):
    """What a batch predicts, a number of tokens ahead."""

    predict_at_BT: Tensor
    ids_M: Tensor
    weight_M: Tensor


class Totals(NamedTuple):
    """Of the whole global batch."""

    weights: list[float]  # Σ w of the targets, by how far ahead they lie
    documents: float
    tokens: list[int]  # by modality


def training_step(
    engine: Engine,
    model: Decoder,
    batches: list[Batch],
    loss_weight_S: Tensor,
    config: TrainConfig,
    rate_share: float,
    norm_limit: float = math.inf,
    align: AlignConfig = NO_ALIGNMENT,
) -> StepResult:
    """loss = Σ w·nll / Σ w + λ · mean over depths of the same ahead + α · mean balance; then the optimizer, the bias.

    The first has a weight too, and the mean contrastive loss of the pairs may come to it. All sums are over the whole
    global batch. Neither moves where the gradients' norm is not finite, or over its limit.
    """
    with engine.timed("forward"):
        alignment = Alignment(engine, batches, align) if align.weight else None
    depths = model.config.num_nextn_predict_layers
    rows = model.rows
    targets = [[_targets(batch, loss_weight_S, rows, 1 + depth) for depth in range(1 + depths)] for batch in batches]
    totals = _add_up_batch(engine, batches, targets, rows)
    sums = torch.zeros(2 + depths, dtype=torch.float64, device=engine.device)
    routed = []
    for number, (batch, ahead) in enumerate(zip(batches, targets, strict=True)):
        with engine.timed("forward"):
            loss, parts, routing_2LE = _micro_batch(engine, model, batch, ahead, totals, config)
            if alignment is not None:
                loss = loss + alignment.share(number)
        with engine.timed("backward"):
            engine.backward(loss)
        sums += parts
        routed.append(routing_2LE)
    with engine.timed("optimizer"):
        grad_norm = engine.step(rate_share, norm_limit)

    routed_2LE = torch.stack(routed).sum(0)
    summed = engine.sum_over_ranks(torch.cat([sums, routed_2LE.flatten()]))
    mean_nll, mean_balance, *mean_mtp = summed[: len(sums)].tolist()
    routing = Routing(*summed[len(sums) :].view_as(routed_2LE))
    if not engine.skipped:
        _move_biases(model, routing.choices_LE, config)
    mtp_mean = sum(mean_mtp) / depths if depths else None
    row_tokens = batches[0].fields["document"].shape[1]
    aligned = {} if alignment is None else alignment.measured
    return StepResult(
        mean_nll, mtp_mean, mean_balance, grad_norm, totals.tokens, row_tokens, routing, engine.skipped, aligned
    )


def _add_up_batch(engine: Engine, batches: list[Batch], targets: list[list[Targets]], rows: Rows) -> Totals:
    depths = len(targets[0])
    sums = [sum(float(ahead[depth].weight_M.sum()) for ahead in targets) for depth in range(depths)]
    sums.append(sum(count_documents(batch.fields["document"]) for batch in batches) / rows.parts)
    sums += torch.stack([_count_tokens(batch, rows) for batch in batches]).sum(0).tolist()
    summed = engine.sum_over_ranks(torch.tensor(sums, dtype=torch.float64, device=engine.device)).tolist()
    return Totals(summed[:depths], summed[depths], [int(count) for count in summed[depths + 1 :]])


def _micro_batch(
    engine: Engine,
    model: Decoder,
    batch: Batch,
    targets: list[Targets],
    totals: Totals,
    config: TrainConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """One forward pass: its share of the loss, of next-token, balance and each module's loss, and its routing.

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
        for logits, target, total in zip((output.logits, *output.mtp), targets, totals.weights, strict=True)
    )
    balance = _balance(output, batch.fields["document"], model) / totals.documents
    loss = config.next_token_loss_weight * next_token + config.balance_loss_weight * balance
    if mtp:
        loss = loss + config.mtp_loss_weight * torch.stack(mtp).mean()  # Eq. 25
    routing_2LE = add_up(output.router, model.rows.cut(batch.fields["document"]))
    return loss, torch.stack([next_token, balance, *mtp]).detach().double(), routing_2LE


def _count_tokens(batch: Batch, rows: Rows) -> Tensor:
    """Positions computed here that hold a token of each modality, int64 (4,)."""
    is_token_BT = rows.cut(batch.fields["document"]) >= 0
    return torch.bincount(rows.cut(batch.fields["modality"])[is_token_BT], minlength=len(MODALITIES))


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
