"""What a finished run leaves: the contract's files and keys, the Python interface, the W&B record."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import omniloom
from conftest import REPOSITORY, train_smoke
from omniloom.track.checkpoints import Folder, find_damage

KEYS = {
    "step",
    "loss/next_token",
    "loss/mtp",
    "loss/balance",
    "val/loss",
    "val/loss/words",
    "val/loss/colours",
    "val/loss/tones",
    "val/loss/fades",
    "lr",
    "grad_norm",
    "skipped_steps",
    "tokens",
    "tokens/text",
    "tokens/image",
    "tokens/audio",
    "tokens/video",
    "tokens_per_s",
    "tokens_per_s_per_rank",
    "step_s",
    "data_wait_s",
    "checkpoint_s",
    "forward_s",
    "backward_s",
    "optimizer_s",
    "communication_s",
    "memory_peak_bytes",
    "memory_added_bytes",  # above what the process held before the model
    "eta_s",
    "batch_hash",
    *(
        f"router/{layer}/{name}"
        for layer in (1, 2)  # the second is the multi-token-prediction module's
        for name in (
            "load_max_over_mean", "dead_experts", "tokens_per_expert", "load_entropy", "score_entropy", "bias_min",
            "bias_max",
        )
    ),
}  # fmt: skip
SCORED = {"omniloom_pictures": "colours", "omniloom_speech": "tones", "omniloom_video": "fades"}


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_metrics_have_each_step_once_and_the_contracts_keys(smoke_run: Path) -> None:
    lines = metrics(smoke_run)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[-1].keys() == KEYS
    assert lines[-1]["eta_s"] == 0
    for key in ("loss/next_token", "loss/mtp"):
        assert lines[-1][key] < lines[0][key], key
    for line in lines:
        assert line["tokens"] == sum(line[f"tokens/{medium}"] for medium in ("text", "image", "audio", "video"))


def test_the_resolved_configuration_is_saved(smoke_run: Path) -> None:
    config = yaml.safe_load((smoke_run / "config.yaml").read_text())
    assert config["model"]["hidden_size"] == 32
    assert config["train"]["steps"] == 20


def test_checkpoints_are_complete_and_hashed(smoke_run: Path) -> None:
    folders = sorted((smoke_run / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step_00000010", "step_00000020"]
    for folder in folders:
        assert find_damage(Folder.of(folder)) is None
        assert {path.suffix for path in folder.rglob("*.*")} == {".safetensors", ".json"}, "nothing is pickled"
        assert list((folder / "model").glob("*.safetensors"))


def test_a_loaded_run_gives_logits_and_scores(smoke_run: Path, workspace: Path) -> None:
    model = omniloom.load(smoke_run)
    logits = model(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]))
    assert logits.shape == (2, 4, 320)
    files = str(workspace / "corpora/smoke/files/words/heldout/*.txt")
    results = omniloom.evaluate(model, ["perplexity"], task_args={"perplexity": {"files": [files]}})
    assert results["perplexity"]["n"] == 2
    assert results["perplexity"]["metrics"]["bits_per_byte"]["value"] > 0


@pytest.fixture(scope="module")
def evaluations(smoke_run: Path, workspace: Path) -> Path:
    """The scores of colours, tones and fades."""
    from omniloom.cli import run_verb

    files = [
        f"task_args.{task}.files={workspace}/corpora/smoke/files/{source}/questions.jsonl"
        for task, source in SCORED.items()
    ]
    run_verb("evaluate", ["init=smoke", f"runs_dir={workspace}/runs", f"tasks=[{','.join(SCORED)}]", *files])
    return smoke_run / "evals" / "step_00000020"


@pytest.mark.parametrize(("task", "choices"), [("omniloom_pictures", 3), ("omniloom_speech", 2), ("omniloom_video", 2)])
def test_a_trained_run_is_evaluated_on_each_medium(task: str, choices: int, evaluations: Path) -> None:
    result = json.loads((evaluations / f"{task}.json").read_text())
    assert (result["task"], result["step"], result["n"]) == (task, 20, 2 * choices)
    acc = result["metrics"]["acc"]
    assert 0 <= acc["value"] <= 1
    assert acc["stderr"] is not None
    assert acc["chance"] == pytest.approx(1 / choices)
    assert acc["control"].keys() == {"removed", "shuffled"}
    samples = [json.loads(line) for line in (evaluations / f"{task}.samples.jsonl").read_text().splitlines()]
    assert sum(sample["right"] for sample in samples) / len(samples) == pytest.approx(acc["value"])
    for sample in samples:
        (medium, *_), _question = (list(part.values()) for part in sample["prompt"])
        assert Path(medium).is_file()
        assert Path(medium).stem == sample["answer"]
        assert sample["given"] in sample["choices"]


def test_there_is_one_wandb_run_and_an_evaluation_adds_none(smoke_run: Path, evaluations: Path) -> None:
    assert sorted(path.name for path in evaluations.iterdir()) == sorted(
        f"{task}{end}" for task in SCORED for end in (".json", ".samples.jsonl")
    )
    assert len(list((smoke_run / "wandb").glob("offline-run-*"))) == 1


def test_two_ranks_see_the_same_batches_and_learn_the_same(smoke_run: Path, workspace: Path) -> None:
    two = train_smoke(workspace, "two_ranks", "cluster.workers=2")
    one_lines, two_lines = metrics(smoke_run), metrics(two)
    assert [line["batch_hash"] for line in one_lines] == [line["batch_hash"] for line in two_lines]
    for one_line, two_line in zip(one_lines, two_lines, strict=True):
        for key in ("loss/next_token", "loss/mtp", "loss/balance", "grad_norm", "tokens"):
            torch.testing.assert_close(one_line[key], two_line[key], rtol=1e-4, atol=1e-6)
        for layer in (1, 2):
            key = f"router/{layer}/tokens_per_expert"
            assert one_line[key] == two_line[key]


def test_the_router_bias_moves_under_bf16_zero_and_stays_float32(ray_cluster: None, workspace: Path) -> None:
    run = train_smoke(workspace, "bf16", "train.precision=bf16", "cluster.workers=2", "parallel=zero1")
    weights = weights_of(run)
    bias = weights["layers.1.mlp.router.bias_E"]
    assert weights["layers.1.mlp.router.weight_ED"].dtype == torch.bfloat16
    assert bias.dtype == torch.float32
    expected = torch.zeros(4)
    for line in metrics(run):
        load = torch.tensor(line["router/1/tokens_per_expert"], dtype=torch.float32)
        expected += 0.001 * torch.sign(load.mean() - load)
    assert expected.abs().max() > 0.001
    torch.testing.assert_close(bias, expected, rtol=0, atol=1e-6)


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (file,) = (run / "checkpoints" / "step_00000020" / "model").glob("*.safetensors")
    return load_file(file)


def test_muon_lowers_the_loss_and_resumes_bit_for_bit(ray_cluster: None, workspace: Path) -> None:
    """What a kill between two checkpoints leaves: the first complete one, and metrics beyond it."""
    words = ("muon", "optimizer.kind=muon", "parallel=zero0", "optimizer.lr=3e-3")
    run = train_smoke(workspace, *words)
    whole, lines = weights_of(run), metrics(run)
    for key in ("loss/next_token", "loss/mtp", "val/loss"):
        assert lines[-1][key] < next(line[key] for line in lines if key in line) - 0.2, key
    shutil.rmtree(run / "checkpoints" / "step_00000020")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "running"}))
    train_smoke(workspace, *words)
    again = metrics(run)
    assert [line["step"] for line in again] == list(range(1, 21))
    for key in ("loss/next_token", "loss/mtp", "loss/balance", "grad_norm", "lr", "batch_hash"):
        assert [line[key] for line in again] == [line[key] for line in lines], key
    resumed = weights_of(run)
    assert resumed.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    starts = [event["step"] for event in map(json.loads, (run / "events.jsonl").open()) if event["event"] == "start"]
    assert starts == [0, 10]


def test_phases_reach_the_stream_and_an_unknown_source_is_named(
    smoke_run: Path, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The batches before the phase are those of the run without it; those after are others."""
    places = ("data.weights.colours=0", "data.weights.tones=0", "data.weights.fades=0", "train.save_every=20")
    phase = "data.phases=[{{from_sample:80,weights:{{{}:1,words:0}}}}]"
    plain = train_smoke(workspace, "plain", *places)
    phased = train_smoke(workspace, "phased", *places, phase.format("tones"))
    before, after = ([line["batch_hash"] for line in metrics(run)] for run in (plain, phased))
    assert before[10:] != after[10:]
    losses = metrics(phased)[-1]
    assert losses["val/loss/tones"] < metrics(plain)[-1]["val/loss/tones"]
    with pytest.raises(SystemExit) as ended:
        train_smoke(workspace, "mistyped", phase.format("tone"))
    assert ended.value.code == 1
    assert "data.phases[0].weights.tone names no source of the corpus; did you mean 'tones'?" in capsys.readouterr().err


def test_a_corpus_swapped_under_a_run_is_refused(smoke_run: Path, workspace: Path, capsys) -> None:
    from omniloom.cli import run_verb

    words = ["tokenize", ["data=smoke", f"corpus={workspace}/corpora/other", "modality.image.size_pixels=24"]]
    run_verb(*words)
    with pytest.raises(SystemExit) as ended:
        train_smoke(workspace, "smoke", f"corpus={workspace}/corpora/other", "train.steps=22")
    assert ended.value.code == 1
    assert "was trained on the corpus" in capsys.readouterr().err


def test_the_repository_has_no_outputs_folder() -> None:
    assert not (REPOSITORY / "outputs").exists()
