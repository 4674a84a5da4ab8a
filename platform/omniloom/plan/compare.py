"""Architectures side by side: what each spends on attention and feed-forward, keeps active, caches, costs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from omniloom.plan.config import HardwareConfig, Measurements, Workload
from omniloom.plan.flops import attention_flops_per_token, count_costs, matmul_parameters
from omniloom.plan.params import Sizes, attention_matrices, count_parameters, parameters
from omniloom.plan.step_time import predict_step

ROWS, ACCUMULATION = 8, 128


@dataclass(frozen=True)
class Architecture:
    """One column of the comparison; FLOPs are a text token's, in documents of the same length for all."""

    name: str
    params_total: int
    params_active: int
    active_share: float
    context_tokens: int
    document_tokens: int
    attention_flops_per_token: float  # projections, and the keys seen
    feed_forward_flops_per_token: float  # the router's too
    forward_flops_per_token: float
    kv_cache_bytes_per_token: int
    train_tokens: int | None
    train_flops: float | None
    train_flops_6nd: int | None
    gpu_hours: float | None  # of one device's roofline, networks aside
    cost_usd: float | None
    missing: tuple[str, ...]  # keys of the cluster, without which hours or cost are not known

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def compare(
    models: Mapping[str, Sizes],
    like: Workload,
    hardware: HardwareConfig,
    train_tokens: int | None,
    measured: Measurements | None = None,
) -> list[Architecture]:
    """Each model in documents of `like.seq_len` tokens, shorter where its context is; cost by one device's roofline."""
    return [_architecture(name, sizes, like, hardware, train_tokens, measured) for name, sizes in models.items()]


def _architecture(
    name: str,
    sizes: Sizes,
    like: Workload,
    hardware: HardwareConfig,
    train_tokens: int | None,
    measured: Measurements | None,
) -> Architecture:
    counted = count_parameters(sizes)
    tokens = min(like.seq_len, sizes.max_position_embeddings)
    costs = count_costs(sizes, tokens, train_tokens)
    layers, projections = sizes.num_hidden_layers, parameters(attention_matrices(sizes))
    attention = layers * (2 * projections + attention_flops_per_token(sizes, tokens))
    feed_forward = 2 * (matmul_parameters(sizes) - sizes.vocab_size * sizes.hidden_size - layers * projections)
    # So large a batch that neither reading the experts nor the optimizer's step counts.
    alone = Workload(sizes, tokens, ROWS * ACCUMULATION, ROWS, zero_stage=0, precision=like.precision)
    step = predict_step(alone, hardware, measured)
    speed, missing = step.tokens_per_s, list(step.missing)
    hours = None if speed is None or train_tokens is None else train_tokens / speed / 3_600
    price = hardware.usd_per_device_hour
    missing += [] if price is not None else ["cluster.usd_per_device_hour"]
    return Architecture(
        name=name,
        params_total=counted.params_total,
        params_active=counted.params_active,
        active_share=counted.params_active / counted.params_total,
        context_tokens=sizes.max_position_embeddings,
        document_tokens=tokens,
        attention_flops_per_token=attention,
        feed_forward_flops_per_token=feed_forward,
        forward_flops_per_token=costs.forward_flops_per_token,
        kv_cache_bytes_per_token=costs.kv_cache_bytes_per_token,
        train_tokens=train_tokens,
        train_flops=costs.train_flops,
        train_flops_6nd=costs.train_flops_6nd,
        gpu_hours=hours,
        cost_usd=None if hours is None or price is None else hours * price,
        missing=tuple(missing) if train_tokens is not None else (),
    )
