"""tiktoken gives the ids that `tokenizers` gives, for every vocabulary that it is trusted with."""

from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from omniloom.modality.bpe import DIGITS_THEN_WORDS, LONGEST, WORDS, FastBPE, fast_bpe
from omniloom.modality.text import SPECIAL_TOKENS, load_tokenizer, train_tokenizer

BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUTS = {
    WORDS: BYTE_LEVEL,
    DIGITS_THEN_WORDS: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]),
}
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
EDGES = [
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'", "’s", "don't", "ab", " the", "...", "--", "\0"),
    *("1", "12", "²", "½", "Ⅷ", "٣", "\U00011de3", "\U00016ff5", "é", "e\u0301", "ß", "中文", "👍🏽", "<|eos|>"),
]
SPACES = " \n\t\r\v\f\x85\xa0\u2003\u2028\u3000"
TEXTS = st.lists(st.sampled_from(EDGES) | st.text(SPACES, max_size=4) | st.text(max_size=4), max_size=30).map("".join)
either_way = pytest.mark.parametrize("pattern", CUTS, ids=["words", "digits"])


@cache
def trained(pattern: str) -> tuple[Tokenizer, FastBPE]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = CUTS[pattern]
    trainer = trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=ALPHABET, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    tokenizer.train_from_iterator(sorted(topics.values()), trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer, taken(tokenizer)


def taken(tokenizer: Tokenizer) -> FastBPE:
    fast = fast_bpe(tokenizer)
    assert fast is not None
    return fast


def by_rules(rules: list[tuple[str, str]], **options: Any) -> Tokenizer:
    tokens = dict.fromkeys([*ALPHABET, *(left + right for left, right in rules)])
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, rules, **options))
    tokenizer.pre_tokenizer = BYTE_LEVEL
    return tokenizer


def same(tokenizer: Tokenizer, fast: FastBPE, text: str) -> bool:
    return fast.encode(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids


@either_way
@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_any_text_gets_the_same_ids(pattern: str, text: str) -> None:
    assert same(*trained(pattern), text)


@either_way
def test_real_text_gets_the_same_ids(pattern: str) -> None:
    assert [name for name, text in topics.items() if not same(*trained(pattern), text)] == []


@either_way
@pytest.mark.parametrize("run", [" ", "\n", "a", "1", "-", "中", " \n", "' "])
def test_a_long_run_of_anything_gets_the_same_ids(pattern: str, run: str) -> None:
    for end in ("", "a", "1", "-"):
        assert same(*trained(pattern), run * (LONGEST // 8) + end)


@either_way
def test_the_longest_run_of_spaces_fits_the_engine(pattern: str) -> None:
    assert same(*trained(pattern), " " * (LONGEST - 1) + "a")


@either_way
@pytest.mark.parametrize("stride", [97, pytest.param(1, marks=pytest.mark.soak)])
def test_every_character_is_cut_alike(pattern: str, stride: int) -> None:
    """Beside a letter, a digit, a sign and a space: one token where one piece."""
    chars = [chr(code) for code in range(0, 0x110000, stride) if not 0xD800 <= code < 0xE000]
    chars += [f"{SPACES}\U00011de0\U00011de9\U00016ff4\U00016ff6"[i] for i in range(len(SPACES) + 4)]
    pairs = [before + char for char in dict.fromkeys(chars) for before in "a1- "]
    tokens = dict.fromkeys([*(bytes([byte]) for byte in range(256)), *(pair.encode() for pair in pairs)])
    fast = FastBPE(pattern, list(tokens), list(range(len(tokens))))
    cut = CUTS[pattern].pre_tokenize_str
    assert [pair for pair in pairs if (len(cut(pair)) == 1) != (len(fast.encode(pair)) == 1)] == []


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_made_up_vocabulary_is_taken_only_if_its_ids_are_the_same(data: st.DataObject) -> None:
    """Rules as no training would leave them: halves out of order, tokens made twice or not by their own bytes."""
    tokens, rules = list("abc"), []
    for _ in range(data.draw(st.integers(1, 6))):
        rule = (data.draw(st.sampled_from(tokens)), data.draw(st.sampled_from(tokens)))
        rules.append(rule)
        tokens.append("".join(rule))
    tokenizer = by_rules(list(dict.fromkeys(rules)))
    fast = fast_bpe(tokenizer)
    if fast is not None:
        for text in data.draw(st.lists(st.text("abc", max_size=20), min_size=5, max_size=5)):
            assert same(tokenizer, fast, text)


REFUSED: dict[str, Tokenizer] = {
    "a token that its own bytes do not become": by_rules([("a", "b"), ("b", "c"), ("a", "bc")]),
    "a token made in two ways": by_rules([("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]),
    "whole words first": by_rules([("a", "b")], ignore_merges=True),
    "merges left out at random": by_rules([("a", "b")], dropout=1e-9),
}


@pytest.mark.parametrize("tokenizer", REFUSED.values(), ids=REFUSED)
def test_a_vocabulary_that_might_differ_is_left_to_tokenizers(tokenizer: Tokenizer) -> None:
    assert fast_bpe(tokenizer) is None


def test_what_changes_or_cuts_the_text_otherwise_is_left_to_tokenizers() -> None:
    assert taken(by_rules([("a", "b")]))
    for cut in (None, pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Whitespace()):
        tokenizer = by_rules([("a", "b")])
        tokenizer.pre_tokenizer = cut
        assert fast_bpe(tokenizer) is None
    changing = by_rules([("a", "b")])
    changing.normalizer = normalizers.NFC()
    assert fast_bpe(changing) is None
    adding = by_rules([("a", "b")])
    adding.add_tokens([AddedToken("whole", special=False)])
    assert fast_bpe(adding) is None
    lacking = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "?": 3}, [("a", "b")], unk_token="?"))
    lacking.pre_tokenizer = BYTE_LEVEL
    assert fast_bpe(lacking) is None


def test_ids_need_not_follow_the_rules() -> None:
    rules = [("a", "b"), ("b", "c"), ("ab", "bc")]
    tokens = ["abbc", "bc", *reversed(ALPHABET), "ab"]
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, rules))
    tokenizer.pre_tokenizer = BYTE_LEVEL
    for text in ("abbc", "abc", "bcab", "aabbcc"):
        assert same(tokenizer, taken(tokenizer), text)


def test_the_vocabularies_trained_here_are_taken(tmp_path: Path) -> None:
    train_tokenizer(iter(topics.values()), 600).save(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer._fast is not None
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("lone \ud800")
