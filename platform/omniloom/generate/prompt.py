"""A prompt's text and files become a document that the model goes on from."""

import re
from pathlib import Path

from pydantic import TypeAdapter

from omniloom.errors import ConfigError, DataError, did_you_mean
from omniloom.modality.config import ModalityConfig
from omniloom.modality.files import Media
from omniloom.modality.media import read_media
from omniloom.modality.sequence import Document, Segment, weave
from omniloom.modality.text import TextTokenizer, load_tokenizer
from omniloom.model.load import Model

KINDS = ("image", "audio", "video")
# {image:path}; what else stands in braces is text, but for a word that is nearly one of the kinds.
MEDIUM = re.compile(r"\{([A-Za-z]+):([^{}]+)\}")


class Prompter:
    """Reads prompts for one model, by its own vocabulary and its own rules for media."""

    def __init__(self, model: Model) -> None:
        self.text: TextTokenizer = load_tokenizer(model.folder / "tokenizer.json", may_be_foreign=True)
        rules = model.folder / "modality.json"  # a Hugging Face folder has none, and reads text alone
        self.modality = (
            TypeAdapter(ModalityConfig).validate_json(rules.read_bytes()) if rules.is_file() else ModalityConfig()
        )
        self._decoder = model.decoder

    def document(self, prompt: str) -> Document:
        """bos, then the text and files of `Which digit is this? {image:seven.png}` in their order.

        Raises ConfigError for an empty prompt and a medium that the model has no encoder for, DataError for a file that
        cannot be read.
        """
        return self.woven(self.segments(prompt))

    def segments(self, prompt: str) -> list[Segment]:
        """Text and files of a prompt; raises as `document` does."""
        if not prompt.strip():
            raise ConfigError("the prompt is empty: set prompt='…', text and {image:file}, {audio:file}, {video:file}")
        segments: list[Segment] = []
        done = 0
        for found in MEDIUM.finditer(prompt):
            kind, path = found.groups()
            if kind not in KINDS:
                if "mean" not in (near := did_you_mean(kind, KINDS)):
                    continue  # text that happens to have braces
                raise ConfigError(f"a prompt holds no {kind}: {found.group()}; {near}")
            segments += self._text(prompt[done : found.start()])
            segments += self.medium(kind, Path(path).expanduser())
            done = found.end()
        return segments + self._text(prompt[done:])

    def _text(self, text: str) -> list[Segment]:
        return [self.text.segment(text, is_target=False)] if text else []

    def medium(self, kind: str, path: Path) -> list[Segment]:
        """A file's segments."""
        if getattr(self._decoder.media, kind) is None or len(self.text.placeholder_ids) == 1:
            raise ConfigError(f"the model has no encoder for {kind}: it cannot read {path}")
        segments = read_media(kind, Media(str(path), path), self.modality)
        lacking = {name for segment in segments if (name := ("text", *KINDS)[segment.modality]) != "text"
                   and getattr(self._decoder.media, name) is None}  # fmt: skip
        if lacking:
            raise ConfigError(
                f"the model has no encoder for {', '.join(lacking)}, which {path} holds beside its {kind}"
            )
        return segments

    def woven(self, segments: list[Segment], begins: bool = True) -> Document:
        """Segments as a document that goes on: no eos, and bos where it begins."""
        woven = weave(
            [segment for segment in segments if len(segment)],
            self.text.bos_id,
            self.text.eos_id,
            self.text.placeholder_ids,
            self.modality.widths,
        )
        if not begins and len(woven) == 2:
            raise DataError("nothing is added: no text and no file")
        return woven.window(0 if begins else 1, len(woven) - 1)
