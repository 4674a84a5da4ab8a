"""Distributions against literal loops and transformers' own; draws against their distributions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from omniloom.generate.config import DecodingConfig, EngineConfig, SamplingConfig
from omniloom.generate.engine import Engine
from omniloom.generate.request import Request
from omniloom.generate.sampling import distributions, draw, log_shares, uniform
from omniloom.generate.speculative import ModelDrafter, ModulesDrafter, accept
from omniloom.modality.text import train_tokenizer
from tiny_decoders import all_logits, batch_of, document, text, tiny_decoder

NOTHING = None


def literal(logits: list[float], config: SamplingConfig, occurred: list[int]) -> list[float]:
    """The rule in words, one token after the other."""
    for id in set(occurred):
        logits[id] = (
            logits[id] / config.repetition_penalty if logits[id] > 0 else logits[id] * config.repetition_penalty
        )
    if config.temperature == 0:
        return [float(i == logits.index(max(logits))) for i in range(len(logits))]
    weights = [math.exp((x - max(logits)) / config.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])
    kept = set(order[: config.top_k])
    total, mass, nucleus = sum(weights[i] for i in kept), 0.0, set()
    for i in order:
        if i in kept and (mass < config.top_p or not nucleus):
            nucleus.add(i)
            mass += weights[i] / total
    least = config.min_p * weights[order[0]]
    last = {i for i in nucleus if weights[i] >= least}
    total = sum(weights[i] for i in last)
    return [weights[i] / total if i in last else 0.0 for i in range(len(logits))]


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    st.sampled_from([None, 1, 3, 50]),
    st.sampled_from([1e-6, 0.3, 0.9, 1.0]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([1.0, 1.3, 0.7]),
)
def test_distributions_equal_the_literal_loop(seed, temperature, top_k, top_p, min_p, penalty):
    config = SamplingConfig(temperature, top_k, top_p, min_p, penalty)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 11, generator=generator) * 3
    occurred = torch.randint(0, 11, (4,), generator=generator)
    share = distributions(logits, [config], [_marked(occurred, 11)])[0]
    assert share.tolist() == pytest.approx(literal(logits[0].double().tolist(), config, occurred.tolist()), abs=1e-5)
    assert float(share.sum()) == pytest.approx(1, abs=1e-6)


def _marked(ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
    return torch.zeros(vocabulary, dtype=torch.bool).index_fill(0, ids, True)


def test_distributions_equal_those_of_transformers():
    logits, occurred = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 3, torch.tensor([[3, 4, 4, 9]])
    theirs = RepetitionPenaltyLogitsProcessor(1.2)(occurred, logits.clone())
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.8), MinPLogitsWarper(0.02)):
        theirs = warper(occurred, theirs)
    ours = distributions(logits, [SamplingConfig(0.7, 20, 0.8, 0.02, 1.2)], [_marked(occurred[0], 50)])
    torch.testing.assert_close(ours, theirs.softmax(-1), atol=1e-6, rtol=1e-5)


def test_tiny_temperatures_and_large_logits_make_no_infinities():
    logits = torch.tensor([[1e30, 1.0, -1e30, 0.0]])
    for temperature in (1e-30, 1e30):
        share = distributions(logits, [SamplingConfig(temperature)], [NOTHING])
        assert torch.isfinite(share).all()
        assert float(share.sum()) == pytest.approx(1)


def test_draws_follow_their_distribution_and_never_take_what_has_no_share():
    share = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    numbers = [uniform(5, i) for i in range(20_000)]
    drawn = np.bincount(draw(share.expand(20_000, -1), numbers), minlength=6)
    assert drawn[share == 0].sum() == 0
    assert stats.chisquare(drawn[share > 0], share[share > 0].double().numpy() * 20_000).pvalue > 1e-4
    assert draw(share.expand(2, -1), [0.0, 1 - 2**-53]) == [1, 4]


def test_numbers_hang_on_seed_index_and_use():
    numbers = {uniform(seed, index, use) for seed in (0, 1, -1) for index in range(50) for use in range(3)}
    assert len(numbers) == 3 * 50 * 3
    assert uniform(3, 7) == uniform(3, 7)
    assert stats.kstest([uniform(0, i) for i in range(5_000)], "uniform").pvalue > 1e-3


def test_log_probabilities_and_entropies():
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)) * 2
    log, entropy = log_shares(logits)
    for row in range(3):
        weights = [math.exp(x) for x in logits[row].tolist()]
        shares = [w / sum(weights) for w in weights]
        assert log[row].exp().tolist() == pytest.approx(shares, rel=1e-5)
        assert float(entropy[row]) == pytest.approx(-sum(p * math.log(p) for p in shares), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_accepted_guesses_have_the_models_distribution(temperature):
    """Over 10,000 draws: whatever the guesses are drawn from, the first token comes from the model's distribution."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 6, generator=generator) * 1.5
    guessed = torch.randn(6, generator=generator).softmax(-1)
    counts, times = np.zeros(6), 10_000
    for seed in range(times):
        config = SamplingConfig(temperature, seed=seed)
        guess = draw(guessed[None], [uniform(seed, 0, 2)])[0]
        counts[accept(logits, [guess], [guessed], config, NOTHING, 0)[0]] += 1
    expected = (logits[0].double() / temperature).softmax(-1).numpy() * times
    assert stats.chisquare(counts, expected).pvalue > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("drafter", [None, "modules", "model"])
def test_pairs_of_tokens_come_from_the_models_distribution(drafter):
    """10,048 answers of two tokens by a real engine, their pairs against all pairs' probabilities."""
    vocabulary, slots, times = 8, 64, 157 * 64
    decoder = tiny_decoder(vocab_size=vocabulary, num_hidden_layers=1, num_nextn_predict_layers=2)
    whole = document(text([6, 7, 6], is_target=False))
    start = whole.window(0, len(whole) - 1)
    shaped = {"temperature": 1.7, "top_k": 6}
    engine = Engine(decoder, _ids_only(), EngineConfig(batch_size=slots, prefill_tokens=10_000, draft_tokens=2))
    if drafter == "modules":
        engine.draft = ModulesDrafter(decoder, engine.cache, 2)
    elif drafter == "model":
        smaller = tiny_decoder(5, vocab_size=vocabulary, num_hidden_layers=1, attention="grouped")
        engine.draft = ModelDrafter(smaller, decoder, 2, slots)
    # The last token is never a guess: a third lets the second be one.
    decodings = [DecodingConfig(max_new_tokens=3, ignore_eos=True, seed=i, **shaped) for i in range(times)]
    answers = engine.generate([Request(start, decoding) for decoding in decodings])
    expected = _pairs(decoder, start, SamplingConfig(**shaped))
    counts = np.zeros_like(expected)
    for answer in answers:
        counts[answer.ids[0], answer.ids[1]] += 1
    seen = expected > 0
    assert counts[~seen].sum() == 0
    assert stats.chisquare(counts[seen], expected[seen] * times).pvalue > 1e-4
    if drafter:
        drafted, accepted = (sum(getattr(one, name) for one in answers) for name in ("drafted", "accepted"))
        assert 0.05 < accepted / drafted < 0.95  # both ways were taken


def _ids_only():
    return train_tokenizer(iter(["nothing"]), 261)


@torch.no_grad()
def _pairs(decoder, start, config) -> np.ndarray:
    vocabulary = decoder.config.vocab_size
    first = distributions(all_logits(decoder, batch_of([[start]], len(start)))[0, -1:], [config], [NOTHING])[0]
    rows = []
    for id in range(vocabulary):
        longer = document(text([6, 7, 6, id], is_target=False))
        logits = all_logits(decoder, batch_of([[longer.window(0, len(longer) - 1)]], len(longer) - 1))[0, -1:]
        rows.append(distributions(logits, [config], [NOTHING])[0])
    pairs = (first[:, None] * torch.stack(rows)).double()
    return (pairs / pairs.sum()).numpy()
