"""What each `train.precision` means, and which machine can do it.

                 parameters  masters  products                 of the engine
fp32             fp32        –        fp32
bf16_autocast    fp32        –        bf16                     torch_autocast
bf16             bf16        fp32     bf16                     bf16
fp16             fp16        fp32     fp16                     fp16, its loss scale following the gradients
fp8              bf16        fp32     float8 in the layers     bf16; torchao multiplies (train/float8.py)

Under each the router scores in float32 and its bias stays float32; norms, softmax and loss reduce in float32.
"""

from collections.abc import Collection

import torch
from torch import nn

from omniloom.errors import ConfigError
from omniloom.model.moe import Experts

COMPUTES_IN = {
    "fp32": torch.float32,
    "bf16_autocast": torch.bfloat16,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}
FLOAT8_CAPABILITY, FLOAT8_EXPERTS_CAPABILITY = (8, 9), (9, 0)


def refuse_unless_possible(precision: str, module: nn.Module, device: str, dtypes: Collection[torch.dtype]) -> None:
    """Raise ConfigError where this rank's `device`, which computes in `dtypes`, cannot do what `precision` asks."""
    wanted = COMPUTES_IN[precision]
    if wanted not in dtypes:
        has = ", ".join(_name(dtype) for dtype in dtypes)
        instead = next(name for name in ("bf16", "fp16", "fp32") if COMPUTES_IN[name] in dtypes)
        raise ConfigError(
            f"train.precision={precision} computes in {_name(wanted)}, and this machine's {device} has {has}: "
            f"set train.precision={instead}"
        )
    if precision == "fp8":
        _refuse_unless_float8(any(isinstance(part, Experts) for part in module.modules()))


def _refuse_unless_float8(experts: bool) -> None:
    found = torch.cuda.get_device_capability() if torch.cuda.is_available() and torch.version.cuda else None
    # torch has float8 products in groups for Hopper alone: later GPUs have another kind of scales.
    if found and (found[0] == FLOAT8_EXPERTS_CAPABILITY[0] if experts else found >= FLOAT8_CAPABILITY):
        return
    needs = "exactly 9.0 (Hopper) for a mixture of experts" if experts else "8.9 or more"
    has = f"{found[0]}.{found[1]}" if found else "no CUDA device"
    instead = "train.precision=bf16" + (", or model.n_routed_experts=0" if found and found >= FLOAT8_CAPABILITY else "")
    raise ConfigError(
        f"train.precision=fp8 needs CUDA's compute capability {needs}, this machine has {has}: set {instead}"
    )


def convert_to_float8(module: nn.Module) -> list[str]:
    """Let the layers multiply in float8, in place; returns the names of the modules that now do."""
    try:
        from omniloom.train.float8 import convert
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torchao":
            raise
        raise ConfigError(
            "train.precision=fp8 multiplies through torchao, which is not installed: pip install 'omniloom[fp8]'"
        ) from error
    return convert(module)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
