"""Which parameters a rank holds: its stage of the pipeline, its share of the matrices, its ZeRO shard."""

import math
from dataclasses import dataclass

from omniloom.plan.config import Workload
from omniloom.plan.params import count_parameters, layer_parameters, norm_parameters


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: its layers, which ends it has, and how many micro batches are under way in it (1F1B)."""

    layers: range
    has_embedding: bool
    has_head: bool  # and the prediction modules
    under_way: int


def stages(workload: Workload) -> list[Stage]:
    """Those that may be the fullest, each of ⌈L / p⌉ layers, the last one last: the first has the embedding and most
    micro batches under way, the second one less and no dense layers, the last the head and one."""
    layers = workload.sizes.num_hidden_layers
    if workload.pipeline == 1:
        return [Stage(range(layers), True, True, 1)]
    each = math.ceil(layers / workload.pipeline)
    under_way = min(workload.pipeline, workload.accumulation)
    first = Stage(range(each), True, False, under_way)
    between = Stage(range(each, min(2 * each, layers)), False, False, min(workload.pipeline - 1, workload.accumulation))
    last = Stage(range(layers - each, layers), False, True, 1)
    return [first, *([between] if workload.pipeline > 2 else []), last]


@dataclass(frozen=True)
class Shards:
    """A rank's parameters: those of the routed experts apart, as fewer ranks hold the same ones."""

    common: float
    routed: float
    common_replicas: int
    routed_replicas: int

    @property
    def whole(self) -> float:
        """Parameters that the rank computes with."""
        return self.common + self.routed

    @property
    def sharded(self) -> float:
        """Parameters of the rank's own ZeRO shard."""
        return self.common / self.common_replicas + self.routed / self.routed_replicas


def shard(workload: Workload, stage: Stage) -> Shards:
    """The parameters of a rank in this pipeline stage.

    Tensor ranks share every matrix, expert ranks the routed experts; norms, router and media encoders are everybody's.
    """
    sizes, tensor = workload.sizes, workload.tensor
    counted = count_parameters(sizes)
    ahead = [sizes.num_hidden_layers] * sizes.num_nextn_predict_layers if stage.has_head else []
    layers = [layer_parameters(sizes, layer) for layer in (*stage.layers, *ahead)]
    routed = sum(layer.routed for layer in layers)
    common = sum(layer.matrices / tensor + layer.others for layer in layers)
    if stage.has_embedding:
        encoders = counted.image_encoder + counted.audio_encoder + counted.video_encoder
        common += (counted.embedding + counted.positions) / tensor + counted.convolution + encoders
    if stage.has_head:
        # What a prediction module has beside its layer: the junction, and norms.
        inside = sum(layer_parameters(sizes, layer).total for layer in ahead)
        last_norm = counted.norms - 2 * sizes.num_hidden_layers * norm_parameters(sizes)
        common += (counted.head + counted.params_mtp - inside) / tensor + last_norm
        if not stage.has_embedding and not counted.head:
            common += counted.embedding / tensor  # a tied head is a second copy
    replicas = workload.data_parallel * workload.sequence
    held = routed / (workload.expert * tensor)
    return Shards(common, held, replicas, max(1, replicas // workload.expert))
