"""Optimizers against a literal loop, clipping at every stage and precision, offload: real engines on 1 and 2 ranks."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_ranks import engine_of, start_ranks, take_step
from test_step import OneRank
from tiny_rows import MEDIA, TINY, row
from torch import Tensor, nn

from omniloom.model.decoder import Decoder
from omniloom.train.config import TrainingRun
from omniloom.train.groups import OptimizerConfig, TrainConfig

STEPS, CLIP, RATE = 3, 0.3, 1.0
ROWS = [row(kinds, seed) for seed, kinds in enumerate([MEDIA, (), ("image",), ("audio",)])]
PRECISIONS = ("fp32", "bf16_autocast", "bf16", "fp16")
OPTIMIZERS = {
    "sgd": OptimizerConfig(kind="sgd", lr=0.5, momentum=0.8, weight_decay=0.0, l2=0.1),
    "adamw": OptimizerConfig(lr=1e-2, eps=1e-3, weight_decay=0.3),
    "adam with l2": OptimizerConfig(lr=1e-2, eps=1e-3, weight_decay=0.0, l2=0.3, decay_all=True),
    "muon": OptimizerConfig(kind="muon", lr=1e-2, muon_lr=5e-2, eps=1e-3),
}
LITERAL = ("sgd", "adamw", "adam with l2")
# Optimizer, precision, stage, and where its state and the parameters lie.
OFFLOADS = [
    *[("adamw", "fp32", stage, "cpu", "none") for stage in (1, 2, 3)],
    ("adamw", "fp32", 3, "none", "cpu"),
    ("adamw", "fp32", 3, "cpu", "cpu"),
    ("adamw", "bf16", 1, "cpu", "none"),
    ("adamw", "bf16", 3, "cpu", "cpu"),
    ("sgd", "fp32", 2, "cpu", "none"),
    ("muon", "fp32", 1, "cpu", "none"),
]
PLAIN = OptimizerConfig(kind="sgd", lr=RATE, momentum=0.0, weight_decay=0.0)


def run_of(optimizer: OptimizerConfig, stage: int, precision: str = "fp32", clipping: float = 0.0) -> TrainingRun:
    train = TrainConfig(steps=STEPS, global_batch_size=len(ROWS), micro_batch_size=1, precision=precision)
    train.gradient_clipping = clipping
    run = TrainingRun(model=TINY, train=train, optimizer=optimizer)
    run.parallel.zero_stage = stage
    run.check_engine()
    return run


def learn(run: TrainingRun, steps: int = STEPS, rate_share: float = 1.0) -> dict[str, Any]:
    """The weights by name and each step's losses and gradient norm."""
    engine, model = engine_of(run)
    results = [take_step(engine, model, run, ROWS, rate_share) for _ in range(steps)]
    weights = engine.weights()
    return {
        "losses": [[result.next_token, result.mtp, result.balance] for result in results],
        "norms": [result.grad_norm for result in results],
        "weights": {name: weight.float() for name, weight in weights.items() if "bias_E" not in name},
    }


def measure(folder: str) -> None:
    """Every case on this rank's side; tensors go through a file of rank 0."""
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = type(get_accelerator())
    accelerator.is_fp16_supported = lambda _: True  # torch has the numbers
    answer: dict[Any, Any] = {}

    def measured(key: Any, run: TrainingRun, **more: Any) -> None:
        if key not in answer:
            answer[key] = learn(run, **more)

    for stage in range(4):
        for precision in PRECISIONS:
            if (precision, stage) != ("fp16", 0):  # refused
                measured(("clipped", precision, stage), run_of(PLAIN, stage, precision, CLIP), steps=1)
        measured(("not clipped", "fp32", stage), run_of(PLAIN, stage), steps=1)
        for name in LITERAL:
            measured((name, "fp32", stage, "none", "none"), run_of(OPTIMIZERS[name], stage))
    for name, precision, stage, optimizer, parameters in OFFLOADS:
        for state, weights in (("none", "none"), (optimizer, parameters)):
            run = run_of(OPTIMIZERS[name], stage, precision)
            run.parallel.offload_optimizer.device, run.parallel.offload_parameters.device = state, weights
            run.check_engine()
            measured((name, precision, stage, state, weights), run)
    decaying = OptimizerConfig(lr=1e-2, weight_decay=10.0)
    for stage in (0, 1):
        measured(("before", stage), run_of(decaying, stage, "bf16"), steps=1, rate_share=1e-9)
    if dist.get_rank() == 0:
        torch.save(answer, Path(folder, f"{dist.get_world_size()}.pt"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[Any, Any]]:
    """By ranks, then case."""
    folder: Path = tmp_path_factory.mktemp("engine")
    for wait in [start_ranks(ranks, measure, folder, str(folder)) for ranks in (1, 2)]:
        wait()
    return {ranks: torch.load(folder / f"{ranks}.pt") for ranks in (1, 2)}


def gradients(model: Decoder) -> dict[str, Tensor]:
    """Of the whole batch, by the parameter's name, in float64."""
    model.zero_grad()
    run = run_of(PLAIN, 0)
    take_step(OneRank(model), model, run, ROWS)
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


@cache
def first_gradients() -> dict[str, Tensor]:
    return gradients(drawn())


def norm_of(tensors: Any) -> float:
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt())


def drawn() -> Decoder:
    torch.manual_seed(0)
    return Decoder(TINY)


def moved(found: dict[str, Any]) -> dict[str, Tensor]:
    """By the parameter's name: a tied head is among the weights too."""
    return {name: found["weights"][name].double() - p.detach().double() for name, p in drawn().named_parameters()}


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_are_clipped_alike(precision: str, stage: int, ranks: int, measured: dict[int, Any]) -> None:
    """A step of plain SGD at rate 1 moves the weights by −g · min(1, c / ‖g‖)."""
    if (precision, stage) == ("fp16", 0):
        return  # refused
    within = {"fp32": 1e-4, "bf16_autocast": 2e-3, "bf16": 2e-3, "fp16": 2e-3}[precision]
    g = first_gradients()
    norm = norm_of(g.values())
    assert norm > 2 * CLIP
    for case, expected in (("clipped", CLIP), ("not clipped", norm)):
        if (case, precision, stage) not in measured[ranks]:
            continue
        found = measured[ranks][case, precision, stage]
        assert found["norms"] == pytest.approx([norm], rel=within), "the norm is told as it was before"
        delta = moved(found)
        assert norm_of(delta.values()) == pytest.approx(expected, rel=within)
        if precision == "fp32":
            for name, gradient in g.items():
                step = -RATE * gradient * expected / norm
                torch.testing.assert_close(delta[name], step, rtol=1e-3, atol=2e-7, msg=name)


@cache
def literal(optimizer: str) -> dict[str, Tensor]:
    """The weights after the steps, number by number as the formulas have it, in float64."""
    config, model = OPTIMIZERS[optimizer], drawn()
    spared = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Embedding)}
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    for t in range(1, STEPS + 1):
        for name, g in gradients(model).items():
            w = weights[name]
            decays = config.decay_all or (w.dim() >= 2 and name not in spared)
            g = g + (config.l2 * w if decays else 0)  # the gradient of λ‖w‖²/2
            m = first.setdefault(name, torch.zeros_like(w))
            if config.kind == "sgd":
                m.mul_(config.momentum).add_((1 - config.momentum) * g)  # v = βv + (1 − β)g
                step = m
            else:
                m.mul_(config.beta1).add_((1 - config.beta1) * g)
                v = second.setdefault(name, torch.zeros_like(w))
                v.mul_(config.beta2).add_((1 - config.beta2) * g * g)
                step = (m / (1 - config.beta1**t)) / ((v / (1 - config.beta2**t)).sqrt() + config.eps)
                if decays:
                    w = w - config.lr * config.weight_decay * w
            weights[name] = w - config.lr * step
        model.load_state_dict({**model.state_dict(), **{name: w.float() for name, w in weights.items()}})
    return weights


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", LITERAL)
def test_an_optimizer_is_the_literal_loop_at_every_stage(name: str, ranks: int, measured: dict[int, Any]) -> None:
    expected, start = literal(name), drawn().state_dict()
    for stage in range(4):
        found = measured[ranks][name, "fp32", stage, "none", "none"]["weights"]
        for key, weight in expected.items():
            torch.testing.assert_close(
                found[key].double(), weight, rtol=1e-4, atol=2e-5 if "adam" in name else 2e-6, msg=f"{stage} {key}"
            )
        assert norm_of(found[key].double() - start[key] for key in expected) > 0.1


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", OFFLOADS, ids=lambda case: "-".join(map(str, case)))
def test_what_is_offloaded_learns_the_same(case: tuple[Any, ...], ranks: int, measured: dict[int, Any]) -> None:
    name, precision, stage, *_ = case
    kept, elsewhere = measured[ranks][name, precision, stage, "none", "none"], measured[ranks][case]
    assert elsewhere["losses"][-1][0] < 0.99 * elsewhere["losses"][0][0]
    for ours, theirs in zip(elsewhere["losses"], kept["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5 if precision == "fp32" else 1e-3)


@pytest.mark.parametrize("stage", [0, 1])
def test_nothing_decays_before_the_first_step(stage: int, measured: dict[int, Any]) -> None:
    """At ZeRO 0 in bf16 DeepSpeed takes a step of zero gradients at the peak rate while it starts."""
    before = drawn().state_dict()
    for name, weight in measured[1]["before", stage]["weights"].items():
        assert torch.equal(weight, before[name].bfloat16().float()), name
