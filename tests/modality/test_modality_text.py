"""Text becomes ids and comes back whole; special tokens are never typed."""

import json
import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from omniloom.errors import ConfigError, DataError
from omniloom.modality.sequence import TEXT
from omniloom.modality.text import BOS, EOS, SPECIAL_TOKENS, load_tokenizer, train_tokenizer

LINES = [
    "The cat sat on the mat, and the cat was fat.",
    "In 1984 and 2024 the <|image|> of a cat: 3.14159",
    "naïve 猫 🐈",
]
TRAINED = train_tokenizer(iter(LINES * 5), 340)
BYTES_ONLY = train_tokenizer(iter(LINES), 261)
SPECIAL_IDS = {TRAINED.bos_id, TRAINED.eos_id, *TRAINED.placeholder_ids}

quiet = settings(max_examples=150, deadline=None)
pieces = st.sampled_from([*SPECIAL_TOKENS, *" \n\t\r09aé猫\u200b\ufeff"])
texts = st.text() | st.lists(pieces).map("".join)


def foreign_tokenizer(path: Path, **changes: object) -> Path:
    """A tokenizer.json as another tool may have left it."""
    TRAINED.save(path)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return path


@quiet
@given(texts)
@example("line\r\nline\n\n  end ")
@example("<|image|><|eos|>")
def test_decoding_an_encoded_text_gives_it_back(text: str) -> None:
    for tokenizer in (TRAINED, BYTES_ONLY):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@quiet
@given(texts)
def test_no_text_gives_a_special_id(text: str) -> None:
    ids = TRAINED.encode(text)
    assert not SPECIAL_IDS & set(ids.tolist())
    assert ((ids >= 0) & (ids < TRAINED.vocab_size)).all()


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_a_typed_special_token_is_plain_text(token: str, tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "tokenizer.json")
    for tokenizer in (TRAINED, load_tokenizer(tmp_path / "tokenizer.json")):
        ids = tokenizer.encode(f"see {token} here")
        assert not SPECIAL_IDS & set(ids.tolist())
        assert tokenizer.decode(ids) == f"see {token} here"


def test_special_tokens_stand_first_and_are_left_out_of_text() -> None:
    assert (TRAINED.bos_id, TRAINED.eos_id, TRAINED.placeholder_ids[1:]) == (0, 1, (2, 3, 4))
    assert TRAINED.decode([0, *TRAINED.encode("a cat"), 2, 2, 1]) == "a cat"


def test_ids_of_bytes_by_hand() -> None:
    # 5 special tokens, then the bytes 33 to 126 ('H' is 72 − 33 + 5), 161 to 172, 174 to 255, then the others.
    assert BYTES_ONLY.encode("Hi!").tolist() == [44, 77, 5]
    assert BYTES_ONLY.encode("a a").tolist() == [69, 225, 69]
    assert BYTES_ONLY.encode("é").tolist() == [5 + 94 + 12 + 0xC3 - 174, 5 + 94 + 0xA9 - 161]


@quiet
@given(st.text(string.digits + " .a", max_size=20))
def test_each_digit_is_a_token_of_its_own(text: str) -> None:
    tokens = [TRAINED.decode([i]) for i in TRAINED.encode(text)]
    assert sum(token in tuple(string.digits) for token in tokens) == sum(c in string.digits for c in text)


def test_words_of_the_training_text_are_merged() -> None:
    assert len(TRAINED.encode(" cat")) == 1
    assert len(TRAINED.encode("19842024")) == 8
    assert TRAINED.vocab_size > BYTES_ONLY.vocab_size


def test_encoded_text_has_the_contracts_dtype() -> None:
    for text in ("", "a cat"):
        segment = TRAINED.segment(text)
        assert segment.content.dtype == np.int32
        assert (segment.position.dtype, segment.position.shape) == (np.int32, (len(segment), 3))
        assert not segment.position.any()
        assert segment.modality == TEXT
    assert TRAINED.segment("a").is_target
    assert not TRAINED.segment("a", is_target=False).is_target


def test_too_small_a_vocabulary_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"261 in all.*tokenizer.vocab_size=260"):
        train_tokenizer(iter(LINES), 260)


@pytest.mark.parametrize("size", [261, 300])
def test_the_vocabulary_has_the_size_asked_for(size: int) -> None:
    assert train_tokenizer(iter(LINES * 5), size).vocab_size == size


def test_training_twice_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_tokenizer(iter(LINES * 5), 320).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_saved_tokenizer_loads_equal(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.vocab_size == TRAINED.vocab_size
    assert loaded.encode(LINES[1]).tolist() == TRAINED.encode(LINES[1]).tolist()


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"not json", b"\xff\xfe", b'{"model": {"type": "BPE", "vocab": {"a": 0}}}'],
)
def test_a_file_that_is_no_tokenizer_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        load_tokenizer(path)


def test_a_missing_tokenizer_is_refused_with_its_key(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DataError, match=r"no tokenizer at .*tokenizer\.path"):
            load_tokenizer(path)


def test_a_tokenizer_without_our_special_tokens_is_refused_with_their_names(tmp_path: Path) -> None:
    path = foreign_tokenizer(tmp_path / "tokenizer.json", added_tokens=[])
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["vocab"] = {t: i for t, i in content["model"]["vocab"].items() if t != "<|image|>"}
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"lacks the special tokens <\|image\|>; "):
        load_tokenizer(path)


def test_a_foreign_tokenizer_serves_text_by_the_ends_that_its_folder_names(tmp_path: Path) -> None:
    foreign = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<s>": 2, "</s>": 3}, unk_token="a"))
    foreign.pre_tokenizer = pre_tokenizers.Whitespace()
    foreign.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="lacks the special tokens"):
        load_tokenizer(tmp_path / "tokenizer.json", may_be_foreign=True)
    named = tmp_path / "tokenizer_config.json"
    for content, ends in [
        ({"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}, (2, 3)),
        ({"bos_token": None, "eos_token": "</s>"}, (3, 3)),
    ]:
        named.write_text(json.dumps(content))
        loaded = load_tokenizer(tmp_path / "tokenizer.json", may_be_foreign=True)
        assert (loaded.bos_id, loaded.eos_id, loaded.encode("b a b").tolist()) == (*ends, [1, 0, 1])
        with pytest.raises(ConfigError, match="lacks the special tokens"):
            load_tokenizer(tmp_path / "tokenizer.json")  # of a corpus: it must have placeholders
    named.write_text(json.dumps({"bos_token": "<s>"}))
    with pytest.raises(DataError, match="names no eos_token"):
        load_tokenizer(tmp_path / "tokenizer.json", may_be_foreign=True)
    named.write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))
    TRAINED.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json", may_be_foreign=True).placeholder_ids == TRAINED.placeholder_ids


def test_a_foreign_tokenizers_truncation_and_padding_do_not_touch_a_document(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    TRAINED.save(path)
    foreign = Tokenizer.from_file(str(path))
    foreign.enable_truncation(max_length=4)
    foreign.enable_padding(length=64, pad_id=1, pad_token="<|eos|>")
    foreign.save(str(path))
    text = "the cat sat on the mat and was fat"
    assert load_tokenizer(path).encode(text).tolist() == TRAINED.encode(text).tolist()


def test_real_texts_come_back_whole(real_data: Path) -> None:
    plays = (real_data / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    tokenizer = train_tokenizer(iter(plays[:200_000].splitlines(keepends=True)), 1_000)
    assert tokenizer.vocab_size == 1_000
    books = sorted((real_data / "text" / "gutenberg").glob("*.txt"))
    assert len(books) >= 3
    for text in (plays, *(book.read_text(encoding="utf-8") for book in books)):
        part = text[:150_000]
        ids = tokenizer.encode(part)
        assert tokenizer.decode(ids) == part
        assert len(ids) < 0.6 * len(part)
        assert not {tokenizer.bos_id, tokenizer.eos_id, *tokenizer.placeholder_ids} & set(ids.tolist())
