"""Sample corpora: held-out files share nothing with the training files, and are written once."""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from handmade import weave_document
from PIL import Image
from pydantic import TypeAdapter

from conftest import REPOSITORY
from omniloom.data.config import SPLITS, CorpusConfig
from omniloom.data.manifest import read_manifest
from omniloom.data.readers import read_documents
from omniloom.data.samples import demo, write_samples
from omniloom.data.samples.demo import _write_digits, _write_topics
from omniloom.data.source import Unit
from omniloom.data.units import list_units
from omniloom.data.vocabulary import make_tokenizer
from omniloom.errors import ConfigError
from omniloom.modality.audio import decode_sound
from omniloom.modality.config import ModalityConfig
from omniloom.modality.files import Media
from omniloom.modality.media import read_media
from omniloom.modality.sequence import MODALITIES
from omniloom.modality.text import TextTokenizer, load_tokenizer

KINDS = ("smoke", "demo")
DIGIT_RADIUS = 8.0  # in the 8 × 8 digits' own scale of 0 to 16
Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, demo_files: Path) -> dict[str, Path]:
    """The folder of each kind, written once."""
    smoke = write_samples("smoke", tmp_path_factory.mktemp("samples") / "smoke").parent
    return {"smoke": smoke, "demo": demo_files}


@pytest.fixture(scope="module")
def tokenizers(samples: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextTokenizer]:
    """Each kind's vocabulary as its tokenize job trains it."""
    made = {}
    for kind, folder in samples.items():
        corpus = tmp_path_factory.mktemp(f"vocabulary_{kind}")
        train_units = [unit for unit in units_of(folder) if unit.split == "train"]
        make_tokenizer(train_units, configuration(kind).tokenizer, corpus, lambda count: None)
        made[kind] = load_tokenizer(corpus / "tokenizer.json")
    return made


def configuration(kind: str) -> CorpusConfig:
    """conf/data/<kind>.yaml."""
    return TypeAdapter(CorpusConfig).validate_python(
        yaml.safe_load((REPOSITORY / f"conf/data/{kind}.yaml").read_text())
    )


def units_of(folder: Path) -> list[Unit]:
    return list_units(read_manifest(folder / "manifest.yaml"), folder)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_lines(*paths: Path) -> Lines:
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def train_lines(folder: Path) -> Lines:
    return read_lines(*sorted(folder.glob("train-*.jsonl")))


def media_of(lines: Lines, kind: str) -> list[str]:
    """The media's paths as the documents name them."""
    return [segment[kind] for line in lines for segment in line["segments"] if kind in segment]


def answers(line: dict[str, Any]) -> list[str]:
    """What a document teaches."""
    return [s["text"] for s in line["segments"] if "text" in s and s.get("loss", True)]


def questions_asked(line: dict[str, Any]) -> list[str]:
    return [s["text"] for s in line["segments"] if s.get("loss") is False]


def digit_number(path: str) -> int:
    """Which of scikit-learn's digits a picture shows, or shows in a variant."""
    return int(re.match(r"\d+", Path(path).stem).group())


def originals(folder: Path, names: list[str]) -> dict[int, np.ndarray]:
    """The 64 values of the pictures that are no variants, on scikit-learn's scale of 0 to 16, by number."""
    found = {}
    for name in names:
        with Image.open(folder / name) as picture:
            if picture.size == (8, 8):
                found[digit_number(name)] = (np.asarray(picture, float).reshape(64) * 16 / 255).round()
    return found


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
def test_every_sample_document_can_be_used(
    kind: str, samples: dict[str, Path], tokenizers: dict[str, TextTokenizer]
) -> None:
    """Some documents of every file are woven whole; every file that a document names is there."""
    seen: Counter[str] = Counter()
    sizes = configuration(kind).modality
    for unit in units_of(samples[kind]):
        read = list(read_documents(unit))
        assert read
        assert not [raw.problem for raw in read if raw.problem]
        assert all(
            part.content.content.is_file() for raw in read for part in raw.segments if isinstance(part.content, Media)
        )
        for raw in read[:: max(1, len(read) // 5)]:
            document = weave_document(raw, tokenizers[kind], sizes)
            assert document.loss_mask.any()
            present = {MODALITIES[number] for number in np.unique(document.modality)}
            assert present == {"text"} | {part.kind for part in raw.segments}
            seen.update(present)
    assert seen.keys() == set(MODALITIES)


def test_the_demos_rows_hold_every_document_with_media(
    samples: dict[str, Path], tokenizers: dict[str, TextTokenizer]
) -> None:
    """None is longer than a row of the experiment, so none is left out of the training in silence."""
    experiment = yaml.safe_load((REPOSITORY / "conf/experiment/demo.yaml").read_text())
    sizes = configuration("demo").modality
    for unit in units_of(samples["demo"]):
        if unit.format == "interleaved":
            read = list(read_documents(unit))
            largest = max(read, key=lambda raw: len(raw.segments))
            document = weave_document(largest, tokenizers["demo"], sizes)
            assert len(document) <= experiment["data"]["seq_len"], largest.name


def test_no_heldout_digit_is_near_a_training_digit(samples: dict[str, Path]) -> None:
    folder = samples["demo"] / "digits"
    train = np.stack([*originals(folder, media_of(train_lines(folder), "image")).values()])
    heldout = np.stack([*originals(folder, media_of(read_lines(folder / "heldout.jsonl"), "image")).values()])
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
    heldout = [digit_number(name) for name in media_of(read_lines(tmp_path / "heldout.jsonl"), "image")]
    assert len(heldout) == 16
    assert {number ^ 1 for number in heldout} == set(heldout)


def test_each_digit_lies_on_one_side_with_all_its_variants(samples: dict[str, Path]) -> None:
    folder = samples["demo"] / "digits"
    train = media_of(train_lines(folder), "image")
    heldout = media_of(read_lines(folder / "heldout.jsonl"), "image")
    assert len(set(train + heldout)) == len(train + heldout)
    assert all((folder / name).is_file() for name in train + heldout)
    assert len(set(map(digit_number, heldout))) == len(heldout), "a held-out picture is asked twice"
    assert not set(map(digit_number, train)) & set(map(digit_number, heldout))
    assert len(set(map(digit_number, train + heldout))) == 1797


def test_digit_documents_hold_the_pictures_own_label(samples: dict[str, Path]) -> None:
    """And its own pixels, or in a variant something much like them."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    folder = samples["demo"] / "digits"
    likeness = []
    for line in [*train_lines(folder), *read_lines(folder / "heldout.jsonl")][::50]:
        picture, question, answer = line["segments"]
        number = digit_number(picture["image"])
        for whole in originals(folder, [picture["image"]]).values():
            assert np.array_equal(whole, images[number])
        with Image.open(folder / picture["image"]) as variant:
            small = np.asarray(variant.resize((8, 8), Image.Resampling.BOX), float).reshape(64)
        likeness.append(np.corrcoef(small, images[number])[0, 1])
        assert answer == {"text": f" {labels[number]}"}
        assert question["loss"] is False
        assert question["text"] in demo.PICTURE_QUESTIONS
    assert np.median(likeness) > 0.8
    assert np.quantile(likeness, 0.1) > 0.4


# In the order in which heldout.jsonl has them.
QUESTION_FILES = {
    "digits": [("questions.jsonl", {"image"}, demo.DIGITS)],
    "speech": [("questions.jsonl", {"audio"}, demo.DIGITS)],
    "videos": [("questions.jsonl", {"video"}, demo.DIGITS), ("motion.jsonl", {"video"}, sorted(demo.DIRECTIONS))],
    "matching": [("questions.jsonl", {"image", "audio"}, ["yes", "no"])],
}


@pytest.mark.parametrize("source", QUESTION_FILES)
def test_questions_are_the_heldout_documents_with_choices(source: str, samples: dict[str, Path]) -> None:
    folder = samples["demo"] / source
    heldout = read_lines(folder / "heldout.jsonl")
    for name, kinds, choices in QUESTION_FILES[source]:
        questions = read_lines(folder / name)
        documents, heldout = heldout[: len(questions)], heldout[len(questions) :]
        assert len(questions) > 100
        for question, document in zip(questions, documents, strict=True):
            *media, text = question["segments"]
            assert {key for medium in media for key in medium} == kinds
            assert question["choices"] == choices
            answer = {"text": f" {question['choices'][question['answer']]}"}
            assert document["segments"] == [*media, text | {"loss": False}, answer]
        counts = Counter(question["answer"] for question in questions)
        assert counts.keys() == set(range(len(choices)))
        assert max(counts.values()) < 2 * len(questions) / len(choices), "one answer is right too often"
    assert not heldout


@pytest.fixture(scope="module")
def media_by_split(samples: dict[str, Path]) -> dict[str, dict[str, set[Path]]]:
    """The files of each kind that any document of a split shows, over all sources of the demo."""
    found: dict[str, dict[str, set[Path]]] = {split: {} for split in ("train", "heldout")}
    for unit in units_of(samples["demo"]):
        for raw in read_documents(unit):
            for part in raw.segments:
                if isinstance(part.content, Media):
                    found[unit.split].setdefault(part.kind, set()).add(part.content.content.resolve())
    return found


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_no_medium_of_a_heldout_document_is_in_a_training_document(
    kind: str, media_by_split: dict[str, dict[str, set[Path]]]
) -> None:
    """By path and by bytes, over all sources."""
    train, heldout = media_by_split["train"][kind], media_by_split["heldout"][kind]
    assert len(heldout) > 100
    assert not train & heldout
    if kind != "image":  # two pictures may be drawn alike: their radius is another test
        assert not {path.read_bytes() for path in train} & {path.read_bytes() for path in heldout}
    else:
        assert not set(map(digit_number, map(str, train))) & set(map(digit_number, map(str, heldout)))


def test_questions_show_nothing_that_a_training_document_shows(
    samples: dict[str, Path], media_by_split: dict[str, dict[str, set[Path]]]
) -> None:
    """The files that the evaluation reads are no sources of the manifest."""
    trained = set().union(*media_by_split["train"].values())
    files = [*samples["demo"].glob("*/questions.jsonl"), *samples["demo"].glob("*/motion.jsonl")]
    assert len(files) >= 5
    for file in files:
        lines = read_lines(file)
        shown = {(file.parent / path).resolve() for kind in MODALITIES[1:] for path in media_of(lines, kind)}
        assert shown
        assert not shown & trained, file


def voice_of(path: str) -> str:
    return Path(path).stem.rsplit("-", 2)[0]


def test_no_voice_and_no_family_of_voices_lies_on_both_sides(
    media_by_split: dict[str, dict[str, set[Path]]],
) -> None:
    """Over all sources that hold speech; f1 and f2, klatt and klatt6 are one family."""
    voices = {split: {voice_of(str(path)) for path in kinds["audio"]} for split, kinds in media_by_split.items()}
    families = {split: {re.sub(r"\d+$", "", voice) for voice in named} for split, named in voices.items()}
    assert len(voices["train"]) > 60
    assert len(voices["heldout"]) >= 10
    assert len(families["heldout"]) >= 5
    assert not families["train"] & families["heldout"]
    assert {"whisper", "whisperf"}.isdisjoint(voices["train"] | voices["heldout"])


def test_speech_is_answered_with_the_digit_that_was_spoken(samples: dict[str, Path]) -> None:
    folder = samples["demo"] / "speech"
    lines = [*train_lines(folder), *read_lines(folder / "heldout.jsonl")]
    for line in lines:
        (clip,) = media_of([line], "audio")
        assert answers(line) == [f" {Path(clip).stem.rsplit('-', 2)[1]}"]
    taught = Counter(answers(line)[0] for line in lines)
    assert len(taught) == 10
    assert max(taught.values()) <= 1.1 * min(taught.values())


def test_wavs_are_audible_and_different(samples: dict[str, Path]) -> None:
    sizes = configuration("demo").modality
    files = sorted((samples["demo"] / "speech" / "wav").iterdir())
    for file in files[::40]:
        samples_S = np.concatenate(list(decode_sound(Media(file.name, file), sizes.audio)))
        assert 0.05 < len(samples_S) / sizes.audio.sample_rate < 3
        assert np.abs(samples_S).max() > 0.01
        assert read_media("audio", Media(file.name, file), sizes)[0].content.shape[1] == sizes.audio.mels
    assert len({file.read_bytes() for file in files}) > 0.99 * len(files)


def frames_of(path: Path, sizes: ModalityConfig) -> np.ndarray:
    """float (frames, side, side) of one grey level, from our reader's patches."""
    (segment,) = read_media("video", Media(path.name, path), sizes)
    patch, grid = sizes.video.patch_pixels, sizes.video.size_pixels // sizes.video.patch_pixels
    cut = segment.content.reshape(-1, grid, grid, patch, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(len(cut), grid * patch, grid * patch, 3).mean(-1)


def test_videos_move_the_way_they_say(samples: dict[str, Path]) -> None:
    """The bright pixels' centre goes in the answered direction, for each of the four."""
    folder, sizes = samples["demo"] / "videos", configuration("demo").modality
    told = [
        (folder / media_of([line], "video")[0], dict(zip(questions_asked(line), answers(line), strict=True)))
        for line in train_lines(folder)[::100]
    ]
    told = [(path, said[demo.MOTION_QUESTION].strip()) for path, said in told]
    for question in read_lines(folder / "motion.jsonl")[::10]:
        told.append((folder / media_of([question], "video")[0], question["choices"][question["answer"]]))
    assert {way for _, way in told} == {"left", "right", "up", "down"}
    for path, way in told:
        frames = frames_of(path, sizes)
        assert len(frames) >= 2
        weight = np.maximum(frames - 40, 0)
        total = weight.sum((1, 2))
        assert total.min() > 0
        row = (weight.sum(2) * np.arange(frames.shape[1])).sum(1) / total
        column = (weight.sum(1) * np.arange(frames.shape[2])).sum(1) / total
        moved = {"down": row[-1] - row[0], "right": column[-1] - column[0]}
        along, across = (moved["right"], moved["down"]) if way in ("left", "right") else (moved["down"], moved["right"])
        assert (along if way in ("right", "down") else -along) > 4, path
        assert abs(across) < 1, path


def test_both_questions_are_asked_of_each_video_in_both_orders(samples: dict[str, Path]) -> None:
    lines = train_lines(samples["demo"] / "videos")
    orders = Counter(tuple(questions_asked(line)) for line in lines)
    pair = (demo.VIDEO_QUESTION, demo.MOTION_QUESTION)
    assert orders.keys() == {pair, pair[::-1]}
    assert min(orders.values()) > 0.4 * len(lines)


def test_heldout_videos_show_heldout_pictures_with_their_digit(samples: dict[str, Path]) -> None:
    """The direction is asked of the very same videos."""
    folder = samples["demo"] / "videos"
    digit, motion = read_lines(folder / "questions.jsonl"), read_lines(folder / "motion.jsonl")
    assert media_of(digit, "video") == media_of(motion, "video")
    assert len(set(media_of(digit, "video"))) == len(digit)


def test_half_the_matching_documents_say_yes_and_every_answer_is_right(samples: dict[str, Path]) -> None:
    from sklearn.datasets import load_digits

    labels = load_digits().target
    folder = samples["demo"] / "matching"
    for lines in (train_lines(folder), read_lines(folder / "heldout.jsonl")):
        said: Counter[str] = Counter()
        forms: Counter[tuple[str, ...]] = Counter()  # of documents with either answer
        for line in lines:
            spoken, shown = spoken_digit(line), str(labels[digit_number(media_of([line], "image")[0])])
            expected = {demo.SPEECH_QUESTION: spoken, demo.MATCHING_QUESTION: "yes" if spoken == shown else "no"}
            expected |= dict.fromkeys(demo.PICTURE_QUESTIONS, shown)
            asked = questions_asked(line)
            assert answers(line) == [f" {expected[question]}" for question in asked]
            said[expected[demo.MATCHING_QUESTION]] += 1
            forms[(expected[demo.MATCHING_QUESTION], *asked)] += 1
        assert said["yes"] == len(lines) / 2
        for (_, *asked), count in forms.items():
            assert count > 0.7 * forms[("yes", *asked)], "the form of a document gives its answer away"


def spoken_digit(line: dict[str, Any]) -> str:
    return Path(media_of([line], "audio")[0]).stem.rsplit("-", 2)[1]


def test_no_digit_alone_tells_the_matching_answer(samples: dict[str, Path]) -> None:
    """Knowing one of the two media must not help: each spoken and each shown digit is yes about half the time."""
    from sklearn.datasets import load_digits

    labels = load_digits().target
    lines = train_lines(samples["demo"] / "matching")
    assert all(questions_asked(line).count(demo.MATCHING_QUESTION) == 1 for line in lines)
    for digit_of in (spoken_digit, lambda line: str(labels[digit_number(media_of([line], "image")[0])])):
        every = Counter(digit_of(line) for line in lines)
        yes = Counter(digit_of(line) for line in lines if " yes" in answers(line))
        assert {digit: yes[digit] / every[digit] for digit in demo.DIGITS} == pytest.approx(
            dict.fromkeys(demo.DIGITS, 0.5), abs=0.12
        )


FACT = re.compile(r"The code of (\w+) is (\d{4})\.")
ASKED = re.compile(r" What is the code of (\w+)\?")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_needle_documents_ask_every_fact_once_and_answer_it_right(split: str, samples: dict[str, Path]) -> None:
    for file in sorted((samples["demo"] / "needles").glob(f"{split}-*.jsonl")):
        facts_held = Counter()
        reordered = 0
        for line in read_lines(file):
            text, *turns = line["segments"]
            assert text["loss"] is False
            facts = dict(FACT.findall(text["text"]))
            assert len(facts) == len(FACT.findall(text["text"])), "a key has two codes"
            keys = [ASKED.fullmatch(turn["text"]).group(1) for turn in turns[::2]]
            assert all(turn["loss"] is False for turn in turns[::2])
            assert [turn["text"] for turn in turns[1::2]] == [f" {facts[key]}" for key in keys]
            assert sorted(keys) == sorted(facts)
            facts_held[len(facts)] += 1
            reordered += keys != list(facts)
        assert reordered > 0 or max(facts_held) == 1
        assert 1 in facts_held


def test_needle_documents_fit_their_length_by_the_corpuss_tokenizer(
    samples: dict[str, Path], tokenizers: dict[str, TextTokenizer]
) -> None:
    """About: the writer measures sentence by sentence, with a vocabulary of the topics alone."""
    tokenizer = tokenizers["demo"]
    lengths: dict[int, list[int]] = {}
    for file in sorted((samples["demo"] / "needles").glob("*.jsonl")):
        lengths.setdefault(int(file.stem.split("-")[1]), []).extend(
            2 + sum(len(tokenizer.encode(segment["text"])) for segment in line["segments"])
            for line in read_lines(file)[::5]
        )
    assert len(lengths) >= 4
    for limit, tokens in lengths.items():
        assert max(tokens) <= 1.1 * limit
        assert np.mean(tokens) > 0.5 * limit
        assert np.quantile(tokens, 0.95) > 0.75 * limit


def test_needle_haystacks_are_texts_of_their_own_side(samples: dict[str, Path]) -> None:
    """No held-out document holds eight words in a row that only a training topic has, and the other way round."""
    topics = {split: set() for split in ("train", "heldout")}
    for split, seen in topics.items():
        for path in (samples["demo"] / "topics" / split).glob("*.txt"):
            words = path.read_text(encoding="utf-8").split()
            seen |= {tuple(words[i : i + 8]) for i in range(len(words) - 7)}
    for split, other in (("train", "heldout"), ("heldout", "train")):
        found: Counter[bool] = Counter()
        for file in sorted((samples["demo"] / "needles").glob(f"{split}-*.jsonl")):
            for line in read_lines(file)[:60]:
                for stretch in FACT.split(line["segments"][0]["text"])[::3]:
                    words = stretch.split()
                    for passage in (tuple(words[i : i + 8]) for i in range(len(words) - 7)):
                        if passage in topics["train"] or passage in topics["heldout"]:
                            found[passage in topics[split]] += 1
        assert found[True] > 1_000
        assert found[False] == 0, other


def test_needle_facts_are_not_to_be_known_by_heart(samples: dict[str, Path]) -> None:
    facts = Counter()
    for file in sorted((samples["demo"] / "needles").glob("train-*.jsonl")):
        for line in read_lines(file):
            facts.update(FACT.findall(line["segments"][0]["text"]))
    keys = {key for key, _ in facts}
    assert len(keys) >= 20
    codes = Counter(code for _, code in facts.elements())
    assert max(codes.values()) < 0.002 * codes.total() + 10


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


@pytest.mark.parametrize("kind", ["smoke", pytest.param("demo", marks=pytest.mark.slow)])
def test_two_folders_get_the_same_bytes(kind: str, samples: dict[str, Path], tmp_path: Path) -> None:
    """In a fresh process: a synthesizer carries state from call to call."""
    code = (
        f"from pathlib import Path; from omniloom.data.samples import write_samples; write_samples({kind!r}, Path('.'))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    here, there = snapshot(samples[kind]), snapshot(tmp_path)
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []


def test_two_processes_speak_and_film_the_same_bytes(tmp_path: Path) -> None:
    code = """
import ctypes, random, sys
from pathlib import Path
import numpy as np
from omniloom.data.samples.demo import _film
from omniloom.data.samples.files import write_mp4, write_wav
from omniloom.data.samples.speech import Speaker, spoken_digits

folder = Path(sys.argv[1])
folder.mkdir()
ctypes.CDLL(None).srand(len(sys.argv[1]))  # who else lives in the process may have drawn from it
speaker = Speaker(0)
breathy = ["Alicia", "Demonic", "f2", "f3", "f5", "sandro", "shelby", "victor"]  # espeak's own noise
voices = [*breathy, "Reed", "caleb"]  # Klatt's, from the C library
for number, (voice, digit, samples) in enumerate(spoken_digits(speaker, voices, 2, seed=1)):
    write_wav(folder / f"{voice}-{digit}-{number}.wav", samples, speaker.sample_rate)
digit = np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)
for direction in ("left", "up"):
    write_mp4(folder / f"{direction}.mp4", _film(digit, direction, random.Random(0)), 8)
"""
    for name in ("one", "second"):
        subprocess.run([sys.executable, "-c", code, tmp_path / name], check=True, capture_output=True)
        time.sleep(1)  # whatever is seeded by the clock counts its seconds
    one, two = snapshot(tmp_path / "one"), snapshot(tmp_path / "second")
    assert len(one) == 202
    assert len(set(one.values())) > 195
    assert [name for name in one if one[name] != two[name]] == []


def test_smoke_asks_about_every_medium(samples: dict[str, Path]) -> None:
    folder = samples["smoke"]
    for source, kind in (("colours", "image"), ("tones", "audio"), ("fades", "video")):
        lines = read_lines(folder / source / "train.jsonl")
        assert len(media_of(lines, kind)) == len(lines)
        for line in lines + read_lines(folder / source / "heldout.jsonl"):
            assert answers(line) == [f" {Path(media_of([line], kind)[0]).stem}"]
        for question in read_lines(folder / source / "questions.jsonl"):
            assert question["choices"][question["answer"]] == Path(media_of([question], kind)[0]).stem


@pytest.mark.parametrize(("module", "extra"), [("sklearn", "scikit-learn"), ("espeakng_loader", "espeakng-loader")])
def test_a_missing_extra_is_named(module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(demo, "_write_topics", lambda folder: {"train": [], "heldout": []})
    monkeypatch.setattr(demo, "_write_digits", lambda folder: {"train": [], "heldout": []})
    with pytest.raises(ConfigError, match=rf"samples=demo needs {extra}: pip install 'omniloom\[demo\]'"):
        write_samples("demo", tmp_path)
    assert not (tmp_path / "manifest.yaml").exists()


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


def passages(folder: Path, split: str) -> list[str]:
    return [segment["text"] for line in read_lines(folder / f"{split}.jsonl") for segment in line["segments"]]


def test_the_library_is_enough_text_and_its_sides_share_no_passage(tmp_path: Path) -> None:
    folder = write_samples("library", tmp_path / "library").parent
    train, heldout = passages(folder, "train"), passages(folder, "heldout")
    assert not set(train) & set(heldout)
    assert sum(map(len, train)) > 7_000_000, "a scaling law's longest run would read it twice"
    assert len(heldout) > 200


def test_the_library_holds_out_whole_modules_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / name))
    for module in range(20):
        paragraphs = [f"# module {module}, paragraph {number}: " + "x" * 400 for number in range(9)]
        path = tmp_path / "stdlib" / f"module_{module}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n\n".join(paragraphs))
    folder = write_samples("library", tmp_path / "library").parent
    named = {split: re.findall(r"module (\d+), paragraph (\d+)", "".join(passages(folder, split))) for split in SPLITS}
    modules = {split: {module for module, _ in found} for split, found in named.items()}
    assert (len(modules["train"]), len(modules["heldout"])) == (18, 2)
    assert not modules["train"] & modules["heldout"]
    assert len(set(named["train"] + named["heldout"])) == len(named["train"] + named["heldout"]) == 20 * 9
    order = [int(module) for module, _ in named["train"]]
    assert order != sorted(order), "passages of one module lie together"
