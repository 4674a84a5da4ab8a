"""Runs that align: handwritten and spoken digits with their names; held-out ones are found by the other side."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import train_smoke
from omniloom.cli import run_verb
from omniloom.data.samples import demo
from omniloom.track import jsonl

CHANCE = 0.1  # ten digits
pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def digits(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the demo's digits, as pictures and as speech by voices that are held out whole."""
    folder = tmp_path_factory.mktemp("digits")
    demo._write_digits(folder / "digits")
    demo._write_speech(folder / "speech")
    sources = {
        name: {"format": "interleaved", "train": [f"{name}/train-*.jsonl"], "heldout": [f"{name}/heldout.jsonl"]}
        for name in ("digits", "speech")
    }
    (folder / "manifest.yaml").write_text(yaml.safe_dump({"sources": sources}))
    return folder


def train(workspace: Path, run: str, *overrides: str) -> list[dict[str, Any]]:
    """Train the smallest model on the digits; returns its metrics."""
    reads = ["data=demo", "samples=null", f"manifest={workspace}/manifest.yaml", "tokenizer.vocab_size=400"]
    model = ["model=smoke", "model.vocab_size=400", "model.audio_mels=40", "parallel=zero0"]
    batch = ["data.seq_len=256", "train.global_batch_size=8", "train.micro_batch_size=4", "train.val_rows=32"]
    rates = ["optimizer.lr=5e-3", "schedule.warmup_steps=10", "train.save_every=1000"]
    where = [f"corpus={workspace}/corpus", f"runs_dir={workspace}/runs", f"run={run}"]
    run_verb("train", [*reads, *model, *batch, *rates, *where, *overrides])
    return list(jsonl.read(workspace / "runs" / run / "metrics.jsonl"))


@pytest.fixture(scope="module")
def stage(digits: Path) -> list[dict[str, Any]]:
    """A stage of alignment alone."""
    alone = ["train.next_token_loss_weight=0", "train.mtp_loss_weight=0", "align.weight=1"]
    return train(digits, "stage", *alone, "train.steps=120", "train.val_every=120")


def test_a_stage_finds_heldout_pairs_far_above_chance(stage: list[dict[str, Any]]) -> None:
    last = stage[-1]
    found = {key.removeprefix("val/retrieval_at_1/"): value for key, value in last.items() if "retrieval_at_1" in key}
    print(found, {key: value for key, value in last.items() if "retrieval_pairs" in key or "retrieval_chance" in key})
    assert found.keys() == {"image_text", "text_image", "audio_text", "text_audio"}
    assert min(found.values()) > 4 * CHANCE
    for kind in ("image_text", "audio_text"):
        assert last[f"val/retrieval_pairs/{kind}"] > 100
        assert last[f"val/retrieval_chance/{kind}"] == pytest.approx(CHANCE, abs=0.02)
        assert last[f"loss/contrastive/{kind}"] < 0.7 * stage[0][f"loss/contrastive/{kind}"]


def test_the_next_stage_begins_with_its_weights(digits: Path, stage: list[dict[str, Any]]) -> None:
    rate = ["optimizer.lr=1e-4", "train.steps=12", "train.val_every=1"]
    second = train(digits, "second", "init=stage", "align.weight=0.1", *rate)
    afresh = train(digits, "afresh", "align.weight=0.1", *rate)
    for kind in ("audio_text", "image_text"):
        key = f"val/retrieval_at_1/{kind}"
        print(key, stage[-1][key], second[0][key], afresh[0][key])
        assert second[0][key] > stage[-1][key] - 0.1
        assert afresh[0][key] < 3 * CHANCE
    again = train(digits, "second", "init=stage", "align.weight=0.1", *rate)
    assert again == second, "a finished run is left as it is"


def test_a_run_goes_on_exactly_as_it_would_have(ray_cluster: None, workspace: Path) -> None:
    aligned = ["align.weight=0.5", "model.dropout=0.1", "train.steps=8", "train.save_every=4", "train.val_every=4"]
    whole = list(jsonl.read(train_smoke(workspace, "aligned", *aligned) / "metrics.jsonl"))
    resumed = list(jsonl.read(train_smoke(workspace, "aligned_on", *aligned, "fork=aligned@4") / "metrics.jsonl"))
    assert [line["step"] for line in resumed] == [line["step"] for line in whole] == list(range(1, 9))
    compared = ("loss/", "val/", "align/", "grad_norm", "batch_hash")
    for one, other in zip(whole, resumed, strict=True):
        told = {key: value for key, value in one.items() if key.startswith(compared)}
        assert told == {key: value for key, value in other.items() if key.startswith(compared)}
        assert {"loss/contrastive", "loss/next_token", "loss/balance", "loss/mtp"} <= told.keys()
