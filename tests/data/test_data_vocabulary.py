"""A corpus's vocabulary is trained on all of its sources, or is the one that is named."""

import json
from pathlib import Path

import pytest

from omniloom.data import vocabulary
from omniloom.data.source import Unit
from omniloom.data.vocabulary import build_tokenizer, make_tokenizer, training_texts
from omniloom.errors import ConfigError
from omniloom.modality.config import TokenizerConfig
from omniloom.modality.text import load_tokenizer, train_tokenizer


def unit(folder: Path, name: str, text: str, count: int) -> Unit:
    file = folder / f"{name}.jsonl"
    file.write_text(f"{json.dumps({'text': text})}\n" * count)
    return Unit(f"{name}-train-00000", name, "train", "jsonl", [str(file)])


def test_every_source_is_in_a_cut_of_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "TRAINING_BYTES", 400)
    monkeypatch.setattr(vocabulary, "LEAST_SHARE_BYTES", 10)
    units = [unit(tmp_path, name, name * 10, 1_000) for name in ("a", "b", "\xe9", "d")]
    texts = list(training_texts(units))
    assert {text[0] for text in texts} == {"a", "b", "\xe9", "d"}
    assert sum(len(text.encode()) for text in texts) == 400
    monkeypatch.setattr(vocabulary, "LEAST_SHARE_BYTES", 200)
    assert len({text[0] for text in training_texts(units)}) == 2


def test_a_finished_vocabulary_is_kept_and_a_named_one_adopted(tmp_path: Path) -> None:
    units = [unit(tmp_path, "a", "red green blue", 20)]
    told: list[int] = []
    make_tokenizer(units, TokenizerConfig(vocab_size=270), tmp_path, told.append)
    first = (tmp_path / "tokenizer.json").read_bytes()
    make_tokenizer(units, TokenizerConfig(vocab_size=290), tmp_path, told.append)
    assert (tmp_path / "tokenizer.json").read_bytes() == first
    train_tokenizer(iter(["other words"] * 9), 265).save(tmp_path / "other.json")
    make_tokenizer(units, TokenizerConfig(str(tmp_path / "other.json")), tmp_path, told.append)
    assert load_tokenizer(tmp_path / "tokenizer.json").vocab_size == 265


def test_a_worker_trains_it_and_the_driver_sees_how_far(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    units = [unit(tmp_path, "a", "red green blue " * 2_000, 300)]
    build_tokenizer(units, TokenizerConfig(vocab_size=270), tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.json").vocab_size == 270
    told = capsys.readouterr()
    assert "train tokenizer" in told.err
    assert not told.out
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"raise tokenizer\.vocab_size=7"):
        build_tokenizer(units, TokenizerConfig(vocab_size=7), tmp_path)
