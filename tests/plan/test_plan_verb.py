"""`omniloom plan` as it is typed: what it prints, its keys, its picture, what it refuses, what runs teach it."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from conftest import REPOSITORY, train_smoke
from omniloom.cli import run_verb
from omniloom.compose import preset
from omniloom.plan.config import Measurements, Rates
from omniloom.plan.measured import write_measurements

LLAMA = ["model=llama_8b", "cluster=h100_1x8", "train.steps=1000", "train.global_batch_size=64", "train.precision=bf16"]
CONTRACT = {
    "params_total",
    "params_active",
    "kv_cache_bytes_per_token",
    "forward_flops_per_token",
    "train_flops",
    "train_flops_6nd",
    "memory_bytes_per_rank",
    "fits",
    "gpu_hours",
    "cost_usd",
}


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    run_verb("plan", list(words))
    return capsys.readouterr().out


def plan_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    return json.loads(plan(capsys, *words, "--json"))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        run_verb("plan", list(words))
    assert ended.value.code == 1
    return capsys.readouterr().err


def test_json_has_the_contracts_keys(capsys: pytest.CaptureFixture[str]) -> None:
    said = plan_json(capsys, *LLAMA)
    assert said.keys() >= CONTRACT
    assert sum(said["memory_bytes_per_rank"].values()) == pytest.approx(said["memory_bytes_per_rank_total"], abs=9)
    assert said["gpu_hours"] == pytest.approx(1_000 * said["step_s"] * 8 / 3_600)
    assert said["cost_usd"] == pytest.approx(said["gpu_hours"] * 2.5)
    assert said["step_s"] == pytest.approx(sum(said["step_s_by_part"].values()))
    assert 0 < said["mfu"] < 1


def test_a_no_go_ends_with_overrides_that_fit_when_they_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*LLAMA, "data.seq_len=8192"]
    said = plan_json(capsys, *asked)
    assert said["fits"] is False
    assert len(said["alternatives"]) == 3
    for one in said["alternatives"]:
        assert plan_json(capsys, *asked, *one["overrides"])["fits"] is True
    assert "no-go: memory " in plan(capsys, *asked)


def test_the_terminal_shows_memory_stages_time_and_totals(capsys: pytest.CaptureFixture[str]) -> None:
    said = plan(capsys, *LLAMA, "train.micro_batch_size=1", "train.activation_checkpointing=true")
    for part in (
        "weights",
        "optimizer",
        "ZeRO stage",
        "with activation checkpointing",
        "MFU",
        "GPU-hours",
        "kWh",
        "go: ",
    ):
        assert part in said


def test_a_price_that_is_not_known_leaves_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    said = plan_json(capsys, *LLAMA, "cluster.usd_per_device_hour=null")
    assert said["cost_usd"] is None
    assert said["gpu_hours"] > 0
    assert "no cost: set cluster.usd_per_device_hour" in plan(capsys, *LLAMA, "cluster.usd_per_device_hour=null")


def test_a_bandwidth_that_is_not_known_is_named_with_what_hangs_on_it(capsys: pytest.CaptureFixture[str]) -> None:
    said = plan_json(capsys, *LLAMA, "cluster.node_bytes_per_s=null")
    assert any("node_bytes_per_s" in key for key in said["missing"])
    assert said["step_s"] is None
    assert said["step_s_by_part"]
    assert said["memory_bytes_per_rank_total"] > 0
    assert "node_bytes_per_s" in plan(capsys, *LLAMA, "cluster.node_bytes_per_s=null")


def test_media_get_their_share_of_a_corpus_that_is_there(
    smoke_run: Path, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = plan_json(capsys, "experiment=smoke", f"corpus={workspace}/corpora/smoke")
    assert {f"activations ({name})" for name in ("text", "image", "audio", "video")} <= said[
        "memory_bytes_per_rank"
    ].keys()


def test_a_finished_run_says_how_wrong_its_plan_was(
    smoke_run: Path, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = json.loads((smoke_run / "plan.json").read_text())
    assert kept["cluster"] == "local"
    assert kept["predicted"]["memory_bytes"] == pytest.approx(sum(kept["memory_by_part"].values()))
    last = json.loads((smoke_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert kept["measured"]["memory_bytes"] == last["memory_added_bytes"] > 0
    assert kept["measured"]["step_s"] > 0


def test_a_band_is_printed_per_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, ratio in enumerate((0.9, 1.2, 1.1)):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        said = {"memory_bytes": 1e9, "step_s": 1.0, "tokens_per_s": 100.0}
        measured = {name: ratio * value for name, value in said.items()}
        record = {"cluster": "local", "device": "cpu", "after_step": 0, "predicted": said, "measured": measured}
        (folder / "plan.json").write_text(json.dumps(record))
    bands = plan_json(capsys, "model=tiny", f"runs_dir={tmp_path}")["measured_over_predicted"]
    assert bands["step_s"] == {"runs": 3, "lowest": 0.9, "median": 1.1, "highest": 1.2}
    assert "step time: 1.10 × predicted (0.90 to 1.20, 3 runs)" in plan(capsys, "model=tiny", f"runs_dir={tmp_path}")
    assert plan_json(capsys, *LLAMA, f"runs_dir={tmp_path}")["measured_over_predicted"] == {}


def test_plans_that_cannot_be_read_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in {
        "empty": "",
        "cut": '{"cluster": "lo',
        "foreign": '{"measured": {"x": 1}}',
        "list": "[]",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "plan.json").write_text(content)
    run_verb("plan", ["model=tiny", f"runs_dir={tmp_path}", "--json"])
    answer = capsys.readouterr()
    assert json.loads(answer.out)["measured_over_predicted"] == {}
    assert f"not used: 4 damaged plans, the first {tmp_path}/cut/plan.json" in answer.err


@pytest.mark.parametrize("content", ["{", "{}", '{"shards": [{"split": "train"}]}'])
def test_a_damaged_index_is_told(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "index.json").write_text(content)
    assert f"{tmp_path}/index.json is no corpus index" in refused(capsys, "model=tiny", f"corpus={tmp_path}")


def test_measurements_of_another_device_are_left_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "machines").mkdir()
    curve = [(256.0, 1e10)]
    rates = Rates(1, {"fp32": curve}, {"fp32": {64: curve}}, {"fp32": {64: curve}}, {"fp32": 1e10},
                  [(1e6, 1e10)], [(1e6, 1e10)], 1e-5)  # fmt: skip
    write_measurements(Measurements("here", "2026-01-01", "2.13", "cpu", "cpu", 1, [rates]), tmp_path, "local")
    words = ["model=tiny_gpt", "train.steps=10", f"runs_dir={tmp_path}", "--json"]
    assert plan_json(capsys, *words)["step_s"] > 0
    run_verb("plan", [*words, "cluster/device=h100_sxm"])
    answer = capsys.readouterr()
    assert json.loads(answer.out)["step_s"] < 0.1
    assert "not used: cluster local was measured with cpu, not h100_sxm" in answer.err
    (tmp_path / "machines" / "local.json").write_text("{}")
    run_verb("plan", words)
    answer = capsys.readouterr()
    assert json.loads(answer.out)["step_s"] is None
    assert "not used: " in answer.err
    assert "measure again with `omniloom doctor measure=true`" in answer.err


def test_this_machines_memory_says_nothing_of_a_named_cluster(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plan_json(capsys, "model=tiny")["fits"] is True
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert plan_json(capsys, "model=tiny")["fits"] is None


def test_media_may_be_said_to_have_a_share(capsys: pytest.CaptureFixture[str]) -> None:
    said = plan_json(capsys, "model=tiny_omni", "shares.image=0.25", "shares.audio=0.25")
    parts = said["memory_bytes_per_rank"]
    assert {"activations (text)", "activations (image)", "activations (audio)"} <= parts.keys()


def test_every_stage_is_there_by_part(capsys: pytest.CaptureFixture[str]) -> None:
    said = plan_json(capsys, *LLAMA)["memory_bytes_by_stage"]
    assert [(one["zero_stage"], one["activation_checkpointing"]) for one in said] == [
        (stage, on) for stage in range(4) for on in (False, True)
    ]
    for one in said:
        assert sum(one["parts"].values()) == pytest.approx(one["total"], abs=9)


def test_rows_that_come_slower_than_they_are_learned_are_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    quick = plan_json(capsys, *LLAMA, "cluster.storage_bytes_per_s=1e10")
    slow = plan_json(capsys, *LLAMA, "cluster.storage_bytes_per_s=1e4")
    tokens = 64 * 1_024
    assert "data loading" not in quick["step_s_by_part"]
    assert slow["step_s"] == pytest.approx(tokens * 18 / 1e4)
    assert slow["step_s_by_part"]["data loading"] == pytest.approx(slow["step_s"] - quick["step_s"])


def test_the_examples_of_the_help_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    help_text = (REPOSITORY / "conf" / "plan_run.yaml").read_text().replace("\\\n", " ")
    examples = [line.split("omniloom plan ")[1] for line in help_text.splitlines() if "  omniloom plan " in line]
    examples = [shlex.split(example) for example in examples if "SWEEP" not in example]
    assert len(examples) >= 5
    for words in examples:
        assert plan(capsys, *(word for word in words if not word.startswith("plot="))).strip(), words


def test_architectures_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare=[gpt3_175b,deepseek_v3,omni_large,claude_large]", "cluster=h100_2x8", "data.seq_len=4096"]
    words += ["train.precision=bf16", "train.tokens=1_000_000_000_000"]
    said = {one["name"]: one for one in plan_json(capsys, *words)}
    assert list(said) == ["gpt3_175b", "deepseek_v3", "omni_large", "claude_large"]
    deepseek = said["deepseek_v3"]
    assert deepseek["kv_cache_bytes_per_token"] == 70_272
    assert deepseek["active_share"] == pytest.approx(36.6 / 671, rel=0.01)
    for one in said.values():
        head = one["forward_flops_per_token"] - one["attention_flops_per_token"] - one["feed_forward_flops_per_token"]
        sizes = preset(one["name"])
        assert head == pytest.approx(2 * sizes.vocab_size * sizes.hidden_size)
        assert one["cost_usd"] == pytest.approx(2.5 * one["gpu_hours"])
    assert said["gpt3_175b"]["document_tokens"] == 2_048
    assert "deepseek_v3" in plan(capsys, *words)


def test_the_picture_is_a_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(capsys, *LLAMA, f"plot={tmp_path}/plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cluster.workers=0"], "cluster.workers=0 must be at least 1"),
        (["cluster/device=h20O"], "did you mean 'h200'"),
        (
            ["cluster=h100_1x8", "cluster.devices_per_node=4", "train.global_batch_size=64"],
            "cluster.workers=8 are over",
        ),
        (["parallel.tensor=3"], "cluster.workers=1 must be a multiple of parallel.tensor=3"),
        (["data.seq_len=8192"], "rows are longer than the model's context"),
        (["cluster.node_bytes_per_s=-1"], "cluster.node_bytes_per_s=-1 must lie between"),
        (["compare=[gpt4]"], "unknown model=gpt4; did you mean"),
        (["plot=plan.jpg"], "plot=plan.jpg must end in .png"),
        (["parallel.zero_stage=4"], "parallel.zero_stage=4 must be 0, 1, 2 or 3"),
        (["shares.imag=0.1"], "shares=imag is none of image, audio, video; did you mean 'image'?"),
        (["shares.image=0.7", "shares.video=0.5"], "the media's shares of the tokens are 1.2 in all, over 1"),
        (["train.steps=10", "train.tokens=1e6"], "say how long once: train.steps=10 or train.tokens=1000000, not both"),
        (["compare=[tiny]", "plot=plan.png"], "compare prints a table and has no picture: leave out plot=plan.png"),
        (["train.precision=fp16", "parallel.zero_stage=0"], "train.precision=fp16 needs parallel.zero_stage=1, 2 or 3"),
        (["cluster.workers=1000"], "cluster.workers=1000 ranks of 0.7 GB"),
    ],
)
def test_what_cannot_be_planned_is_one_message(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, *words)
    assert message.startswith("error: ")
    assert said in message


@pytest.mark.parametrize(
    ("key", "reason"),
    [("tensor", "does not share matrices: DeepSpeed's AutoTP"), ("pipeline", "does not share layers")],
)
def test_training_refuses_what_only_planning_knows(key: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_verb("train", ["corpus=corpora/none", "train.steps=200", f"parallel.{key}=2", "cluster.workers=2"])
    said = capsys.readouterr().err
    assert reason in said
    assert f"parallel.{key}=2 must be 1" in said
    assert run_verb("plan", ["model=llama_8b", f"parallel.{key}=2", "cluster=h100_1x8", "data.seq_len=4096"]) is None


def test_activation_checkpointing_changes_no_step(smoke_run: Path, workspace: Path) -> None:
    """Bit for bit: each layer's second run is its first."""
    other = train_smoke(workspace, "checkpointing", "train.activation_checkpointing=true")
    losses = [
        [json.loads(line)["loss/next_token"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (smoke_run, other)
    ]
    assert losses[0] == losses[1]
