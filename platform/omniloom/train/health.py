"""How the experts fare: figures of each mixture-of-experts layer, alarms, and a bias that stands still.

B batch, T tokens, N = B·T, E routed experts, L mixture-of-experts layers.
"""

import math
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omniloom.errors import DataError
from omniloom.model.decoder import Decoder
from omniloom.model.moe import MixtureOfExperts, RouterOutput
from omniloom.train.groups import HealthConfig, TrainConfig

STEPS_AT_REST = 10  # of uneven load, after which a bias should have moved as often


class Routing(NamedTuple):
    """What the routers of all layers did with the tokens of a batch, padding excluded."""

    choices_LE: Tensor  # float64: how many choices landed on each expert
    shares_LE: Tensor  # float64: Σ over tokens of the expert's score over the sum of all experts' scores


@torch.no_grad()
def add_up(router: tuple[RouterOutput, ...], document_BT: Tensor) -> Tensor:
    """One micro batch's `Routing`, stacked (2, L, E), so that one sum over ranks does for both."""
    is_token_N = (document_BT >= 0).flatten().float()
    layers = []
    for layer in router:
        scores_NE = layer.scores_BTE.flatten(0, 1).float()
        shares_E = (is_token_N / scores_NE.sum(-1)) @ scores_NE
        layers.append(torch.stack([layer.tokens_per_expert_E.double(), shares_E.double()]))
    return (
        torch.stack(layers, dim=1) if layers else torch.zeros(2, 0, 0, dtype=torch.float64, device=document_BT.device)
    )


def entropy(weight_LE: Tensor) -> Tensor:
    """−Σ p ln p / ln E of p = weight / Σ weight, (L,): 1 where all share alike, 0 where one has all or none has any."""
    share_LE = weight_LE / weight_LE.sum(-1, keepdim=True).clamp(min=torch.finfo(weight_LE.dtype).tiny)
    return -torch.xlogy(share_LE, share_LE).sum(-1) / math.log(max(weight_LE.shape[-1], 2))


def sparse_layers(model: Decoder) -> list[tuple[int, MixtureOfExperts]]:
    """The mixture-of-experts layers with their index in the decoder; the modules of multi-token prediction go on."""
    layers = [*model.layers, *(module.layer for module in model.mtp)]
    return [(i, layer.mlp) for i, layer in enumerate(layers) if isinstance(layer.mlp, MixtureOfExperts)]


class Health:
    """Watches one run's routers, step by step."""

    def __init__(self, config: HealthConfig, train: TrainConfig, model: Decoder) -> None:
        self._config, self._train, self._layers = config, train, sparse_layers(model)
        self._collapsed = 1 + config.collapse_share * (
            model.config.n_routed_experts / model.config.num_experts_per_tok - 1
        )
        self._steps_over: dict[tuple[int, str], int] = defaultdict(int)
        self._biases_LE, self._at_rest = self._biases(), [0] * len(self._layers)

    def figures(self, routing: Routing) -> dict[str, Any]:
        """The `router/<layer>/…` keys of a step's line."""
        if not self._layers:
            return {}
        choices_LE, mean_L = routing.choices_LE.cpu(), routing.choices_LE.cpu().mean(-1)
        by_name = {
            "load_max_over_mean": choices_LE.amax(-1) / mean_L.where(mean_L > 0, 1.0),
            "dead_experts": (choices_LE == 0).sum(-1),
            "load_entropy": entropy(choices_LE),
            "score_entropy": entropy(routing.shares_LE.cpu()),
            "tokens_per_expert": choices_LE.long(),
        }
        if (biases_LE := self._biases()) is not None:
            by_name |= {"bias_min": biases_LE.amin(-1), "bias_max": biases_LE.amax(-1)}
        listed = {name: of_L.tolist() for name, of_L in by_name.items()}
        return {
            f"router/{index}/{name}": of_L[row]
            for row, (index, _) in enumerate(self._layers)
            for name, of_L in listed.items()
        }

    def alarms(self, line: dict[str, Any]) -> list[dict[str, Any]]:
        """What begins with this step, having lasted for `alarm_steps`, and what has ended."""
        told = []
        for index, moe in self._layers:
            dead = line[f"router/{index}/dead_experts"] / moe.router.config.n_routed_experts
            load = line[f"router/{index}/load_max_over_mean"]
            limits = (("dead_experts", dead, self._config.dead_share), ("collapse", load, self._collapsed))
            for alarm, value, limit in limits:
                before = self._steps_over[index, alarm]
                now = self._steps_over[index, alarm] = before + 1 if value > limit else 0
                begins, ends = now == self._config.alarm_steps, not now and before >= self._config.alarm_steps
                if begins or ends:
                    state = "begins" if begins else "ends"
                    figures = {"value": value, "limit": limit, "lasted_steps": max(before, now)}
                    told.append({"step": line["step"], "layer": index, "alarm": alarm, "state": state} | figures)
        return told

    def refuse_bias_at_rest(self, step: int, routing: Routing) -> None:
        """Raise DataError where a bias has not moved in `STEPS_AT_REST` steps whose load told it to.

        Asked after each step that was taken. The training step moves every bias after uneven load, so that one at rest
        is a fault of ours, or of an engine that puts an old one back.
        """
        biases_LE, before_LE = self._biases(), self._biases_LE
        if biases_LE is None or before_LE is None or not self._train.expert_bias_rate:
            return
        self._biases_LE = biases_LE
        over_mean_LE = routing.choices_LE.cpu() / routing.choices_LE.cpu().mean(-1, keepdim=True)
        is_uneven_L = ((over_mean_LE - 1).abs() > self._train.expert_bias_tolerance).any(-1)
        is_still_L = (biases_LE == before_LE).all(-1)
        for row, (uneven, still) in enumerate(zip(is_uneven_L.tolist(), is_still_L.tolist(), strict=True)):
            self._at_rest[row] = 0 if not still else self._at_rest[row] + uneven
            if self._at_rest[row] == STEPS_AT_REST:
                raise DataError(
                    f"the router's bias of layer {self._layers[row][0]} has not moved in {STEPS_AT_REST} steps of "
                    f"uneven load up to {step}, the busiest expert at {over_mean_LE[row].max():.3g} times the mean: "
                    "nothing balances the experts, a fault of omniloom or of the engine"
                )

    @torch.no_grad()
    def _biases(self) -> Tensor | None:
        """(L, E) on the CPU; None where routing has no bias."""
        biases = [moe.router.bias_E for _, moe in self._layers if moe.router.bias_E is not None]
        return torch.stack(biases).cpu() if biases else None
