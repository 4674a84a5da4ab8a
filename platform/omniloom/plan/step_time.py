"""Seconds of one optimizer step, by part: a roofline over the operations of `model/`, `objective/` and DeepSpeed.

The story, in call order: `predict_step` finds what a rank reaches (`speeds.Speeds`), adds up what it computes for one
micro batch (`micro_batch.MicroBatch`), what ranks exchange, the optimizer's step, and the pipeline's bubble.

N tokens of a micro batch on one rank, D model width, r data-parallel ranks, P parameters of a rank, w bytes of each.
"""

import math
from dataclasses import dataclass, field

from omniloom.plan.activations import Numerics
from omniloom.plan.collectives import Group, ranks_per_node
from omniloom.plan.config import HardwareConfig, Measurements, Workload
from omniloom.plan.cost import shard_bytes_per_token
from omniloom.plan.flops import train_flops
from omniloom.plan.memory import WEIGHT_BYTES
from omniloom.plan.micro_batch import MicroBatch
from omniloom.plan.params import attention_matrices, count_parameters, layer_matrices
from omniloom.plan.sharding import Shards, shard, stages
from omniloom.plan.speeds import PRODUCTS_IN, Speeds
from omniloom.plan.traffic import Moved, weight_traffic

KEPT_GATHERED = 500_000_000  # ZeRO 3 keeps what is used again within 10⁹ parameters: stage3_max_reuse_distance
SCATTERED_ALONE = 3  # of a buffer's bytes that a reduce-scatter of one rank copies, a buffer and a half
STEP_OPERATIONS = 15  # a tensor
NEWTON_SCHULZ_STEPS = 5  # of Muon


@dataclass(frozen=True)
class StepTime:
    """What one optimizer step takes. `missing` names each key of the cluster that is not known, with the parts that
    hang on it; with any, there is no total, and the seconds hold the other parts."""

    seconds: dict[str, float]
    total_s: float | None
    tokens_per_s: float | None
    mfu: float | None  # by the data sheet's peak of the products' precision; FLOPs as plan.flops.train_flops
    missing: dict[str, list[str]] = field(default_factory=dict)


def predict_step(workload: Workload, hardware: HardwareConfig, measured: Measurements | None = None) -> StepTime:
    """Seconds of one step: accumulation · (products + attention + elementwise + exchanges) + optimizer + bubble.

    A matrix product takes max(FLOPs / rate, bytes / memory bandwidth), twice as much backward; attention has rates of
    its own; all else is bytes over memory bandwidth (`plan.traffic`). Of what ranks exchange, ZeRO 3's weights and
    gradients overlap with the computing on a GPU, so that max(0, exchange − computing) is left: DeepSpeed's
    overlap_comm, on at stage 3 alone. All else is waited for, and on a CPU, whose ranks compute while they exchange,
    everything. 1F1B's bubble is (p − 1) micro batches. Documents fill their rows; layers, experts and batches are
    evenly shared, and the last pipeline stage, which has the head, sets the pace. Rows are read ahead: of their loading
    what takes longer than everything else is left, 0 where the storage's bandwidth is not known.
    """
    speeds, shards = Speeds(workload, hardware, measured), shard(workload, stages(workload)[-1])
    micro = MicroBatch(workload, speeds)
    each = dict(micro.seconds) | _exchanged_each(workload, speeds)
    seconds = {part: workload.accumulation * took for part, took in each.items()}
    seconds |= _weights_and_gradients(workload, shards, speeds, micro.total)
    seconds["optimizer"] = _optimizer(workload, shards, speeds)
    seconds["pipeline bubble"] = (workload.pipeline - 1) * sum(each.values())
    device = sum(seconds.values())
    launches = speeds.operation_s * (workload.accumulation * micro.operations + _step_operations(workload))
    # A GPU is handed its operations ahead of time; a CPU's rank starts them itself.
    seconds["operations"] = launches if speeds.on_cpu else max(0.0, launches - device)
    seconds["data loading"] = max(0.0, _loading(workload, hardware) - sum(seconds.values()))
    seconds = {part: took for part, took in seconds.items() if took}
    if speeds.missing:
        unknown = set().union(*speeds.missing.values())
        known = {part: took for part, took in seconds.items() if part not in unknown}
        return StepTime(known, None, None, None, {key: sorted(parts) for key, parts in speeds.missing.items()})
    total = sum(seconds.values())
    flops = train_flops(workload.sizes, workload.seq_len, workload.tokens_per_step)
    peak = hardware.device.peak_flops_per_s.get(PRODUCTS_IN[workload.precision])
    mfu = flops / total / workload.ranks / peak if peak else None
    return StepTime(seconds, total, workload.tokens_per_step / total, mfu)


def _loading(workload: Workload, hardware: HardwareConfig) -> float:
    """A step's rows, read from the corpus's shards by as many nodes as there are."""
    if hardware.storage_bytes_per_s is None:
        return 0.0
    nodes = math.ceil(workload.ranks / ranks_per_node(workload, hardware))
    return workload.tokens_per_step * shard_bytes_per_token(workload) / nodes / hardware.storage_bytes_per_s


def _exchanged_each(workload: Workload, speeds: Speeds) -> dict[str, float]:
    """What ranks that share layers, rows or experts exchange at every micro batch; each waits for it.

    tensor: an all-reduce of N·D numbers after attention and after the feed-forward, forward, and two backward.
    sequence (Ulysses): all-to-alls of queries, keys, values and of what was attended, forward and backward.
    expert: all-to-alls of N·K·D numbers, dispatch and combine, forward and backward. pipeline: N·D numbers to the next
    stage and their gradient back. A layer that runs twice forward exchanges as often.
    """
    sizes, numerics = workload.sizes, Numerics(workload.precision, speeds.on_cpu)
    tokens = workload.micro_batch_size * workload.seq_len / workload.sequence
    forwards = 2 if workload.activation_checkpointing else 1
    layers = [*stages(workload)[-1].layers, *[sizes.num_hidden_layers] * sizes.num_nextn_predict_layers]
    sparse = sum(sizes.is_sparse(layer) for layer in layers)
    row = numerics.compute * sizes.hidden_size * tokens
    matrices = attention_matrices(sizes)
    attended = numerics.compute * tokens * (sum(m.outputs for m in matrices[:-1]) + matrices[-1].inputs)
    tensor, sequence = Group(workload.tensor), Group(workload.sequence, workload.tensor)
    expert = Group(workload.expert, workload.tensor)
    stage = Group(2 if workload.pipeline > 1 else 1, workload.ranks // workload.pipeline)
    passes, routed = forwards + 1, sizes.num_experts_per_tok * row
    todo = [
        ("tensor parallel", "all_reduce", 2 * passes * len(layers), row, tensor),
        ("sequence parallel", "all_to_all", passes * len(layers), attended / workload.tensor, sequence),
        ("expert parallel", "all_to_all", 2 * passes * sparse, routed, expert),
        ("pipeline", "all_to_all", 2, 2 * numerics.residual * sizes.hidden_size * tokens, stage),  # half leaves
    ]
    return {part: speeds.exchange(part, kind, calls * held, group, calls) for part, kind, calls, held, group in todo}


def _weights_and_gradients(workload: Workload, shards: Shards, speeds: Speeds, computing: float) -> dict[str, float]:
    """What is done with weights and gradients in one step, but for the optimizer's work, and what ranks exchange of it.

    ZeRO 0: all-reduce of w·P gradients, once. 1: the same (DeepSpeed reduces whole buckets and keeps its part), and an
    all-gather of w·P weights after the step. 2: the all-reduce at every micro batch. 3: at every micro batch an
    all-gather forward, another backward of what was let go in between, and a reduce-scatter.
    """
    stage, micros, whole = workload.zero_stage, workload.accumulation, shards.whole
    w, moved = WEIGHT_BYTES[workload.precision], weight_traffic(workload.precision, workload.zero_stage)
    copies = micros if moved.is_each_exchanged else 1
    took = copies * speeds.in_place("gradients", *_times(moved.exchange, whole), w * whole)
    for numbers in _tensors(workload, whole):
        took += micros * speeds.in_place("gradients", *_times(moved.casts, numbers), w * numbers)
        took += (micros - 1) * speeds.in_place("gradients", *_times(moved.sums, numbers), w * numbers)
    if stage == 3 and shards.common_replicas == 1:
        took += micros * speeds.in_place("gradients", SCATTERED_ALONE * w * whole, 0.0, w * whole)
    seconds = {"gradients": took}
    groups = (
        (w * shards.common, Group(shards.common_replicas, workload.tensor)),
        (w * shards.routed, Group(shards.routed_replicas, workload.tensor * workload.expert)),
    )
    exchanged = 0.0
    for held, group in groups:
        calls = max(1, held / w / workload.bucket_numbers)
        if stage < 3:
            times = micros if stage == 2 else 1
            exchanged += speeds.exchange("ZeRO exchange", "all_reduce", times * held, group, times * calls)
            exchanged += speeds.exchange("ZeRO exchange", "all_gather", held, group, calls) if stage else 0.0
        else:
            gathers = 1 + max(0.0, 1 - KEPT_GATHERED / whole)
            modules = 2 * workload.sizes.num_hidden_layers
            exchanged += speeds.exchange(
                "ZeRO exchange", "all_gather", micros * gathers * held, group, micros * modules
            )
            exchanged += speeds.exchange("ZeRO exchange", "reduce_scatter", micros * held, group, micros * calls)
    if stage == 3 and not speeds.on_cpu:
        exchanged = max(0.0, exchanged - micros * computing)
    return seconds | {"ZeRO exchange": exchanged}


def _optimizer(workload: Workload, shards: Shards, speeds: Speeds) -> float:
    """AdamW's bytes over the rank's shard; Muon's products beside, 5 steps of 4·n²·k + 2·n³ for n rows of k ≥ n."""
    own = shards.sharded if workload.zero_stage else shards.whole
    step = weight_traffic(workload.precision, workload.zero_stage).step
    # From ZeRO 1 on the shard is one tensor.
    tensors = [own] if workload.zero_stage else _tensors(workload, own)
    took = sum(speeds.in_place("optimizer", *_times(step, numbers), 4 * numbers) for numbers in tensors)
    if workload.optimizer == "muon":
        flops = 0.0
        for layer in range(workload.sizes.num_hidden_layers):
            always, router, chosen = layer_matrices(workload.sizes, layer)
            for matrix in [*always, *router, *chosen * workload.sizes.n_routed_experts]:
                small, large = sorted(matrix)
                flops += NEWTON_SCHULZ_STEPS * (4 * small**2 * large + 2 * small**3)
        counted = count_parameters(workload.sizes)
        took += speeds.flops("optimizer", flops * own / (counted.params_total + counted.params_mtp), "fp32")
    return took


def _times(moved: Moved, numbers: float) -> tuple[float, float]:
    return moved.bytes * numbers, moved.fresh * numbers


def _tensors(workload: Workload, numbers: float) -> list[float]:
    """So many numbers as the model's tensors hold them: each matrix, a layer's experts together, the embedding."""
    sizes = workload.sizes
    held: list[int] = [sizes.vocab_size * sizes.hidden_size] * (1 if sizes.tie_word_embeddings else 2)
    for layer in range(sizes.num_hidden_layers + sizes.num_nextn_predict_layers):
        always, router, chosen = layer_matrices(sizes, layer)
        held += [matrix.parameters for matrix in always + router]
        held += [sizes.n_routed_experts * matrix.parameters for matrix in chosen]
    return [numbers * one / sum(held) for one in held]


def _step_operations(workload: Workload) -> float:
    """AdamW's, tensor after tensor at ZeRO 0; from 1 on on one flat tensor, gathered from as many."""
    tensors = workload.sizes.num_hidden_layers * 10
    return STEP_OPERATIONS * tensors
