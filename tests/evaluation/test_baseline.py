"""The unigram against its closed form."""

import math

import pytest
from tiny_models import ask, rolling

from omniloom.errors import ConfigError
from omniloom.evaluation.baseline import UnigramLM
from tiny_folders import tokenizer


@pytest.fixture(scope="module")
def text():
    return tokenizer()


@pytest.fixture(scope="module")
def counts(text):
    return [(7 * i) % 13 for i in range(text.vocab_size)]


def cost(ids, counts):
    total = sum(counts) + len(counts)
    return sum(math.log((counts[i] + 1) / total) for i in ids)


def test_a_text_costs_the_sum_of_its_tokens_smoothed_shares(text, counts):
    lm = UnigramLM(text, counts)
    strings = ["the cat sat on the mat", "", "dog " * 300]
    expected = [cost(text.encode(string).tolist(), counts) for string in strings]
    assert lm.loglikelihood_rolling([rolling(string) for string in strings], disable_tqdm=True) == pytest.approx(
        expected
    )


def test_without_counts_every_token_is_as_likely(text):
    lm = UnigramLM(text, [0] * text.vocab_size)
    tokens = len(text.encode("the cat"))
    (value,) = lm.loglikelihood_rolling([rolling("the cat")], disable_tqdm=True)
    assert value == pytest.approx(-tokens * math.log(text.vocab_size))


def test_a_continuation_costs_the_same_after_any_context(text, counts):
    lm = UnigramLM(text, counts)
    expected = cost(text.encode(" sat").tolist(), counts)
    values = lm.loglikelihood([ask("the cat", " sat"), ask("on the mat", " sat")], disable_tqdm=True)
    assert [value for value, _ in values] == pytest.approx([expected] * 2)


def test_only_the_commonest_token_is_greedy(text):
    ids = text.encode(" sat").tolist()
    counts = [0] * text.vocab_size
    counts[ids[0]] = 5
    lm = UnigramLM(text, counts)
    scores = lm._loglikelihood_tokens([(("", ""), [], ids[:1] * 2), (("", ""), [], [ids[0], ids[0] + 1])])
    assert [greedy for _, greedy in scores] == [True, False]


def test_it_writes_no_text(text, counts):
    with pytest.raises(ConfigError, match="no text"):
        UnigramLM(text, counts).generate_until([])
