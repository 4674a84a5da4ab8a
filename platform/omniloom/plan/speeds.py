"""What one rank reaches: what was measured, else what the cluster's description says, else the data sheet's peaks."""

import math
from collections import defaultdict

from omniloom.plan.collectives import Group, Links, ranks_per_node
from omniloom.plan.config import HardwareConfig, Measurements, Workload
from omniloom.plan.measured import attention_s_per_flop, read_curve
from omniloom.plan.params import Matrix

PRODUCTS_IN = {"fp32": "fp32", "bf16_autocast": "bf16", "bf16": "bf16", "fp16": "fp16", "fp8": "fp8"}
CHAIN_BYTES = 12 + 12 + 8 + 6 + 6  # a number: what the measured chain reads and writes, a + b, · b, silu, bf16, float
CHAIN_FRESH_BYTES = 4 + 4 + 4 + 2 + 4  # of them written
NUMBER_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


class Speeds:
    """Turns FLOPs and bytes into seconds; of what is not known it keeps the keys, and the parts that hang on them."""

    def __init__(self, workload: Workload, hardware: HardwareConfig, measured: Measurements | None) -> None:
        per_node = ranks_per_node(workload, hardware)
        self._device, self._rates = hardware.device, measured.of(per_node) if measured else None
        self.missing: dict[str, set[str]] = defaultdict(set)
        self.on_cpu = hardware.device.name == "cpu"
        self.operation_s = self._rates.operation_s if self._rates else 0.0
        self.links = Links(
            per_node,
            hardware.node_bytes_per_s,
            hardware.network_bytes_per_s,
            self._rates.collectives if self._rates else {},
        )

    def product(self, part: str, rows: float, matrix: Matrix, precision: str) -> float:
        """Seconds of one product of n rows: max(2·n·i·o / rate, (n·i + i·o + n·o) numbers / bandwidth)."""
        if not rows:
            return 0.0
        moved = NUMBER_BYTES[precision] * (rows * (matrix.inputs + matrix.outputs) + matrix.parameters)
        bandwidth = self._bandwidth(moved, in_place=True)
        computed = self.flops(part, 2 * rows * matrix.parameters, precision, rows)
        return max(computed, moved / bandwidth if bandwidth else 0.0)

    def flops(self, part: str, flops: float, precision: str, rows: float = math.inf) -> float:
        """Seconds of so many FLOPs in matrix products of so many rows each."""
        rate = self._matmul(precision, rows)
        if rate is None:
            self._miss(f"cluster.device.peak_flops_per_s.{precision}", part)
            return 0.0
        return flops / rate

    def attention(
        self, part: str, flops: float, tokens: int, width: int, precision: str, backward: bool = False
    ) -> float:
        """Seconds of causal attention over documents of `tokens` with heads of `width`."""
        if self._rates:
            curves = (
                self._rates.attention_backward_flops_per_s if backward else self._rates.attention_forward_flops_per_s
            )
            if precision in curves:
                return flops * attention_s_per_flop(curves[precision], width, tokens)
        return self._attention_by_description(part, flops, precision)

    def block_attention(self, part: str, flops: float, precision: str) -> float:
        """Seconds of attention with a mask over blocks of keys."""
        if self._rates and precision in self._rates.block_attention_flops_per_s:
            return flops / self._rates.block_attention_flops_per_s[precision]
        return self._attention_by_description(part, flops, precision)

    def traffic(self, part: str, moved: float, tensor: float) -> float:
        """Seconds of reading and writing `moved` bytes in all, in tensors of so many."""
        bandwidth = self._bandwidth(tensor, in_place=False)
        if bandwidth is None:
            self._miss("cluster.device.memory_bytes_per_s", part)
            return 0.0
        return moved / bandwidth

    def in_place(self, part: str, moved: float, fresh: float, tensor: float) -> float:
        """Seconds of reading and writing `moved` bytes in all, `fresh` of them into new memory, in tensors of so many.

        New memory costs what the measured chain of operations lost by it, over the bytes it wrote there.
        """
        if self._rates is None:
            return self.traffic(part, moved, tensor)
        there, new = (
            1 / read_curve(curve, tensor)
            for curve in (self._rates.in_place_bytes_per_s, self._rates.elementwise_bytes_per_s)
        )
        return moved * there + fresh * CHAIN_BYTES / CHAIN_FRESH_BYTES * max(0.0, new - there)

    def exchange(self, part: str, kind: str, held: float, group: Group, calls: float = 1) -> float:
        """Seconds of `calls` collectives over `held` bytes a rank."""
        if group.size == 1 or not held:
            return 0.0
        for key in self.links.missing(group):
            self._miss(key, part)
        return self.links.seconds(kind, held, group, calls)

    def _attention_by_description(self, part: str, flops: float, precision: str) -> float:
        rate = self._device.attention_flops_per_s.get(precision)
        return flops / rate if rate else self.flops(part, flops, precision)

    def _matmul(self, precision: str, rows: float) -> float | None:
        if self._rates and precision in self._rates.matmul_flops_per_s:
            return read_curve(self._rates.matmul_flops_per_s[precision], rows)
        device = self._device
        return device.matmul_flops_per_s.get(precision) or device.peak_flops_per_s.get(precision)

    def _bandwidth(self, tensor: float, in_place: bool) -> float | None:
        if self._rates is None:
            return self._device.memory_bytes_per_s
        return read_curve(self._rates.in_place_bytes_per_s if in_place else self._rates.elementwise_bytes_per_s, tensor)

    def _miss(self, key: str, part: str) -> None:
        self.missing[key].add(part)
