"""Text becomes ids and comes back whole; special tokens are never typed."""

import json
import string
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from omniloom.errors import ConfigError, DataError
from omniloom.modality import text as text_module
from omniloom.modality.config import TokenizerConfig
from omniloom.modality.sequence import TEXT
from omniloom.modality.text import (
    BOS,
    EOS,
    SPECIAL_TOKENS,
    TextTokenizer,
    adopt_tokenizer,
    load_tokenizer,
    train_tokenizer,
)

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


@quiet
@given(st.lists(texts, max_size=8))
def test_a_batch_is_encoded_as_its_texts_one_by_one(batch: list[str]) -> None:
    encoded = TRAINED.encode_batch(batch)
    assert [ids.tolist() for ids in encoded] == [TRAINED.encode(text).tolist() for text in batch]
    assert all(ids.dtype == np.int32 for ids in encoded)


def test_256k_ids_may_be_asked_for() -> None:
    tokenizer = train_tokenizer(iter(LINES * 5), TokenizerConfig(vocab_size=262_144).vocab_size)
    assert 261 < tokenizer.vocab_size < 1_000  # there are no more merges in so little text


def word_level(path: Path, vocabulary: dict[str, int]) -> Path:
    """Another tool's tokenizer of whole words."""
    foreign = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    foreign.pre_tokenizer = pre_tokenizers.Whitespace()
    foreign.save(str(path))
    return path


def test_an_adopted_tokenizer_keeps_its_ids_and_gets_ours_behind_them(tmp_path: Path) -> None:
    word_level(tmp_path / "tokenizer.json", {"a": 0, "b": 1, "<s>": 2, "</s>": 3})
    for path in (tmp_path / "tokenizer.json", tmp_path):
        adopted = adopt_tokenizer(str(path))
        assert (adopted.bos_id, adopted.eos_id, adopted.placeholder_ids) == (4, 5, (5, 6, 7, 8))
        assert (adopted.vocab_size, adopted.encode("b a b").tolist()) == (9, [1, 0, 1])
    adopted.save(tmp_path / "corpus.json")
    loaded = load_tokenizer(tmp_path / "corpus.json")
    assert (loaded.bos_id, loaded.vocab_size, loaded.encode("b a").tolist()) == (4, 9, [1, 0])


def test_adopting_ours_changes_nothing(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "tokenizer.json")
    adopt_tokenizer(str(tmp_path)).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_a_special_token_that_a_vocabulary_has_as_a_word_keeps_its_id(tmp_path: Path) -> None:
    adopted = adopt_tokenizer(str(word_level(tmp_path / "a.json", {"a": 0, "<|eos|>": 1, "b": 2})))
    assert (adopted.bos_id, adopted.eos_id, adopted.placeholder_ids[1:]) == (3, 1, (4, 5, 6))


def test_a_vocabulary_with_holes_that_an_added_id_would_meet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has holes or shares ids: no token can be added"):
        adopt_tokenizer(str(word_level(tmp_path / "a.json", {"a": 0, "b": 5, "c": 2})))


def test_a_tokenizer_is_read_by_url(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "tokenizer.json")
    fsspec.filesystem("memory").pipe("/hub/tokenizer.json", (tmp_path / "tokenizer.json").read_bytes())
    assert adopt_tokenizer("memory://hub/tokenizer.json").encode(LINES[1]).tolist() == TRAINED.encode(LINES[1]).tolist()
    with pytest.raises(DataError, match=r"no tokenizer at memory://hub/none.json: FileNotFoundError"):
        adopt_tokenizer("memory://hub/none.json")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no tokenizer in .*one \*vocab.json and one \*merges.txt \(it holds 0 and 0\)"),
        ({"vocab.json": "{}"}, r"it holds 1 and 0"),
        ({"vocab.json": "{}", "a_vocab.json": "{}", "merges.txt": ""}, r"it holds 2 and 1"),
        ({"vocab.json": "[", "merges.txt": "#version: 0.2\n"}, "are no vocabulary of GPT-2's kind"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\na b\n"}, "are no vocabulary of GPT-2's kind"),
        ({"tokenizer.json": "{}"}, r"tokenizer.json is not a tokenizer.json"),
    ],
    ids=range(6),
)
def test_a_folder_without_a_tokenizer_is_refused(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        adopt_tokenizer(str(tmp_path))


@pytest.fixture(scope="session")
def gpt2(real_data: Path) -> tuple[TextTokenizer, Any]:
    """GPT-2's vocabulary as we read it, and as transformers does."""
    from transformers import GPT2TokenizerFast

    folder = real_data / "tokenizer" / "gpt2"
    theirs = GPT2TokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    return adopt_tokenizer(str(folder)), theirs


def test_gpt2s_ids_are_transformers_on_real_text(gpt2: tuple[TextTokenizer, Any], real_data: Path) -> None:
    ours, theirs = gpt2
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (50_262, 50_257, 50_258)
    assert ours.encode("Hello world").tolist() == [15_496, 995]
    for file in (real_data / "text" / "tinyshakespeare.txt", *sorted((real_data / "text" / "gutenberg").glob("*.txt"))):
        text = file.read_text(encoding="utf-8")[:200_000]
        assert ours.encode(text).tolist() == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == text


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts)
def test_gpt2s_ids_are_transformers_on_any_text(gpt2: tuple[TextTokenizer, Any], text: str) -> None:
    ours, theirs = gpt2
    assert ours.encode(text).tolist() == theirs(text)["input_ids"]


def test_gpt2s_own_end_is_text_when_typed_and_left_out_when_decoded(gpt2: tuple[TextTokenizer, Any]) -> None:
    ours, _ = gpt2
    assert 50_256 not in ours.encode("a<|endoftext|>b").tolist()
    assert ours.decode([50_256, *ours.encode("a cat"), 50_256]) == "a cat"


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


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("ab \n\t'1é.字 "), max_size=300), st.integers(1, 40))
def test_a_long_text_has_the_ids_of_the_whole(text: str, part: int) -> None:
    tokenizer = train_tokenizer(iter(["a b ab ba aab 'a bb. a\n b"] * 8), 300)
    whole = tokenizer.encode(text).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "PART_CHARACTERS", part)
        assert tokenizer.encode(text).tolist() == whole
        assert [ids.tolist() for ids in tokenizer.encode_batch(["b", text])] == [tokenizer.encode("b").tolist(), whole]


def test_a_long_text_is_encoded_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer(iter(["red green blue"] * 8), 300)
    seen: list[str] = []
    encode = tokenizer._encode_short
    monkeypatch.setattr(text_module, "PART_CHARACTERS", 100)
    monkeypatch.setattr(tokenizer, "_encode_short", lambda texts: seen.extend(texts) or encode(texts))
    tokenizer.encode("red green " * 100)
    assert max(map(len, seen)) < 120
    assert "".join(seen) == "red green " * 100


def test_a_vocabulary_whose_tokens_reach_over_spaces_gets_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, "a", "b", " ", "a ", "a b"])}
    bare = Tokenizer(models.BPE(vocabulary, [("a", " "), ("a ", "b")]))
    bare.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = TextTokenizer(bare, "bare")
    monkeypatch.setattr(text_module, "PART_CHARACTERS", 3)
    assert tokenizer.encode("a b" * 20).tolist() == [vocabulary["a b"]] * 20
