"""Text becomes ids by byte-level BPE (the `tokenizers` library)."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from omniloom.errors import ConfigError, DataError
from omniloom.modality.sequence import TEXT, Segment

BOS, EOS = "<|bos|>", "<|eos|>"
PLACEHOLDERS = ("<|image|>", "<|audio|>", "<|video|>")  # modality 1, 2, 3
SPECIAL_TOKENS = (BOS, EOS, *PLACEHOLDERS)
BYTES = 256


class TextTokenizer:
    """The vocabulary of one corpus, with the ids of its special tokens."""

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        missing = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
        if missing:
            raise ConfigError(f"tokenizer {name} lacks the special tokens {', '.join(missing)}; omniloom needs each")
        # Special tokens written out in a user's text are ordinary text: nobody types a placeholder into a prompt.
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()  # a foreign file may ask for both
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        ids = {token: int(tokenizer.token_to_id(token) or 0) for token in SPECIAL_TOKENS}  # none is missing
        self.bos_id, self.eos_id = ids[BOS], ids[EOS]
        # By modality; text has no placeholder of its own.
        self.placeholder_ids = (self.eos_id, *(ids[token] for token in PLACEHOLDERS))

    @property
    def vocab_size(self) -> int:
        """Number of ids, the special tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32 (N,); no special token is ever among them."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens are left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def segment(self, text: str, is_target: bool = True) -> Segment:
        """A text segment of the unified sequence."""
        ids = self.encode(text)
        return Segment(TEXT, ids, np.zeros((len(ids), 3), np.int32), is_target=is_target)

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        self._tokenizer.save(str(path))


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


def load_tokenizer(path: Path) -> TextTokenizer:
    """Read an existing `tokenizer.json`; raises DataError where it is missing or no tokenizer."""
    if not path.is_file():
        raise DataError(f"no tokenizer at {path}: set tokenizer.path to a tokenizer.json, or leave it out to train one")
    try:
        return TextTokenizer(Tokenizer.from_file(str(path)), str(path))
    except ConfigError:
        raise
    except Exception as error:  # the library raises bare Exception for malformed files
        raise DataError(f"{path} is not a tokenizer.json: {error}") from error
