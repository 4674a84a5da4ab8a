"""DeepSpeed: the one place that knows it. Our configuration in, a sharded engine out."""

import math
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from omniloom.data.heap import trim_heap
from omniloom.errors import ConfigError
from omniloom.model.decoder import Layer
from omniloom.train.config import TrainingRun
from omniloom.train.debugging import set_collective_timeout
from omniloom.train.deepspeed_json import clips_here, deepspeed_config
from omniloom.train.groups import ParallelConfig
from omniloom.train.optimizer import parameter_groups
from omniloom.train.precision import convert_to_float8, refuse_unless_possible
from omniloom.train.timing import Clock

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed finds it too, but warns on standard output

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.ops import __compatible_ops__
from deepspeed.ops.op_builder import AsyncIOBuilder

from omniloom.train import fragments
from omniloom.train.fragments import Fragment, Whole
from omniloom.train.parallel import gradient_norm, share_experts, share_rows, whole_weights

if not torch.accelerator.is_available():
    __compatible_ops__["deepspeed_shm_comm"] = False  # collectives in shared memory: compiled for most of a minute


class Engine:
    """A DeepSpeed engine with what the training step needs of it."""

    def __init__(self, module: nn.Module, run: TrainingRun) -> None:
        precision, accelerator = run.train.precision, get_accelerator()
        refuse_unless_possible(precision, module, accelerator.device_name(), accelerator.supported_dtypes())
        _refuse_disk_unless_possible(run.parallel)
        self.float8 = convert_to_float8(module) if precision == "fp8" else []  # names of modules
        _compile(module, run.train.compile)
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.rows = share_rows(module, run.parallel.sequence)
        self.replicas, self.replica = self.ranks // self.rows.parts, self.rank // self.rows.parts  # by their rows
        share_experts(module, run.parallel.expert, run.parallel.zero_stage)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=parameter_groups(module, run.optimizer),
            config=deepspeed_config(run, self.ranks, sum(p.numel() for p in module.parameters())),
        )
        set_collective_timeout(run.debug.collective_timeout_s)  # of DeepSpeed's groups too: they have torch's default
        self._engine.basic_optimizer.step = self._unless_over_limit(self._engine.basic_optimizer.step)
        trim_heap()  # what building and sharding the model has freed lies in holes that fit little else
        # Muon's groups have a rate of their own.
        self._peak_rates = [group["lr"] for group in self._engine.optimizer.param_groups]
        self.zero_stage = run.parallel.zero_stage
        self.optimizer = run.optimizer.kind
        self.accumulation = run.train.gradient_accumulation_steps(self.replicas)
        self.device: torch.device = self._engine.device
        self.module = module
        self.clock = Clock(self.device)
        self._clips_here, self._clipping = clips_here(run), run.train.gradient_clipping
        self._scales_loss = precision == "fp16"
        if self.zero_stage == 0 and not self._clips_here:
            # DeepSpeed has taken a step of zero gradients to make the optimizer's state: Adam would count it, and the
            # masters have decayed by it.
            self._engine.optimizer.state.clear()
            with torch.no_grad():
                for masters, weights in zip(
                    self._engine.optimizer.fp32_groups, self._engine.optimizer.fp16_groups, strict=True
                ):
                    for master, weight in zip(masters, weights, strict=True):
                        master.copy_(weight)

    def forward(self, **inputs: Tensor | list[Tensor]) -> Any:
        """Run the model."""
        return self._engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, which is this micro batch's share of the global batch's loss.

        DeepSpeed averages over ranks and over micro batches; the loss is already divided by the global weight, so both
        averages are undone.
        """
        self._engine.backward(loss * (self.ranks * self.accumulation))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts the micro batch

    def timed(self, part: str) -> AbstractContextManager[None]:
        """What the body takes belongs to this part of the step."""
        return self.clock.part(part)

    def step(self, rate_share: float, norm_limit: float = math.inf) -> float:
        """Take the optimizer step at this share of the peak rates; returns the global gradient norm.

        Where the norm is not finite, or over its limit, the step is left out: neither weights nor moments move.
        """
        for group, peak in zip(self._engine.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * rate_share
        self._norm_limit, self._over_limit = norm_limit, False
        if self._clips_here:
            self._norm = gradient_norm(self.module.parameters())
            if self._clipping:
                torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), self._clipping, self._norm)
        self._engine.step()
        return float(self._norm if self._clips_here else self._engine.get_global_grad_norm())

    def _unless_over_limit(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The `step` of torch's optimizer, which comes last at every ZeRO stage: DeepSpeed knows the norm by then.

        DeepSpeed leaves out by itself what is not finite, but for fp32 parameters at stage 0. It calls `step` once for
        each of its groups, with the same norm; a loss scale takes such a step for a good one.
        """

        def unless_over_limit(*args: Any, **kwargs: Any) -> Any:
            norm = float(self._norm if self._clips_here else self._engine.optimizer._global_grad_norm)
            self._over_limit = not (math.isfinite(norm) and norm <= self._norm_limit)
            return None if self._over_limit else step(*args, **kwargs)

        return unless_over_limit

    @property
    def skipped(self) -> bool:
        """Whether the last step was left out."""
        return self._over_limit or not self._engine.was_step_applied()

    @property
    def loss_scale(self) -> float | None:
        """What the next step's loss is multiplied by, where gradients would vanish in fp16 otherwise."""
        return float(self._engine.optimizer.loss_scale) if self._scales_loss else None

    def train(self, mode: bool) -> None:
        """Switch between training and evaluation."""
        self._engine.train(mode)

    def fragments(self) -> list[Fragment]:
        """What this rank holds of the weights and the optimizer's state: views, as they stand."""
        return fragments.fragments(self._engine)

    def wholes(self) -> dict[str, Whole]:
        """The shape and type of every parameter and buffer, in the model's order."""
        return fragments.wholes(self.module)

    def counts(self) -> tuple[dict[str, int], dict[str, float]]:
        """The optimizer's own count of steps, by parameter, of those that this rank has; the engine's counters."""
        return fragments.optimizer_steps(self._engine), fragments.counters(self._engine)

    def restore(
        self,
        states: Mapping[str, Collection[str]],
        steps: Mapping[str, int],
        counters: Mapping[str, float],
        read: Callable[[list[Fragment]], None],
    ) -> None:
        """Take over a state of these tensors, whose values `read` fills in; all ranks call it.

        The optimizer's settings stay this run's: one forked from another may have other ones.
        """
        fragments.restore(self._engine, states, steps, read)
        fragments.set_counters(self._engine, counters)

    def weights(self) -> dict[str, Tensor]:
        """The whole model's weights; all ranks call it, rank 0 gets them."""
        sharded = self._engine.optimizer if self.zero_stage == 3 else None
        if sharded is not None:
            sharded.checkpoint_event_prologue()
        weights = whole_weights(self.module)
        if sharded is not None:
            sharded.checkpoint_event_epilogue()
        return weights

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum `values` over all ranks, in place."""
        dist.all_reduce(values)
        return values

    def max_over_ranks(self, values: list[float]) -> list[float]:
        """The largest of each value of any rank."""
        held = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(held, op=dist.ReduceOp.MAX)
        return held.tolist()

    def gather_bytes(self, mine: bytes) -> bytes:
        """Every rank's bytes, of equal length, in rank order."""
        held = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(self.device)
        everyone = [torch.empty_like(held) for _ in range(self.ranks)]
        dist.all_gather(everyone, held)
        return b"".join(part.cpu().numpy().tobytes() for part in everyone)

    def gather(self, mine: Any) -> list[Any]:
        """Every rank's plain value, in rank order."""
        everyone: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyone, mine)
        return everyone

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()


def _compile(module: nn.Module, compiled: bool) -> None:
    """Compile each layer by itself, but for its attention and its experts; what surrounds layers stays as it is.

    Where nothing is asked for, a CPU compiles nothing: a minute for the few matrix products of a Muon step.
    """
    torch.compiler.set_stance("default" if compiled or torch.accelerator.is_available() else "force_eager")
    if compiled:
        for part in module.modules():
            if isinstance(part, Layer):
                part.compile()


def _refuse_disk_unless_possible(parallel: ParallelConfig) -> None:
    """Raise ConfigError, with DeepSpeed's own reason, where this machine cannot keep anything on a disk."""
    for key in ("offload_optimizer", "offload_parameters"):
        if getattr(parallel, key).device != "nvme":
            continue
        operation, reasons = AsyncIOBuilder(), list[str]()
        operation.warning = reasons.append  # instead of printing them
        if not operation.is_compatible(verbose=True):
            raise ConfigError(
                f"parallel.{key}.device=nvme needs DeepSpeed's async_io, which this machine cannot build "
                f"({' '.join(reasons)}): set parallel.{key}.device=cpu"
            )


def shut_down() -> None:
    """Leave the process group, so that the process can end cleanly."""
    if dist.is_initialized():
        dist.destroy_process_group()
