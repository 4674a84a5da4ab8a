"""Results as a table and as sentences."""

import json

from omniloom.track.verdict import read_evaluations, table, verdict


def accuracy(value, stderr=0.02, chance=0.1, **control):
    metric = {"value": value, "stderr": stderr, "chance": chance, "control": control}
    return {"task": "omniloom_pictures", "step": 5, "n": 360, "metrics": {"acc": metric}}


def text_score(value, **control):
    metrics = {
        "word_perplexity": {"value": 90.5, "stderr": None, "chance": None, "control": {}},
        "bits_per_byte": {"value": value, "stderr": None, "chance": None, "control": control},
    }
    return {"task": "perplexity", "step": 5, "n": 4, "metrics": metrics}


def test_the_table_has_a_line_a_metric_with_error_chance_and_controls():
    lines = table([accuracy(0.75, removed=0.1, shuffled=0.125), text_score(2.5, unigram=4.0)]).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "omniloom_pictures acc 0.750 ± 0.020 chance 0.100 removed 0.100 shuffled 0.125 n 360",
        "perplexity word_perplexity 90.500 n 4",
        "perplexity bits_per_byte 2.500 unigram 4.000 n 4",
    ]
    assert table([]) == ""


def test_accuracy_two_errors_above_chance_counts_as_learned():
    (sentence,) = verdict([accuracy(0.15, stderr=0.02, removed=0.1, shuffled=0.125)])
    assert sentence == (
        "omniloom_pictures: 15.0% ± 2.0% right (above chance 10.0%; with its media removed 10.0% and shuffled 12.5%)"
    )


def test_accuracy_within_two_errors_of_chance_does_not():
    assert "(not told apart from chance 10.0%)" in verdict([accuracy(0.13, stderr=0.02)])[0]
    assert "(not told apart from chance 10.0%)" in verdict([accuracy(0.05, stderr=0.02)])[0]


def test_accuracy_without_a_chance_is_not_held_against_one():
    (sentence,) = verdict([accuracy(0.9, chance=None)])
    assert "90.0% ± 2.0% right" in sentence
    assert "not told apart" not in sentence
    assert "0.0%)" not in sentence


def test_text_is_held_against_the_unigram():
    assert verdict([text_score(2.5, unigram=4.0)]) == ["perplexity: 2.50 bits a byte (under a unigram's 4.00)"]
    assert verdict([text_score(4.5, unigram=4.0)]) == ["perplexity: 4.50 bits a byte (not under a unigram's 4.00)"]
    assert verdict([text_score(2.5)]) == ["perplexity: 2.50 bits a byte"]


def test_a_result_with_neither_accuracy_nor_bits_has_no_sentence():
    assert verdict([{"task": "other", "step": 1, "n": 1, "metrics": {"f1": {"value": 1.0, "stderr": None}}}]) == []


def test_the_newest_evaluated_step_is_read(tmp_path):
    assert read_evaluations(tmp_path) == []
    for step, tasks in ((5, ["a"]), (100, ["c", "b"])):
        folder = tmp_path / "evals" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        for task in tasks:
            (folder / f"{task}.json").write_text(json.dumps({"task": task, "step": step}))
    assert read_evaluations(tmp_path) == [{"task": "b", "step": 100}, {"task": "c", "step": 100}]


def test_a_grid_is_told_by_its_worst_cell_and_printed_as_rows_of_length() -> None:
    cells = {(64, 0.0): 1.0, (64, 0.5): 0.95, (512, 0.0): 0.8, (512, 0.5): 0.9}
    metrics = {
        f"acc/{length}/{depth:g}": {"value": value, "stderr": 0.05, "chance": None, "control": {}}
        for (length, depth), value in cells.items()
    }
    whole = {"value": 0.9125, "stderr": 0.01, "chance": None, "control": {}}
    result = {"task": "needle", "step": 1, "n": 80, "metrics": {"acc": whole, **metrics}}
    assert verdict([result]) == [
        "needle: 91.2% of the facts recalled; the worst of 4 cells is 80% at 512 tokens, depth 0%"
    ]
    lines = table([result]).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["tokens", "at", "depth", "0%", "50%"],
        ["64", "100%", "95%"],
        ["512", "80%", "90%"],
    ]
