"""Needles: exact lengths, the asked fact at its depth, one answer, the same items for one seed."""

import re
from collections import Counter

import pytest

from omniloom.errors import ConfigError, DataError
from omniloom.evaluation.needle import Grid, needle_items
from tiny_folders import save_tiny, tokenizer

CONTEXT = 512
HAY = [" ".join(f"the cat sat on the {i % 7} mat" for i in range(400)), "and the dog sat on the log " * 100]
FACT = re.compile(r"The code of (\w+) is (\d+)\.")


@pytest.fixture(scope="module")
def text():
    return tokenizer()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("long") / "model", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def items(model):
    return needle_items(HAY, model, Grid(lengths=[128, 256, 512]))


def asked_key(item):
    return re.fullmatch(r".* What is the code of (\w+)\?", item["prompt"]).group(1)


def test_every_cell_of_the_grid_has_its_items(items):
    cells = Counter((item["length"], item["depth"]) for item in items)
    assert cells == {(n, d): 20 for n in (128, 256, 512) for d in (0.0, 0.25, 0.5, 0.75, 1.0)}


def test_prompt_and_answer_have_the_length_or_just_under(items, text):
    for item in items:
        tokens = 1 + len(text.encode(f"{item['prompt']} {item['answer']}"))
        assert item["length"] - 8 < tokens <= item["length"], item


def test_the_fact_is_asked_at_the_end_and_has_one_answer(items):
    for item in items:
        facts = FACT.findall(item["prompt"])
        codes = dict(facts)
        assert len(codes) == len(facts)
        assert codes[asked_key(item)] == item["answer"]
        assert len(item["answer"]) == 4
        assert item["prompt"].endswith(f"What is the code of {asked_key(item)}?")
        assert item["prompt"].count(f"code of {asked_key(item)} is") == 1


def test_one_and_four_needles_take_turns(items):
    assert Counter(len(FACT.findall(item["prompt"])) for item in items if item["length"] >= 256) == {1: 100, 4: 100}


def test_the_facts_take_at_most_half_of_the_text(items, text):
    facts = [(item["length"], FACT.finditer(item["prompt"])) for item in items]
    several = [(length, found) for length, (*found,) in facts if len(found) > 1]
    assert len(several) > 100
    for length, found in several:
        assert 2 * len(text.encode(" ".join(match.group(0) for match in found))) <= length


def test_a_long_question_leaves_fewer_facts_beside_the_asked_one(model):
    """Half of the text would hold two, but not the question too."""
    question = "Whatever else you were told, and whoever told it, and whenever that was, what is the code of {key}?"
    for item in needle_items(HAY, model, Grid(lengths=[120], per_cell=4, needles=[2], question=question)):
        assert len(FACT.findall(item["prompt"])) == 1


def test_the_asked_fact_stands_at_its_depth(items):
    """The share of the haystack's words before it, the other facts left out."""
    for item in items:
        fact = f"The code of {asked_key(item)} is {item['answer']}."
        body = item["prompt"].removesuffix(f" What is the code of {asked_key(item)}?")
        before, after = (len(FACT.sub("", part).split()) for part in body.split(fact))
        assert abs(before - item["depth"] * (before + after)) <= 0.51, item
        if item["depth"] == 0:
            assert before == 0
        if item["depth"] == 1:
            assert after == 0


def test_the_haystack_is_text_in_its_own_order(items):
    words = " ".join(HAY).split()
    circle = " ".join(words + words)
    for item in items[::7]:
        hay = " ".join(FACT.sub(" ", item["prompt"].rpartition(" What is")[0]).split())
        assert hay in circle


def test_a_seed_gives_its_items_again_and_another_others(model):
    first, again, other = (needle_items(HAY, model, Grid(lengths=[128], seed=seed)) for seed in (3, 3, 4))
    assert first == again
    assert not {item["prompt"] for item in first} & {item["prompt"] for item in other}
    assert len({(asked_key(item), item["answer"]) for item in first}) > 90


def test_a_grid_says_everything_about_an_item(model):
    grid = Grid([96], [0.5], 6, [2], 3, "{key} = {value}.", "{key} =", ["xx", "yy", "zz"], 1)
    for item in needle_items(HAY, model, grid):
        facts = dict(re.findall(r"(\w+) = (\d{3})\.", item["prompt"]))
        assert len(facts) == 2
        assert item["answer"] == facts[item["prompt"].split()[-2]]
        assert facts.keys() < {"xx", "yy", "zz"}


def test_without_lengths_they_double_up_to_the_context(model, tmp_path):
    def lengths(folder):
        return {item["length"] for item in needle_items(HAY, folder, Grid(per_cell=1, depths=[0.5], needles=[1]))}

    assert lengths(model) == {64, 128, 256, 512}
    assert lengths(save_tiny(tmp_path / "model", max_position_embeddings=200)) == {64, 128}


def test_a_length_over_the_context_is_refused_with_both(model):
    with pytest.raises(ConfigError, match=r"task_args\.needle\.lengths: 513 is over the model's context of 512"):
        needle_items(HAY, model, Grid(lengths=[128, 513]))


def test_a_length_too_short_for_a_fact_is_refused_with_both(model):
    with pytest.raises(DataError, match=r"take \d+ tokens: task_args\.needle\.lengths has 16"):
        needle_items(HAY, model, Grid(lengths=[16]))


def test_a_context_too_short_for_any_is_refused(tmp_path):
    folder = save_tiny(tmp_path / "model", max_position_embeddings=32)
    with pytest.raises(ConfigError, match=r"context of 32 tokens holds no needle task: set task_args\.needle\.lengths"):
        needle_items(HAY, folder, Grid())


@pytest.mark.parametrize(
    ("grid", "key"),
    [
        ({"needles": []}, "needles"),
        ({"needles": [0]}, "needles"),
        ({"per_cell": 0}, "per_cell"),
        ({"depths": []}, "depths"),
        ({"depths": [1.5]}, "depths"),
        ({"depths": [-0.1]}, "depths"),
        ({"digits": 0}, "digits"),
        ({"keys": []}, "keys"),
        ({"needle": "The code of {kex} is {value}."}, "needle"),
        ({"lengths": [0]}, "lengths"),
        ({"needle": "The code of {key} is {value} {more}."}, "needle"),
        ({"needle": "The code { of {key} is {value}."}, "needle"),
        ({"question": "Well?"}, "question"),
    ],
)
def test_a_grid_that_cannot_hold_is_our_own_error(grid, key, model):
    with pytest.raises((ConfigError, DataError), match=rf"task_args\.needle\.{key}"):
        needle_items(HAY, model, Grid(**{"lengths": [128]} | grid))


@pytest.mark.parametrize("texts", [[""], [" \n"]])
def test_a_haystack_without_a_word_is_our_own_error(texts, model):
    with pytest.raises((ConfigError, DataError), match="needle"):
        needle_items(texts, model, Grid(lengths=[128]))
