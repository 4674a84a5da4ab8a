"""What the task folders under evals/ read, and how they refuse."""

import importlib.util
import json
from functools import partial

import pytest
import yaml
from tiny_models import EVALS

from omniloom.errors import ConfigError, DataError
from tiny_folders import audible, colourful, moving


def utils(task):
    spec = importlib.util.spec_from_file_location(f"{task}_utils", EVALS / task / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


perplexity, media, needle = utils("perplexity"), utils("omniloom_media"), utils("needle")
LOADERS = {
    "perplexity": perplexity.load,
    "omniloom_speech": partial(media.load, "omniloom_speech"),
    "needle": partial(needle.load, "no model is read before its texts"),
}
GOOD = {"segments": [{"image": "png/1.png"}, {"text": "Which?"}], "choices": ["red"], "answer": 0}


@pytest.fixture
def questions(tmp_path):
    """Write questions and return their file."""
    colourful(tmp_path / "png", 2)
    audible(tmp_path / "wav", 1)
    moving(tmp_path / "mp4", 1)

    def write(**changes):
        segments = [{"image": "png/0.png"}, {"audio": "wav/0.wav"}, {"text": "Which?"}]
        row = {"segments": segments, "choices": ["red", "blue"], "answer": 1} | changes
        kept = {key: value for key, value in row.items() if value is not None}
        path = tmp_path / "questions.jsonl"
        path.write_text(json.dumps(GOOD) + "\n" + json.dumps(kept) + "\n", encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize("task", LOADERS)
@pytest.mark.parametrize("files", [None, [], ""])
def test_without_files_the_key_to_set_is_named(task, files):
    with pytest.raises(ConfigError) as caught:
        LOADERS[task](files=files)
    assert f"task_args.{task}.files=" in str(caught.value)


@pytest.mark.parametrize("task", LOADERS)
def test_a_pattern_without_a_match_is_named(task, tmp_path):
    with pytest.raises(DataError) as caught:
        LOADERS[task](files=[f"{tmp_path}/*.none"])
    assert f"{tmp_path}/*.none" in str(caught.value)
    assert task in str(caught.value)


def test_each_text_file_is_a_document_in_order(tmp_path):
    for name in "bca":
        (tmp_path / f"{name}.txt").write_text(f"text {name} ü\n", encoding="utf-8")
    (tmp_path / "z.txt").write_text("last")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.txt").write_text("deep")
    rows = perplexity.load(files=[f"{tmp_path}/[abc].txt", f"{tmp_path}/z.txt"], other=1)["test"]
    assert rows["text"] == ["text a ü\n", "text b ü\n", "text c ü\n", "last"]
    assert perplexity.load(files=f"{tmp_path}/z.txt")["test"]["text"] == ["last"]
    assert perplexity.load(files=f"{tmp_path}/**/d.txt")["test"]["text"] == ["deep"]


def test_a_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("müde".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt"):
        perplexity.load(files=f"{tmp_path}/latin.txt")


def load(files):
    return media.load("omniloom_matching", files=files)["test"]


def test_questions_are_read_with_media_beside_their_own_file(questions, tmp_path, monkeypatch):
    segments = [
        {"text": "A"},
        {"audio": "wav/0.wav"},
        {"image": "png/0.png"},
        {"video": "mp4/0.mp4"},
        {"text": "Which?"},
    ]
    path = questions(segments=segments)
    monkeypatch.chdir("/")
    rows = load([path])
    assert rows["prompt"] == ["<image>Which?", "A<audio><image><video>Which?"]
    assert rows["choices"] == [["red"], ["red", "blue"]]
    assert rows["answer"] == [0, 1]
    assert media.seen(rows[0]) == [str(tmp_path / "png" / "1.png")]
    assert media.heard(rows[0]) == []
    assert media.seen(rows[1]) == [str(tmp_path / "png" / "0.png"), str(tmp_path / "mp4" / "0.mp4")]
    assert media.heard(rows[1]) == [str(tmp_path / "wav" / "0.wav")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"segments": None, "segmnts": []}, ["no segments", "did you mean 'segmnts'"]),
        ({"choices": None}, ["no choices"]),
        ({"choices": ["red", 7]}, ["choices must be a list of strings"]),
        ({"choices": "red"}, ["choices must be a list of strings"]),
        ({"answer": None}, ["no answer"]),
        ({"answer": 2}, ["answer=2", "2 choices"]),
        ({"answer": -1}, ["answer=-1", "2 choices"]),
        ({"answer": "1"}, ["answer=1", "2 choices"]),
        ({"answer": True}, ["answer=True", "2 choices"]),
        ({"choices": []}, ["answer=1", "0 choices"]),
        ({"segments": [{"image": "png/9.png"}]}, ["no image", "png/9.png"]),
        ({"segments": [{"audio": "wav/9.wav"}]}, ["no audio", "wav/9.wav"]),
        ({"segments": [{"video": "png"}]}, ["no video", "png"]),
        ({"segments": [{"sound": "wav/0.wav"}]}, ["unknown segment sound"]),
        ({"segments": [{"imge": "png/0.png"}]}, ["unknown segment imge", "did you mean 'image'?"]),
        ({"segments": [{"image": "png/0.png", "text": "a"}]}, ["a segment is one of text, image, video, audio"]),
        ({"segments": [{"image": 7}]}, ["a segment is one of"]),
        ({"segments": ["Which?"]}, ["a segment is one of"]),
        ({"segments": 7}, ["segments"]),
        ({"segments": []}, ["segments"]),
        ({"segments": [{"text": "Which <image>?"}]}, ["<image>"]),
    ],
)
def test_a_bad_question_is_named_with_file_line_and_key(questions, changes, said):
    path = questions(**changes)
    with pytest.raises(DataError) as caught:
        load(path)
    for part in [f"{path}:2", *said]:
        assert part in str(caught.value)


@pytest.mark.parametrize("line", ["{", "[1]", "7", "null", '"question"'])
def test_a_line_that_is_no_question_is_named(tmp_path, line):
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:1"):
        load(f"{tmp_path}/bad.jsonl")


def test_questions_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"question": "Müde?"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl"):
        load(f"{tmp_path}/latin.jsonl")


def test_only_a_newline_ends_a_question(questions, tmp_path):
    path = questions()
    text = "first\u2028second\x85third"  # line separators that JSON allows inside a string
    row = GOOD | {"segments": [{"image": "png/0.png"}, {"text": text}]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load(path)["prompt"] == [f"<image>{text}"]


def test_every_media_task_names_itself_in_its_errors():
    """The loader is shared; each task's metadata hands it its own name."""
    tasks = sorted((EVALS / "omniloom_media").glob("omniloom_*.yaml"))
    assert len(tasks) >= 5
    for path in tasks:
        written = yaml.safe_load(path.read_text())
        assert written["task"] == path.stem
        assert written["metadata"]["task"] == path.stem
