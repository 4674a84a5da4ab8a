"""Beam search against all answers there are."""

import pytest
import torch
from writing import KINDS, uncached, words

from omniloom.generate.beam import search
from omniloom.generate.config import CacheConfig, DecodingConfig
from omniloom.generate.request import Request
from tiny_decoders import document, picture, text, tiny_decoder

VOCABULARY, EOS = 5, 1


class Letters:
    """Five ids, of which 1 ends."""

    eos_id = EOS

    def decode(self, ids: list[int]) -> str:
        return "".join("a.bcd"[id] for id in ids)


@torch.no_grad()
def all_answers(decoder, start, longest: int) -> dict[tuple[int, ...], float]:
    """Σ log p of every answer that ends with eos or is of the longest length."""
    found: dict[tuple[int, ...], float] = {}

    def go_on(ids: tuple[int, ...], summed: float) -> None:
        if (ids and ids[-1] == EOS) or len(ids) == longest:
            found[ids] = summed
            return
        log = _next(decoder, start, ids)
        for id in range(VOCABULARY):
            go_on((*ids, id), summed + float(log[id]))

    go_on((), 0.0)
    return found


def _next(decoder, start, ids):
    from writing import _followed, all_logits, batch_of

    fields = _followed(batch_of([[start]], len(start)), list(ids))
    return all_logits(decoder, fields)[0, -1].log_softmax(-1)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_beam_as_wide_as_everything_finds_the_best_of_all_answers(seed, penalty):
    decoder = tiny_decoder(seed, vocab_size=VOCABULARY, num_hidden_layers=1)
    start, longest = document(picture(2, 2, seed), text([2, 3], is_target=False)), 4
    start = start.window(0, len(start) - 1)
    every = all_answers(decoder, start, longest)
    scored = sorted(every.items(), key=lambda one: -one[1] / len(one[0]) ** penalty)
    width = VOCABULARY**longest
    decoding = DecodingConfig(max_new_tokens=longest, beams=width, length_penalty=penalty)
    found = search(decoder, Letters(), Request(start, decoding), CacheConfig())
    assert [tuple(one.ids) for one in found[:20]] == [ids for ids, _ in scored[:20]]
    assert [one.score for one in found[:20]] == pytest.approx([summed for _, summed in scored[:20]], abs=1e-4)
    assert len(found) == len(every)


@pytest.mark.parametrize("kind", ["grouped", "sparse latent", "convolution"])
def test_one_beam_is_greedy_and_more_are_no_worse(kind):
    decoder = tiny_decoder(2, **KINDS[kind])
    whole = document(words(9, 1), picture(2, 3, 1), words(3, 2))
    start = whole.window(0, len(whole) - 1)

    def found(width: int):
        decoding = DecodingConfig(max_new_tokens=10, beams=width, ignore_eos=True)
        return search(decoder, Letters61(), Request(start, decoding), CacheConfig(), prefill_tokens=6)

    ids, rows = uncached(decoder, start, 10)
    greedy = found(1)
    assert [one.ids for one in greedy] == [ids]
    assert greedy[0].score == pytest.approx(float(rows.log_softmax(-1).max(-1).values.sum()), abs=1e-3)
    several = found(6)
    assert several[0].score >= greedy[0].score - 1e-4
    assert len({tuple(one.ids) for one in several}) == 6
    for one in several:  # each beam's numbers are its own answer's
        assert one.score == pytest.approx(_sum(decoder, start, one.ids), abs=1e-3)


class Letters61(Letters):
    def decode(self, ids: list[int]) -> str:
        return str(ids)


@torch.no_grad()
def _sum(decoder, start, ids) -> float:
    return sum(float(_next(decoder, start, ids[:at])[id]) for at, id in enumerate(ids))


def test_a_beam_ends_at_a_stop():
    decoder = tiny_decoder(1, vocab_size=VOCABULARY, num_hidden_layers=1)
    whole = document(text([2, 3], is_target=False))
    start = whole.window(0, len(whole) - 1)
    free = DecodingConfig(max_new_tokens=6, beams=4, ignore_eos=True)
    first = search(decoder, Letters(), Request(start, free), CacheConfig())[0].text
    stopped = DecodingConfig(max_new_tokens=6, beams=4, ignore_eos=True, stop=[first[2]])
    for one in search(decoder, Letters(), Request(start, stopped), CacheConfig()):
        assert first[2] not in one.text
        assert (one.finish == "stop") == (len(one.text) < len(one.ids))
