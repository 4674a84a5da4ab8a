"""Bytes per rank, by part, at the moments that may be the highest: the backward pass and the optimizer's step.

P parameters of a rank, r ranks that share a ZeRO shard, S = P / r, w bytes of a weight and of its gradient, 4 of a
master, B numbers of a bucket. What DeepSpeed holds was read from its 0.19.8 source and measured stage by stage
(tests/train/test_planned_memory.py).
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
from omniloom.plan.params import count_parameters, layer_matrices
from omniloom.plan.sharding import Shards, Stage, shard, stages

WEIGHT_BYTES = {"fp32": 4, "bf16_autocast": 4, "bf16": 2, "fp16": 2, "fp8": 2}
LIVE_NUMBERS = 1_000_000_000  # that ZeRO 3 keeps gathered: stage3_max_live_parameters
SUB_GROUP_NUMBERS = 1_000_000_000  # that ZeRO 3 steps at a time: sub_group_size
HEAP_BYTES = 32 << 20  # a CPU rank's larger tensors have a heap of their own (cluster/local.py)
# Blocks of one size cannot serve another: of a CPU's heap of small tensors, and of what is in its heap of large ones
# when ranks reduce a bucket, both as measured; of all that a GPU's allocator holds, a round figure.
HEAP_FRAGMENTATION, REDUCED_FRAGMENTATION, GPU_FRAGMENTATION = 0.40, 0.25, 0.05

ORDER = ("weights", "gathered", "gradients", "optimizer", "activations", "logits", "buffers", "fragmentation")

Parts = dict[str, float]


@dataclass(frozen=True)
class Memory:
    """A rank's bytes by part when it holds the most; they sum to the peak. `moment` is backward or step."""

    parts: Parts
    moment: str

    @property
    def total(self) -> float:
        """The peak."""
        return sum(self.parts.values())


def count_memory(workload: Workload, on_cpu: bool = False) -> Memory:
    """The peak of one rank, of the fullest pipeline stage, above the process's footprint before the model is built.

    What is held all the time stands under each of: the backward pass's beginning, with activations and logits and what
    earlier micro batches left of gradients; where its first gradients have come, with the bucket that they are
    exchanged in; its end, with all gradients; the optimizer's step, with the shard's gradients flattened and the
    optimizer's temporaries. On a CPU what small tensors have freed serves small ones: every moment stands on top of it.
    """
    return max((_of_stage(workload, stage, on_cpu) for stage in stages(workload)), key=lambda memory: memory.total)


def _of_stage(workload: Workload, stage: Stage, on_cpu: bool) -> Memory:
    shards = shard(workload, stage)
    held, activations = _held(workload, shards), _activations(workload, stage, on_cpu)
    if not on_cpu:
        held |= _elsewhere(workload, shards)
    logits = {"logits": _logits(workload, on_cpu)} if stage.has_head else {}
    moments = _on_cpu if on_cpu else _on_gpu
    moment, moving = max(moments(workload, shards, activations, logits), key=lambda one: _total(one[1]))
    if moment == "step":
        held = held | {"gathered weights": 0.0}  # ZeRO 3 lets them go first
    parts = _sum(held, moving)
    if not on_cpu:
        parts["fragmentation"] = GPU_FRAGMENTATION * _total(parts)
    named = sorted(parts, key=lambda name: ORDER.index(name.partition(" ")[0]))
    return Memory({name: parts[name] for name in named if parts[name]}, moment)


def _on_gpu(workload: Workload, shards: Shards, activations: Parts, logits: Parts) -> list[tuple[str, Parts]]:
    kept, whole, stage = _kept_gradients(workload, shards), _gradients(workload, shards), workload.zero_stage
    early, bucket, reduced = _bucket_at_logits(workload, shards), _bucket(workload, shards), _reduced(workload, shards)
    # Buckets that fill before the backward pass has ended are reduced while activations are still there.
    fills_early = stage >= 2 and shards.whole > workload.bucket_numbers
    first = reduced if fills_early else bucket if stage else 0.0
    return [
        ("backward", _sum(activations, logits, {"gradients": kept, "buffers": early})),
        ("backward", _sum(activations, {"gradients": kept, "buffers": first})),
        ("backward", {"gradients": whole, "buffers": bucket}),
        ("backward", {"gradients": kept if stage >= 2 else 0.0, "buffers": reduced}),
        ("step", {} if workload.offload_optimizer else _step(workload, shards, on_cpu=False)),
    ]


def _on_cpu(workload: Workload, shards: Shards, activations: Parts, logits: Parts) -> list[tuple[str, Parts]]:
    large = _large_share(workload)
    kept, whole = _kept_gradients(workload, shards), _gradients(workload, shards)
    heap = activations
    if workload.micro_batch_size * workload.seq_len * workload.sizes.vocab_size * 4 < HEAP_BYTES:
        heap, logits = heap | logits, {}
    # ZeRO 2 keeps one flat tensor; the others keep each parameter's, which find room, large ones too, where activations
    # have been freed: the next micro batch's then need room of their own.
    flat, apart = (kept, 0.0) if workload.zero_stage == 2 else (0.0, kept)
    room = max(_first_gradients(workload, shards), whole * (1 - large) - apart - _total(heap))
    heap = heap | {"gradients": apart + room}
    gathered = _gathered(workload, shards) * (1 - large)
    heap["fragmentation"] = HEAP_FRAGMENTATION * (_total(heap) + gathered)
    reduced = _reduced(workload, shards)
    holes = REDUCED_FRAGMENTATION * reduced if workload.zero_stage and shards.common_replicas > 1 else 0.0
    waiting = 0.0 if apart else whole * large
    if workload.zero_stage == 1:  # a bucket's pages come as it is filled, and what is copied into it goes
        waiting = max(0.0, waiting - _bucket(workload, shards))
    return [
        ("backward", _sum(heap, logits, {"gradients": flat})),
        ("backward", _sum(heap, {"gradients": flat + waiting, "buffers": reduced, "fragmentation": holes})),
        ("step", _sum(heap, _step(workload, shards, on_cpu=True))),
    ]


def by_stage(workload: Workload, on_cpu: bool = False) -> dict[tuple[int, bool], Memory]:
    """The peak at every ZeRO stage, without and with activation checkpointing."""
    return {
        (stage, checkpointing): count_memory(
            replace(workload, zero_stage=stage, activation_checkpointing=checkpointing), on_cpu
        )
        for stage in range(4)
        for checkpointing in (False, True)
    }


def _held(workload: Workload, shards: Shards) -> Parts:
    """What is held from step to step: w·P of weights, 4 of masters and 8 of AdamW's moments (4 of Muon's and SGD's).

    From ZeRO 1 on masters and moments, in float32 also beside float32 weights, are a shard's. At ZeRO 3 weights are
    too, and beside them stand the shard's gradients, the weights gathered, and the bucket of gradients.
    """
    stage, precision, whole = workload.zero_stage, workload.precision, shards.whole
    w, own = WEIGHT_BYTES[precision], shards.sharded if stage else whole
    masters = 4 * own if stage or w == 2 else 0.0
    moments = moment_bytes(workload) * own
    held = {"weights": w * (shards.sharded if stage == 3 else whole), "optimizer": masters + moments}
    if stage == 3:
        held |= {
            "gradients": w * shards.sharded,
            "gathered weights": _gathered(workload, shards),
            "buffers": w * min(whole, workload.bucket_numbers),
        }
    if precision == "bf16_autocast":
        held["weights as bf16"] = 2.0 * whole
    return held


def _elsewhere(workload: Workload, shards: Shards) -> Parts:
    """What a GPU does not hold where it is offloaded; weights are then gathered of the rank's own shard too."""
    parts: Parts = {}
    if workload.offload_optimizer:
        parts |= {"optimizer": 0.0} | ({"gradients": 0.0} if workload.zero_stage == 3 else {})
    if workload.offload_parameters:
        gathered = WEIGHT_BYTES[workload.precision] * min(shards.whole, LIVE_NUMBERS)
        parts |= {"weights": 0.0, "gathered weights": gathered}
    return parts


def _gathered(workload: Workload, shards: Shards) -> float:
    """At ZeRO 3, of the weights that other ranks hold shards of."""
    if workload.zero_stage < 3:
        return 0.0
    numbers = shards.common * (shards.common_replicas > 1) + shards.routed * (shards.routed_replicas > 1)
    return WEIGHT_BYTES[workload.precision] * min(numbers, LIVE_NUMBERS)


def moment_bytes(workload: Workload) -> float:
    """Of the optimizer's moments, a parameter, in float32: AdamW's two; SGD's one; Muon keeps one of the layers'
    matrices."""
    if workload.optimizer != "muon":
        return {"adamw": 8.0, "sgd": 4.0}[workload.optimizer]
    counted = count_parameters(workload.sizes)
    others = counted.embedding + counted.head + counted.norms
    return 4.0 + 4.0 * others / (counted.params_total + counted.params_mtp)


def _kept_gradients(workload: Workload, shards: Shards) -> float:
    """What earlier micro batches of the step have left: all gradients, at ZeRO 2 those of the shard; ZeRO 3 adds them
    to what it holds anyway."""
    if workload.accumulation <= 1 or workload.zero_stage == 3:
        return 0.0
    return WEIGHT_BYTES[workload.precision] * (shards.sharded if workload.zero_stage == 2 else shards.whole)


def _gradients(workload: Workload, shards: Shards) -> float:
    """All gradients at the end of the backward pass: ZeRO 0 and 1 reduce none before; from 2 on each goes."""
    return WEIGHT_BYTES[workload.precision] * shards.whole if workload.zero_stage < 2 else 0.0


def _first_gradients(workload: Workload, shards: Shards) -> float:
    """Gradients of the head and of the last layer, which stand beside all activations."""
    sizes, counted = workload.sizes, count_parameters(workload.sizes)
    ends = counted.embedding + counted.head + counted.positions
    layers = (shards.common - ends / workload.tensor) / sizes.num_hidden_layers
    return WEIGHT_BYTES[workload.precision] * (sizes.vocab_size * sizes.hidden_size / workload.tensor + max(0, layers))


def _bucket(workload: Workload, shards: Shards) -> float:
    """The bucket in which gradients are exchanged, w·B, made when the first one comes; ZeRO 3 holds it anyway."""
    if workload.zero_stage == 3:
        return 0.0
    return WEIGHT_BYTES[workload.precision] * min(shards.whole, workload.bucket_numbers)


def _bucket_at_logits(workload: Workload, shards: Shards) -> float:
    """ZeRO 1 keeps its bucket from one micro batch to the next."""
    return _bucket(workload, shards) if workload.zero_stage == 1 and workload.accumulation > 1 else 0.0


def _reduced(workload: Workload, shards: Shards) -> float:
    """Buffers when a bucket is reduced: at ZeRO 0 the bucket; at 1 and 2 the shard taken out of it too, and, between
    ranks, what is reduced flattened once more; at 3 the bucket's copy and what is scattered of it."""
    w, replicas = WEIGHT_BYTES[workload.precision], shards.common_replicas
    bucket = min(shards.whole, workload.bucket_numbers)
    if workload.zero_stage == 0:
        return w * bucket
    if workload.zero_stage == 3:
        if workload.expert > 1:  # it is sent off at each layer's experts, which other ranks share
            layers, ends = workload.sizes.num_hidden_layers, workload.sizes.vocab_size * workload.sizes.hidden_size
            bucket = min(bucket, shards.whole / layers + ends / workload.tensor)
        return 2 * w * bucket
    again = 0.0 if replicas == 1 else bucket if workload.zero_stage == 1 else bucket / replicas
    return w * (bucket + shards.sharded + again)


def _step(workload: Workload, shards: Shards, on_cpu: bool) -> Parts:
    """At the optimizer's step the shard's gradients, from ZeRO 1 on flattened in float32, and AdamW's temporaries of
    the same size: two on a CPU, one on a GPU; SGD has one, where weights decay. At ZeRO 0 a CPU takes tensor after
    tensor; ZeRO 3 takes 10⁹ numbers."""
    w, temporaries = WEIGHT_BYTES[workload.precision], 2 if on_cpu and workload.optimizer != "sgd" else 1
    if workload.zero_stage == 0:
        gradients = w * shards.whole + (4 * shards.whole if w == 2 else 0)
        return {"gradients": gradients, "buffers": 0.0 if on_cpu else 4 * shards.whole}
    own = 0.0 if workload.zero_stage == 3 else w * shards.sharded
    matrices = shards.sharded * (1 - _spared_share(workload))
    if workload.zero_stage == 3:
        matrices = min(matrices, SUB_GROUP_NUMBERS)
    flattened = 4 + (w if w == 2 else 0)  # and, before that, as they came
    return {"gradients": own, "buffers": (flattened + 4.0 * temporaries) * matrices}


def _spared_share(workload: Workload) -> float:
    """Of the parameters, that stand in the optimizer's second group, without decay: the embedding and the norms."""
    counted = count_parameters(workload.sizes)
    spared = counted.embedding + counted.positions + counted.norms
    return min(0.5, spared / (counted.params_total + counted.params_mtp))  # the larger group is stepped alone


def _large_share(workload: Workload) -> float:
    """Of the parameters, that lie in tensors too large for a CPU's heap: the embedding, a layer's experts together."""
    sizes, counted = workload.sizes, count_parameters(workload.sizes)
    tensors = [sizes.vocab_size * sizes.hidden_size] * (1 if sizes.tie_word_embeddings else 2)
    for layer in range(sizes.num_hidden_layers + sizes.num_nextn_predict_layers):
        always, _, chosen = layer_matrices(sizes, layer)
        tensors += [matrix.parameters for matrix in always]
        tensors += [sizes.n_routed_experts * matrix.parameters for matrix in chosen]
    large = sum(numbers for numbers in tensors if 4 * numbers >= HEAP_BYTES)
    return large / (counted.params_total + counted.params_mtp)


def _activations(workload: Workload, stage: Stage, on_cpu: bool) -> Parts:
    """What the forward pass keeps, by modality: each token's share of the layers, and its encoder's.

    One layer's come twice, as the gradients of them; under checkpointing a layer's input alone is kept, and one layer
    is run again.
    """
    sizes, numerics = workload.sizes, Numerics(workload.precision, on_cpu)
    ahead = [sizes.num_hidden_layers] * sizes.num_nextn_predict_layers if stage.has_head else []
    each = [layer_bytes(sizes, layer, numerics, workload.tensor) for layer in (*stage.layers, *ahead)]
    if workload.activation_checkpointing:
        kept = checkpointed_bytes(sizes, numerics) * len(each) * stage.under_way + max(each)
    else:
        kept = sum(each) * stage.under_way
    kept += max(each) + ends_bytes(sizes, numerics, stage.has_head)
    tokens = workload.micro_batch_size * workload.seq_len / workload.sequence
    encoders = encoder_bytes(sizes, numerics) if stage.has_embedding else {}
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
