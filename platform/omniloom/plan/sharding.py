"""Which parameters a rank holds, and how many ranks share each ZeRO shard of them."""

import math
from dataclasses import dataclass

from omniloom.plan.config import Workload
from omniloom.plan.params import count_parameters, expert_parameters


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

    def part(self, numbers_common: float, numbers_routed: float) -> float:
        """The rank's ZeRO share of so many numbers."""
        return numbers_common / self.common_replicas + numbers_routed / self.routed_replicas

    @property
    def sharded(self) -> float:
        """Parameters of the rank's own ZeRO shard."""
        return self.part(self.common, self.routed)


def layers_of_fullest_stage(workload: Workload) -> int:
    """Layers of the pipeline's fullest stage."""
    return math.ceil(workload.sizes.num_hidden_layers / workload.pipeline)


def shard(workload: Workload) -> Shards:
    """The parameters of a rank in the fullest pipeline stage: ⌈L / p⌉ layers and the heavier of the two ends.

    Tensor ranks share every matrix, expert ranks the routed experts; norms, router and media encoders are everybody's.
    """
    sizes, tensor = workload.sizes, workload.tensor
    counted = count_parameters(sizes)
    layers = layers_of_fullest_stage(workload) / sizes.num_hidden_layers
    matrices = (counted.attention + counted.dense_feed_forward + counted.shared_experts) / tensor
    inside = layers * (matrices + counted.router + counted.norms)
    encoders = counted.image_encoder + counted.audio_encoder + counted.video_encoder
    first = (counted.embedding + counted.positions) / tensor + counted.convolution + encoders
    mtp_routed = _mtp_routed(workload)
    last = counted.head / tensor + (counted.params_mtp - mtp_routed) / tensor
    if workload.pipeline == 1:
        ends, mtp_held = first + last, mtp_routed
    else:  # a tied head is a second copy of the embedding
        last += counted.embedding / tensor if not counted.head else 0
        ends, mtp_held = max((first, 0.0), (last, mtp_routed), key=sum)
    replicas = workload.data_parallel * workload.sequence
    routed = (layers * counted.routed_experts + mtp_held) / (workload.expert * tensor)
    return Shards(inside + ends, routed, replicas, max(1, replicas // workload.expert))


def _mtp_routed(workload: Workload) -> float:
    """Routed experts' parameters in the prediction modules; each has one layer, as sparse as the last ones."""
    sizes = workload.sizes
    if not sizes.is_sparse(sizes.num_hidden_layers) or not sizes.num_nextn_predict_layers:
        return 0.0
    return sizes.num_nextn_predict_layers * sizes.n_routed_experts * expert_parameters(sizes)
