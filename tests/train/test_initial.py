"""Where a run begins that names another model's weights."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_rows import TINY

from omniloom.data.corpus import TOKENIZER
from omniloom.data.index import file_sha256
from omniloom.errors import CheckpointError, ConfigError, DataError
from omniloom.model.decoder import Decoder
from omniloom.model.load import save_model
from omniloom.train import checkpoint
from omniloom.train.config import TrainingRun
from omniloom.train.initial import begin_with, initial_folder


@pytest.fixture
def held(tmp_path: Path) -> tuple[Path, Decoder, Any]:
    """A model folder of ours, the model in it, and a corpus of its vocabulary."""
    torch.manual_seed(3)
    model = Decoder(TINY)
    folder = tmp_path / "model"
    save_model(folder, TINY, model.state_dict())
    (folder / TOKENIZER).write_text("a vocabulary")
    (folder / "modality.json").write_text("{}")
    files = {TOKENIZER: SimpleNamespace(sha256=file_sha256(folder / TOKENIZER))}
    return folder, model, SimpleNamespace(folder="corpora/mine", index=SimpleNamespace(files=files))


def run_of(folder: Path, **changes: Any) -> TrainingRun:
    return TrainingRun(
        run="second", runs_dir=str(folder.parent / "runs"), init=str(folder), model=replace(TINY, **changes)
    )


def test_the_run_begins_with_those_weights(held: tuple[Path, Decoder, Any]) -> None:
    folder, theirs, corpus = held
    run = run_of(folder, dropout=0.1)  # what is no weight may be another
    assert initial_folder(run, corpus) == folder
    ours = Decoder(run.model)
    assert not torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    begin_with(ours, run)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_without_init_or_after_a_checkpoint_of_its_own_a_run_is_left_alone(
    held: tuple[Path, Decoder, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, drawn = run_of(held[0]), Decoder(TINY)
    before = drawn.lm_head.weight.clone()
    begin_with(drawn, replace(run, init=None))
    monkeypatch.setattr(checkpoint, "newest_state", lambda folder: "a state")
    begin_with(drawn, replace(run, init="gone"))
    assert torch.equal(drawn.lm_head.weight, before)


def test_another_model_is_refused_with_both_shapes(held: tuple[Path, Decoder, Any]) -> None:
    folder, _, corpus = held
    with pytest.raises(ConfigError, match=r"embed_tokens.weight is \(32, 16\) there and \(40, 16\) here") as caught:
        initial_folder(run_of(folder, vocab_size=40), corpus)
    assert "tensors that differ: 1" in str(caught.value)
    with pytest.raises(ConfigError, match=r"mtp\.0\..* is \(.*\) there and none here"):
        initial_folder(run_of(folder, num_nextn_predict_layers=0), corpus)


def test_another_vocabulary_is_refused_with_the_key(held: tuple[Path, Decoder, Any]) -> None:
    folder, _, corpus = held
    (folder / TOKENIZER).write_text("another vocabulary")
    with pytest.raises(DataError, match=r"another vocabulary than corpora/mine.*tokenizer\.path="):
        initial_folder(run_of(folder), corpus)
    (folder / "modality.json").unlink()  # somebody else's, whose file is another whatever it says
    assert initial_folder(run_of(folder), corpus) == folder


def test_a_folder_that_is_no_model_is_refused(held: tuple[Path, Decoder, Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no complete checkpoint and no model"):
        initial_folder(run_of(tmp_path / "empty"), held[2])
    with pytest.raises(ConfigError, match=r"init=.*neither a run"):
        initial_folder(run_of(tmp_path / "nowhere"), held[2])
