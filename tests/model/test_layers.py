"""Norms, feed-forward networks, the local convolution, initialisation: against literal loops."""

import math

import pytest
import torch
from torch import Tensor

from omniloom.model.decoder import Decoder
from omniloom.model.layers import MLP, LocalConvolution, SwiGLU, norm
from omniloom.model.position import running_index
from tiny_decoders import enliven, text_places, tiny_config, tiny_decoder

DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, -1, -1], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]])


def tiny_convolution(tokens: int, width: int = 8) -> LocalConvolution:
    module = LocalConvolution(width, tokens)
    enliven(module)
    return module


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 12])
def test_output_and_gradients_equal_a_literal_loop_over_tokens_of_one_document(tokens):
    module = tiny_convolution(tokens)
    x = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    out = module(x, running_index(DOCUMENTS))
    weight = module.weight_KD.detach().double().requires_grad_()
    twin = x.detach().double().requires_grad_()
    rows = []
    for row in range(2):
        for t in range(10):
            total = twin[row, t]
            for back in range(tokens):
                if t - back >= 0 and DOCUMENTS[row, t - back] == DOCUMENTS[row, t]:
                    total = total + weight[back] * twin[row, t - back]
            rows.append(total)
    expected = torch.stack(rows).view(2, 10, 8)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(2))
    out.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), twin.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module.weight_KD.grad.double(), weight.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("row", "at", "moved"), [(0, 1, [1, 2, 3]), (0, 3, [3]), (0, 4, [4, 5]), (1, 7, [7, 8, 9])])
@torch.no_grad()
def test_a_token_reaches_the_next_tokens_of_its_document_and_no_other(row, at, moved):
    module, index = tiny_convolution(3), running_index(DOCUMENTS)
    x = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(1))
    changed = x.clone()
    changed[row, at] += 1.0
    difference = (module(changed, index) - module(x, index)).abs().amax(-1)
    assert difference.nonzero().tolist() == [[row, t] for t in moved]


@torch.no_grad()
def test_weights_of_zero_leave_the_embeddings_as_they_are():
    module = LocalConvolution(8, 3)
    module.weight_KD.zero_()
    x = torch.randn(2, 10, 8)
    assert torch.equal(module(x, running_index(DOCUMENTS)), x)


def literal_norm(x: Tensor, kind: str, gain: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    values = x.tolist()
    mean = sum(values) / len(values) if kind == "layer" else 0.0
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + eps)
    out = torch.stack([g * (v - mean) / spread for g, v in zip(gain, values, strict=True)])
    return out if shift is None else out + shift


@pytest.mark.parametrize("kind", ["rms", "layer"])
@torch.no_grad()
def test_a_norm_equals_a_literal_loop(kind):
    config = tiny_config(norm=kind, norm_eps=1e-2)
    module = norm(config)
    enliven(module)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)) + 0.5
    shift = module.bias.double() if kind == "layer" else None
    for ours, row in zip(module(x), x.double(), strict=True):
        expected = literal_norm(row, kind, module.weight.double(), shift, 1e-2)
        torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)


LITERAL = {
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "swiglu": lambda x: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("activation", LITERAL)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_feed_forward_network_equals_a_literal_loop(bias, activation):
    config = tiny_config(activation=activation, mlp_bias=bias, n_routed_experts=0)
    config.check()
    module = (SwiGLU if activation == "swiglu" else MLP)(config, 24)
    enliven(module)
    weight = {name: tensor.double() for name, tensor in module.state_dict().items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return weight[f"{name}.weight"] @ x + (weight[f"{name}.bias"] if bias else 0.0)

    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    for ours, row in zip(module(x), x.double(), strict=True):
        first = linear("gate_proj" if activation == "swiglu" else "up_proj", row)
        inner = torch.tensor([LITERAL[activation](v) for v in first.tolist()], dtype=torch.float64)
        inner = inner * linear("up_proj", row) if activation == "swiglu" else inner
        torch.testing.assert_close(ours.double(), linear("down_proj", inner), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("place", ["pre", "post"])
@torch.no_grad()
def test_a_layer_adds_and_normalises_in_the_order_of_its_formula(place):
    decoder = tiny_decoder(norm_position=place, n_routed_experts=0)
    layer, config = decoder.layers[0], decoder.config
    places = text_places(torch.zeros(1, 7, dtype=torch.long), config)
    h = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1))
    first, second = layer.input_layernorm, layer.post_attention_layernorm
    if place == "pre":
        middle = h + layer.self_attn(first(h), places)
        expected = middle + layer.mlp(second(middle))
    else:
        middle = first(h + layer.self_attn(h, places))
        expected = second(middle + layer.mlp(middle))
    out, router = layer(h, places)
    assert router is None
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    assert ("norm.weight" in decoder.state_dict()) == (place == "pre")


@pytest.mark.parametrize("kind", ["residual", "normal", "he"])
@torch.no_grad()
def test_matrices_are_drawn_as_the_initializer_says(kind):
    config = tiny_config(
        initializer=kind,
        initializer_range=0.03,
        vocab_size=400,
        hidden_size=64,
        intermediate_size=96,
        attention="grouped",
        position="learned",
        attention_bias=True,
        norm="layer",
        router_bias=True,
    )
    for name, parameter in Decoder(config).named_parameters():
        if name.endswith("bias") or name.endswith("logit_bias_E"):
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert bool((parameter == 1).all()), name
        else:
            writes = any(part in name for part in ("o_proj", "down_proj", "down_EFD"))
            if kind == "he" and "embed_" not in name and "lm_head" not in name:
                expected = math.sqrt(2 / parameter.shape[1])
            elif kind == "residual" and writes:
                expected = 0.03 / math.sqrt(2 * config.num_hidden_layers)
            elif kind == "he" and "lm_head" in name:
                expected = math.sqrt(2 / 64)
            else:
                expected = 0.03
            assert float(parameter.std()) == pytest.approx(expected, rel=6 / math.sqrt(parameter.numel())), name
