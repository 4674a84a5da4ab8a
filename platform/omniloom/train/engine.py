"""DeepSpeed: the one place that knows it. Our configuration in, a sharded engine out."""

import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from omniloom.data.heap import trim_heap
from omniloom.train.config import TrainingRun
from omniloom.train.optimizer import deepspeed_section, parameter_groups
from omniloom.train.precision import (
    FP32_PARAMETERS,
    convert_to_float8,
    deepspeed_sections,
    refuse_unless_possible,
)

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed finds it too, but warns on standard output

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.ops import __compatible_ops__

from omniloom.train import fragments
from omniloom.train.fragments import Fragment, Whole

if not torch.accelerator.is_available():
    # On CPU compiling takes most of a minute at every start, for the collectives in shared memory as for the few matrix
    # products of a Muon step. Here, as the compiler's own modules belong to the process and not to the model.
    __compatible_ops__["deepspeed_shm_comm"] = False
    torch.compiler.set_stance("force_eager")


def deepspeed_config(run: TrainingRun, ranks: int, parameters: int) -> dict[str, Any]:
    """Translate a run into DeepSpeed's own configuration."""
    train = run.train
    bucket = min(run.parallel.bucket_numbers, parameters + parameters % 2)  # DeepSpeed allocates whole ones, even ones
    return {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps(ranks),
        "gradient_clipping": train.gradient_clipping,
        # Muon multiplies whole matrices: at stage 3 DeepSpeed takes it only with gradients reduced whole.
        "zero_optimization": {
            "stage": run.parallel.zero_stage,
            "reduce_scatter": run.optimizer.kind != "muon",
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        **deepspeed_sections(train.precision),
        "optimizer": deepspeed_section(run.optimizer),
        "steps_per_print": 1 << 62,  # our own tracker reports
    }


class Engine:
    """A DeepSpeed engine with what the training step needs of it."""

    def __init__(self, module: nn.Module, run: TrainingRun) -> None:
        precision, accelerator = run.train.precision, get_accelerator()
        refuse_unless_possible(precision, module, accelerator.device_name(), accelerator.supported_dtypes())
        self.float8 = convert_to_float8(module) if precision == "fp8" else []  # names of modules
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=parameter_groups(module, run.optimizer),
            config=deepspeed_config(run, self.ranks, sum(p.numel() for p in module.parameters())),
        )
        trim_heap()  # what building and sharding the model has freed lies in holes that fit little else
        # Muon's groups have a rate of their own.
        self._peak_rates = [group["lr"] for group in self._engine.optimizer.param_groups]
        self.zero_stage = run.parallel.zero_stage
        self.optimizer = run.optimizer.kind
        self.accumulation = run.train.gradient_accumulation_steps(self.ranks)
        self.device: torch.device = self._engine.device
        self.module = module
        # The gradients' norm is ours to take where DeepSpeed keeps none.
        self._clip_here = self.zero_stage == 0 and precision in FP32_PARAMETERS
        self._scales_loss = precision == "fp16"
        if self.zero_stage == 0 and not self._clip_here:
            # DeepSpeed has taken a step of zero gradients to make the optimizer's state: Adam would count it.
            self._engine.optimizer.state.clear()

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

    def step(self, rate_share: float) -> float:
        """Take the optimizer step at this share of the peak rates; returns the global gradient norm."""
        for group, peak in zip(self._engine.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * rate_share
        norm = None
        if self._clip_here:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if norm is None else norm
        return float(norm)

    @property
    def skipped(self) -> bool:
        """Whether DeepSpeed left the last step out, as its gradients were not finite."""
        return not self._engine.was_step_applied()

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out since the run began."""
        return self._engine.skipped_steps

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
        if self.zero_stage == 3:
            gathered = self._engine._zero3_consolidated_16bit_state_dict()
            return gathered or {}
        return dict(self.module.state_dict())

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


def shut_down() -> None:
    """Leave the process group, so that the process can end cleanly."""
    if dist.is_initialized():
        dist.destroy_process_group()
