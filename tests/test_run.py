"""What a finished run leaves: the contract's files and keys, the Python interface, the W&B record."""

import json
from pathlib import Path

import torch
import yaml

import omniloom
from conftest import REPOSITORY, train_smoke
from omniloom.train.checkpoint import verify

KEYS = {
    "step",
    "loss/next_token",
    "loss/balance",
    "val/loss",
    "val/loss/words",
    "val/loss/colours",
    "lr",
    "grad_norm",
    "tokens",
    "tokens_per_s",
    "tokens_per_s_per_rank",
    "step_s",
    "data_wait_s",
    "memory_peak_bytes",
    "eta_s",
    "batch_hash",
    "router/1/load_max_over_mean",
    "router/1/dead_experts",
    "router/1/tokens_per_expert",
}


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_metrics_have_each_step_once_and_the_contracts_keys(smoke_run: Path) -> None:
    lines = metrics(smoke_run)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[-1].keys() == KEYS
    assert lines[-1]["eta_s"] == 0
    assert lines[-1]["loss/next_token"] < lines[0]["loss/next_token"]


def test_the_resolved_configuration_is_saved(smoke_run: Path) -> None:
    config = yaml.safe_load((smoke_run / "config.yaml").read_text())
    assert config["model"]["hidden_size"] == 32
    assert config["train"]["steps"] == 20


def test_checkpoints_are_complete_and_hashed(smoke_run: Path) -> None:
    folders = sorted((smoke_run / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step_00000010", "step_00000020"]
    for folder in folders:
        verify(folder)
        assert list((folder / "model").glob("*.safetensors"))


def test_a_loaded_run_gives_logits_and_scores(smoke_run: Path, workspace: Path) -> None:
    model = omniloom.load(smoke_run)
    logits = model(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]))
    assert logits.shape == (2, 4, 320)
    files = str(workspace / "corpora/smoke/files/words/heldout/*.txt")
    results = omniloom.evaluate(model, ["perplexity"], task_args={"perplexity": {"files": [files]}})
    assert results["perplexity"]["n"] == 2
    assert results["perplexity"]["metrics"]["bits_per_byte"]["value"] > 0


def test_there_is_one_wandb_run_and_an_evaluation_adds_none(smoke_run: Path, workspace: Path) -> None:
    from omniloom.cli import run_verb

    files = f"{workspace}/corpora/smoke/files/colours/questions.jsonl"
    places = ["init=smoke", f"runs_dir={workspace}/runs"]
    run_verb("evaluate", [*places, "tasks=[omniloom_pictures]", f"task_args.omniloom_pictures.files={files}"])
    result = json.loads((smoke_run / "evals" / "step_00000020" / "omniloom_pictures.json").read_text())
    assert result["step"] == 20
    assert result["metrics"]["acc"]["stderr"] is not None
    assert len(list((smoke_run / "wandb").glob("offline-run-*"))) == 1


def test_two_ranks_see_the_same_batches_and_learn_the_same(smoke_run: Path, workspace: Path) -> None:
    two = train_smoke(workspace, "two_ranks", "cluster.workers=2")
    one_lines, two_lines = metrics(smoke_run), metrics(two)
    assert [line["batch_hash"] for line in one_lines] == [line["batch_hash"] for line in two_lines]
    for one_line, two_line in zip(one_lines, two_lines, strict=True):
        for key in ("loss/next_token", "loss/balance", "grad_norm", "tokens"):
            torch.testing.assert_close(one_line[key], two_line[key], rtol=1e-4, atol=1e-6)
        assert one_line["router/1/tokens_per_expert"] == two_line["router/1/tokens_per_expert"]


def test_the_router_bias_moves_under_bf16_zero_and_stays_float32(ray_cluster: None, workspace: Path) -> None:
    run = train_smoke(workspace, "bf16", "train.precision=bf16", "cluster.workers=2", "parallel=zero1")
    from safetensors.torch import load_file

    (file,) = (run / "checkpoints" / "step_00000020" / "model").glob("*.safetensors")
    weights = load_file(file)
    bias = weights["layers.1.mlp.router.bias_E"]
    assert weights["layers.1.mlp.router.weight_ED"].dtype == torch.bfloat16
    assert bias.dtype == torch.float32
    expected = torch.zeros(4)
    for line in metrics(run):
        load = torch.tensor(line["router/1/tokens_per_expert"], dtype=torch.float32)
        expected += 0.001 * torch.sign(load.mean() - load)
    assert expected.abs().max() > 0.001
    torch.testing.assert_close(bias, expected, rtol=0, atol=1e-6)


def test_a_corpus_swapped_under_a_run_is_refused(smoke_run: Path, workspace: Path, capsys) -> None:
    import pytest

    from omniloom.cli import run_verb

    words = ["tokenize", ["data=smoke", f"corpus={workspace}/corpora/other", "modality.image.size_pixels=24"]]
    run_verb(*words)
    with pytest.raises(SystemExit) as ended:
        train_smoke(workspace, "smoke", f"corpus={workspace}/corpora/other", "train.steps=22")
    assert ended.value.code == 1
    assert "was trained on the corpus" in capsys.readouterr().err


def test_the_repository_has_no_outputs_folder() -> None:
    assert not (REPOSITORY / "outputs").exists()
