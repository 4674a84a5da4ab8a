"""Byte-level BPE by tiktoken, several times as fast as `tokenizers`, for vocabularies to which both give the same ids.

The two differ in three ways, and a vocabulary is taken only where none of them can be seen:

- `tokenizers` merges the pairs that its rules name, tiktoken any two neighbours that make a token together, and takes
  a whole word that is a token at once. Where each token is a byte, or what exactly one rule makes of two earlier
  tokens, and the rules make of each token's own bytes just that token, all three are one: no merge crosses a token's
  ends before it is made, so wherever it could be made its bytes have become the two halves that its one rule names.
- tiktoken merges in the order of ids. It is given the numbers of the rules instead, and a table turns them into ids.
- A regular expression cuts a text into words. Two ways are taken, that of GPT-2 and that of the vocabularies trained
  here, each written once more for tiktoken's engine.
"""

import json
from typing import Any

import numpy as np
import tiktoken
from tokenizers import Tokenizer, pre_tokenizers

LONGEST = 1 << 19  # characters of a text: tiktoken's engine holds a million states, and a run of spaces one for each
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Digits knows the numbers of Unicode 17, which the expressions' engines do not yet.
DIGIT = r"\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}"
OTHER = rf"[^\s\p{{L}}{DIGIT}]"
DIGITS_THEN_WORDS = rf"'(?:[sdmt]|ll|ve|re)| ?\p{{L}}++|[{DIGIT}]| ?{OTHER}++|\s++(?=[{DIGIT}])|\s++$|\s+(?!\S)|\s"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
CUTS = (([BYTE_LEVEL], WORDS), ([DIGITS, BYTE_LEVEL], DIGITS_THEN_WORDS))
PLAIN = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}


class FastBPE:
    """A vocabulary in tiktoken's hands."""

    def __init__(self, pattern: str, tokens: list[bytes], ids: list[int]) -> None:
        ranks = {token: rank for rank, token in enumerate(tokens)}
        self._encoding = tiktoken.Encoding("omniloom", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self._ids = np.asarray(ids, np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text of at most `LONGEST` characters, int32 (N,)."""
        return self._ids[self._encoding.encode_to_numpy(text, disallowed_special=())]


def fast_bpe(tokenizer: Tokenizer) -> FastBPE | None:
    """`tokenizer` in tiktoken's hands, or None where it is not shown that its ids would be the same."""
    told = json.loads(tokenizer.to_str())
    pattern, model = _pattern(told["pre_tokenizer"]), told["model"]
    takes_words_from_text = any(not token["special"] for token in told["added_tokens"])
    if pattern is None or told["normalizer"] is not None or takes_words_from_text or not _is_plain(model):
        return None
    made = _tokens(model["vocab"], [tuple(rule) for rule in model["merges"]])
    if made is None or any(len(tokenizer.model.tokenize(token)) != 1 for token in made):
        return None
    byte_of = _byte_of()
    tokens = [bytes(byte_of[char] for char in token) for token in made]
    return FastBPE(pattern, tokens, [model["vocab"][token] for token in made])


def _pattern(cuts: dict[str, Any] | None) -> str | None:
    steps = [] if cuts is None else cuts["pretokenizers"] if cuts["type"] == "Sequence" else [cuts]
    known = [{key: step[key] for key in step if key != "trim_offsets"} for step in steps]
    return next((pattern for cut, pattern in CUTS if cut == known), None)


def _is_plain(model: dict[str, Any]) -> bool:
    return model["type"] == "BPE" and all(model[key] == value for key, value in PLAIN.items())


def _tokens(vocabulary: dict[str, int], rules: list[tuple[str, str]]) -> list[str] | None:
    """The bytes and what each rule makes, in order; None where a byte, a half or a token is missing or made twice."""
    tokens = dict.fromkeys(_byte_of())
    if any(byte not in vocabulary for byte in tokens):
        return None
    for left, right in rules:
        if left not in tokens or right not in tokens or left + right in tokens or left + right not in vocabulary:
            return None
        tokens[left + right] = None
    return list(tokens)


def _byte_of() -> dict[str, int]:
    """The byte that each of GPT-2's 256 characters stands for: itself where it can be printed, the rest in order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printed = [ord(char) for char in alphabet if ord(char) < 256]
    rest = sorted(set(range(256)) - set(printed))
    return dict(zip(alphabet, printed + rest, strict=True))
