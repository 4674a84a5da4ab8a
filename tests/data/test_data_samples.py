"""Sample corpora: held-out files share nothing with the training files, and are written once."""

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omniloom.data.samples import DIGIT_QUESTIONS, EVAL_QUESTION, _write_digits, _write_topics, write_samples
from omniloom.data.shards import weave_document
from omniloom.data.source import list_units, read_documents, read_manifest
from omniloom.errors import ConfigError
from omniloom.modality.config import ImageConfig, ModalityConfig
from omniloom.modality.text import train_tokenizer

KINDS = ("smoke", "demo")
DIGIT_RADIUS = 8.0  # in the 8 × 8 digits' own scale of 0 to 16
Lines = list[dict[str, object]]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each kind, written once."""
    folder = tmp_path_factory.mktemp("samples")
    return {kind: write_samples(kind, folder / kind).parent for kind in KINDS}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_lines(*paths: Path) -> Lines:
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def picture_names(lines: Lines) -> list[str]:
    return [segment["image"] for line in lines for segment in line["segments"] if "image" in segment]


def digit_vectors(folder: Path, names: list[str]) -> np.ndarray:
    """The pictures' 64 values on scikit-learn's scale of 0 to 16."""
    return np.stack([np.asarray(Image.open(folder / name), float).reshape(64) * 16 / 255 for name in names]).round()


@pytest.mark.parametrize("kind", KINDS)
def test_heldout_and_training_files_are_disjoint(kind: str, samples: dict[str, Path]) -> None:
    folder = samples[kind]
    units = list_units(read_manifest(folder / "manifest.yaml"), folder)
    files = {
        split: {file for unit in units if unit.split == split for file in unit.files} for split in ("train", "heldout")
    }
    assert files["train"]
    assert files["heldout"]
    assert not files["train"] & files["heldout"]
    texts = {
        split: {Path(file).read_bytes() for file in named if file.endswith(".txt")} for split, named in files.items()
    }
    assert not texts["train"] & texts["heldout"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_document_can_be_used(kind: str, samples: dict[str, Path]) -> None:
    folder = samples[kind]
    tokenizer = train_tokenizer(iter(["a"]), 261)
    sizes = ModalityConfig(ImageConfig(16, 8))
    for unit in list_units(read_manifest(folder / "manifest.yaml"), folder):
        read = [raw for file in unit.files for raw in read_documents(Path(file), unit.format)]
        assert read
        for raw in read[:: max(1, len(read) // 20)]:
            document = weave_document(raw, tokenizer, sizes)
            assert len(document.image) == (4 if unit.format == "interleaved" else 0)
            assert document.loss_mask.any()


def test_no_heldout_digit_is_near_a_training_digit(samples: dict[str, Path]) -> None:
    folder = samples["demo"] / "digits"
    train = digit_vectors(folder, picture_names(read_lines(*sorted(folder.glob("train-*.jsonl")))))
    heldout = digit_vectors(folder, picture_names(read_lines(folder / "heldout.jsonl")))
    assert len(train) + len(heldout) == 1797
    assert 0.1 < len(heldout) / 1797 < 0.35
    squares = (heldout**2).sum(1)[:, None] + (train**2).sum(1) - 2 * heldout @ train.T
    assert np.sqrt(squares.min()) > DIGIT_RADIUS


def test_pictures_a_radius_apart_lie_on_one_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the real digits only three pairs are that near: here each picture has a copy one stroke away."""
    once = np.random.default_rng(0).integers(0, 9, (40, 64)).astype(float)
    images = np.repeat(once, 2, axis=0)
    images[1::2, 0] += 7
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda return_X_y: (images, np.arange(80) % 10))
    _write_digits(tmp_path)
    heldout = [int(Path(name).stem) for name in picture_names(read_lines(tmp_path / "heldout.jsonl"))]
    assert len(heldout) == 16
    assert {number ^ 1 for number in heldout} == set(heldout)


def test_each_digit_picture_lies_on_one_side_once(samples: dict[str, Path]) -> None:
    folder = samples["demo"] / "digits"
    names = picture_names(read_lines(*sorted(folder.glob("train-*.jsonl")), folder / "heldout.jsonl"))
    assert len(set(names)) == len(names) == 1797
    assert all((folder / name).is_file() for name in names)


def test_digit_documents_hold_the_pictures_own_label(samples: dict[str, Path]) -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    folder = samples["demo"] / "digits"
    for line in read_lines(*sorted(folder.glob("train-*.jsonl")), folder / "heldout.jsonl")[::50]:
        picture, question, answer = line["segments"]
        number = int(Path(picture["image"]).stem)
        assert np.array_equal(digit_vectors(folder, [picture["image"]])[0], images[number])
        assert answer == {"text": f" {labels[number]}"}
        assert question["loss"] is False
        assert question["text"] in DIGIT_QUESTIONS


def test_digit_questions_ask_about_heldout_pictures_alone(samples: dict[str, Path]) -> None:
    folder = samples["demo"] / "digits"
    questions = read_lines(folder / "questions.jsonl")
    answers = {
        line["segments"][0]["image"]: line["segments"][2]["text"] for line in read_lines(folder / "heldout.jsonl")
    }
    assert {question["image"] for question in questions} == set(answers)
    for question in questions:
        assert question["question"] == EVAL_QUESTION
        assert f" {question['choices'][question['answer']]}" == answers[question["image"]]


def shingles(path: Path) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", path.read_text(encoding="utf-8").lower())
    return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}


def test_no_heldout_topic_shares_a_tenth_of_its_passages_with_a_training_topic(samples: dict[str, Path]) -> None:
    folder = samples["demo"] / "topics"
    heldout, train = ({p: shingles(p) for p in sorted((folder / s).glob("*.txt"))} for s in ("heldout", "train"))
    assert len(heldout) >= 5
    assert len(train) > len(heldout)
    for (kept, mine), (learned, theirs) in product(heldout.items(), train.items()):
        assert len(mine & theirs) <= 0.1 * len(mine), (kept.name, learned.name)


def test_topics_that_share_a_passage_lie_on_one_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair of topics shares a sixth of its 8-word passages."""
    topics = {}
    for pair in range(30):
        passage = " ".join(f"shared{pair}x{word}" for word in range(26))
        for side in "ab":
            own = " ".join(f"own{pair}{side}{word}" for word in range(100))
            topics[f"{pair}{side}"] = f"{own} {passage}"
    monkeypatch.setattr("pydoc_data.topics.topics", topics)
    _write_topics(tmp_path)
    heldout = {path.stem for path in (tmp_path / "heldout").glob("*.txt")}
    assert 4 <= len(heldout) <= 14
    assert {name[:-1] + "ba"["ab".index(name[-1])] for name in heldout} == heldout


def test_every_help_topic_is_written_once(samples: dict[str, Path]) -> None:
    from pydoc_data.topics import topics

    files = sorted((samples["demo"] / "topics").rglob("*.txt"))
    assert sorted(file.read_text(encoding="utf-8") for file in files) == sorted(topics.values())


@pytest.mark.parametrize("kind", KINDS)
def test_writing_twice_changes_nothing(kind: str, samples: dict[str, Path]) -> None:
    before = {path: path.stat().st_mtime_ns for path in samples[kind].rglob("*")}
    assert write_samples(kind, samples[kind]) == samples[kind] / "manifest.yaml"
    assert {path: path.stat().st_mtime_ns for path in samples[kind].rglob("*")} == before


@pytest.mark.parametrize("kind", KINDS)
def test_two_folders_get_the_same_bytes(kind: str, samples: dict[str, Path], tmp_path: Path) -> None:
    write_samples(kind, tmp_path)
    assert snapshot(tmp_path) == snapshot(samples[kind])


def test_files_without_a_manifest_are_written_again(tmp_path: Path) -> None:
    """The manifest is written last: where it is missing, the files may be cut."""
    write_samples("smoke", tmp_path)
    whole = snapshot(tmp_path)
    (tmp_path / "manifest.yaml").unlink()
    (tmp_path / "words" / "train" / "0.txt").write_text("cut")
    write_samples("smoke", tmp_path)
    assert snapshot(tmp_path) == whole


def test_an_unknown_kind_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"samples=smok; did you mean 'smoke'\?"):
        write_samples("smok", tmp_path / "files")
    assert not (tmp_path / "files").exists()
