"""Files of one JSON object a line, torn ones included."""

import pytest

from omniloom.track import jsonl


def entry(step: int) -> dict[str, object]:
    return {"step": step, "loss/next_token": 1.0 / step, "note": "ü\n→"}


@pytest.fixture
def three_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        jsonl.append(path, entry(step))
    return path


def tear(path) -> None:
    with path.open("a") as stream:
        stream.write('{"step": 4, "loss/next_to')


def test_what_is_appended_is_read_back_in_order(three_steps):
    assert jsonl.read(three_steps) == [entry(1), entry(2), entry(3)]
    assert three_steps.read_bytes().count(b"\n") == 3


def test_a_missing_file_has_no_line(tmp_path):
    assert jsonl.read(tmp_path / "none.jsonl") == []
    assert jsonl.read_from(tmp_path / "none.jsonl", 100) == ([], 0)


def test_a_torn_last_line_is_left_out(three_steps):
    tear(three_steps)
    assert jsonl.read(three_steps) == [entry(1), entry(2), entry(3)]


def test_what_follows_a_torn_line_is_still_read(three_steps):
    tear(three_steps)
    jsonl.append(three_steps, entry(5))
    assert jsonl.read(three_steps)[-1] == entry(5)


def test_cut_back_drops_later_steps_and_a_torn_line(three_steps):
    tear(three_steps)
    jsonl.cut_back(three_steps, 2)
    assert jsonl.read(three_steps) == [entry(1), entry(2)]
    jsonl.append(three_steps, entry(3))
    assert jsonl.read(three_steps) == [entry(1), entry(2), entry(3)]


def test_cut_back_to_the_start_leaves_an_empty_file_and_makes_a_missing_one(tmp_path, three_steps):
    jsonl.cut_back(three_steps, 0)
    assert jsonl.read(three_steps) == []
    jsonl.cut_back(tmp_path / "new.jsonl", 0)
    assert jsonl.read(tmp_path / "new.jsonl") == []


def test_read_from_goes_on_where_it_stopped_and_waits_for_a_torn_line(three_steps):
    lines, offset = jsonl.read_from(three_steps, 0)
    assert lines == [entry(1), entry(2), entry(3)]
    assert offset == three_steps.stat().st_size
    assert jsonl.read_from(three_steps, offset) == ([], offset)
    tear(three_steps)
    assert jsonl.read_from(three_steps, offset) == ([], offset)
    with three_steps.open("a") as stream:
        stream.write('ken": 0.25}\n')
    lines, end = jsonl.read_from(three_steps, offset)
    assert lines == [{"step": 4, "loss/next_token": 0.25}]
    assert end == three_steps.stat().st_size


def test_read_from_starts_again_where_the_file_was_cut_back(three_steps):
    _, offset = jsonl.read_from(three_steps, 0)
    jsonl.cut_back(three_steps, 1)
    assert jsonl.read_from(three_steps, offset) == ([entry(1)], three_steps.stat().st_size)


def test_read_from_survives_a_file_cut_back_and_grown_past_the_offset(three_steps):
    _, offset = jsonl.read_from(three_steps, 0)
    jsonl.cut_back(three_steps, 1)
    for step in (2, 3, 4):
        jsonl.append(three_steps, entry(step) | {"another width": "x" * 17})
    lines, end = jsonl.read_from(three_steps, offset)
    assert lines[-1]["step"] == 4
    assert end == three_steps.stat().st_size
