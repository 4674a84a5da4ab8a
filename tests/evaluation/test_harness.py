"""lm-eval tasks end to end on tiny models, with their controls."""

import json
import math

import pytest
from tiny_models import EVALS, LETTERS, ask, colourful, save_tiny, tiny_lm, tokenizer

from omniloom.errors import ConfigError
from omniloom.evaluation.harness import Item, Scores, evaluate, evaluate_item, gather, task_manager, variants_of
from omniloom.model.load import load_model

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


def test_pictures_are_scored_kept_removed_and_shuffled(tmp_path):
    folder = save_tiny(tmp_path / "model")
    paths = colourful(tmp_path / "png", 6)
    choices = [["red", "green", "blue"], ["red", "blue"]]
    rows = [
        {"image": f"png/{i}.png", "question": f"what is {i}?", "choices": choices[i % 2], "answer": i % 2}
        for i in range(6)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task_args = {"omniloom_pictures": {"files": f"{tmp_path}/questions.jsonl"}}
    result = evaluate(load_model(folder), ["omniloom_pictures"], EVALS, task_args=task_args)["omniloom_pictures"]

    def accuracy(medium):
        lm, right = tiny_lm(folder, medium), 0
        requests = [
            ask(f"<image>{row['question']}", f" {choice}", {"visual": [str(path)]}, document=i)
            for i, (row, path) in enumerate(zip(rows, paths, strict=True))
            for choice in row["choices"]
        ]
        values = iter(value for value, _ in lm.loglikelihood(requests, disable_tqdm=True))
        for row in rows:
            mine = [next(values) for _ in row["choices"]]
            right += mine.index(max(mine)) == row["answer"]
        return right / 6

    assert result["n"] == 6
    acc = result["metrics"]["acc"]
    assert acc["value"] == pytest.approx(accuracy("kept"))
    assert acc["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert acc["stderr"] == pytest.approx(math.sqrt(acc["value"] * (1 - acc["value"]) / 5), abs=1e-6)
    assert acc["control"] == {
        "removed": pytest.approx(accuracy("removed")),
        "shuffled": pytest.approx(accuracy("shuffled")),
    }


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
        Scores("a", "kept", 4, {"acc": (0.5, 0.1), "f1": (0.4, None)}, 0.25),
        Scores("a", "removed", 4, {"acc": (0.2, 0.1)}, 0.25),
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
