"""A corpus's vocabulary is trained on all of its sources, or is the one that is named."""

import json
from pathlib import Path

import pytest

from omniloom.data import vocabulary
from omniloom.data.build import build_corpus
from omniloom.data.config import CorpusConfig
from omniloom.data.corpus import Corpus
from omniloom.data.source import Unit
from omniloom.data.vocabulary import build_tokenizer, make_tokenizer, refuse_other_tokenizer, training_texts
from omniloom.errors import ConfigError, DataError
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


def test_a_finished_vocabulary_is_kept_and_another_made_anew(tmp_path: Path) -> None:
    units = [unit(tmp_path, "a", "red green blue", 20)]
    told: list[int] = []
    tokenizer, made = tmp_path / "tokenizer.json", tmp_path / "tokenizer_made.json"
    make_tokenizer(units, TokenizerConfig(vocab_size=270), tmp_path, told.append)
    before = tokenizer.stat().st_mtime_ns
    make_tokenizer(units, TokenizerConfig(vocab_size=270), tmp_path, told.append)
    assert tokenizer.stat().st_mtime_ns == before
    for unfinish in (made.unlink, lambda: made.write_bytes(made.read_bytes()[:9]), lambda: tokenizer.write_text("{}")):
        unfinish()
        make_tokenizer(units, TokenizerConfig(vocab_size=270), tmp_path, told.append)
        assert tokenizer.stat().st_mtime_ns > before
        before = tokenizer.stat().st_mtime_ns
    make_tokenizer(units, TokenizerConfig(vocab_size=268), tmp_path, told.append)
    assert load_tokenizer(tokenizer).vocab_size == 268
    train_tokenizer(iter(["other words"] * 9), 265).save(tmp_path / "other.json")
    make_tokenizer(units, TokenizerConfig(str(tmp_path / "other.json")), tmp_path, told.append)
    assert load_tokenizer(tokenizer).vocab_size == 265
    make_tokenizer(units, TokenizerConfig(vocab_size=268), tmp_path, told.append)
    assert load_tokenizer(tokenizer).vocab_size == 268


def test_a_corpus_of_another_vocabulary_is_refused_with_both(tmp_path: Path) -> None:
    units = [unit(tmp_path, "a", "red green blue", 20)]
    named = [tmp_path / "one.json", tmp_path / "copy.json", tmp_path / "two.json"]
    for path, words in zip(named, ("one word", "one word", "two words"), strict=True):
        train_tokenizer(iter([words] * 9), 263).save(path)
    one, copy, two = (TokenizerConfig(str(path)) for path in named)
    trained, larger = TokenizerConfig(vocab_size=270), TokenizerConfig(vocab_size=290)
    for made, same, others in ((trained, [trained], [larger, one]), (one, [one, copy], [two, trained])):
        make_tokenizer(units, made, tmp_path, lambda count: None)
        for config in same:
            refuse_other_tokenizer(config, tmp_path)
        for other in others:
            held, asked = (
                f"tokenizer.vocab_size={c.vocab_size}"
                if c.path is None
                else f"tokenizer.path={c.path} \\([0-9a-f]{{12}}\\)"
                for c in (made, other)
            )
            with pytest.raises(DataError, match=f"a corpus of {held}, asked is {asked}: .*force=true"):
                refuse_other_tokenizer(other, tmp_path)
    (tmp_path / "tokenizer_made.json").unlink()
    with pytest.raises(DataError, match=r"a corpus of another tokenizer, asked is tokenizer\.vocab_size=270"):
        refuse_other_tokenizer(trained, tmp_path)


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


def test_a_job_makes_another_vocabulary_anew_until_its_corpus_is_finished(ray_cluster: None, tmp_path: Path) -> None:
    unit(tmp_path, "a", "red green blue", 20)
    (tmp_path / "manifest.yaml").write_text("sources: {a: {format: jsonl, train: [a.jsonl]}}")

    def build(vocab_size: int) -> Corpus:
        files = {"corpus": str(tmp_path / "corpus"), "manifest": str(tmp_path / "manifest.yaml")}
        return build_corpus(CorpusConfig(**files, tokenizer=TokenizerConfig(vocab_size=vocab_size)))

    build(264)
    (tmp_path / "corpus" / "index.json").unlink()  # as if killed before it was written
    assert build(268).index.vocab_size == 268
    assert build(268).index.vocab_size == 268
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size=268, asked is tokenizer\.vocab_size=264"):
        build(264)
