"""The media of a task's prompts: decoded once, left out, or given to another document."""

import io
import random
import re
import wave
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lm_eval.api.instance import Instance
from PIL import Image

from omniloom.errors import DataError
from omniloom.modality.config import ModalityConfig
from omniloom.modality.files import Media
from omniloom.modality.media import read_media
from omniloom.modality.sequence import Segment

Control = Literal["kept", "removed", "shuffled"]
# Where a prompt shows a medium, and the lm-eval argument that holds it: "visual" has pictures and videos in order.
PLACEHOLDERS = {"<image>": ("image", "visual"), "<video>": ("video", "visual"), "<audio>": ("audio", "audio")}
SHUFFLE_SEED = 0


def split_prompt(prompt: str) -> list[str]:
    """A prompt as text, placeholder, text, placeholder, …, text."""
    return re.split("(" + "|".join(PLACEHOLDERS) + ")", prompt)


class PromptMedia:
    """Each request's media under one control, in order of appearance."""

    def __init__(self, modality: ModalityConfig, control: Control) -> None:
        self._modality, self._control = modality, control
        self._decoded: dict[tuple[str, str | int], list[Segment]] = {}
        self._held: list[Any] = []  # media in memory: one that is gone leaves its id to the next

    def of(self, requests: list[Instance]) -> list[list[list[Segment]]]:
        """The segments that stand at each request's placeholders; none for a medium that is left out."""
        shown = [self._shown(request) for request in requests]
        if self._control == "removed":
            return [[[] for _ in mine] for mine in shown]
        if self._control == "shuffled":
            shown = _shuffle(requests, shown)
        return [[self._decode(kind, medium) for kind, medium in mine] for mine in shown]

    def _shown(self, request: Instance) -> list[tuple[str, Any]]:
        """(kind, medium) at each placeholder."""
        held = {name: list(media) for name, media in (request.args[2] if len(request.args) > 2 else {}).items()}
        given = {name: len(media) for name, media in held.items()}
        shown: list[tuple[str, Any]] = []
        asked: dict[str, int] = {}
        for part in split_prompt(request.args[0])[1::2]:
            kind, argument = PLACEHOLDERS[part]
            asked[argument] = asked.get(argument, 0) + 1
            if held.get(argument):
                shown.append((kind, held[argument].pop(0)))
        if asked != {name: count for name, count in given.items() if count}:
            raise DataError(
                f"task {request.task_name}: a prompt shows {asked or 'no media'} and is given {given or 'none'}"
            )
        return shown

    def _decode(self, kind: str, medium: Any) -> list[Segment]:
        is_file = isinstance(medium, str | Path)
        key = (kind, str(medium) if is_file else id(medium))
        if key not in self._decoded:
            content = Path(medium) if is_file else _as_file(medium)
            self._decoded[key] = read_media(kind, Media(str(key[1]), content), self._modality)
            self._held.append(medium)
        return self._decoded[key]


def _as_file(medium: Any) -> bytes:
    """A Pillow picture, or sound as lm-eval hands it over ({"array", "sampling_rate"}), as the bytes of a file."""
    stream = io.BytesIO()
    if isinstance(medium, Image.Image):
        medium.save(stream, format="PNG")
    else:
        with wave.open(stream, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(int(medium["sampling_rate"]))
            file.writeframes((np.clip(medium["array"], -1, 1) * 32_767).astype("<i2").tobytes())
    return stream.getvalue()


def _shuffle(requests: list[Instance], shown: list[list[tuple[str, Any]]]) -> list[list[tuple[str, Any]]]:
    """Every document gets the media of another with as many of each kind, the same for all its requests."""
    of_document = {(r.task_name, r.doc_id): mine for r, mine in zip(requests, shown, strict=True)}
    alike: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    for key in sorted(of_document):
        alike.setdefault((key[0], *(kind for kind, _ in of_document[key])), []).append(key)
    follower: dict[tuple[str, int], tuple[str, int]] = {}
    for (task, *kinds), documents in alike.items():
        if kinds and len(documents) == 1:
            raise DataError(f"task {task} has one document of its kind: its media cannot be shuffled with another's")
        drawn = random.Random(SHUFFLE_SEED).sample(documents, len(documents))
        follower |= dict(zip(drawn, drawn[1:] + drawn[:1], strict=True))  # one cycle: nobody keeps its own
    return [of_document[follower[r.task_name, r.doc_id]] for r in requests]
