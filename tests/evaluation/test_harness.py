"""lm-eval tasks end to end on tiny models, with their controls."""

import json
import math
from dataclasses import asdict

import pytest
from tiny_models import EVALS, ask, direct, tiny_lm

from omniloom.errors import ConfigError
from omniloom.evaluation.harness import (
    SAMPLES_KEPT,
    Item,
    Scores,
    evaluate,
    evaluate_item,
    gather,
    task_manager,
    variants_of,
)
from omniloom.evaluation.needle import Grid, needle_items
from omniloom.model.load import load_model
from omniloom.track.run_directory import open_run
from omniloom.track.tracker import record_evaluations
from omniloom.train.config import TrainingRun
from tiny_folders import LETTERS, audible, colourful, moving, save_tiny, tokenizer

TEXT = LETTERS * 3


@pytest.fixture(scope="module")
def text():
    return tokenizer()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    return [str(path)]


@pytest.fixture(scope="module")
def uniform(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("uniform") / "model", "uniform")


def test_perplexity_of_a_uniform_model_is_its_tokens_and_its_control_the_unigram(tmp_path, text, files):
    folder = save_tiny(tmp_path / "model", "uniform")
    ids = text.encode(TEXT).tolist()
    counts = [ids.count(i) for i in range(text.vocab_size)]
    (folder / "target_counts.json").write_text(json.dumps(counts))
    results = evaluate(load_model(folder), ["perplexity"], EVALS, task_args={"perplexity": {"files": files}})
    assert list(results) == ["perplexity"]
    result = results["perplexity"]
    assert (result["task"], result["step"], result["n"]) == ("perplexity", None, 1)
    bits = result["metrics"]["bits_per_byte"]
    size, total = len(TEXT.encode()), sum(counts) + len(counts)
    assert bits["value"] == pytest.approx(len(ids) * math.log2(text.vocab_size) / size, rel=1e-5)
    unigram = -sum(math.log2((counts[i] + 1) / total) for i in ids) / size
    assert bits["control"] == {"unigram": pytest.approx(unigram, rel=1e-5)}
    assert unigram < bits["value"]
    assert bits["chance"] is None
    assert result["metrics"]["byte_perplexity"]["value"] == pytest.approx(2 ** bits["value"], rel=1e-5)
    words = len(TEXT.split()) + 1  # lm-eval counts the empty piece behind the last space
    expected = math.exp(len(ids) * math.log(text.vocab_size) / words)
    assert result["metrics"]["word_perplexity"]["value"] == pytest.approx(expected, rel=1e-4)
    json.dumps(results)


def test_without_counts_text_has_no_control(uniform, files):
    item = Item("perplexity", "kept", str(uniform), {"files": files}, str(EVALS))
    assert variants_of(item) == ["kept"]
    scores = evaluate_item(item)
    assert (scores.n, scores.chance) == (1, None)
    assert gather([scores], 5)["perplexity"]["metrics"]["bits_per_byte"]["control"] == {}


@pytest.fixture(scope="module")
def long_model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("long") / "model", max_position_embeddings=96)


def mixed_questions(folder, count=6):
    """Half of a picture, half of a clip and a video, with 3 and with 2 choices."""
    kinds = {"image": colourful(folder, count), "audio": audible(folder, count), "video": moving(folder, count)}
    rows = []
    for i in range(count):
        shown = ("image",) if i % 2 else ("audio", "video")
        media = [{kind: kinds[kind][i].name} for kind in shown]
        choices = [["red", "green", "blue"], ["red", "blue"]][i % 2]
        segments = [*media, {"text": f"what is {i}?"}]
        rows.append({"segments": segments, "choices": choices, "answer": i % 2})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def requests_of(rows, folder):
    """What lm-eval should ask of the model."""
    requests = []
    for number, row in enumerate(rows):
        *media, text = row["segments"]
        kinds = [(kind, str(folder / name)) for medium in media for kind, name in medium.items()]
        held = {"visual": [p for k, p in kinds if k != "audio"], "audio": [p for k, p in kinds if k == "audio"]}
        prompt = "".join(f"<{kind}>" for kind, _ in kinds) + text["text"]
        requests += [ask(prompt, f" {choice}", held, document=number) for choice in row["choices"]]
    return requests


def given_answers(rows, values):
    values = iter(values)
    given = []
    for row in rows:
        mine = [next(values)[0] for _ in row["choices"]]
        given.append(mine.index(max(mine)))
    return given


def test_media_are_scored_kept_removed_and_shuffled(tmp_path):
    """Equal to a literal loop over the questions under each control."""
    model = load_model(save_tiny(tmp_path / "model"))
    rows = mixed_questions(tmp_path)
    task_args = {"omniloom_matching": {"files": f"{tmp_path}/questions.jsonl"}}
    result = evaluate(model, ["omniloom_matching"], EVALS, task_args=task_args)["omniloom_matching"]

    def accuracy(control):
        values = tiny_lm(model.folder, control).loglikelihood(requests_of(rows, tmp_path), disable_tqdm=True)
        return sum(g == row["answer"] for g, row in zip(given_answers(rows, values), rows, strict=True)) / 6

    assert result["n"] == 6
    acc = result["metrics"]["acc"]
    assert acc["value"] == pytest.approx(accuracy("kept"))
    assert acc["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert acc["stderr"] == pytest.approx(math.sqrt(acc["value"] * (1 - acc["value"]) / 5), abs=1e-6)
    assert acc["control"] == {
        "removed": pytest.approx(accuracy("removed")),
        "shuffled": pytest.approx(accuracy("shuffled")),
    }


def test_samples_show_prompt_choices_right_and_given_answer(tmp_path):
    folder = save_tiny(tmp_path / "model")
    rows = mixed_questions(tmp_path)
    item = Item("omniloom_motion", "kept", str(folder), {"files": f"{tmp_path}/questions.jsonl"}, str(EVALS))
    samples = evaluate_item(item).samples
    values = tiny_lm(folder).loglikelihood(requests_of(rows, tmp_path), disable_tqdm=True)
    for number, (sample, row, given) in enumerate(zip(samples, rows, given_answers(rows, values), strict=True)):
        *media, text = row["segments"]
        assert sample == {
            "doc_id": number,
            "prompt": [{kind: str(tmp_path / name)} for medium in media for kind, name in medium.items()] + [text],
            "choices": row["choices"],
            "answer": row["choices"][row["answer"]],
            "given": row["choices"][given],
            "right": given == row["answer"],
        }
    json.dumps(samples)


def needle_args(files, **grid):
    return {"files": files, "lengths": [64, 96], "depths": [0.0, 0.5, 1.0], "per_cell": 3} | grid


def test_the_needles_cells_are_a_literal_loop_over_the_items(long_model, files, monkeypatch):
    """Every third answer is made right, so that cells differ."""
    from omniloom.evaluation import lm

    real = lm.OmniloomLM.loglikelihood

    def some_right(self, requests, disable_tqdm=False):
        values = real(self, requests, disable_tqdm)
        return [(value, int(request.args[1]) % 3 == 0) for (value, _), request in zip(values, requests, strict=True)]

    monkeypatch.setattr(lm.OmniloomLM, "loglikelihood", some_right)
    grid = needle_args(files, per_cell=7)
    result = evaluate(load_model(long_model), ["needle"], EVALS, task_args={"needle": grid})["needle"]
    grid.pop("files")
    cells = {}
    for item in needle_items([TEXT], long_model, Grid(**grid)):
        cells.setdefault((item["length"], item["depth"]), []).append(int(item["answer"]) % 3 == 0)
    metrics = result["metrics"]
    assert metrics.keys() == {"acc", *(f"acc/{length}/{depth:g}" for length, depth in cells)}
    every = [hit for hits in cells.values() for hit in hits]
    assert result["n"] == len(every) == 42
    assert metrics["acc"]["value"] == pytest.approx(sum(every) / 42)
    assert 0 < sum(every) < 42
    for (length, depth), hits in cells.items():
        cell, share = metrics[f"acc/{length}/{depth:g}"], sum(hits) / 7
        assert cell["value"] == pytest.approx(share)
        assert cell["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 6))
        assert (cell["chance"], cell["control"]) == (None, {})


def test_the_needles_answers_are_scored_after_their_prompt(long_model, files, text):
    """A needle is found where greedy decoding writes the whole answer."""
    item = Item("needle", "kept", str(long_model), needle_args(files), str(EVALS))
    assert variants_of(item) == ["kept"]
    scores = evaluate_item(item)
    assert scores.n == 18
    made = needle_items([TEXT], long_model, Grid(lengths=[64, 96], depths=[0.0, 0.5, 1.0], per_cell=3))
    assert [(s["prompt"], s["answer"], s["length"], s["depth"]) for s in scores.samples] == [
        ([{"text": i["prompt"]}], i["answer"], i["length"], i["depth"]) for i in made
    ]
    model = load_model(long_model)
    for sample in scores.samples:
        prompt = [text.bos_id, *text.encode(sample["prompt"][0]["text"]).tolist()]
        likeliest = direct(model, prompt, text.encode(f" {sample['answer']}").tolist())[1]
        assert sample["right"] == likeliest
        assert sample["given"] == (sample["answer"] if likeliest else None)


def test_an_answer_follows_its_question_after_a_space_as_in_training(long_model, files, monkeypatch):
    """lm-eval joins the two as they stand: without the space, other tokens than the learned ones were scored."""
    from omniloom.evaluation import lm

    asked = []
    real = lm.OmniloomLM.loglikelihood

    def noted(self, requests, disable_tqdm=False):
        asked.extend(request.args for request in requests)
        return real(self, requests, disable_tqdm)

    monkeypatch.setattr(lm.OmniloomLM, "loglikelihood", noted)
    evaluate_item(Item("needle", "kept", str(long_model), needle_args(files), str(EVALS)))
    made = needle_items([TEXT], long_model, Grid(lengths=[64, 96], depths=[0.0, 0.5, 1.0], per_cell=3))
    assert asked == [(item["prompt"], f" {item['answer']}") for item in made]


def test_a_cell_of_one_item_has_no_standard_error(long_model, files):
    grid = needle_args(files, per_cell=1)
    result = evaluate(load_model(long_model), ["needle"], EVALS, task_args={"needle": grid})["needle"]
    assert result["metrics"]["acc/64/0.5"]["stderr"] is None
    assert result["n"] == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lenghts": [64]}, "unknown key task_args.needle.lenghts; did you mean 'lengths'?"),
        ({"lengths": "many"}, "task_args.needle.lengths"),
        ({"lengths": 64}, "task_args.needle.lengths"),
        ({"per_cell": 0}, "task_args.needle.per_cell=0"),
        ({"lengths": [97]}, "97 is over the model's context of 96 tokens"),
    ],
)
def test_a_wrong_key_of_the_needle_task_is_named(changes, said, long_model, files):
    with pytest.raises(ConfigError) as caught:
        evaluate(load_model(long_model), ["needle"], EVALS, task_args={"needle": needle_args(files, **changes)})
    assert said in str(caught.value)


def test_samples_are_spread_over_the_documents_and_few(long_model, files):
    item = Item("needle", "kept", str(long_model), needle_args(files, per_cell=20), str(EVALS))
    samples = evaluate_item(item).samples
    assert len(samples) == SAMPLES_KEPT
    assert len({(sample["length"], sample["depth"]) for sample in samples}) == 6


def test_samples_show_both_answers_where_they_take_turns(long_model, tmp_path):
    """As the questions of the two-media task do."""
    colourful(tmp_path, 1)
    rows = [
        {"segments": [{"image": "0.png"}, {"text": f"is {i}?"}], "choices": ["yes", "no"], "answer": i % 2}
        for i in range(80)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    item = Item("omniloom_matching", "removed", str(long_model), {"files": f"{tmp_path}/questions.jsonl"}, str(EVALS))
    samples = evaluate_item(item).samples
    assert len(samples) == SAMPLES_KEPT
    assert 8 <= sum(sample["answer"] == "yes" for sample in samples) <= 24


TASKS = sorted(path for path in EVALS.glob("*/*.yaml") if not path.name.startswith("_"))


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_every_task_of_evals_loads_and_runs_tiny(path, long_model, files, tmp_path):
    """New tasks are found by themselves: one that reads other files needs its line here."""
    task = path.stem
    mixed_questions(tmp_path, 4)
    task_args = {"perplexity": {"files": files}, "needle": needle_args(files)}
    mine = task_args.get(task, {"files": f"{tmp_path}/questions.jsonl"})
    result = evaluate(load_model(long_model), [task], EVALS, task_args={task: mine}, limit=4)[task]
    assert 1 <= result["n"] <= 4
    (metric,) = {"acc", "bits_per_byte"} & result["metrics"].keys()
    assert math.isfinite(result["metrics"][metric]["value"])
    is_media = path.parent.name == "omniloom_media"
    assert set(result["metrics"][metric]["control"]) == ({"removed", "shuffled"} if is_media else set())


def test_the_samples_stand_beside_the_scores(tmp_path):
    """Each task's file, its samples a line each; another evaluation of the step writes them anew."""
    run = tmp_path / "run"
    open_run(run, asdict(TrainingRun()))
    result = {"a": {"task": "a", "step": 7, "n": 1, "metrics": {}}}
    for samples in ([{"doc_id": 0}, {"doc_id": 1, "given": "ü"}], [{"doc_id": 2}]):
        record_evaluations(run, result, {"a": samples, "other": [{}]})
        folder = run / "evals" / "step_00000007"
        assert sorted(path.name for path in folder.iterdir()) == ["a.json", "a.samples.jsonl"]
        assert json.loads((folder / "a.json").read_text()) == result["a"]
        written = (folder / "a.samples.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in written] == samples
    record_evaluations(run, result, {})
    assert (folder / "a.samples.jsonl").read_text() == ""


def test_a_limit_scores_that_many_documents(uniform, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"the cat {number}")
    task_args = {"perplexity": {"files": f"{tmp_path}/*.txt"}}
    results = evaluate(load_model(uniform), ["perplexity"], EVALS, task_args=task_args, limit=2)
    assert results["perplexity"]["n"] == 2


def test_a_missing_task_argument_is_our_own_error(uniform):
    with pytest.raises(ConfigError, match=r"task_args\.perplexity\.files"):
        evaluate(load_model(uniform), ["perplexity"], EVALS)


def test_an_unknown_task_is_refused_with_the_nearest_name(uniform):
    with pytest.raises(ConfigError) as caught:
        task_manager(Item("perplexty", "kept", str(uniform), tasks_folder=str(EVALS)))
    assert "unknown task perplexty" in str(caught.value)
    assert "did you mean 'perplexity'?" in str(caught.value)


def test_gather_puts_controls_beside_their_own_metric():
    scores = [
        Scores("a", "kept", 4, {"acc": (0.5, 0.1), "f1": (0.4, None)}, 0.25, [{"doc_id": 0}]),
        Scores("a", "removed", 4, {"acc": (0.2, 0.1)}, 0.25, [{"doc_id": 0}]),
        Scores("b", "kept", 2, {"acc_norm": (0.9, 0.1)}, 0.5),
    ]
    assert gather(scores, 7) == {
        "a": {
            "task": "a",
            "step": 7,
            "n": 4,
            "metrics": {
                "acc": {"value": 0.5, "stderr": 0.1, "chance": 0.25, "control": {"removed": 0.2}},
                "f1": {"value": 0.4, "stderr": None, "chance": None, "control": {}},
            },
        },
        "b": {
            "task": "b",
            "step": 7,
            "n": 2,
            "metrics": {"acc_norm": {"value": 0.9, "stderr": 0.1, "chance": 0.5, "control": {}}},
        },
    }
