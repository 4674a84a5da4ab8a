"""A manifest names files, files hold raw documents; what is wrong is said, never raised halfway."""

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from handmade import save_lines

from omniloom.data.config import CorpusConfig, DataConfig, Manifest, PhaseConfig, SourceSpec
from omniloom.data.manifest import read_manifest
from omniloom.data.readers import read_documents
from omniloom.data.source import RawDocument, RawSegment, Unit
from omniloom.data.units import LEAST_UNIT_BYTES, list_units
from omniloom.errors import ConfigError, DataError
from omniloom.modality.files import Media

WHOLE = """\
sources:
  words: {format: text, train: ["words/*.txt"], heldout: ["held/*.txt"], weight: 0.25}
  pictures: {format: interleaved, train: ["*.jsonl"], loss_weight: 4}
"""


def phases(*starts: int, weight: float = 0.5) -> list[PhaseConfig]:
    return [PhaseConfig(start, {"a": weight}) for start in starts]


def manifest(folder: Path, content: str | bytes) -> Manifest:
    path = folder / "corpus.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_manifest(path)


def source(**keys: Any) -> str:
    return json.dumps({"sources": {"words": {"format": "text", "train": ["*.txt"], **keys}}})


def documents(folder: Path, *lines: Any) -> list[RawDocument]:
    return read(save_lines(folder / "lines.jsonl", *lines), "interleaved")


def read(file: Path, format: str) -> list[RawDocument]:
    return list(read_documents(Unit("a-train-00000", "a", "train", format, [str(file)])))


def test_a_manifest_reads_to_its_sources_in_order(tmp_path: Path) -> None:
    assert manifest(tmp_path, WHOLE) == Manifest(
        {
            "words": SourceSpec("text", ["words/*.txt"], ["held/*.txt"], weight=0.25, loss_weight=1.0),
            "pictures": SourceSpec("interleaved", ["*.jsonl"], [], weight=1.0, loss_weight=4.0),
        }
    )
    assert list(manifest(tmp_path, WHOLE).sources) == ["words", "pictures"]


def test_a_missing_manifest_is_named_with_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "corpus.yaml").write_text(WHOLE)
    with pytest.raises(DataError, match=r"no manifest at .*corpsu.yaml did you mean 'corpus.yaml'\?: set manifest="):
        read_manifest(tmp_path / "corpsu.yaml")
    with pytest.raises(DataError, match="no manifest at"):
        read_manifest(tmp_path / "nowhere" / "corpus.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not YAML"),
        ("a:\t- b", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
        ("sources: 2024-99-99", "corpus.yaml"),
        pytest.param("[" * 5_000, "corpus.yaml", id="deep"),
        ("", "must have a mapping `sources:`"),
        ("[]", "must have a mapping `sources:`"),
        ("sources: [words]", "must have a mapping `sources:`"),
        ("sources: {}", "names 0 sources; 1 to 256"),
        ("sources: {words: null}", "sources.words"),
        ("sources: {1: {format: text, train: []}}", "sources.1"),
        ("source: {}\nsources: {}", "unknown key source; did you mean 'sources'?"),
        (source(trian=["*.txt"]), "unknown key sources.words.trian; did you mean 'train'?"),
        (source(wieght=1), "unknown key sources.words.wieght; did you mean 'weight'?"),
        (source(zzz=1), "unknown key sources.words.zzz; valid: audio_key, format, heldout, image_key"),
        (source(format="txt"), "sources.words.format"),
        (source(train="*.txt"), "sources.words.train"),
        (source(train=[1]), "sources.words.train.0"),
        (source(weight="much"), "sources.words.weight"),
        (source(weight=None), "sources.words.weight"),
        (source(weight=-0.1), "weights of source words must not be negative"),
        (source(loss_weight=-1), "weights of source words must not be negative"),
        (source(txt_key="a"), "unknown key sources.words.txt_key; did you mean 'text_key'?"),
        (source(limit_document_bytes=0), "limit_document_bytes of source words must be at least 1"),
    ],
)
def test_a_wrong_manifest_is_refused_with_the_reason(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        manifest(tmp_path, content)
    assert message in str(refused.value)


@pytest.mark.parametrize("weight", [".nan", ".inf"])
@pytest.mark.parametrize("key", ["weight", "loss_weight"])
def test_a_weight_that_is_no_finite_number_is_refused(key: str, weight: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="words"):
        manifest(tmp_path, f"sources:\n  words: {{format: text, train: ['*.txt'], {key}: {weight}}}\n")


@pytest.mark.parametrize("name", ["news/web", "../outside"])
def test_a_source_name_that_is_no_file_name_is_refused(name: str, tmp_path: Path) -> None:
    """A source's name begins its shards' file names."""
    with pytest.raises(DataError, match=name):
        manifest(tmp_path, json.dumps({"sources": {name: {"format": "text", "train": ["*.txt"]}}}))


def test_257_sources_are_too_many_for_one_byte(tmp_path: Path) -> None:
    spec = {"format": "text", "train": ["*.txt"]}
    assert len(manifest(tmp_path, json.dumps({"sources": {f"s{i}": spec for i in range(256)}})).sources) == 256
    with pytest.raises(DataError, match="names 257 sources; 1 to 256"):
        manifest(tmp_path, json.dumps({"sources": {f"s{i}": spec for i in range(257)}}))


def write_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_units_name_their_files_in_order_whatever_the_order_of_writing(tmp_path: Path) -> None:
    listed = []
    for number, names in enumerate(itertools.islice(itertools.permutations(["b.txt", "a.txt", "c/d.txt"]), 3)):
        folder = tmp_path / str(number)
        write_files(folder, *names, "held.txt")
        units = list_units(Manifest({"words": SourceSpec("text", ["**/[a-d].txt", "a.txt"], ["held.txt"])}), folder)
        assert [(unit.name, unit.source, unit.split, unit.format) for unit in units] == [
            ("words-train-00000", "words", "train", "text"),
            ("words-heldout-00000", "words", "heldout", "text"),
        ]
        listed.append([[os.path.relpath(file, folder) for file in unit.files] for unit in units])
    assert listed == [[["a.txt", "b.txt", "c/d.txt"], ["held.txt"]]] * 3


def test_text_files_are_gathered_up_to_the_units_size(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_bytes(b"a" * (LEAST_UNIT_BYTES // 2))
    (tmp_path / "4.txt").write_bytes(b"a" * (LEAST_UNIT_BYTES * 2))
    units = list_units(Manifest({"words": SourceSpec("text", ["*.txt"])}), tmp_path)
    assert [[Path(file).name for file in unit.files] for unit in units] == [
        ["0.txt", "1.txt"],
        ["2.txt", "3.txt"],
        ["4.txt"],
    ]
    assert [unit.name for unit in units] == ["words-train-00000", "words-train-00001", "words-train-00002"]


def test_each_interleaved_file_is_a_unit_of_its_own(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jsonl", "b.jsonl")
    units = list_units(Manifest({"pictures": SourceSpec("interleaved", ["*.jsonl"])}), tmp_path)
    assert [[Path(file).name for file in unit.files] for unit in units] == [["a.jsonl"], ["b.jsonl"]]


def test_absolute_patterns_are_taken_from_the_root(tmp_path: Path) -> None:
    write_files(tmp_path, "far/a.txt")
    units = list_units(Manifest({"words": SourceSpec("text", [f"{tmp_path}/far/*.txt"])}), tmp_path / "near")
    assert units[0].files == [str((tmp_path / "far" / "a.txt").resolve())]


@pytest.mark.parametrize("pattern", ["*.md", "nowhere/*.txt", "/nowhere/*.txt", "[", "**", "", "/", ".", "**.txt"])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_pattern_that_names_no_file_is_refused(pattern: str, split: str, tmp_path: Path) -> None:
    write_files(tmp_path, "folder/a.txt")
    spec = SourceSpec("text", ["folder/*.txt"])
    getattr(spec, split)[:] = [pattern]
    with pytest.raises(DataError, match=f"source words: .*{split}"):
        list_units(Manifest({"words": spec}), tmp_path)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Two lines,\nnaïve 猫.\n", encoding="utf-8")
    (document,) = read(path, "text")
    assert document.problem is None
    assert document.segments == [RawSegment("text", "Two lines,\nnaïve 猫.\n", is_target=True)]


@pytest.mark.parametrize(
    ("content", "problem"), [(b"ab\xffcd", "not UTF-8 at byte 2"), (b"", "empty"), (b" \n", "empty")]
)
def test_an_unusable_text_file_says_why(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    (document,) = read(path, "text")
    assert (document.name, document.problem, document.segments) == (str(path), problem, [])


def test_an_interleaved_line_is_a_document(tmp_path: Path) -> None:
    first = [
        {"image": "png/1.png"},
        {"audio": "wav/1.wav"},
        {"text": "Which?", "loss": False},
        {"text": " red"},
        {"video": "../b.mp4", "loss": False},
    ]
    read = documents(tmp_path, first, "", "  ", [{"text": "plain"}])
    assert [document.problem for document in read] == [None, None]
    first_line = len(json.dumps({"segments": first})) + 1
    assert [document.name.rpartition("@")[2] for document in read] == ["0", str(first_line + 4)]
    assert read[0].segments == [
        RawSegment("image", Media("png/1.png", tmp_path / "png" / "1.png"), is_target=False),
        RawSegment("audio", Media("wav/1.wav", tmp_path / "wav" / "1.wav"), is_target=False),
        RawSegment("text", "Which?", is_target=False),
        RawSegment("text", " red", is_target=True),
        RawSegment("video", Media("../b.mp4", tmp_path / ".." / "b.mp4"), is_target=False),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "null",
        "7",
        "NaN",
        "[]",
        pytest.param("[" * 100_000, id="deep"),
        pytest.param('{"segments": ' + "[" * 50_000 + "]" * 50_000 + "}", id="deep segments"),
        "{}",
        '{"segments": null}',
        '{"segments": []}',
        '{"segments": {}}',
        '{"segments": "text"}',
        '{"segments": {"text": "a"}}',
        '{"segments": [null]}',
        '{"segments": [[]]}',
        '{"segments": [["text"]]}',
        '{"segments": [7]}',
        '{"segments": ["text"]}',
        '{"segments": [{}]}',
        '{"segments": [{"text": null}]}',
        '{"segments": [{"text": 7}]}',
        '{"segments": [{"text": ["a"]}]}',
        '{"segments": [{"text": "a", "image": "a.png"}]}',
        '{"segments": [{"audio": "a.wav", "video": "a.mp4"}]}',
        '{"segments": [{"loss": false}]}',
        '{"segments": [{"audio": 7}]}',
        '{"segments": [{"video": null}]}',
        '{"segments": [{"audio": "half \\ud800.wav"}]}',
        '{"segments": [{"text": null, "image": null}]}',
        '{"segments": [{"image": null}]}',
        '{"segments": [{"image": 7}]}',
        '{"segments": [{"text": "a", "loss": "no"}]}',
        '{"segments": [{"text": "half of a pair: \\ud800"}]}',
        '{"segments": [{"text": "a"}, {"sound": "a.wav"}]}',
    ],
)
def test_a_wrong_interleaved_line_gives_a_problem(line: str, tmp_path: Path) -> None:
    read = documents(tmp_path, [{"text": "before"}], line, [{"text": "after"}])
    assert [document.problem is None for document in read] == [True, False, True]
    assert read[1].segments == []
    assert read[1].name.endswith("lines.jsonl@35")


@pytest.mark.parametrize(
    ("key", "near"), [("txt", "text"), ("imge", "image"), ("los", "loss"), ("vidoe", "video"), ("adio", "audio")]
)
def test_an_unknown_segment_key_is_named_with_the_nearest(key: str, near: str, tmp_path: Path) -> None:
    (document,) = documents(tmp_path, [{key: "a"}])
    assert f"unknown key {key}" in document.problem
    assert f"did you mean '{near}'?" in document.problem


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_a_medium_as_target_and_two_contents_in_one_segment_say_so(kind: str, tmp_path: Path) -> None:
    target, both = documents(tmp_path, [{kind: "a.bin", "loss": True}], [{"text": "a", kind: "a.bin"}])
    assert f"{kind} cannot be a target" in target.problem
    assert "a segment is one of text, image, audio, video" in both.problem


def test_a_line_that_is_not_utf_8_gives_a_short_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"segments": [{"text": "\xff' + b"a" * 100_000 + b'"}]}\n')
    (document,) = read(path, "interleaved")
    assert document.problem is not None
    assert len(document.problem) < 1_000


def test_config_wants_exactly_one_source_of_files() -> None:
    with pytest.raises(ConfigError, match="set corpus="):
        CorpusConfig(manifest="a.yaml").check_corpus()
    for both_or_none in ({}, {"manifest": "a.yaml", "samples": "demo"}):
        with pytest.raises(ConfigError, match=r"exactly one of manifest=.* and samples="):
            CorpusConfig("folder", **both_or_none).check_corpus()
    with pytest.raises(ConfigError, match=r"max_reject_share=1.5"):
        CorpusConfig("folder", "a.yaml", max_reject_share=1.5).check_corpus()
    CorpusConfig("folder", "a.yaml").check_corpus()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"seq_len": 1}, "data.seq_len=1"),
        ({"loader_workers": -1}, "data.loader_workers=-1"),
        ({"weights": {"a": -1.0}}, "data.weights.a=-1.0"),
        ({"weights": {"a": float("nan")}}, "data.weights.a=nan"),
        ({"loss_weights": {"a": float("inf")}}, "data.loss_weights.a=inf"),
        ({"phases": phases(0)}, "data.phases from_sample=0 must be over 0"),
        ({"phases": phases(-8)}, "data.phases from_sample=-8 must be over 0"),
        ({"phases": phases(16, 8)}, "data.phases from_sample=8 must be over 16"),
        ({"phases": phases(8, 16, 16)}, "data.phases from_sample=16 must be over 16"),
        ({"phases": phases(8, weight=-0.5)}, "data.phases[0].weights.a=-0.5 must be a number of at least 0"),
        ({"phases": phases(8, weight=float("nan"))}, "data.phases[0].weights.a=nan"),
    ],
)
def test_config_refuses_what_cannot_hold(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        DataConfig(**keys).check()


def test_phases_in_order_are_sound() -> None:
    DataConfig(phases=phases(1, 2, 1_000)).check()
