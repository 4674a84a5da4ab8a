"""float8 on a CPU: what is converted, how near its products are; torchao's own code over kernels written out here."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_precision import IN_FLOAT8, SIZES, relative
from torch import Tensor, nn
from torch.nn import functional as F

from omniloom.errors import ConfigError
from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder
from omniloom.model.layers import SwiGLU
from omniloom.model.moe import Experts, MixtureOfExperts
from omniloom.train import float8


def test_float8_takes_the_layers_matrices_and_nothing_else() -> None:
    model = Decoder(SIZES)
    parameters, kinds = dict(model.named_parameters()), {name: type(part) for name, part in model.named_modules()}
    assert set(float8.convert(model, emulate=True)) == IN_FLOAT8
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    changed = {name for name, part in model.named_modules() if type(part) is not kinds[name]}
    experts = {name for name, part in model.named_modules() if isinstance(part, Experts)}
    assert changed == IN_FLOAT8 - experts
    assert all(model.get_submodule(name).product is float8.grouped_product for name in experts)
    for name in ("lm_head", "layers.1.mlp.router", "layers.0.self_attn.kv_a_proj_with_mqa", "mtp.0.junction.eh_proj"):
        assert name in kinds
        assert name not in changed
    with pytest.raises(ConfigError, match=r"multiples of 16.*model\.hidden_size"):
        float8.convert(Decoder(replace(SIZES, hidden_size=24, kv_lora_rank=12)))


def test_float8_layers_are_within_a_few_percent_of_float32() -> None:
    """Forward and backward; a float8 number has 3 or 4 binary digits, so that each operand is off by 2 to 4%."""
    torch.manual_seed(0)
    plain = nn.ModuleDict({"mlp": SwiGLU(ModelConfig(hidden_size=64), 128)})
    x = torch.randn(40, 64)
    found: list[tuple[Tensor, ...]] = []
    for module in (plain, nn.ModuleDict({"mlp": SwiGLU(ModelConfig(hidden_size=64), 128)})):
        module.load_state_dict(plain.state_dict())
        if found:
            assert len(float8.convert(module, emulate=True)) == 3
        asked = x.clone().requires_grad_()
        y = module["mlp"](asked)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), [asked, *module.parameters()])))
    for one, other in zip(*found, strict=True):
        assert 0.005 < relative(other, one) < 0.12


def test_a_float8_matrix_is_read_again_in_the_backward_pass() -> None:
    """ZeRO 3 takes a layer's weights away after its forward pass and brings them back: none may be held meanwhile."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"mlp": nn.Linear(32, 16, bias=False)})
    float8.convert(module, emulate=True)
    linear: Any = module["mlp"]
    x = torch.randn(8, 32, requires_grad=True)
    (before,) = torch.autograd.grad(linear(x).sum(), x)
    y = linear(x)
    linear.weight.data = 2 * linear.weight.data
    (after,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(after, 2 * before)


def to_float8(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Float8 numbers and their scales along `dim`, powers of two as torchao's."""
    scale = torch.exp2(torch.floor(torch.log2(448.0 / x.float().abs().amax(dim, keepdim=True).clamp(min=1e-12))))
    return (x.float() * scale).to(torch.float8_e4m3fn), scale


def by_columns(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


@pytest.fixture
def torchao_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao's grouped product, its own checks and gradients with them, over kernels written out for a CPU."""
    from torchao.prototype.moe_training import fp8_grouped_mm as theirs

    def groups(x: Tensor, offs: Tensor) -> tuple[Tensor, Tensor]:
        rows, scales, begin = torch.zeros_like(x).to(torch.float8_e4m3fn), [], 0
        for end in offs.tolist():
            assert (end - begin) % 16 == 0
            if end > begin:
                rows[begin:end], scale = to_float8(x[begin:end], 0)
            scales.append(scale[0] if end > begin else torch.ones(x.shape[1]))
            begin = end
        return by_columns(rows), torch.cat(scales)

    def product(a: Tensor, b: Tensor, by_a: Tensor, by_b: Tensor, offs: Tensor, **_: Any) -> Tensor:
        ends = offs.tolist()
        spans = list(zip([0, *ends[:-1]], ends, strict=True))
        if b.dim() == 3:
            out = torch.full((len(a), b.shape[2]), float("nan"))  # what lies past the last end is garbage
            for (begin, end), matrix, scale in zip(spans, b.float(), by_b, strict=True):
                out[begin:end] = (a[begin:end].float() @ matrix) * by_a[begin:end, None] * scale
            return out.bfloat16()
        parts = torch.stack([a[:, begin:end].float() @ b[begin:end].float() for begin, end in spans])
        return (parts * by_a.view(len(ends), -1, 1) * by_b.view(len(ends), 1, -1)).bfloat16()

    def transposed(x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        rows, scale = to_float8(x, -1)
        return rows.contiguous().mT, scale.mT

    def stacked(x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        rows, scale = to_float8(x, 1)
        return by_columns(rows), scale

    monkeypatch.setattr(theirs, "triton_fp8_rowwise_2d_scale_and_cast", lambda x, **_: to_float8(x, 1))
    monkeypatch.setattr(theirs, "triton_fp8_colwise_3d_scale_and_cast", stacked)
    monkeypatch.setattr(theirs, "triton_fp8_rowwise_3d_transpose_rhs", transposed)
    monkeypatch.setattr(
        theirs,
        "triton_fp8_per_group_colwise_scales_dual",
        lambda one, other, offs, *_, **__: (*groups(one, offs), *groups(other, offs)),
    )
    monkeypatch.setattr(torch, "_scaled_grouped_mm", product)


@pytest.mark.parametrize("counts", [(16, 32), (5, 0, 1, 18), (0, 0, 7), (0, 3, 0), (1,)])
def test_the_grouped_product_in_float8_is_near_the_exact_one(counts: tuple[int, ...], torchao_on_cpu: None) -> None:
    torch.manual_seed(0)
    x = torch.randn(sum(counts), 32).bfloat16().requires_grad_()
    weight = torch.randn(len(counts), 32, 48).bfloat16().requires_grad_()
    offs = torch.tensor(counts).cumsum(0).to(torch.int32)
    back = torch.randn(sum(counts), 48).bfloat16()
    found = []
    for multiply in (F.grouped_mm, float8.grouped_product):
        y = multiply(x, weight, offs=offs)
        assert y.dtype == torch.bfloat16
        found.append((y.detach(), *torch.autograd.grad(y, (x, weight), back)))
    for exact, ours in zip(*found, strict=True):
        assert ours.shape == exact.shape
        assert 0.005 < relative(ours.float(), exact.float()) < 0.06


def test_experts_multiply_in_float8_without_holding_a_second_copy(torchao_on_cpu: None) -> None:
    torch.manual_seed(0)
    moe = MixtureOfExperts(replace(SIZES, initializer_range=0.3)).bfloat16()
    for parameter in moe.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    module = nn.ModuleDict({"mlp": moe})
    hidden, is_token = torch.randn(2, 9, 32).bfloat16(), torch.ones(2, 9, dtype=torch.bool)
    exact, router = moe(hidden, is_token)
    float8.convert(module, emulate=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours, router_too = moe(hidden, is_token)
    torch.testing.assert_close(router_too.scores_BTE, router.scores_BTE, rtol=0, atol=0)
    assert 0.005 < relative(ours.float(), exact.float()) < 0.15
    experts = moe.experts
    copies = [t for t in kept if t.dim() == 3 and t.shape in (experts.gate_up_EDF.shape, experts.down_EFD.shape)]
    assert not [t for t in copies if t.stride(-2) == 1], "the weights by columns are made again in the backward pass"
    ours.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in moe.parameters())
