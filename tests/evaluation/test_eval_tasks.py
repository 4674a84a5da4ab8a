"""What the task folders under evals/ read, and how they refuse."""

import importlib.util
import json

import pytest
from tiny_models import EVALS, colourful

from omniloom.errors import ConfigError, DataError


def utils(task):
    spec = importlib.util.spec_from_file_location(f"{task}_utils", EVALS / task / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


perplexity, pictures = utils("perplexity"), utils("omniloom_pictures")


@pytest.fixture
def questions(tmp_path):
    """Write questions and return their file."""
    colourful(tmp_path / "png", 2)

    def write(**changes):
        row = {"image": "png/0.png", "question": "Which?", "choices": ["red", "blue"], "answer": 1} | changes
        kept = {key: value for key, value in row.items() if value is not None}
        good = {"image": "png/1.png", "question": "Which?", "choices": ["red"], "answer": 0}
        path = tmp_path / "questions.jsonl"
        path.write_text(json.dumps(good) + "\n" + json.dumps(kept) + "\n", encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize("task", ["perplexity", "omniloom_pictures"])
@pytest.mark.parametrize("files", [None, [], ""])
def test_without_files_the_key_to_set_is_named(task, files):
    with pytest.raises(ConfigError) as caught:
        utils(task).load(files=files)
    assert f"task_args.{task}.files=" in str(caught.value)


@pytest.mark.parametrize("task", ["perplexity", "omniloom_pictures"])
def test_a_pattern_without_a_match_is_named(task, tmp_path):
    with pytest.raises(DataError) as caught:
        utils(task).load(files=[f"{tmp_path}/*.none"])
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


def test_questions_are_read_with_pictures_beside_their_own_file(questions, tmp_path, monkeypatch):
    path = questions()
    monkeypatch.chdir("/")
    rows = pictures.load(files=[path])["test"]
    assert rows["image"] == [str(tmp_path / "png" / "1.png"), str(tmp_path / "png" / "0.png")]
    assert rows["choices"] == [["red"], ["red", "blue"]]
    assert rows["answer"] == [0, 1]
    assert pictures.pictures(rows[1]) == [str(tmp_path / "png" / "0.png")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"question": None, "qestion": "Which?"}, ["no question", "did you mean 'qestion'"]),
        ({"image": None}, ["no image"]),
        ({"choices": None}, ["no choices"]),
        ({"answer": None}, ["no answer"]),
        ({"answer": 2}, ["answer=2", "2 choices"]),
        ({"answer": -1}, ["answer=-1", "2 choices"]),
        ({"answer": "1"}, ["answer=1", "2 choices"]),
        ({"choices": []}, ["answer=1", "0 choices"]),
        ({"image": "png/9.png"}, ["no picture", "png/9.png"]),
    ],
)
def test_a_bad_question_is_named_with_file_line_and_key(questions, changes, said):
    path = questions(**changes)
    with pytest.raises(DataError) as caught:
        pictures.load(files=path)
    for part in [f"{path}:2", *said]:
        assert part in str(caught.value)


@pytest.mark.parametrize("line", ["{", "[1]", "7", "null", '"question"'])
def test_a_line_that_is_no_question_is_named(tmp_path, line):
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:1"):
        pictures.load(files=f"{tmp_path}/bad.jsonl")


def test_questions_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"question": "Müde?"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl"):
        pictures.load(files=f"{tmp_path}/latin.jsonl")


def test_only_a_newline_ends_a_question(questions, tmp_path):
    path = questions()
    question = "first\u2028second\x85third"  # line separators that JSON allows inside a string
    row = {"image": "png/0.png", "question": question, "choices": ["red"], "answer": 0}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert pictures.load(files=path)["test"]["question"] == [question]
