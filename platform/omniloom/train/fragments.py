"""Where DeepSpeed keeps what a run is made of: of each parameter the parts of its master and of the optimizer's state.

stage 0         the parameter itself, in bf16 a float32 copy of it; the optimizer's state by parameter
stage 1 and 2   a rank's share of all parameters laid end to end, in float32; `_hp_mapping` says where each lies
stage 3         the same, each parameter cut into as many parts as there are ranks

Whatever of it lies where, here it is named by the parameter and by its place in the flattened whole, which no stage and
no number of ranks changes. A parameter of which a rank has a slice alone says so by `global_shape` and `global_offset`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from deepspeed import comm
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

MASTER = "master"  # the weight, as precisely as it is kept
BUFFER = "buffer"  # no parameter, but part of the model
MOMENTUM = "momentum_buffer"
COUNTERS = (
    "global_steps",
    "global_samples",
    "skipped_steps",
)  # its micro steps begin anew: no accumulation is under way
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Fragment:
    """A part that this rank holds of one tensor of the state: `values`, flat, from element `offset` of the whole on."""

    name: str
    state: str  # MASTER, BUFFER, or the optimizer's own word: exp_avg, exp_avg_sq, momentum_buffer
    offset: int
    values: Tensor


@dataclass(frozen=True)
class Whole:
    """What all fragments of a name make: its shape, and the type that the model computes with."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Home:
    """Part of a parameter in a flat tensor that the optimizer steps: `numel` elements from `place` on."""

    name: str
    flat: Tensor
    place: int
    numel: int
    offset: int  # in the whole parameter

    def of(self, values: Tensor) -> Tensor:
        return values.detach().view(-1).narrow(0, self.place, self.numel)


def wholes(module: nn.Module) -> dict[str, Whole]:
    """Every parameter and buffer that is saved, each once, in the model's order."""
    found = {name: Whole(_shape(parameter), parameter.dtype) for name, parameter in module.named_parameters()}
    return found | {name: Whole(tuple(buffer.shape), buffer.dtype) for name, buffer in _buffers(module).items()}


def fragments(engine: Any) -> list[Fragment]:
    """All that this rank holds, as it stands: views of DeepSpeed's own tensors."""
    base = _base(engine)
    found = [Fragment(name, BUFFER, 0, buffer.view(-1)) for name, buffer in _buffers(engine.module).items()]
    whole = _whole_momenta(engine)
    for home in _homes(engine):
        found.append(Fragment(home.name, MASTER, home.offset, home.of(home.flat)))
        for state, values in _states_of(base, home.flat).items():
            if torch.is_tensor(values) and values.dim() and not (state == MOMENTUM and id(home.flat) in whole):
                found.append(Fragment(home.name, state, home.offset, home.of(values)))
    for flat, homes in whole.values():
        if MOMENTUM in _states_of(base, flat):
            momentum = base.state[flat][MOMENTUM]
            found += [Fragment(home.name, MOMENTUM, home.offset, home.of(momentum)) for home in homes]
    return found


def optimizer_steps(engine: Any) -> dict[str, int]:
    """How many steps the optimizer counts of each parameter, where it counts."""
    base = _base(engine)
    counted = ((home.name, _states_of(base, home.flat)) for home in _homes(engine))
    return {name: int(state["step"]) for name, state in counted if "step" in state}


def restore(
    engine: Any,
    states: Mapping[str, Collection[str]],
    steps: Mapping[str, int],
    read: Callable[[list[Fragment]], None],
) -> None:
    """Give the optimizer the named states of each parameter, have `read` fill all fragments, and pass them on to the
    weights that the model computes with; all ranks call it."""
    optimizer, base, whole = engine.optimizer, _base(engine), _whole_momenta(engine)
    counts_in_tensors = type(getattr(base, "aux_optimizer", None) or base).__module__.startswith("torch.optim")
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.checkpoint_event_prologue()  # gives up what is gathered of the old weights
    for home in _homes(engine):
        if not home.flat.requires_grad:
            continue
        state = base.state[home.flat]
        for name in set(states[home.name]) - {MASTER, BUFFER} - state.keys():
            is_whole = name == MOMENTUM and id(home.flat) in whole
            size = sum(each.numel for each in whole[id(home.flat)][1]) if is_whole else 0
            state[name] = home.flat.new_zeros(size) if is_whole else torch.zeros_like(home.flat, requires_grad=False)
        if home.name in steps:
            step = steps[home.name]
            state["step"] = torch.tensor(float(step)) if counts_in_tensors else step
    read(fragments(engine))
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        optimizer.update_lp_params()
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for parameter, copy in _copies(optimizer):
            parameter.data.copy_(copy.data)


def counters(engine: Any) -> dict[str, float]:
    """DeepSpeed's own counts, and how fp16's loss scale stands."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    counted = {name: getattr(engine, name) for name in COUNTERS}
    return counted | {name: getattr(scaler, name) for name in SCALER if hasattr(scaler, name)}


def set_counters(engine: Any, counted: Mapping[str, float]) -> None:
    """Take over what `counters` told; a loss scale only where there is one."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    for name in COUNTERS:
        setattr(engine, name, int(counted[name]))
    for name in SCALER:
        if name in counted and hasattr(scaler, name):
            setattr(scaler, name, counted[name])


def _base(engine: Any) -> Any:
    """The optimizer that steps, without what DeepSpeed wraps around it."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _states_of(base: Any, flat: Tensor) -> dict[str, Any]:
    known: dict[str, Any] = base.state.get(flat, {})
    return known


def _copies(optimizer: FP16_UnfusedOptimizer) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter, and the float32 copy that is stepped in its place."""
    for parameters, copies in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        yield from zip(parameters, copies, strict=True)


def _homes(engine: Any) -> Iterator[_Home]:
    optimizer = engine.optimizer
    pairs = _copies(optimizer) if isinstance(optimizer, FP16_UnfusedOptimizer) else ()
    stepped = {id(parameter): copy for parameter, copy in pairs}
    for name, parameter in engine.module.named_parameters():
        offset = int(getattr(parameter, "global_offset", 0))
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            yield from _home_at_stage_3(optimizer, name, parameter, offset)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer) and parameter.requires_grad:
            mapping = parameter._hp_mapping
            if mapping is not None:
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                flat = _base(engine).param_groups[mapping.param_group_index]["params"][0]
                yield _Home(name, flat, here.start, here.numel, offset + there.start)
        else:
            yield _Home(name, stepped.get(id(parameter), parameter), 0, parameter.numel(), offset)


def _home_at_stage_3(optimizer: Any, name: str, parameter: Any, offset: int) -> Iterator[_Home]:
    part = parameter.ds_tensor
    start = comm.get_rank(group=parameter.ds_process_group) * part.ds_numel
    numel = min(part.ds_numel, parameter.ds_numel - start)  # the last ranks' parts are padded
    if numel <= 0:
        return
    if not parameter.requires_grad:
        yield _Home(name, part, 0, numel, offset + start)
        return
    group, place, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    yield _Home(name, optimizer.fp32_partitioned_groups_flat[group], place, numel, offset + start)


def _whole_momenta(engine: Any) -> dict[int, tuple[Tensor, list[_Home]]]:
    """Muon's momenta at ZeRO 1 and 2, by the flat tensor's id: a rank keeps them of whole parameters, one after the
    other, of each that it has a part of."""
    optimizer = engine.optimizer
    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or optimizer.cpu_offload:
        return {}
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    found: dict[int, tuple[Tensor, list[_Home]]] = {}
    for group, parameters in zip(_base(engine).param_groups, optimizer.params_in_partition, strict=True):
        if not group.get("use_muon"):
            continue
        flat, place, homes = group["params"][0], 0, []
        for parameter in parameters:
            offset = int(getattr(parameter, "global_offset", 0))
            homes.append(_Home(names[id(parameter)], flat, place, parameter.numel(), offset))
            place += parameter.numel()
        found[id(flat)] = (flat, homes)
    return found


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    local = parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape
    return tuple(getattr(parameter, "global_shape", local))


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in parameters}


def elements(whole: Whole) -> int:
    """Of a whole tensor."""
    return prod(whole.shape)
