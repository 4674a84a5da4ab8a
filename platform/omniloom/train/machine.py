"""What a rank of this machine reaches, measured on the ranks of a job: the peaks that the planner's step time uses.

On CUDA kernels are timed between synchronisations; that path was written, not tried.
"""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from omniloom.model.attention import attend_fully
from omniloom.plan.collectives import RING_PASSES
from omniloom.plan.config import Curve, Exchange, Measurements, Rates
from omniloom.plan.measured import write_measurements
from omniloom.plan.micro_batch import ATTENTION_BACKWARD
from omniloom.plan.speeds import CHAIN_BYTES

HEADS, HEAD_WIDTH = 2, 64
BLOCKS, WINDOW, SEEN = 4, 256, 576  # sparse attention: queries of a block, keys that it is handed
MIB = 1 << 20


@dataclass(frozen=True)
class Task:
    """What is to be measured, where it is kept, and how large and long each timing is."""

    runs_dir: str
    cluster: str
    device: str  # as the cluster's description names it
    seconds_each: float = 0.5
    products: int = 1_024  # rows and columns; 8 times as many on a GPU
    rows: tuple[float, ...] = (1 / 16, 1 / 4, 1, 4)  # of products, so many times that: from an expert's to long rows'
    head_widths: tuple[int, ...] = (32, 64, 128)
    documents: tuple[int, ...] = (256, 1_024, 4_096)
    tensors_mib: tuple[float, ...] = (1, 4, 16, 32, 64, 128)
    exchanged_mib: float = 32

    @property
    def progress(self) -> Path:
        """A file that grows by a line with each thing that was measured."""
        return Path(self.runs_dir) / "machines" / f"{self.cluster}.progress"


def measure(task: Task) -> None:
    """Measure on every rank of the job, first on rank 0 alone, then on all at once; rank 0 writes it down."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    bench = _Bench(task, device)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    rates = []
    if rank == 0:
        rates.append(bench.rates(1, together=False))
    dist.barrier()
    if ranks > 1:
        rates.append(bench.rates(local, together=True))
    if rank == 0:
        measured = Measurements(
            host=platform.node(),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            torch=torch.__version__,
            device=task.device,
            accelerator=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            rates=rates,
        )
        write_measurements(measured, Path(task.runs_dir), task.cluster)
    dist.barrier()


class _Bench:
    """Times one thing after another on this rank's device."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._task, self._device, self._together = task, device, False
        self._heads = HEADS * (16 if device.type == "cuda" else 1)
        self._precisions = {"fp32": torch.float32, "bf16": torch.bfloat16}
        if device.type == "cuda":
            self._precisions["fp16"] = torch.float16

    def rates(self, ranks: int, together: bool) -> Rates:
        """Everything once; of ranks that work together the slowest counts."""
        self._together, dtypes = together, self._precisions.items()
        forward: dict[str, dict[int, Curve]] = {name: {} for name in self._precisions}
        backward: dict[str, dict[int, Curve]] = {name: {} for name in self._precisions}
        for (name, dtype), width in product(dtypes, self._task.head_widths):
            both = [(tokens, *self._attention(tokens, width, dtype)) for tokens in self._task.documents]
            forward[name][width] = [(tokens, rate) for tokens, rate, _ in both]
            backward[name][width] = [(tokens, rate) for tokens, _, rate in both]
        return Rates(
            ranks=ranks,
            matmul_flops_per_s={name: self._products(dtype) for name, dtype in dtypes},
            attention_forward_flops_per_s=forward,
            attention_backward_flops_per_s=backward,
            block_attention_flops_per_s={name: self._blocks(dtype) for name, dtype in dtypes},
            elementwise_bytes_per_s=[(mib * MIB, self._elementwise(mib)) for mib in self._task.tensors_mib],
            in_place_bytes_per_s=[(mib * MIB, self._in_place(mib)) for mib in self._task.tensors_mib],
            operation_s=self._operation(),
            collectives={kind: self._exchange(kind, passes) for kind, passes in RING_PASSES.items()}
            if together
            else {},
        )

    def _products(self, dtype: torch.dtype) -> Curve:
        """FLOP/s of a linear layer's three products, by rows."""
        side = self._task.products * (8 if self._device.type == "cuda" else 1)
        return [(rows, self._layer(rows, side, dtype)) for rows in (int(side * share) for share in self._task.rows)]

    def _layer(self, rows: int, side: int, dtype: torch.dtype) -> float:
        x, weight, gradient = (torch.randn(n, side, device=self._device).to(dtype) for n in (rows, side, rows))

        def layer() -> None:
            F.linear(x, weight)
            gradient @ weight
            gradient.T @ x

        return 3 * 2 * rows * side**2 / self._seconds(f"products, {rows} rows, {_name(dtype)}", layer)

    def _attention(self, tokens: int, width: int, dtype: torch.dtype) -> tuple[float, float]:
        """FLOP/s of causal attention by the planner's count, forward and backward."""
        shape = (tokens, self._heads, width)
        query, key, value = (torch.randn(shape, device=self._device).to(dtype).requires_grad_() for _ in range(3))

        def forward() -> Tensor:
            return attend_fully(query, key, value, [], width**-0.5)

        out = forward()
        gradient = torch.ones_like(out)

        def backward() -> None:
            torch.autograd.grad(out, (query, key, value), gradient, retain_graph=True)

        flops = 4 * self._heads * width * (tokens + 1) / 2 * tokens
        what = f"attention, {tokens} tokens, heads of {width}, {_name(dtype)}"
        forward_s = self._seconds(what, forward)
        return flops / forward_s, ATTENTION_BACKWARD * flops / self._seconds(f"{what}, backward", backward)

    def _blocks(self, dtype: torch.dtype) -> float:
        """FLOP/s of sparse attention's kernel, forward and backward together."""
        shapes = ((BLOCKS, self._heads, tokens, HEAD_WIDTH) for tokens in (WINDOW, SEEN, SEEN))
        query, key, value = (torch.randn(shape, device=self._device).to(dtype).requires_grad_() for shape in shapes)
        mask = torch.rand(BLOCKS, 1, WINDOW, SEEN, device=self._device) < 0.6

        def both() -> None:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            torch.autograd.grad(out, (query, key, value), torch.ones_like(out))

        flops = 4 * BLOCKS * self._heads * WINDOW * SEEN * HEAD_WIDTH
        return (1 + ATTENTION_BACKWARD) * flops / self._seconds(f"masked attention, {_name(dtype)}", both)

    def _elementwise(self, mib: float) -> float:
        """Bytes a second between products: a sum, a product, a nonlinearity, casts, each into a tensor of its own."""
        a, b = self._pair(mib)
        took = self._seconds(f"elementwise, {mib:g} MiB", lambda: F.silu((a + b) * b).bfloat16().float())
        return CHAIN_BYTES * a.numel() / took

    def _in_place(self, mib: float) -> float:
        """The same into tensors that are there."""
        a, b = self._pair(mib)
        out, half = torch.empty_like(a), torch.empty_like(a, dtype=torch.bfloat16)

        def chain() -> None:
            torch.add(a, b, out=out)
            F.silu(out.mul_(b), inplace=True)
            out.copy_(half.copy_(out))

        return CHAIN_BYTES * a.numel() / self._seconds(f"in place, {mib:g} MiB", chain)

    def _pair(self, mib: float) -> tuple[Tensor, Tensor]:
        a = torch.randn(max(1, int(mib * MIB) // 4), device=self._device)
        return a, torch.randn_like(a)

    def _operation(self) -> float:
        """Seconds of the smallest operation, one of a chain forward and backward."""
        a = torch.ones(1, device=self._device, requires_grad=True)

        def chain() -> None:
            out = a
            for _ in range(100):
                out = out * a
            out.backward()

        return self._seconds("smallest operation", chain) / 400  # each has two products and a sum backward

    def _exchange(self, kind: str, passes: int) -> Exchange:
        """A collective's latency, from 4 KiB, and bytes a second, from many."""
        ranks, many = dist.get_world_size(), int(self._task.exchanged_mib * MIB) // 4
        took = []
        for numbers in (1_024, many):
            part = torch.ones(numbers // ranks, device=self._device)
            whole = torch.ones(numbers // ranks * ranks, device=self._device)
            call = partial(_collective, kind, whole, part, torch.empty_like(whole))
            took.append(self._seconds(f"{kind.replace('_', '-')}, {numbers * 4:,} bytes", call))
        latency, large = took
        return Exchange(latency, passes * (ranks - 1) / ranks * 4 * many / max(large - latency, large / 10))

    def _seconds(self, what: str, function: Callable[[], object]) -> float:
        """The median of as many calls as fit, at least 3; where ranks work together, the slowest one's."""
        if dist.get_rank() == 0:
            with self._task.progress.open("a") as file:
                file.write(f"{what}\n")
        function()
        count = math.ceil(self._slowest(max(3.0, self._task.seconds_each / self._once(function))))
        if self._together:
            dist.barrier()
        return self._slowest(statistics.median(self._once(function) for _ in range(count)))

    def _once(self, function: Callable[[], object]) -> float:
        self._synchronize()
        start = time.perf_counter()
        function()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _slowest(self, value: float) -> float:
        if not self._together:
            return value
        held = torch.tensor([value], dtype=torch.float64, device=self._device)
        dist.all_reduce(held, op=dist.ReduceOp.MAX)
        return float(held)


def _collective(kind: str, whole: Tensor, part: Tensor, other: Tensor) -> None:
    if kind == "all_reduce":
        dist.all_reduce(whole)
    elif kind == "all_gather":
        dist.all_gather_into_tensor(whole, part)
    elif kind == "reduce_scatter":
        dist.reduce_scatter_tensor(part, whole)
    else:
        dist.all_to_all_single(other, whole)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
