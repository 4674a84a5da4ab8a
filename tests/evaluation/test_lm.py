"""Our decoder as an lm-eval model; its media have test_media.py."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import ask, direct, direct_document, rolling, tiny_lm

from omniloom.errors import ConfigError, DataError
from omniloom.modality.audio import audio_segment
from omniloom.modality.sequence import Segment, weave
from omniloom.model.decoder import Decoder
from omniloom.model.load import load_model
from tiny_folders import CONTEXT_TOKENS, LETTERS, PICTURE_TOKENS, TINY, colourful, save_tiny, tokenizer


@pytest.fixture(scope="module")
def text():
    return tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("random") / "model")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return [str(path) for path in colourful(tmp_path_factory.mktemp("pictures"), 4)]


def score(lm, requests):
    return lm.loglikelihood(requests, disable_tqdm=True)


PAIRS = [("the cat", " sat"), ("the dog sat on the", " log"), ("what is", " shown here"), ("a", " cat sat on the mat")]


def test_a_continuation_scores_what_the_model_gives_it_directly(folder, text):
    model = load_model(folder)
    scores = score(tiny_lm(folder), [ask(*pair) for pair in PAIRS])
    for (context, continuation), (value, greedy) in zip(PAIRS, scores, strict=True):
        ids = [text.bos_id, *text.encode(context).tolist()]
        expected, likeliest = direct(model, ids, text.encode(continuation).tolist())
        assert expected < -1
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == likeliest


def test_an_empty_context_is_bos_alone(folder, text):
    ((value, _),) = score(tiny_lm(folder), [ask("", "cat")])
    assert value == pytest.approx(direct(load_model(folder), [text.bos_id], text.encode("cat").tolist())[0], abs=1e-4)


def test_spaces_at_the_contexts_end_belong_to_the_continuation(folder):
    trailing, leading = score(tiny_lm(folder), [ask("the cat ", "sat"), ask("the cat", " sat")])
    assert trailing == pytest.approx(leading, abs=1e-5)


def test_the_likeliest_continuation_is_called_greedy(folder, text):
    model = load_model(folder)
    ids = [text.bos_id, *text.encode("the cat").tolist()]
    with torch.no_grad():
        best = int(model(torch.tensor([ids]))[0, -1].argmax())
    lm = tiny_lm(folder)
    (greedy,) = lm._loglikelihood_tokens([(("", ""), ids[1:], [best])], disable_tqdm=True)
    (other,) = lm._loglikelihood_tokens([(("", ""), ids[1:], [(best + 1) % 200 + 5])], disable_tqdm=True)
    assert greedy[1] is True
    assert other[1] is False
    assert greedy[0] > other[0]


def test_special_tokens_written_out_are_ordinary_text(folder, text):
    assert not {text.bos_id, text.eos_id, *text.placeholder_ids} & set(tiny_lm(folder).tok_encode("<|bos|><|image|>"))


def test_a_long_text_under_a_uniform_model_costs_every_token_once(tmp_path, text):
    lm = tiny_lm(save_tiny(tmp_path / "model", "uniform"))
    texts = [LETTERS * 5, "cat", LETTERS]
    counts = [len(text.encode(t)) for t in texts]
    assert counts[0] > 3 * CONTEXT_TOKENS
    values = lm.loglikelihood_rolling([rolling(t) for t in texts], disable_tqdm=True)
    assert values == pytest.approx([-n * math.log(text.vocab_size) for n in counts], rel=1e-6)


@pytest.mark.parametrize("extra", range(-4, 5))
def test_a_long_text_under_a_bigram_model_costs_each_token_after_its_own_predecessor(tmp_path, text, extra):
    model = load_model(save_tiny(tmp_path / "model", "bigram"))
    ids = text.encode(LETTERS * 8).tolist()[: 2 * CONTEXT_TOKENS + extra]
    string = text.decode(ids)
    ids = text.encode(string).tolist()
    with torch.no_grad():
        table = model(torch.arange(text.vocab_size)[:, None])[:, 0].double().log_softmax(-1)
    expected = sum(float(table[a, b]) for a, b in zip([text.bos_id, *ids], ids, strict=False))
    lm = tiny_lm(tmp_path / "model")
    assert lm.loglikelihood_rolling([rolling(string)], disable_tqdm=True) == [pytest.approx(expected, rel=1e-5)]


def test_a_text_that_fits_the_context_is_read_as_a_whole(folder, text):
    ids = text.encode("the cat sat on the mat").tolist()
    (value,) = tiny_lm(folder).loglikelihood_rolling([rolling("the cat sat on the mat")], disable_tqdm=True)
    assert value == pytest.approx(direct(load_model(folder), [text.bos_id], ids)[0], abs=1e-4)


def test_an_empty_text_costs_nothing(folder):
    assert tiny_lm(folder).loglikelihood_rolling([rolling("")], disable_tqdm=True) == [0.0]


def mixed_requests(pictures):
    plain = [ask(*pair, document=10 + i) for i, pair in enumerate(PAIRS)]
    seen = [
        ask("<image>what is shown?", f" {answer}", {"visual": [picture]}, document=i)
        for i, picture in enumerate(pictures)
        for answer in ("red", "green and blue")
    ]
    return [request for pair in zip(plain, seen, strict=False) for request in pair] + seen[len(plain) :]


@pytest.mark.parametrize("batch_tokens", [1, 40])
def test_batching_changes_no_score_and_no_order(folder, pictures, batch_tokens):
    requests = mixed_requests(pictures)
    together = score(tiny_lm(folder), requests)
    apart = score(tiny_lm(folder, batch_tokens=batch_tokens), requests)
    alone = [score(tiny_lm(folder), [request])[0] for request in requests]
    for kept in (together, apart):
        assert [value for value, _ in kept] == pytest.approx([value for value, _ in alone], abs=1e-4)
        assert [greedy for _, greedy in kept] == [greedy for _, greedy in alone]
    assert len({round(value, 3) for value, _ in together}) == len(requests)


def test_batches_keep_to_their_limit_of_tokens(folder, pictures, monkeypatch):
    lm, shapes = tiny_lm(folder, batch_tokens=40), []
    decoder = lm._decoder
    forward = type(decoder).forward

    def watched(self, *args, **fields):
        shapes.append(tuple(fields["input_ids"].shape))
        return forward(self, *args, **fields)

    monkeypatch.setattr(type(decoder), "forward", watched)
    score(lm, mixed_requests(pictures))
    assert sum(rows for rows, _ in shapes) == len(mixed_requests(pictures))
    assert all(rows * longest <= 40 or rows == 1 for rows, longest in shapes)
    assert any(rows > 1 for rows, _ in shapes)


def test_a_picture_is_given_as_a_path_or_as_an_image(folder, pictures):
    with Image.open(pictures[0]) as picture:
        by_path, by_image, other = score(
            tiny_lm(folder),
            [
                ask("<image>what?", " red", {"visual": [pictures[0]]}, document=0),
                ask("<image>what?", " red", {"visual": [picture]}, document=1),
                ask("<image>what?", " red", {"visual": [pictures[1]]}, document=2),
            ],
        )
    assert by_path == pytest.approx(by_image, abs=1e-5)
    assert abs(by_path[0] - other[0]) > 1e-2


def test_text_stands_before_between_and_after_pictures(folder, pictures):
    a, b = pictures[:2]

    def value(context, visual):
        return score(tiny_lm(folder), [ask(context, " red", {"visual": visual})])[0][0]

    values = [
        value("<image>the<image> cat", [a, b]),
        value("<image>the<image> cat", [b, a]),
        value("the<image><image> cat", [a, b]),
        value("the cat<image><image>", [a, b]),
    ]
    assert len({round(v, 3) for v in values}) == 4


def test_removed_pictures_leave_the_bare_text(folder, pictures, text):
    requests = [ask("<image>what is shown?", " red", {"visual": [p]}, document=i) for i, p in enumerate(pictures)]
    bare = [text.bos_id, *text.encode("what is shown?").tolist()]
    expected, _ = direct(load_model(folder), bare, text.encode(" red").tolist())
    values = [value for value, _ in score(tiny_lm(folder, "removed"), requests)]
    assert values == pytest.approx([expected] * 4, abs=1e-4)
    kept = [value for value, _ in score(tiny_lm(folder), requests)]
    assert min(abs(value - expected) for value in kept) > 1e-2


def questions(order):
    """Two requests a document; document i asks its own question about picture order[i]."""
    return [
        ask(f"<image>what is shown here {i}?", answer, {"visual": [picture]}, document=i)
        for i, picture in enumerate(order)
        for answer in (" red", " blue")
    ]


def test_shuffled_gives_every_document_another_documents_picture(folder, pictures):
    kept = tiny_lm(folder)
    by_picture = [[value for value, _ in score(kept, questions([p] * 4))] for p in pictures]
    shuffled = [value for value, _ in score(tiny_lm(folder, "shuffled"), questions(pictures))]
    got = []
    for document in range(4):
        mine = slice(2 * document, 2 * document + 2)
        near = [p for p in range(4) if by_picture[p][mine] == pytest.approx(shuffled[mine], abs=1e-4)]
        assert len(near) == 1  # one picture, the same for both answers
        got += near
    assert sorted(got) == [0, 1, 2, 3]
    assert all(picture != document for document, picture in enumerate(got))
    again = [value for value, _ in score(tiny_lm(folder, "shuffled"), questions(pictures))]
    assert again == pytest.approx(shuffled, abs=1e-6)


def test_shuffled_keeps_two_tasks_of_one_call_apart(folder, pictures):
    """lm-eval hands a group's tasks over together, and counts the documents of each from 0."""
    one = [ask("<image>what?", " red", {"visual": [p]}, document=i, task="one") for i, p in enumerate(pictures)]
    two = [
        ask("<image><image>what?", " red", {"visual": [p, p]}, document=i, task="two") for i, p in enumerate(pictures)
    ]
    lm = tiny_lm(folder, "shuffled")
    together = score(lm, one + two)
    apart = score(lm, one) + score(lm, two)
    assert [value for value, _ in together] == pytest.approx([value for value, _ in apart], abs=1e-4)


def test_a_prompt_longer_than_the_context_is_refused_with_both_figures(folder, pictures, text):
    def request(words):
        return ask("<image>" * 6 + " cat" * words, " red", {"visual": [pictures[0]] * 6})

    words = CONTEXT_TOKENS - 1 - 6 * PICTURE_TOKENS - len(text.encode(" red"))
    assert len(text.encode(" cat" * words)) == words > 0
    assert score(tiny_lm(folder), [request(words)])[0][0] < 0  # fills the context
    with pytest.raises(DataError) as caught:
        score(tiny_lm(folder), [request(words + 1)])
    assert f"{CONTEXT_TOKENS + 1} tokens" in str(caught.value)
    assert f"max_position_embeddings={CONTEXT_TOKENS}" in str(caught.value)


def test_a_continuation_without_a_token_of_its_own_is_never_a_free_win(folder, text):
    assert len(text.encode("the cat")) <= len(text.encode("the c"))  # the continuation merges into the context
    for request in (ask("the c", "at"), ask("the cat", "")):
        with pytest.raises(DataError, match="some_task"):
            score(tiny_lm(folder), [request])


def test_generation_is_refused_by_name(folder):
    with pytest.raises(ConfigError, match=r"gsm8k.*generat"):
        tiny_lm(folder).generate_until([ask("2 + 2 =", {"until": ["\n"]}, task="gsm8k", kind="generate_until")])


def one_by_one(documents):
    """In place of the grouping: every document has a forward pass of its own."""
    return [[number] for number in range(len(documents))]


def answers_of_one_token(text):
    ids = [text.encode(f" {word}").tolist() for word in ("cat", "sat", "mat", "dog", "log", "the", "red", "blue")]
    alone = [text.decode(tokens) for tokens in ids if len(tokens) == 1]
    assert len(alone) > 3
    return alone


@pytest.mark.parametrize("batch_tokens", [1, 60, 8_192])
def test_grouped_answers_score_as_each_alone(folder, pictures, text, monkeypatch, batch_tokens):
    """Answers of one token after one prompt share a forward pass; longer ones and other prompts have their own."""
    answers = [*answers_of_one_token(text), " cat sat on", " shown here"]
    requests = [ask("the cat", answer, document=0) for answer in answers]
    requests += [ask("the dog", answer, document=1) for answer in answers]
    for document, picture in enumerate(pictures[:2], 2):
        requests += [ask("<image>the cat", answer, {"visual": [picture]}, document=document) for answer in answers]
    # The same tokens, of which other many are asked.
    requests += [ask("the cat sat", " on", document=8), ask("the cat", " sat on", document=9)]
    requests += [ask("the", " cat sat on", document=10)]
    requests = requests[::2] + requests[1::2]  # a document's requests need not follow one another
    grouped = score(tiny_lm(folder, batch_tokens=batch_tokens), requests)
    monkeypatch.setattr("omniloom.evaluation.lm._same_but_for_the_last", one_by_one)
    alone = score(tiny_lm(folder, batch_tokens=batch_tokens), requests)
    assert [value for value, _ in grouped] == pytest.approx([value for value, _ in alone], abs=1e-5)
    assert [greedy for _, greedy in grouped] == [greedy for _, greedy in alone]
    assert len({round(value, 4) for value, _ in grouped}) == len(requests)


def test_a_prompts_answers_of_one_token_take_one_forward_pass(folder, pictures, text, monkeypatch):
    rows = []
    forward = Decoder.forward

    def watched(self, *args, **fields):
        rows.append(len(fields["input_ids"]))
        return forward(self, *args, **fields)

    monkeypatch.setattr(Decoder, "forward", watched)
    answers = answers_of_one_token(text)
    score(tiny_lm(folder), [ask("the cat", answer) for answer in answers])
    assert sum(rows) == 1
    rows.clear()
    requests = [
        ask("<image>the", answer, {"visual": [p]}, document=i) for i, p in enumerate(pictures) for answer in answers
    ]
    score(tiny_lm(folder), requests)
    assert sum(rows) == len(pictures)
    rows.clear()
    score(tiny_lm(folder), [ask("the cat", " cat sat"), ask("the cat", " cat sat on")])
    assert sum(rows) == 2


def clips_cut_at(*lengths):
    """One stretch of sound as clips of these lengths, then a question and its answer of one token."""
    frames = np.random.default_rng(0).normal(-4, 2, (sum(lengths), 4)).astype(np.float16)
    segments = [audio_segment(part, TINY.audio) for part in np.split(frames, np.cumsum(lengths)[:-1])]
    target = Segment(0, np.array([40], np.int32), np.zeros((1, 3), np.int32), is_target=True)
    return weave([*segments, target], 0, 1, (1, 2, 3, 4), TINY.widths).window(0, sum(map(len, segments)) + 2)


def test_media_that_differ_only_in_where_clips_end_are_not_one_group(folder):
    """The same frames and as many tokens, cut into two clips elsewhere."""
    documents = [clips_cut_at(5, 3), clips_cut_at(3, 5)]
    assert len(documents[0]) == len(documents[1])
    values = [value for value, _ in tiny_lm(folder)._score(documents, "score", True)]
    model = load_model(folder)
    expected = [direct_document(model, document)[0] for document in documents]
    assert abs(expected[0] - expected[1]) > 1e-3
    assert values == pytest.approx(expected, abs=1e-4)
