"""One optimizer step, and one validation: the loss of a whole global batch, whatever the ranks and micro batches.

B batch, T tokens, M targets, E experts, L mixture-of-experts layers, S sources.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from omniloom.data.loader import Batch
from omniloom.model.decoder import Decoder, Output
from omniloom.model.moe import MixtureOfExperts, update_expert_bias
from omniloom.objective.balance import count_documents, sequence_balance
from omniloom.objective.next_token import next_token_nll, shifted_targets
from omniloom.train.config import TrainConfig
from omniloom.train.engine import Engine


@dataclass
class StepResult:
    """What one step measured, already over the whole global batch."""

    next_token: float
    balance: float
    grad_norm: float
    tokens: int  # positions that hold a token, padding excluded
    tokens_per_expert_LE: Tensor


def training_step(
    engine: Engine, model: Decoder, batches: list[Batch], loss_weight_S: Tensor, config: TrainConfig, lr: float
) -> StepResult:
    """loss = Σ w·nll / Σ w + α · mean balance, sums over the whole global batch; then the optimizer, then the bias."""
    targets = [_targets(batch, loss_weight_S) for batch in batches]
    totals = torch.stack(
        [
            torch.stack([weight.sum() for *_, weight in targets]).sum(),
            torch.tensor(float(sum(count_documents(batch.fields["document"]) for batch in batches))),
            torch.tensor(float(sum(int((batch.fields["document"] >= 0).sum()) for batch in batches))),
        ]
    )
    total_weight, total_documents, total_tokens = engine.sum_over_ranks(totals.double()).tolist()

    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    counts_LE = None
    for batch, (predict_at, target_ids, weight) in zip(batches, targets, strict=True):
        output: Output = engine.forward(**batch.model_inputs(), predict_at=predict_at)
        assert output.logits is not None
        # A global batch without a target has no loss and a zero gradient, not a division by zero.
        next_token = (weight * next_token_nll(output.logits, target_ids)).sum() / max(total_weight, 1e-12)
        balance = _balance(output, batch.fields["document"], model.config.num_experts_per_tok) / total_documents
        engine.backward(next_token + config.balance_loss_weight * balance)
        sums += torch.stack([next_token.detach(), balance.detach()]).double()
        counts = torch.stack([router.tokens_per_expert_E for router in output.router]) if output.router else None
        counts_LE = counts if counts_LE is None or counts is None else counts_LE + counts
    grad_norm = engine.step(lr)

    mean_nll, mean_balance = engine.sum_over_ranks(sums).tolist()
    counts_LE = torch.zeros(0, 0) if counts_LE is None else engine.sum_over_ranks(counts_LE)
    _move_biases(model, counts_LE, config)
    return StepResult(mean_nll, mean_balance, grad_norm, int(total_tokens), counts_LE)


def _targets(batch: Batch, loss_weight_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    fields = batch.fields
    predict_at, target_ids = shifted_targets(fields["input_ids"], fields["document"], fields["loss_mask"])
    return predict_at, target_ids, loss_weight_S[fields["source"][predict_at].long()]


def _balance(output: Output, document: Tensor, experts_per_token: int) -> Tensor:
    """Mean over layers of the sequence-wise balance loss, summed over the batch's documents."""
    per_layer = [sequence_balance(router.scores_BTE, document, experts_per_token) for router in output.router]
    return torch.stack(per_layer).mean() if per_layer else output.hidden.sum() * 0.0


def sparse_layers(model: Decoder) -> list[tuple[int, MixtureOfExperts]]:
    """The mixture-of-experts layers with their index in the decoder."""
    return [(i, layer.mlp) for i, layer in enumerate(model.layers) if isinstance(layer.mlp, MixtureOfExperts)]


@torch.no_grad()
def _move_biases(model: Decoder, counts_LE: Tensor, config: TrainConfig) -> None:
    for (_, moe), counts_E in zip(sparse_layers(model), counts_LE, strict=True):
        bias_E = moe.router.bias_E
        bias_E.copy_(update_expert_bias(bias_E, counts_E, config.expert_bias_rate, config.expert_bias_tolerance))


@torch.no_grad()
def validation_loss(
    engine: Engine, batches: Iterable[list[Batch]], loss_weight_S: Tensor, source_names: list[str]
) -> dict[str, float]:
    """Held-out loss: `val/loss` = Σ w·nll / Σ w as in training, and each source's own mean."""
    engine.train(False)
    sums = torch.zeros(2, len(source_names), dtype=torch.float64, device=engine.device)  # Σ nll and targets
    for (batch,) in batches:
        batch.to(engine.device)
        predict_at, target_ids, _ = _targets(batch, loss_weight_S)
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
