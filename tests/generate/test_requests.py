"""Many requests at once: each gets what it would get alone."""

import pytest
import torch
from writing import KINDS, uncached, words

from omniloom.errors import ConfigError
from omniloom.generate.config import CacheConfig, DecodingConfig, EngineConfig
from omniloom.generate.engine import Engine
from omniloom.generate.request import Request, Stopper
from omniloom.generate.speculative import ModelDrafter, ModulesDrafter
from omniloom.modality.text import TextTokenizer, train_tokenizer
from tiny_decoders import document, picture, sound, text, tiny_decoder

VOCABULARY = 300


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(iter(["the cat sat on the mat and the dog sat on the log " * 4]), VOCABULARY)


def decoder_of(kind: str = "latent", seed: int = 0, **changes):
    return tiny_decoder(seed, **KINDS[kind] | {"vocab_size": VOCABULARY} | changes)


def prompts(count: int) -> list:
    """Unequal ones, some with media."""
    media = [[], [picture(2, 2, 1)], [sound(9, 2), picture(2, 3, 3)]]
    whole = [document(words(3 + 5 * i % 17, i), *media[i % 3], words(2 + i % 3, i + 50)) for i in range(count)]
    return [one.window(0, len(one) - 1) for one in whole]


def engine_of(decoder, tokenizer, **changes) -> Engine:
    return Engine(decoder, tokenizer, EngineConfig(**{"batch_size": 3, "prefill_tokens": 8} | changes))


@pytest.mark.parametrize("kind", ["grouped", "latent", "sparse latent", "sparse both ways", "convolution"])
def test_greedy_answers_equal_uncached_decoding(kind, tokenizer):
    """Seven requests, three places, prompts in chunks of eight tokens."""
    decoder, starts = decoder_of(kind), prompts(7)
    decoding = DecodingConfig(max_new_tokens=9, ignore_eos=True)
    answers = engine_of(decoder, tokenizer).generate([Request(one, decoding) for one in starts])
    for start, answer in zip(starts, answers, strict=True):
        ids, rows = uncached(decoder, start, 9)
        assert answer.ids == ids
        log = rows.log_softmax(-1)
        assert answer.logprobs == pytest.approx(log.max(-1).values.tolist(), abs=1e-4)
        assert answer.entropies == pytest.approx((-(log.exp() * log).sum(-1)).tolist(), abs=1e-4)
        assert (answer.finish, answer.prompt_tokens) == ("length", len(start))


def test_what_is_drawn_hangs_on_its_own_seed_alone(tokenizer):
    decoder, starts = decoder_of(), prompts(5)
    requests = [
        Request(one, DecodingConfig(max_new_tokens=12, temperature=0.9, seed=i)) for i, one in enumerate(starts)
    ]
    together = engine_of(decoder, tokenizer).generate(requests)
    alone = [engine_of(decoder, tokenizer, batch_size=1).generate([one])[0] for one in reversed(requests)][::-1]
    assert [one.ids for one in together] == [one.ids for one in alone]
    other = Request(starts[0], DecodingConfig(max_new_tokens=12, temperature=0.9, seed=99))
    assert engine_of(decoder, tokenizer).generate([other])[0].ids != together[0].ids


def test_a_shared_prefix_is_read_once(tokenizer, monkeypatch):
    decoder = decoder_of("convolution")
    shared = [words(20, 1), picture(2, 2, 1), words(6, 2)]
    starts = []
    for i in range(5):
        whole = document(*shared, words(3, 10 + i))
        starts.append(whole.window(0, len(whole) - 1))
    other_picture = document(words(20, 1), picture(2, 2, 7), words(6, 2), words(3, 10))
    starts.append(other_picture.window(0, len(other_picture) - 1))
    requests = [Request(one, DecodingConfig(max_new_tokens=5, ignore_eos=True)) for one in starts]
    answers = engine_of(decoder, tokenizer, batch_size=2).generate(requests)
    for start, answer in zip(starts, answers, strict=True):
        assert answer.ids == uncached(decoder, start, 5)[0]
    assert [one.shared_tokens for one in answers] == [0, 31, 31, 31, 31, 21]


def test_stop_strings_eos_and_length_end_answers(tokenizer):
    decoder, start = decoder_of(), prompts(1)[0]
    free = engine_of(decoder, tokenizer).generate([Request(start, DecodingConfig(max_new_tokens=30, ignore_eos=True))])[
        0
    ]
    assert free.finish == "length"
    whole = tokenizer.decode(free.ids)
    assert whole.startswith(free.text)
    assert not whole[len(free.text) :].strip("\ufffd")  # a character that was not finished is not shown
    stop = free.text[4:7]
    ended = engine_of(decoder, tokenizer).generate(
        [Request(start, DecodingConfig(max_new_tokens=30, stop=[stop, "never"]))]
    )
    assert ended[0].finish == "stop"
    assert ended[0].text == free.text[: free.text.index(stop)]
    with torch.no_grad():
        decoder.lm_head.weight[tokenizer.eos_id] = decoder.lm_head.weight[free.ids[3]] * 1.01
    ended = engine_of(decoder, tokenizer).generate([Request(start, DecodingConfig(max_new_tokens=30))])
    assert ended[0].finish == "eos"
    assert len(ended[0].ids) <= 4


def test_a_context_that_is_full_ends_an_answer(tokenizer):
    decoder = decoder_of()
    whole = document(words(60, 1))
    answer = engine_of(decoder, tokenizer).generate([Request(whole.window(0, 61), DecodingConfig(ignore_eos=True))])[0]
    assert (answer.finish, len(answer.ids)) == ("length", 3)  # 64 in all


def test_text_is_shown_as_soon_as_it_cannot_be_a_stop():
    stopper = Stopper(["abc", "xx"], {0: "z", 1: "a", 2: "b", 3: "c", 4: "x"}.__getitem__)
    assert [stopper.take(i) for i in (0, 1, 2, 0, 1, 4, 1)] == ["z", "", "", "abz", "", "a", "xa"[:1]]
    assert stopper.rest() == "a"
    assert [stopper.take(i) for i in (4, 4)] == ["", ""]
    assert stopper.stopped


@pytest.mark.parametrize(
    ("start", "decoding", "message"),
    [
        (words(64, 1), {}, "65 tokens leaves no room"),
        (words(3, 1), {"temperature": float("nan")}, "temperature=nan"),
        (words(3, 1), {"temperature": -1.0}, r"temperature=-1\.0"),
        (words(3, 1), {"top_p": 0.0}, r"top_p=0\.0"),
        (words(3, 1), {"min_p": 1.5}, r"min_p=1\.5"),
        (words(3, 1), {"top_k": 0}, "top_k=0"),
        (words(3, 1), {"repetition_penalty": 0.0}, "repetition_penalty"),
        (words(3, 1), {"max_new_tokens": 0}, "max_new_tokens=0"),
        (words(3, 1), {"stop": [""]}, "empty text"),
        (words(3, 1), {"beams": 2, "temperature": 1.0}, "beams=2"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(start, decoding, message, tokenizer):
    whole = document(start)
    with pytest.raises(ConfigError, match=message):
        engine_of(decoder_of(), tokenizer).generate(
            [Request(whole.window(0, len(whole) - 1), DecodingConfig(**decoding))]
        )


@pytest.mark.parametrize("modules", [1, 2, 3])
@pytest.mark.parametrize("kind", ["grouped", "latent", "sparse latent", "both ways", "convolution"])
def test_guesses_of_the_modules_change_nothing_of_a_greedy_answer(kind, modules, tokenizer):
    decoder, starts = decoder_of(kind, num_nextn_predict_layers=modules), prompts(5)
    requests = [Request(one, DecodingConfig(max_new_tokens=14, ignore_eos=True)) for one in starts]
    engine = engine_of(decoder, tokenizer, draft_tokens=modules)
    engine.draft = ModulesDrafter(decoder, engine.cache, modules)
    answers = engine.generate(requests)
    assert [one.ids for one in answers] == [uncached(decoder, one, 14)[0] for one in starts]
    assert all(one.drafted > one.accepted for one in answers)


@pytest.mark.parametrize("tokens", [1, 4])
def test_guesses_of_a_model_change_nothing_of_a_greedy_answer(tokens, tokenizer):
    decoder, starts = decoder_of("sparse latent"), prompts(5)
    requests = [Request(one, DecodingConfig(max_new_tokens=14, ignore_eos=True)) for one in starts]
    for smaller, right in ((decoder_of("grouped", seed=1), False), (decoder, True)):
        engine = engine_of(decoder, tokenizer, draft_tokens=tokens)
        engine.draft = ModelDrafter(smaller, decoder, tokens, 3)
        answers = engine.generate(requests)
        assert [one.ids for one in answers] == [uncached(decoder, one, 14)[0] for one in starts]
        assert all((one.accepted == one.drafted) == right for one in answers)


@pytest.mark.parametrize("kind", ["grouped", "sparse latent", "convolution"])
def test_what_goes_on_from_an_answer_reads_only_what_is_new(kind, tokenizer):
    """As a chat's next turn does; of sparse attention too, which has let go of some by then."""
    decoder, decoding = decoder_of(kind), DecodingConfig(max_new_tokens=8, ignore_eos=True)
    engine, first = engine_of(decoder, tokenizer, batch_size=1), [words(19, 1)]
    whole = document(*first)
    answer = engine.generate([Request(whole.window(0, len(whole) - 1), decoding)])[0]
    whole = document(*first, text(answer.ids, is_target=False), words(5, 2))
    start = whole.window(0, len(whole) - 1)
    again = engine.generate([Request(start, decoding)])[0]
    assert again.shared_tokens == 20 + 7  # the answer's last token was not read yet
    assert again.ids == uncached(decoder, start, 8)[0]


def test_a_slot_that_is_used_again_gives_no_stale_prefix(tokenizer):
    """A, B and C begin alike; B takes over A's own slot, then C comes, which has more of A than B has."""
    decoder = decoder_of()
    common, short = words(20, 1), DecodingConfig(max_new_tokens=2, ignore_eos=True)
    long = DecodingConfig(max_new_tokens=12, ignore_eos=True)
    starts = []
    for rest in ([words(12, 2)], None, [words(12, 3)], [words(12, 2), words(3, 4)]):
        whole = document(words(9, 8)) if rest is None else document(common, *rest)
        starts.append(whole.window(0, len(whole) - 1))
    engine = engine_of(decoder, tokenizer, batch_size=2, prefill_tokens=100)
    decodings = (short, long, long, short)
    answers = engine.generate([Request(one, decoding) for one, decoding in zip(starts, decodings, strict=True)])
    for start, decoding, answer in zip(starts, decodings, answers, strict=True):
        assert answer.ids == uncached(decoder, start, decoding.max_new_tokens)[0]


def test_pictures_of_the_same_patches_in_another_shape_share_what_stands_at_the_same_place(tokenizer):
    decoder, decoding = decoder_of(), DecodingConfig(max_new_tokens=4, ignore_eos=True)
    starts = []
    for shape in ((2, 6), (6, 2)):
        shown = picture(*shape, 1)
        shown.content[:] = 7
        whole = document(words(20, 1), shown, words(6, 2))
        starts.append(whole.window(0, len(whole) - 1))
    answers = engine_of(decoder, tokenizer, batch_size=1).generate([Request(one, decoding) for one in starts])
    assert answers[1].shared_tokens == 21 + 2  # the first two patches stand in one row in both
    assert [one.ids for one in answers] == [uncached(decoder, one, 4)[0] for one in starts]


@pytest.mark.parametrize("drafter", ["modules", "model"])
def test_guesses_end_before_the_context_does(drafter, tokenizer):
    decoder = decoder_of(num_nextn_predict_layers=3)
    whole = document(words(58, 1))
    start, engine = whole.window(0, 59), engine_of(decoder, tokenizer, draft_tokens=3)
    engine.draft = (
        ModulesDrafter(decoder, engine.cache, 3) if drafter == "modules" else ModelDrafter(decoder, decoder, 3, 3)
    )
    answer = engine.generate([Request(start, DecodingConfig(max_new_tokens=50, ignore_eos=True))])[0]
    assert answer.ids == uncached(decoder, start, 5)[0]
    assert answer.finish == "length"


def test_a_penalty_of_one_request_is_no_others(tokenizer):
    decoder, start = decoder_of(), prompts(1)[0]
    plain, hard = (DecodingConfig(max_new_tokens=12, ignore_eos=True, repetition_penalty=x) for x in (1.0, 1e6))
    together = engine_of(decoder, tokenizer).generate([Request(start, plain), Request(start, hard)])
    assert together[0].ids == uncached(decoder, start, 12)[0]
    seen = [*start.input_ids[start.modality == 0].tolist(), *together[1].ids]
    assert len(set(together[1].ids)) == 12
    assert len(set(seen)) >= 12


def test_guesses_and_a_selective_cache_are_refused_together():
    with pytest.raises(ConfigError, match="leave out one"):
        EngineConfig(draft_tokens=1, cache=CacheConfig(heavy_tokens=8)).check()
    with pytest.raises(ConfigError, match="draft_tokens=65 is over the 64"):
        EngineConfig(draft_tokens=65).check()


def test_a_draft_model_of_text_is_given_no_pictures(tokenizer):
    decoder = decoder_of()
    smaller = decoder_of(image_patch_pixels=None)
    engine = engine_of(decoder, tokenizer, draft_tokens=2)
    engine.draft = ModelDrafter(smaller, decoder, 2, 3)
    plain, shown = prompts(2)
    assert engine.generate([Request(plain, DecodingConfig(max_new_tokens=4, ignore_eos=True))])[0].ids
    with pytest.raises(ConfigError, match="this prompt has some"):
        engine.generate([Request(shown, DecodingConfig(max_new_tokens=4))])
