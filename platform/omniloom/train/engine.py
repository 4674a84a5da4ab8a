"""DeepSpeed: the one place that knows it. Our configuration in, a sharded engine out."""

import os
from pathlib import Path
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

from omniloom.train.parallel import gradient_norm, share_experts, share_rows, whole_weights

if not torch.accelerator.is_available():
    # On CPU compiling takes most of a minute at every start, for the collectives in shared memory as for the few matrix
    # products of a Muon step. Here, as the compiler's own modules belong to the process and not to the model.
    __compatible_ops__["deepspeed_shm_comm"] = False
    torch.compiler.set_stance("force_eager")

SETTINGS = ("betas", "eps", "weight_decay", "momentum")  # of a parameter group; its rate is set at every step


def deepspeed_config(run: TrainingRun, ranks: int, parameters: int) -> dict[str, Any]:
    """Translate a run into DeepSpeed's own configuration."""
    train = run.train
    bucket = min(run.parallel.bucket_numbers, parameters + parameters % 2)  # DeepSpeed allocates whole ones, even ones
    return {
        # It takes ranks that share rows for ranks with rows of their own: each has its tokens' gradients.
        "train_batch_size": train.global_batch_size * run.parallel.sequence,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps(ranks // run.parallel.sequence),
        "gradient_clipping": 0.0 if _clips_here(run) else train.gradient_clipping,
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


def _clips_here(run: TrainingRun) -> bool:
    """DeepSpeed keeps no norm of these gradients, and clips those of shared experts by a mean of the ranks' norms."""
    return run.parallel.zero_stage == 0 and run.train.precision in FP32_PARAMETERS


class Engine:
    """A DeepSpeed engine with what the training step needs of it."""

    def __init__(self, module: nn.Module, run: TrainingRun) -> None:
        precision, accelerator = run.train.precision, get_accelerator()
        refuse_unless_possible(precision, module, accelerator.device_name(), accelerator.supported_dtypes())
        self.float8 = convert_to_float8(module) if precision == "fp8" else []  # names of modules
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
        trim_heap()  # what building and sharding the model has freed lies in holes that fit little else
        # Muon's groups have a rate of their own.
        self._peak_rates = [group["lr"] for group in self._engine.optimizer.param_groups]
        self.zero_stage = run.parallel.zero_stage
        self.accumulation = run.train.gradient_accumulation_steps(self.replicas)
        self.device: torch.device = self._engine.device
        self.module = module
        self._clips_here, self._clipping = _clips_here(run), run.train.gradient_clipping
        self._scales_loss = precision == "fp16"
        if self.zero_stage == 0 and not self._clips_here:
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
        if self._clips_here:
            norm = gradient_norm(self.module.parameters())
            if self._clipping:
                torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), self._clipping, norm)
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

    def save(self, folder: Path) -> None:
        """Write every rank's shards under `folder`; all ranks call it."""
        self._engine.save_checkpoint(str(folder), tag="state", save_latest=False)

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote at the same ranks and ZeRO stage; the optimizer's settings stay this run's."""
        groups = self._engine.optimizer.param_groups
        ours = [{name: group[name] for name in SETTINGS if name in group} for group in groups]
        self._engine.load_checkpoint(str(folder), tag="state")
        for group, settings in zip(self._engine.optimizer.param_groups, ours, strict=True):
            group |= settings  # a run forked from another may have other ones

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


def shut_down() -> None:
    """Leave the process group, so that the process can end cleanly."""
    if dist.is_initialized():
        dist.destroy_process_group()
