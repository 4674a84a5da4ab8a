"""Bytes per rank, by part, at the two moments that may be the highest: the backward pass and the optimizer's step.

P parameters of a rank, r ranks that share a ZeRO shard, w, g and 4 bytes of a weight, a gradient and a master. What
DeepSpeed holds was read from its 0.19.8 source and measured stage by stage (tests/train/test_planned_memory.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from omniloom.plan.activations import (
    Numerics,
    checkpointed_bytes,
    encoder_bytes,
    ends_bytes,
    head_bytes,
    layer_bytes,
)
from omniloom.plan.config import Workload
from omniloom.plan.params import count_parameters
from omniloom.plan.sharding import Shards, layers_of_fullest_stage, shard

WEIGHT_BYTES = {"fp32": 4, "bf16_autocast": 4, "bf16": 2, "fp16": 2, "fp8": 2}
LIVE_NUMBERS = 1_000_000_000  # that ZeRO 3 keeps gathered: stage3_max_live_parameters
HEAP_BYTES = 32 << 20  # a CPU rank's larger tensors are given back, smaller ones stay in its heap (cluster/local.py)
# Blocks of one size cannot serve another: of a CPU's heap, as measured; of all that a GPU's allocator holds, a round
# figure.
HEAP_FRAGMENTATION, GPU_FRAGMENTATION = 0.40, 0.05


@dataclass(frozen=True)
class Memory:
    """A rank's bytes by part when it holds the most; they sum to the peak. `moment` is backward or step."""

    parts: dict[str, float]
    moment: str

    @property
    def total(self) -> float:
        """The peak."""
        return sum(self.parts.values())


def count_memory(workload: Workload, on_cpu: bool = False) -> Memory:
    """The peak of one rank above the process's footprint before the model is built.

    backward begins: what is held all the time, activations, logits and their gradient. It ends: gradients, and the
    buffers that they are exchanged in. step: the shard's gradients flattened, and the optimizer's temporaries. On a CPU
    the heap keeps what small tensors have freed, so that the last two stand on top of the activations.
    """
    shards, sizes = shard(workload), workload.sizes
    held, activations = _held(workload, shards), _activations(workload, on_cpu)
    logits, gradients = _logits(workload, on_cpu), _gradients(workload, shards)
    exchange, step = _exchange(workload, shards), _step(workload, shards, on_cpu)
    begins = {"logits": logits}
    ends = {"gradients": gradients, "buffers": exchange}
    if on_cpu:
        heap = activations
        if workload.micro_batch_size * workload.seq_len * sizes.vocab_size * 4 < HEAP_BYTES:
            heap, begins = heap | begins, {}
        small = gradients * (1 - _large_share(workload))
        room = max(_first_gradients(workload, shards), small - _total(heap))  # beyond what the heap has already
        heap = heap | {"gradients": room}
        ends = {"gradients": gradients - small, "buffers": exchange}
        passing = _total(heap) + held.get("gathered weights", 0.0) * (1 - _large_share(workload))
        heap["fragmentation"] = HEAP_FRAGMENTATION * passing
        moments = {"backward": max(_sum(heap, begins), _sum(heap, ends), key=_total), "step": _sum(heap, step)}
    else:
        moments = {"backward": max(_sum(activations, begins), ends, key=_total), "step": step}
    moment, moving = max(moments.items(), key=lambda item: _total(item[1]))
    parts = _sum(held, moving)
    if not on_cpu:
        parts["fragmentation"] = GPU_FRAGMENTATION * _total(parts)
    return Memory({name: size for name, size in parts.items() if size}, moment)


def by_stage(workload: Workload, on_cpu: bool = False) -> dict[tuple[int, bool], Memory]:
    """The peak at every ZeRO stage, without and with activation checkpointing."""
    return {
        (stage, checkpointing): count_memory(
            replace(workload, zero_stage=stage, activation_checkpointing=checkpointing), on_cpu
        )
        for stage in range(4)
        for checkpointing in (False, True)
    }


def _held(workload: Workload, shards: Shards) -> dict[str, float]:
    """What is held from step to step: w·P of weights, 4 of masters and 8 of AdamW's moments (4 of Muon's).

    From ZeRO 1 on masters and moments, in float32 also beside float32 weights, are a shard's. At ZeRO 3 weights are
    too, and beside them stand the shard's gradients, the weights gathered, and the bucket of gradients.
    """
    stage, precision, whole = workload.zero_stage, workload.precision, shards.whole
    w, own = WEIGHT_BYTES[precision], shards.sharded if stage else whole
    masters = 4 * own if stage or w == 2 else 0.0
    moments = 8 * own - 4 * _muon_share(workload) * own
    held = {"weights": w * (shards.sharded if stage == 3 else whole), "optimizer": masters + moments}
    if stage == 3:
        gathered = min(whole, LIVE_NUMBERS) if shards.common_replicas > 1 else 0.0
        held |= {
            "gradients": 4 * shards.sharded,
            "gathered weights": w * gathered,
            "buffers": w * min(whole, workload.bucket_numbers),
        }
    if precision == "bf16_autocast":
        held["weights as bf16"] = 2.0 * whole
    return held


def _muon_share(workload: Workload) -> float:
    """Of the parameters, that Muon keeps one moment of: the layers' matrices."""
    if workload.optimizer != "muon":
        return 0.0
    counted = count_parameters(workload.sizes)
    others = counted.embedding + counted.head + counted.norms
    return 1 - others / (counted.params_total + counted.params_mtp)


def _gradients(workload: Workload, shards: Shards) -> float:
    """Gradients at the end of the backward pass; from ZeRO 1 on they stand in the bucket."""
    return WEIGHT_BYTES[workload.precision] * shards.whole if workload.zero_stage == 0 else 0.0


def _first_gradients(workload: Workload, shards: Shards) -> float:
    """Gradients of the head and of the last layer, which stand beside all activations."""
    sizes, counted = workload.sizes, count_parameters(workload.sizes)
    ends = counted.embedding + counted.head + counted.positions
    layers = (shards.common - ends / workload.tensor) / sizes.num_hidden_layers
    return WEIGHT_BYTES[workload.precision] * (sizes.vocab_size * sizes.hidden_size / workload.tensor + max(0, layers))


def _exchange(workload: Workload, shards: Shards) -> float:
    """Buffers of the exchange: a bucket flattened at ZeRO 0; at 1 and 2 the bucket, the shard taken out of it, and,
    between ranks, what is reduced flattened once more; at 3 the bucket's copy and what is scattered of it."""
    w, replicas = WEIGHT_BYTES[workload.precision], shards.common_replicas
    bucket = min(shards.whole, workload.bucket_numbers)
    if workload.zero_stage == 0:
        return w * bucket
    if workload.zero_stage == 3:
        return 2 * w * bucket
    again = 0.0 if replicas == 1 else bucket if workload.zero_stage == 1 else bucket / replicas
    return w * (bucket + shards.sharded + again)


def _step(workload: Workload, shards: Shards, on_cpu: bool) -> dict[str, float]:
    """At the optimizer's step the shard's gradients, from ZeRO 1 on flattened in float32, and AdamW's temporaries of
    the same size: two on a CPU, one on a GPU; at ZeRO 0 a CPU takes tensor after tensor."""
    w, temporaries = WEIGHT_BYTES[workload.precision], 2 if on_cpu else 1
    if workload.zero_stage == 0:
        gradients = w * shards.whole + (4 * shards.whole if w == 2 else 0)
        return {"gradients": gradients, "buffers": 0.0 if on_cpu else 4 * shards.whole}
    own = 0.0 if workload.zero_stage == 3 else w * shards.sharded
    matrices = shards.sharded * (1 - _spared_share(workload))
    flattened = 4 + (w if w == 2 else 0)  # and, before that, as they came
    return {"gradients": own, "buffers": (flattened + 4.0 * temporaries) * matrices}


def _spared_share(workload: Workload) -> float:
    """Of the parameters, that stand in the optimizer's second group, without decay: the embedding and the norms."""
    counted = count_parameters(workload.sizes)
    spared = counted.embedding + counted.positions + counted.norms
    return min(0.5, spared / (counted.params_total + counted.params_mtp))  # the larger group is stepped alone


def _large_share(workload: Workload) -> float:
    """Of the gradients, that lie in tensors too large for a CPU's heap."""
    sizes = workload.sizes
    counted = count_parameters(sizes)
    experts = sizes.n_routed_experts * 2 * sizes.hidden_size * sizes.moe_intermediate_size
    tensors = [
        (sizes.vocab_size * sizes.hidden_size, counted.embedding + counted.head),
        (experts, counted.routed_experts * (1 + sizes.num_nextn_predict_layers / max(1, sizes.num_hidden_layers))),
        (sizes.intermediate_size * sizes.hidden_size, counted.dense_feed_forward),
    ]
    large = sum(of_kind for numbers, of_kind in tensors if 4 * numbers >= HEAP_BYTES)
    return min(1.0, large / (counted.params_total + counted.params_mtp))


def _activations(workload: Workload, on_cpu: bool) -> dict[str, float]:
    """What the forward pass keeps, by modality: each token's share of the layers, and its encoder's.

    One layer's come twice, as the gradients of them; under checkpointing a layer's input alone is kept, and one layer
    is run again. The first pipeline stage has as many micro batches under way as there are stages (1F1B).
    """
    sizes, numerics = workload.sizes, Numerics(workload.precision, on_cpu)
    layers = range(sizes.num_hidden_layers - layers_of_fullest_stage(workload), sizes.num_hidden_layers)
    ahead = range(sizes.num_hidden_layers, sizes.num_hidden_layers + sizes.num_nextn_predict_layers)
    each = [layer_bytes(sizes, layer, numerics, workload.tensor) for layer in (*layers, *ahead)]
    under_way = max(1, min(workload.pipeline, workload.accumulation))
    if workload.activation_checkpointing:
        kept = checkpointed_bytes(sizes, numerics) * len(each) * under_way + max(each)
    else:
        kept = sum(each) * under_way
    kept += max(each) + ends_bytes(sizes, numerics)
    tokens = workload.micro_batch_size * workload.seq_len / workload.sequence
    encoders = encoder_bytes(sizes, numerics)
    return {
        f"activations ({medium})": tokens * share * (kept + encoders.get(medium, 0.0))
        for medium, share in workload.share_by_modality.items()
        if share
    }


def _logits(workload: Workload, on_cpu: bool) -> float:
    """Logits of the positions with a target, kept, and those that pass; tensor ranks share the vocabulary."""
    head = head_bytes(workload.sizes, Numerics(workload.precision, on_cpu))
    positions = workload.micro_batch_size * workload.seq_len / workload.sequence * workload.target_share
    return positions * (head.kept + head.passing) / workload.tensor


def _total(parts: Mapping[str, float]) -> float:
    return sum(parts.values())


def _sum(*parts: Mapping[str, float]) -> dict[str, float]:
    """Parts of one name together."""
    total: dict[str, float] = {}
    for some in parts:
        for name, size in some.items():
            total[name] = total.get(name, 0.0) + size
    return total
