"""Mixture of experts against a literal float64 loop; the router's bias; balancing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniloom.errors import ConfigError
from omniloom.model.config import ModelConfig
from omniloom.model.moe import MixtureOfExperts, Router, update_expert_bias
from tiny_decoders import enliven, tiny_config, tiny_decoder

RATE = 0.001


def tiny_mixture(seed: int = 0, **changes) -> tuple[MixtureOfExperts, ModelConfig]:
    config = tiny_config(**changes)
    module = MixtureOfExperts(config)
    enliven(module, seed)
    return module, config


def literal_groups(steered: list[float], groups: int, kept: int) -> list[int]:
    """The experts of the groups with the best two experts."""
    size = len(steered) // groups
    if groups == 1:
        return list(range(size))
    members = [range(size * g, size * (g + 1)) for g in range(groups)]
    best = sorted(members, key=lambda group: -sum(sorted(steered[i] for i in group)[-2:]))
    return [i for group in best[:kept] for i in group]


def literal_mixture(weight: dict[str, Tensor], config: ModelConfig, hidden_ND: Tensor) -> tuple[Tensor, list[int]]:
    """Token by token, expert by expert; also how many choices landed on each expert."""
    counts, outs, inner = [0] * config.n_routed_experts, [], config.moe_intermediate_size
    for u in hidden_ND:
        logits = [u @ e for e in weight["router.weight_ED"]]
        if config.router_bias:
            logits = [logit + b for logit, b in zip(logits, weight["router.logit_bias_E"], strict=True)]
        if config.scoring_func == "sigmoid":
            scores = [1 / (1 + torch.exp(-logit)) for logit in logits]
            steered = [(s + b).item() for s, b in zip(scores, weight["router.bias_E"], strict=True)]
        else:
            scores = [torch.exp(logit) / sum(map(torch.exp, logits)) for logit in logits]
            steered = [s.item() for s in scores]
        allowed = literal_groups(steered, config.n_group, config.topk_group)
        chosen = sorted(allowed, key=lambda i: -steered[i])[: config.num_experts_per_tok]
        total = sum(scores[i] for i in chosen) if config.norm_topk_prob else 1.0
        out = torch.zeros_like(u)
        if config.n_shared_experts:
            gate, up = weight["shared_experts.gate_proj.weight"] @ u, weight["shared_experts.up_proj.weight"] @ u
            out = weight["shared_experts.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)
        for i in chosen:
            counts[i] += 1
            both = u @ weight["experts.gate_up_EDF"][i]
            gate, up = both[:inner], both[inner:]
            expert = (gate / (1 + torch.exp(-gate)) * up) @ weight["experts.down_EFD"][i]
            out = out + config.routed_scaling_factor * scores[i] / total * expert
        outs.append(out)
    return torch.stack(outs), counts


def doubled(module: MixtureOfExperts) -> dict[str, Tensor]:
    return {
        name: t.detach().double().requires_grad_("bias_E" not in name or "logit" in name)
        for name, t in module.state_dict().items()
    }


SOFTMAX = {"scoring_func": "softmax", "n_shared_experts": 0}


STEERED = [  # by a bias, of the choice or of the logits
    {"moe_intermediate_size": 8},
    {"num_experts_per_tok": 1},
    {"num_experts_per_tok": 3, "n_shared_experts": 1},
    {"n_group": 3, "topk_group": 2},
    {"n_group": 2, "topk_group": 1, "norm_topk_prob": False},
    SOFTMAX | {"norm_topk_prob": False, "router_bias": True},
    SOFTMAX | {"n_group": 3, "topk_group": 2, "router_bias": True},
]


@pytest.mark.parametrize(
    ("changes", "banned"),
    [*((changes, banned) for changes in STEERED for banned in ((), (0, 2, 5))), (SOFTMAX, ())],
    ids=str,
)
def test_output_and_every_gradient_equal_a_literal_loop(changes, banned):
    module, config = tiny_mixture(**changes)
    config.check()
    steering = module.router.logit_bias_E if config.scoring_func == "softmax" else module.router.bias_E
    with torch.no_grad():
        if banned:
            steering[list(banned)] = -10.0 if config.scoring_func == "sigmoid" else -1e3  # nobody chooses these
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 9, config.hidden_size, generator=generator, requires_grad=True)
    upstream = torch.randn(2, 9, config.hidden_size, generator=generator)
    out, router = module(hidden, torch.ones(2, 9, dtype=torch.bool))
    out.backward(upstream)

    weight = doubled(module)
    hidden_ND = hidden.detach().double().flatten(0, 1).requires_grad_()
    expected, counts = literal_mixture(weight, config, hidden_ND)
    expected.backward(upstream.double().flatten(0, 1))
    assert expected.std() > 0.5
    assert router.tokens_per_expert_E.tolist() == counts
    assert all(counts[i] == 0 for i in banned)
    torch.testing.assert_close(out.flatten(0, 1).double(), expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(hidden.grad.flatten(0, 1).double(), hidden_ND.grad, atol=1e-4, rtol=1e-5)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), weight[name].grad, atol=1e-4, rtol=1e-4, msg=name)
    for i in banned:
        assert not module.experts.gate_up_EDF.grad[i].any()
        assert not module.experts.down_EFD.grad[i].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [{"moe_intermediate_size": 5}, {"moe_intermediate_size": 12}, {"hidden_size": 36}])
def test_sizes_that_pass_the_check_run_forward_and_backward(sizes, dtype):
    try:
        module, config = tiny_mixture(**sizes)
        config.check()
    except ConfigError:
        return  # refused before anything was allocated: as good
    module.to(dtype)
    hidden = torch.randn(1, 6, config.hidden_size, dtype=dtype)
    out, _ = module(hidden, torch.ones(1, 6, dtype=torch.bool))
    out.sum().backward()
    assert out.isfinite().all()


def test_the_bias_changes_the_choice_but_not_the_gates():
    config = tiny_config(num_experts_per_tok=2, routed_scaling_factor=2.5)
    router = Router(config)
    enliven(router)
    hidden = torch.randn(20, config.hidden_size, generator=torch.Generator().manual_seed(2))
    router.bias_E.zero_()
    scores, _, unsteered = router(hidden)
    router.bias_E[3] = 5.0
    steered_scores, gates, chosen = router(hidden)
    assert (chosen == 3).any(dim=1).all()
    assert not (unsteered == 3).any(dim=1).all()
    torch.testing.assert_close(steered_scores, scores, atol=0, rtol=0)
    torch.testing.assert_close(scores, torch.sigmoid(hidden @ router.weight_ED.T))
    picked = torch.stack([scores[n, chosen[n]] for n in range(20)])
    torch.testing.assert_close(gates, 2.5 * picked / picked.sum(dim=1, keepdim=True))


def test_the_bias_gets_no_gradient():
    module, config = tiny_mixture()
    module(torch.randn(1, 5, config.hidden_size), torch.ones(1, 5, dtype=torch.bool))[0].sum().backward()
    assert not module.router.bias_E.requires_grad
    assert "router.bias_E" not in dict(module.named_parameters())


def test_padding_is_not_counted_and_changes_no_token():
    module, config = tiny_mixture()
    hidden = torch.randn(2, 7, config.hidden_size, generator=torch.Generator().manual_seed(3))
    is_token = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]]).bool()
    out, router = module(hidden, is_token)
    _, counts = literal_mixture(doubled(module), config, hidden[is_token].double())
    assert router.tokens_per_expert_E.tolist() == counts
    assert router.tokens_per_expert_E.sum() == 10 * config.num_experts_per_tok
    other = torch.where(is_token[..., None], hidden, torch.randn(hidden.shape) * 10)
    torch.testing.assert_close(module(other, is_token)[0][is_token], out[is_token], atol=1e-5, rtol=1e-5)


def test_router_scores_are_float32_even_in_bf16():
    module, config = tiny_mixture()
    module.bfloat16()
    out, router = module(torch.randn(1, 4, config.hidden_size).bfloat16(), torch.ones(1, 4, dtype=torch.bool))
    assert out.dtype == torch.bfloat16
    assert router.scores_BTE.dtype == torch.float32
    assert router.scores_BTE.shape == (1, 4, config.n_routed_experts)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "to"])
def test_the_bias_stays_float32_and_moves_by_exactly_one_rate_whatever_the_cast(cast):
    decoder = tiny_decoder()
    router = decoder.layers[1].mlp.router
    start = torch.tensor([0.5, 0.5, 0.5, 0.3371, -0.25, 0.0])
    router.bias_E.copy_(start)
    decoder.to(torch.bfloat16) if cast == "to" else getattr(decoder, cast)()
    assert router.bias_E.dtype == torch.float32
    assert router.weight_ED.dtype == {"half": torch.half, "double": torch.double}.get(cast, torch.bfloat16)
    assert router.bias_E.tolist() == start.tolist()
    counts = torch.tensor([9, 0, 4, 9, 0, 2])  # mean 4
    router.bias_E.copy_(update_expert_bias(router.bias_E, counts, RATE))
    expected = start + torch.tensor([-1.0, 1, 0, -1, 1, 1]) * RATE
    assert router.bias_E.tolist() == expected.tolist()


def test_load_state_dict_restores_the_bias_in_a_bf16_module():
    saved = tiny_decoder(seed=1).state_dict()
    decoder = tiny_decoder(seed=2).bfloat16()
    decoder.load_state_dict(saved)
    bias = decoder.layers[1].mlp.router.bias_E
    assert bias.dtype == torch.float32
    assert bias.tolist() == saved["layers.1.mlp.router.bias_E"].tolist()
    assert decoder.state_dict()["layers.1.mlp.router.bias_E"].dtype == torch.float32


def test_tolerance_zero_is_the_sign_rule():
    bias = torch.tensor([0.1, 0.2, 0.3, 0.4])
    moved = update_expert_bias(bias, torch.tensor([4, 5, 6, 5]), RATE)
    assert moved.dtype == torch.float32
    assert moved.tolist() == (bias + torch.tensor([RATE, 0, -RATE, 0])).tolist()
    assert bias.tolist() == torch.tensor([0.1, 0.2, 0.3, 0.4]).tolist()  # pure


def test_inside_the_tolerance_nothing_moves():
    counts = torch.tensor([80, 89, 90, 110, 111, 120])  # mean 100, 10% either way
    moved = update_expert_bias(torch.zeros(6), counts, RATE, tolerance=0.1)
    assert moved.tolist() == (torch.tensor([1.0, 1, 0, 0, -1, -1]) * RATE).tolist()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=12), st.sampled_from([0.0, 0.05, 0.5]))
def test_the_bias_update_equals_a_loop(counts, tolerance):
    mean = sum(counts) / len(counts)
    moved = update_expert_bias(torch.zeros(len(counts)), torch.tensor(counts), 1.0, tolerance)
    for count, move in zip(counts, moved.tolist(), strict=True):
        if abs(abs(count - mean) - tolerance * mean) > 1e-3 * mean:  # off the border, where rounding decides
            assert move == (-1 if count > (1 + tolerance) * mean else 1 if count < (1 - tolerance) * mean else 0)


def test_repeated_updates_balance_a_lopsided_router():
    config = tiny_config(num_experts_per_tok=1)
    router = Router(config)
    enliven(router)
    router.bias_E.zero_()
    hidden = torch.randn(300, config.hidden_size, generator=torch.Generator().manual_seed(4)) * 0.2 + 0.2

    def counts() -> Tensor:
        return router(hidden)[2].flatten().bincount(minlength=config.n_routed_experts)

    lopsided = counts().max()
    for _ in range(500):
        router.bias_E.copy_(update_expert_bias(router.bias_E, counts(), RATE))
    assert lopsided > 100
    assert counts().max() < 65  # the mean is 50
