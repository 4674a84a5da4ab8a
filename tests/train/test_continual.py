"""A corpus joins a run at a declared sample: the stream before it stays, the old sources are replayed and watched."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import train_smoke
from omniloom.cli import run_verb
from omniloom.data.config import DataConfig, PhaseConfig
from omniloom.data.index import SourceRecord
from omniloom.data.schedule import appended, open_corpora, read_schedule
from omniloom.errors import ConfigError
from omniloom.train.forgetting import forgetting

OLD = ["words", "colours", "tones", "fades"]


@pytest.fixture(scope="module")
def more(smoke_run: Path, workspace: Path) -> Path:
    """Another text, by the vocabulary and the sizes of the smoke corpus."""
    files = workspace / "more_files"
    files.mkdir()
    for number in range(6):
        (files / f"{number}.txt").write_text(" ".join(str(number + step) for step in range(300)))
    source = {"numbers": {"format": "text", "train": ["[0-4].txt"], "heldout": ["5.txt"]}}
    (files / "manifest.yaml").write_text(json.dumps({"sources": source}))
    folder = workspace / "corpora" / "more"
    vocabulary = workspace / "corpora" / "smoke" / "tokenizer.json"
    run_verb(
        "tokenize",
        [
            "data=smoke",
            "samples=null",
            f"manifest={files}/manifest.yaml",
            f"corpus={folder}",
            f"tokenizer.path={vocabulary}",
        ],
    )
    return folder


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def phase(sample: int, more: Path, *others: str) -> str:
    return "data.phases=[{" + ", ".join([f"from_sample: {sample}", f"append: '{more}'", *others]) + "}]"


def test_a_finished_run_goes_on_with_a_corpus_more(smoke_run: Path, workspace: Path, more: Path) -> None:
    run = train_smoke(
        workspace, "continual", "fork=smoke", "train.steps=26", "train.val_every=2", phase(160, more, "replay: 0.25")
    )
    lines, before = metrics(run), metrics(smoke_run)
    assert [line["batch_hash"] for line in lines[:20]] == [line["batch_hash"] for line in before]
    assert not any(key.startswith("val/forgetting") for line in lines[:20] for key in line)
    for line in lines[21::2]:
        for name in OLD:
            grown = line[f"val/loss/{name}"] - lines[19][f"val/loss/{name}"]
            assert line[f"val/forgetting/{name}"] == pytest.approx(grown)
        assert line["val/loss/numbers"] > 0
        assert "val/forgetting/numbers" not in line
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (plan,) = [event for event in events if event["event"] == "plan"]
    assert plan["epochs"]["numbers"] > 0


def test_the_stream_changes_its_length_and_corpora_at_the_declared_step(workspace: Path, more: Path) -> None:
    run = train_smoke(
        workspace, "declared", "train.steps=8", "train.val_every=8", phase(32, more, "replay: 0.0", "seq_len: 32")
    )
    lines = metrics(run)
    positions = [
        line["tokens"] - before["tokens"] for before, line in zip([{"tokens": 0}, *lines[:-1]], lines, strict=True)
    ]
    assert all(count <= 8 * 64 for count in positions[:4])
    assert max(positions[:4]) > 8 * 32
    assert all(count <= 8 * 32 for count in positions[4:])
    assert "val/loss" in lines[3]  # what forgetting counts from, though no validation is due


def test_a_phase_declared_for_what_was_trained_is_refused(
    smoke_run: Path, workspace: Path, more: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        train_smoke(workspace, "late", "fork=smoke", "train.steps=24", phase(80, more))
    said = capsys.readouterr().err
    assert "the batch of step 20 was" in said
    assert "what data.phases declare up to sample 160 must stay as it was" in said


def test_a_runs_corpora_come_in_the_order_of_their_joining(workspace: Path, smoke_run: Path, more: Path) -> None:
    smoke = workspace / "corpora" / "smoke"
    corpora = open_corpora(smoke, DataConfig(phases=[PhaseConfig(8, append=str(more))]))
    assert [corpus.folder for corpus in corpora] == [smoke, more]


def test_weights_at_a_joining_are_shares(smoke_run: Path, workspace: Path, more: Path) -> None:
    data = DataConfig(
        weights={"words": 3.0},
        phases=[PhaseConfig(40, append=str(more), replay=0.2), PhaseConfig(80, weights={"numbers": 0.0})],
    )
    corpora = open_corpora(workspace / "corpora" / "smoke", data)
    first, joined, last = (phase.weights for phase in read_schedule(corpora, data, 0).phases)
    assert first == (3.0, 1.0, 1.0, 1.0, 0.0)
    assert joined == pytest.approx((0.1, 0.2 / 6, 0.2 / 6, 0.2 / 6, 0.8))
    assert last == pytest.approx((0.1, 0.2 / 6, 0.2 / 6, 0.2 / 6, 0.0))
    assert [(join.from_sample, join.before) for join in appended(corpora, data)] == [(40, OLD)]
    early = DataConfig(phases=[PhaseConfig(8, weights={"numbers": 1.0}), PhaseConfig(40, append=str(more))])
    with pytest.raises(ConfigError, match="numbers names no source of the corpus"):
        read_schedule(corpora, early, 0)


def test_preference_pairs_are_given_no_weight(tmp_path: Path) -> None:
    record = SourceRecord("pairs", 0.0, 1.0, "preference")
    corpus = SimpleNamespace(index=SimpleNamespace(sources=[SourceRecord("words", 1.0, 1.0), record]))
    with pytest.raises(
        ConfigError, match=r"data\.weights\.pairs: a source of preference pairs stays out of the stream"
    ):
        read_schedule([corpus], DataConfig(weights={"pairs": 1.0}), 0)
    phases = [PhaseConfig(8, weights={"pairs": 1.0})]
    with pytest.raises(ConfigError, match=r"data\.phases\[0\]\.weights\.pairs"):
        read_schedule([corpus], DataConfig(phases=phases), 0)


def test_forgetting_is_read_off_the_runs_own_metrics(tmp_path: Path) -> None:
    from omniloom.data.schedule import Appended

    steps = [
        {"step": 4, "val/loss": 1.0, "val/loss/a": 1.0},
        {"step": 5},
        {"step": 8, "val/loss": 2, "val/loss/a": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    joins = [Appended(32, ["a"]), Appended(64, ["a", "b"])]
    assert forgetting(tmp_path, {"step": 4, "val/loss/a": 9.0}, joins, 8) == {}
    assert forgetting(tmp_path, {"step": 6, "val/loss/a": 9.0}, joins, 8) == {"val/forgetting/a": 8.0}
    assert forgetting(tmp_path, {"step": 9, "val/loss/a": 9.0, "val/loss/b": 1}, joins, 8) == {"val/forgetting/a": 7.0}


@pytest.mark.slow
def test_ranks_micro_batches_and_loader_workers_of_a_run_change_no_batch(smoke_run: Path, workspace: Path) -> None:
    run = train_smoke(
        workspace, "others", "cluster.workers=2", "data.loader_workers=2", "train.micro_batch_size=1", "train.steps=12"
    )
    expected = [line["batch_hash"] for line in metrics(smoke_run)]
    assert [line["batch_hash"] for line in metrics(run)] == expected[:12]
