"""Text becomes ids by byte-level BPE: `tokenizers` trains and reads vocabularies, tiktoken encodes where it may."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from omniloom.errors import ConfigError, DataError
from omniloom.modality.bpe import LONGEST, FastBPE, fast_bpe
from omniloom.modality.sequence import TEXT, Segment

BOS, EOS = "<|bos|>", "<|eos|>"
PLACEHOLDERS = ("<|image|>", "<|audio|>", "<|video|>")  # modality 1, 2, 3
SPECIAL_TOKENS = (BOS, EOS, *PLACEHOLDERS)
BYTES = 256
PART_CHARACTERS = 1 << 18  # of a text encoded at once: the library holds 400 bytes a token meanwhile
BETWEEN_WORDS = re.compile(r"[^\W\d_]\s[^\W\d_]")
SURROUNDINGS = 64  # characters on each side that say whether a word begins
MISSES = 16
GPT2_END = "<|endoftext|>"


class TextTokenizer:
    """The vocabulary of one corpus, with the ids of its special tokens; a foreign model's has no placeholders."""

    def __init__(self, tokenizer: Tokenizer, name: str, foreign: tuple[str, str] | None = None) -> None:
        bos, eos = foreign or (BOS, EOS)
        asked = SPECIAL_TOKENS if foreign is None else foreign
        missing = [token for token in asked if tokenizer.token_to_id(token) is None]
        if missing:
            raise ConfigError(f"tokenizer {name} lacks the special tokens {', '.join(missing)}; omniloom needs each")
        # Special tokens written out in a user's text are ordinary text: nobody types a placeholder into a prompt.
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()  # a foreign file may ask for both
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        ids = {token: int(tokenizer.token_to_id(token) or 0) for token in asked}  # none is missing
        self.bos_id, self.eos_id = ids[bos], ids[eos]
        # By modality; text has no placeholder of its own.
        self.placeholder_ids = (self.eos_id, *(ids[token] for token in PLACEHOLDERS if foreign is None))

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids, the special tokens included, and holes where a foreign vocabulary has some."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32 (N,); no special token is ever among them. A long text is encoded part by part."""
        return np.concatenate([self._encode_short([part])[0] for part in self._parts(text)])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as `encode` gives them."""
        short = iter(self._encode_short([text for text in texts if len(text) <= PART_CHARACTERS]))
        return [next(short) if len(text) <= PART_CHARACTERS else self.encode(text) for text in texts]

    @cached_property
    def _fast(self) -> FastBPE | None:
        return fast_bpe(self._tokenizer)

    def _encode_short(self, texts: list[str]) -> list[np.ndarray]:
        if self._fast is not None and all(len(text) <= LONGEST for text in texts):
            return [self._fast.encode(text) for text in texts]
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(one.ids, dtype=np.int32) for one in encoded]

    def _parts(self, text: str) -> Iterator[str]:
        """A text cut between words where the vocabulary's own rule for words cuts it too: the ids are the same.

        Not where it changes the text first, or cuts otherwise: then the rest is one part.
        """
        begin = at = misses = 0
        while misses < MISSES and self._tokenizer.normalizer is None:
            found = BETWEEN_WORDS.search(text, max(begin + PART_CHARACTERS, at))
            if found is None:
                break
            at = found.start() + 1
            if self._begins_word(text, at):
                yield text[begin:at]
                begin, misses = at, 0
            else:
                misses += 1
        yield text[begin:]

    def _begins_word(self, text: str, at: int) -> bool:
        rule, before = self._tokenizer.pre_tokenizer, min(at, SURROUNDINGS)
        around = text[at - before : at + SURROUNDINGS]
        return rule is not None and any(start == before for _, (start, _) in rule.pre_tokenize_str(around))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens are left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def decoding(self) -> Callable[[int], str]:
        """Text id by id: each call gives what the id completes, nothing in the middle of a character."""
        stream = decoders.DecodeStream(skip_special_tokens=True)
        return lambda id: stream.step(self._tokenizer, id) or ""

    def segment(self, text: str, is_target: bool = True) -> Segment:
        """A text segment of the unified sequence."""
        return text_segment(self.encode(text), is_target)

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        self._tokenizer.save(str(path))


def text_segment(ids: np.ndarray, is_target: bool) -> Segment:
    """Ids int32 (N,) as a segment of the unified sequence."""
    return Segment(TEXT, ids, np.zeros((len(ids), 3), np.int32), is_target=is_target)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> TextTokenizer:
    """Train a byte-level BPE with single digits on `texts`."""
    least = BYTES + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ConfigError(
            f"a byte-level vocabulary needs {BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens, {least} in all: "
            f"raise tokenizer.vocab_size={vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return TextTokenizer(tokenizer, "just trained")


def adopt_tokenizer(path: str) -> TextTokenizer:
    """Read anybody's tokenizer for a corpus of ours: a file, a folder or a URL of a tokenizer.json.

    A folder holds tokenizer.json, or GPT-2's vocab.json and merges.txt, whatever stands before these names. Special
    tokens of ours that it lacks are added behind its own ids, which stay what they are. Documents begin and end with
    ours even where it has a bos and eos of its own: one rule for all vocabularies, and its own keep their meaning.
    Raises DataError where there is none, or where its vocabulary has holes that the added ids would meet.
    """
    tokenizer = _read_anybodys(path)
    before = tokenizer.get_vocab(with_added_tokens=True)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    after = tokenizer.get_vocab(with_added_tokens=True)
    if len(set(after.values())) < len(after) or any(after[token] != id for token, id in before.items()):
        raise DataError(f"the vocabulary of {path} has holes or shares ids: no token can be added to it")
    return TextTokenizer(tokenizer, path)


def _read_anybodys(path: str) -> Tokenizer:
    if "://" in path:
        import fsspec

        try:
            with fsspec.open(path, "rb") as stream:
                return Tokenizer.from_buffer(stream.read())
        except Exception as error:  # each store has its own
            raise DataError(f"no tokenizer at {path}: {type(error).__name__}: {error}") from error
    file = Path(path)
    if not file.is_dir():
        return _read(file)
    if (file / "tokenizer.json").is_file():
        return _read(file / "tokenizer.json")
    vocabularies, merges = sorted(file.glob("*vocab.json")), sorted(file.glob("*merges.txt"))
    if len(vocabularies) != 1 or len(merges) != 1:
        raise DataError(
            f"no tokenizer in {path}: tokenizer.path must hold tokenizer.json, or one *vocab.json and one *merges.txt "
            f"(it holds {len(vocabularies)} and {len(merges)})"
        )
    return _read_gpt2(vocabularies[0], merges[0])


def _read_gpt2(vocabulary: Path, merges: Path) -> Tokenizer:
    """GPT-2's byte-level BPE from its two files."""
    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises bare Exception for malformed files
        raise DataError(f"{vocabulary} and {merges} are no vocabulary of GPT-2's kind: {error}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id(GPT2_END) is not None:
        tokenizer.add_special_tokens([GPT2_END])
    return tokenizer


def load_tokenizer(path: Path, may_be_foreign: bool = False) -> TextTokenizer:
    """Read a corpus's or a model's `tokenizer.json`; raises DataError where it is missing or no tokenizer.

    Where it may be foreign, a tokenizer_config.json beside it that names other tokens for the beginning and the end of
    a document makes it so: it serves text alone.
    """
    tokenizer = _read(path)
    try:
        foreign = _foreign_ends(path.with_name("tokenizer_config.json")) if may_be_foreign else None
        return TextTokenizer(tokenizer, str(path), foreign)
    except (ConfigError, DataError):
        raise
    except Exception as error:  # a tokenizer_config.json that is none
        raise DataError(f"{path} is not a tokenizer.json: {error}") from error


def _read(path: Path) -> Tokenizer:
    if not path.is_file():
        raise DataError(f"no tokenizer at {path}: set tokenizer.path to a tokenizer.json, or leave it out to train one")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for malformed files
        raise DataError(f"{path} is not a tokenizer.json: {error}") from error


def _foreign_ends(path: Path) -> tuple[str, str] | None:
    """bos and eos as a Hugging Face folder names them, eos for both where it has no bos; None where they are ours."""
    if not path.is_file():
        return None
    named = json.loads(path.read_bytes())
    bos, eos = (_content(named.get(key)) for key in ("bos_token", "eos_token"))
    if eos is None:
        raise DataError(f"{path} names no eos_token: documents could not be told apart")
    return None if (bos, eos) == (BOS, EOS) else (bos or eos, eos)


def _content(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token
