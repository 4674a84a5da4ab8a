"""Each precision in a real DeepSpeed engine at each ZeRO stage, float8 in emulation, and what is refused where."""

import gzip
import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_engines import SIZES, exact_product, resume_engine, save_engine
from small_run import train_here, words_run
from tiny_rows import MEDIA, row
from torch import Tensor, nn

from omniloom.data.loader import Batch
from omniloom.errors import ConfigError
from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder
from omniloom.model.moe import MixtureOfExperts, Router
from omniloom.train.config import TrainingRun
from omniloom.train.groups import OptimizerConfig, TrainConfig
from omniloom.train.precision import convert_to_float8, refuse_unless_possible

STEPS = 4
IN_FLOAT8 = {
    *(f"layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "kv_b_proj", "o_proj")),
    *(f"layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    *(f"layers.1.mlp.{name}" for name in ("experts", *(f"shared_experts.{n}_proj" for n in ("gate", "up", "down")))),
    *(f"mtp.0.layer.self_attn.{name}" for name in ("q_proj", "kv_b_proj", "o_proj")),
    *(f"mtp.0.layer.mlp.{n}" for n in ("experts", *(f"shared_experts.{n}_proj" for n in ("gate", "up", "down")))),
}
DTYPES = {"fp32": "float32", "bf16_autocast": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}
# Largest share by which the loss of any step may differ from fp32's; several times what was seen.
TOLERANCE = {"bf16_autocast": 2e-3, "bf16": 3e-3, "fp16": 1e-3, "fp8": 3e-2}


def run_of(precision: str, zero_stage: int) -> TrainingRun:
    train = TrainConfig(steps=STEPS, global_batch_size=2, micro_batch_size=1, precision=precision)
    run = TrainingRun(model=SIZES, train=train, optimizer=OptimizerConfig(lr=1e-2))
    run.parallel.zero_stage = zero_stage
    return run


def measure(folder: Path) -> None:
    """In a process of its own: DeepSpeed and autocast leave marks on one. Writes what each precision did."""
    import torch.distributed as dist
    from deepspeed.utils import logger

    import omniloom.train.engine as engines
    from omniloom.train import float8

    os.environ["LOCAL_RANK"] = "0"
    torch.set_num_threads(1)
    logger.setLevel(logging.ERROR)
    accelerator: Any = type(engines.get_accelerator())
    answer: dict[str, Any] = {"refused": {}}
    accelerator.is_fp16_supported = lambda _: False
    for precision in ("fp16", "fp8"):
        with pytest.raises(ConfigError) as caught:
            engines.Engine(Decoder(SIZES), run_of(precision, 1))
        answer["refused"][precision] = [str(caught.value), dist.is_initialized()]

    # From here on the machine is one that can: torch has the numbers, and float8 is emulated.
    accelerator.is_fp16_supported = lambda _: True
    engines.convert_to_float8 = partial(float8.convert, emulate=True)  # type: ignore[assignment]
    float8._to_fp8_rowwise_then_scaled_grouped_mm = exact_product
    allowed = engines.refuse_unless_possible
    engines.refuse_unless_possible = lambda precision, *known: allowed(precision.replace("fp8", "bf16"), *known)
    partition_all(engines)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    for precision in DTYPES:
        for stage in range(4):
            if (precision, stage) != ("fp16", 0):
                answer[f"{precision}/{stage}"] = learn(engines, precision, stage, folder / f"{precision}{stage}")
    answer["overflow"] = {stage: overflow(engines, stage) for stage in (1, 3)}
    train_with_overflows(folder)
    (folder / "answer.json").write_text(json.dumps(answer))


def partition_all(engines: Any) -> None:
    """ZeRO 3 shards even parameters as small as these; the loss scale begins where fp16 overflows a few times."""
    ours = engines.deepspeed_config

    def config(run: TrainingRun, ranks: int, parameters: int) -> dict[str, Any]:
        answer = ours(run, ranks, parameters)
        if run.parallel.zero_stage == 3:
            answer["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        if run.run == "overflows":
            answer["fp16"] |= {"initial_scale_power": 24, "hysteresis": 1}
        return answer

    engines.deepspeed_config = config


def started(engines: Any, precision: str, stage: int) -> tuple[Any, Decoder, Callable[[int], list[list[float]]]]:
    torch.manual_seed(0)
    model, run = Decoder(SIZES), run_of(precision, stage)
    engine = engines.Engine(model, run)

    def take(steps: int) -> list[list[float]]:
        from omniloom.train.step import training_step

        results = []
        for _ in range(steps):
            batches = [Batch([row(MEDIA, seed)]) for seed in range(2)]
            result = training_step(engine, model, batches, torch.tensor([1.0, 0.5]), run.train, 1.0)
            results.append([result.next_token, result.grad_norm])
        return results

    return engine, model, take


def learn(engines: Any, precision: str, stage: int, folder: Path) -> dict[str, Any]:
    names = list(Decoder(SIZES).state_dict())
    engine, model, take = started(engines, precision, stage)
    first = take(STEPS // 2)
    save_engine(engine, folder)
    rest = take(STEPS // 2)
    resumed = rest
    if precision != "fp32" and stage != 2:  # others' tests resume fp32, and ZeRO 2 keeps what 1 keeps
        again, _, take_again = started(engines, precision, stage)
        resume_engine(again, folder)
        resumed = take_again(STEPS // 2)
    weights = engine.weights()
    cast = [weight for name, weight in weights.items() if not name.endswith("bias_E")]
    return {
        "steps": first + rest,
        "resumed": resumed == rest,
        "parameters": names_of(model.parameters()),
        "weights": names_of(cast),
        "biases": names_of(part.bias_E for part in model.modules() if isinstance(part, Router)),
        "names": list(weights) == names,
        "float8": sorted(engine.float8),
        "loss_scale": engine.loss_scale,
        "skipped_steps": engine._engine.skipped_steps,
    }


def names_of(tensors: Iterable[Tensor]) -> list[str]:
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})


def overflow(engines: Any, stage: int) -> dict[str, Any]:
    """A step whose scaled gradients are no fp16 numbers, between two ordinary ones."""
    engine, _, take = started(engines, "fp16", stage)
    take(1)
    scaler = engine._engine.optimizer.loss_scaler
    scaler.cur_scale, scaler.cur_hysteresis = 2.0**40, 1
    before = {name: weight.clone() for name, weight in engine.weights().items()}
    ((_, norm),) = take(1)
    after = engine.weights()
    told = {
        "norm": norm,
        "skipped": engine.skipped,
        "skipped_steps": engine._engine.skipped_steps,
        "scale": engine.loss_scale,
    }
    told["unchanged"] = all(torch.equal(before[name], after[name]) for name in before)  # the router's bias with them
    scaler.cur_scale = 2.0**16
    ((_, norm),) = take(1)
    return told | {"then": [norm, engine.skipped, engine._engine.skipped_steps]}


def train_with_overflows(folder: Path) -> None:
    """The whole loop on a small corpus of words."""
    steps = TrainConfig(
        steps=16, global_batch_size=2, micro_batch_size=2, precision="fp16", val_every=16, save_every=16
    )
    run = words_run(folder, "overflows", steps, SIZES)
    run.debug.profile_steps = [3, 4]
    train_here(run)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("precision")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(measure, folder).result()
    return folder


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "answer.json").read_text())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", DTYPES)
def test_each_precision_learns_as_fp32_does_and_resumes_exactly(
    precision: str, stage: int, measured: dict[str, Any]
) -> None:
    if (precision, stage) == ("fp16", 0):
        return  # refused: below
    found, losses = measured[f"{precision}/{stage}"], [loss for loss, _ in measured["fp32/0"]["steps"]]
    mine = [loss for loss, _ in found["steps"]]
    assert mine[-1] < 0.85 * mine[0]
    assert mine == pytest.approx(losses, rel=TOLERANCE.get(precision, 1e-6))
    if precision != "fp32":
        assert mine != pytest.approx(losses, rel=1e-6), "this is fp32"
    assert found["parameters"] == found["weights"] == [DTYPES[precision]]
    assert found["biases"] == ["float32"]
    assert found["resumed"]
    assert found["names"], "a checkpoint's names are the decoder's under each precision"
    assert set(found["float8"]) == (IN_FLOAT8 if precision == "fp8" else set())
    assert (found["loss_scale"], found["skipped_steps"]) == (65536.0 if precision == "fp16" else None, 0)


@pytest.mark.parametrize("stage", ["1", "3"])
def test_a_step_that_overflows_is_skipped_told_and_moves_nothing(stage: str, measured: dict[str, Any]) -> None:
    found = measured["overflow"][stage]
    assert found["norm"] == float("inf")
    assert (found["skipped"], found["skipped_steps"], found["scale"]) == (True, 1, 2.0**39)
    assert found["unchanged"]
    norm, skipped, skipped_steps = found["then"]
    assert 0 < norm < 100
    assert (skipped, skipped_steps) == (False, 1)


def test_the_loop_records_the_loss_scale_and_each_skipped_step(folder: Path, measured: dict[str, Any]) -> None:
    lines = [json.loads(line) for line in (folder / "overflows" / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (folder / "overflows" / "events.jsonl").read_text().splitlines()]
    skipped = [event["step"] for event in events if event["event"] == "skipped_step"]
    assert 1 < len(skipped) < 12
    assert skipped == [line["step"] for line in lines if line["grad_norm"] == float("inf")]
    assert [line["skipped_steps"] for line in lines] == [sum(s <= line["step"] for s in skipped) for line in lines]
    assert [line["loss_scale"] for line in lines] == [2.0 ** (24 - line["skipped_steps"]) for line in lines]
    assert lines[-1]["loss/next_token"] < lines[0]["loss/next_token"]


def test_the_loop_traces_the_chosen_steps(folder: Path) -> None:
    with gzip.open(folder / "overflows" / "debug" / "trace_steps_3_4_rank_0.json.gz", "rt") as stream:
        names = [event.get("name", "") for event in json.load(stream)["traceEvents"]]
    assert [name for name in names if name.startswith("step ")] == ["step 3", "step 4"]
    assert "NllLossBackward0" in names


def test_what_a_cpu_cannot_do_is_refused_before_the_engine_starts(measured: dict[str, Any]) -> None:
    fp16, fp16_started = measured["refused"]["fp16"]
    fp8, fp8_started = measured["refused"]["fp8"]
    assert not fp16_started
    assert not fp8_started
    for word in ("train.precision=fp16", "float16", "this machine's cpu has float32, bfloat16", "train.precision=bf16"):
        assert word in fp16
    for word in ("train.precision=fp8", "exactly 9.0", "this machine has no CUDA device", "train.precision=bf16"):
        assert word in fp8


def test_fp16_is_refused_where_deepspeed_does_not_scale_the_loss() -> None:
    run = run_of("fp16", 0)
    run.run, run.data.seq_len, run.schedule.warmup_steps = "a", 16, 1
    with pytest.raises(ConfigError, match=r"train\.precision=fp16 needs parallel\.zero_stage=1, 2 or 3 \(it is 0\)"):
        run.check_run(1)
    run.parallel.zero_stage = 1
    run.check_run(1)


BOTH = (torch.float32, torch.bfloat16)
DENSE = replace(SIZES, n_routed_experts=0, num_nextn_predict_layers=0)


@pytest.mark.parametrize(
    ("capability", "sizes", "said"),
    [
        (None, DENSE, ["8.9 or more", "no CUDA device"]),
        ((8, 0), DENSE, ["8.9 or more", "this machine has 8.0", "set train.precision=bf16"]),
        ((8, 9), DENSE, None),
        ((9, 0), DENSE, None),
        ((12, 0), DENSE, None),
        ((8, 0), SIZES, ["exactly 9.0", "this machine has 8.0", "set train.precision=bf16"]),
        ((8, 9), SIZES, ["exactly 9.0", "this machine has 8.9", "or model.n_routed_experts=0"]),
        ((9, 0), SIZES, None),
        ((10, 0), SIZES, ["exactly 9.0", "this machine has 10.0", "or model.n_routed_experts=0"]),
    ],
)
def test_float8_asks_the_device_for_its_capability(
    capability: tuple[int, int] | None, sizes: ModelConfig, said: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with torch.device("meta"):
        model = Decoder(sizes)
    if said is None:
        refuse_unless_possible("fp8", model, "cuda", BOTH)
        return
    with pytest.raises(ConfigError) as caught:
        refuse_unless_possible("fp8", model, "cuda", BOTH)
    for word in ["train.precision=fp8", *said]:
        assert word in str(caught.value)


def test_a_gpu_without_bf16_is_told_of_fp16() -> None:
    with pytest.raises(ConfigError, match=r"cuda has float32, float16: set train\.precision=fp16"):
        refuse_unless_possible("bf16_autocast", nn.Identity(), "cuda", (torch.float32, torch.float16))


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "omniloom.train.float8", raising=False)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ConfigError, match=r"pip install 'omniloom\[fp8\]'"):
        convert_to_float8(nn.Identity())


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_router_scores_in_float32_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    moe = MixtureOfExperts(SIZES)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    hidden, is_token = torch.randn(3, 20, 32).to(dtype), torch.ones(3, 20, dtype=torch.bool)
    scores, gates, chosen = moe.router(hidden.float().flatten(0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = moe.router(hidden.flatten(0, 1))
        output, told = moe(hidden, is_token)
    for found, expected in zip((*mixed, told.scores_BTE.flatten(0, 1)), (scores, gates, chosen, scores), strict=True):
        assert torch.equal(found, expected)
    assert mixed[0].dtype == torch.float32
    assert moe.router.bias_E.dtype == torch.float32
    plain, _ = moe(hidden.float(), is_token)
    assert 0 < relative(output.float(), plain) < 0.02
