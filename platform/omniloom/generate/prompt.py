"""A prompt's text and files become a document that the model goes on from."""

import base64
import binascii
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from omniloom.errors import ConfigError, DataError, did_you_mean
from omniloom.modality.config import ModalityConfig
from omniloom.modality.dialogue import MEDIA
from omniloom.modality.files import Media
from omniloom.modality.media import read_media
from omniloom.modality.sequence import Document, Segment, weave
from omniloom.modality.text import TextTokenizer, load_tokenizer
from omniloom.model.load import Model

HERE = Path()
# {image:path}; what else stands in braces is text, but for a word that is nearly one of the kinds.
MEDIUM = re.compile(r"\{([A-Za-z]+):([^{}]+)\}")


@dataclass(frozen=True)
class Medium:
    """A file of a prompt, read."""

    kind: str  # image, audio or video
    name: str  # as it was named
    segments: list[Segment]


class Prompter:
    """Reads prompts for one model, by its own vocabulary and its own rules for media."""

    def __init__(self, model: Model) -> None:
        self.text: TextTokenizer = load_tokenizer(model.folder / "tokenizer.json", may_be_foreign=True)
        rules = model.folder / "modality.json"  # a Hugging Face folder has none, and reads text alone
        self.modality = (
            TypeAdapter(ModalityConfig).validate_json(rules.read_bytes()) if rules.is_file() else ModalityConfig()
        )
        self._decoder = model.decoder

    @property
    def context(self) -> int:
        """Tokens that the model can see."""
        return self._decoder.config.max_position_embeddings

    def document(self, prompt: str, folder: Path = HERE) -> Document:
        """bos, then the text and files of `Which digit is this? {image:seven.png}` in their order; relative paths begin
        at `folder`.

        Raises ConfigError for an empty prompt and a medium that the model has no encoder for, DataError for a file that
        cannot be read.
        """
        return self.woven(self.segments(prompt, folder))

    def segments(self, prompt: str, folder: Path = HERE) -> list[Segment]:
        """Text and files of a prompt; raises as `document` does."""
        return self.encoded((part, False) for part in self.parts(prompt, folder))

    def parts(self, prompt: str, folder: Path = HERE) -> list[str | Medium]:
        """Text and files of a prompt in their order, text not encoded yet; raises as `document` does."""
        if not prompt.strip():
            raise ConfigError("the prompt is empty: set prompt='…', text and {image:file}, {audio:file}, {video:file}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the prompt is not UTF-8, from character {error.start} on") from error
        parts: list[str | Medium] = []
        done = 0
        for found in MEDIUM.finditer(prompt):
            kind, path = found.groups()
            if kind not in MEDIA:
                if "mean" not in (near := did_you_mean(kind, MEDIA)):
                    continue  # text that happens to have braces
                raise ConfigError(f"a prompt holds no {kind}: {found.group()}; {near}")
            parts += [prompt[done : found.start()], self.medium(kind, path, folder)]
            done = found.end()
        return [part for part in [*parts, prompt[done:]] if part != ""]

    def encoded(self, parts: Iterable[tuple[str | Medium | Segment, bool]]) -> list[Segment]:
        """Parts, each with whether it is a target, as segments."""
        segments: list[Segment] = []
        for part, is_target in parts:
            if isinstance(part, Medium):
                segments += part.segments
            else:
                segments.append(self.text.segment(part, is_target) if isinstance(part, str) else part)
        return segments

    def medium(self, kind: str, name: str, folder: Path = HERE) -> Medium:
        """A file, or what a data: URL holds."""
        media = _media(kind, name, folder)
        if getattr(self._decoder.media, kind) is None or len(self.text.placeholder_ids) == 1:
            raise ConfigError(f"the model has no encoder for {kind}: it cannot read {media.name}")
        try:
            segments = read_media(kind, media, self.modality)
        except DataError as error:
            raise error if media.name in str(error) else DataError(f"{media.name}: {error}") from error
        kinds = {MEDIA[segment.modality - 1] for segment in segments if segment.modality}
        lacking = [held for held in MEDIA if held in kinds and getattr(self._decoder.media, held) is None]
        if lacking:
            raise ConfigError(
                f"the model has no encoder for {', '.join(lacking)}, which {media.name} holds beside its {kind}"
            )
        return Medium(kind, name, segments)

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


def _media(kind: str, name: str, folder: Path) -> Media:
    if name[:5].lower() == "data:":
        head, _, data = name.partition(",")
        try:
            if head.endswith(";base64"):
                return Media(f"the {kind} of a data: URL", base64.b64decode(data, validate=True))
        except binascii.Error as error:
            raise DataError(f"the {kind} of a data: URL is not base64: {error}") from error
        raise DataError(f"the {kind} of a data: URL is not in base64")
    if "://" in name:
        raise DataError(f"{name[:200]} is no file: prompts read files of this machine and data: URLs")
    path = folder / os.path.expanduser(name)
    return Media(str(path), path)
