"""The demo's corpus: every source split by file, near-duplicates, voices and pictures on one side of the split."""

import math
import random
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from omniloom.data.samples.files import answered, asked, document, question, write_jsonl, write_mp4, write_wav
from omniloom.data.samples.needles import DOCUMENTS, needle_documents
from omniloom.data.samples.speech import Speaker, spoken_digits
from omniloom.errors import ConfigError
from omniloom.modality.text import train_tokenizer

SPLIT_SEED = 0  # the held-out files never depend on the run's seed: scores of different seeds stay comparable
DIGITS = [str(digit) for digit in range(10)]
PICTURE_QUESTIONS = ("Which digit is this?", "What number is shown?", "Read the digit.")
SPEECH_QUESTION = "Which digit is spoken?"
VIDEO_QUESTION, MOTION_QUESTION = "Which digit moves?", "Which way does it move?"
MATCHING_QUESTION = "Is the spoken digit the one in the picture?"
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
YES_NO = ["yes", "no"]
VIDEO_PIXELS, DIGIT_PIXELS, VIDEO_FRAMES, VIDEO_RATE = 32, 16, 16, 8
TAKES = 2  # of each spoken digit by each voice
VARIANTS = 2  # of each training picture
MATCHING_DOCUMENTS, MATCHING_QUESTIONS = 9_000, 400
VIDEO_QUESTIONS = 240
HELDOUT_NEEDLES = 60  # documents of each length
RULER_VOCABULARY = 1_280
PARTS = 2  # files of each source: as many workers can read them

# Shares of the training tokens, and the weight of each target in the loss: a medium's one answer a document would
# drown among the targets of the text.
WEIGHTS = {
    "topics": (0.27, 1.0),
    "digits": (0.03, 10.0),
    "speech": (0.02, 10.0),
    "videos": (0.18, 10.0),
    "matching": (0.2, 15.0),
    **{f"needles_{length}": (0.075, 4.0) for length in DOCUMENTS},
}


def write_demo(folder: Path) -> dict[str, Any]:
    """Write the files and return the manifest's sources."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ConfigError("samples=demo needs scikit-learn: pip install 'omniloom[demo]'") from error
    texts = _write_topics(folder / "topics")
    pictures = _write_digits(folder / "digits")
    voices = _write_speech(folder / "speech")
    _write_videos(folder / "videos", folder / "digits", pictures)
    _write_matching(folder / "matching", pictures, voices)
    _write_needles(folder / "needles", texts)
    sources: dict[str, Any] = {
        "topics": {"format": "text", "train": ["topics/train/*.txt"], "heldout": ["topics/heldout/*.txt"]}
    }
    for name in ("digits", "speech", "videos", "matching"):
        files = {"train": [f"{name}/train-*.jsonl"], "heldout": [f"{name}/heldout.jsonl"]}
        sources[name] = {"format": "interleaved", **files}
    for length in DOCUMENTS:
        files = {"train": [f"needles/train-{length}-*.jsonl"], "heldout": [f"needles/heldout-{length}.jsonl"]}
        sources[f"needles_{length}"] = {"format": "interleaved", **files}
    for name, (weight, loss_weight) in WEIGHTS.items():
        sources[name] |= {"weight": weight, "loss_weight": loss_weight}
    return sources


def _write_topics(folder: Path) -> dict[str, list[str]]:
    """The standard library's help topics, one file each; topics that share a passage lie on one side of the split."""
    from pydoc_data.topics import topics

    from sklearn.feature_extraction.text import CountVectorizer

    names = sorted(topics)
    shingles = CountVectorizer(ngram_range=(8, 8), binary=True, token_pattern=r"\w+")
    # Shorter than a shingle: padded with its own name, which no other topic holds.
    seen = shingles.fit_transform([f"{topics[name]} {' '.join([name] * 8)}" for name in names])
    shared = (seen @ seen.T).toarray()
    smaller = np.minimum.outer(shared.diagonal(), shared.diagonal())
    heldout = _heldout(shared > 0.1 * smaller, share=0.15)
    texts: dict[str, list[str]] = {"train": [], "heldout": []}
    for name, is_heldout in zip(names, heldout, strict=True):
        split = "heldout" if is_heldout else "train"
        path = folder / split / f"{name.replace('/', '_')}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(topics[name], encoding="utf-8")
        texts[split].append(topics[name])
    return texts


Pictures = dict[str, list[tuple[str, str]]]  # by split: file and digit


def _write_digits(folder: Path) -> Pictures:
    """scikit-learn's 8 × 8 handwritten digits as png, with questions; near-equal pictures lie on one side.

    Each training picture comes again in variants, a little turned, sheared and shifted.
    """
    from sklearn.datasets import load_digits
    from sklearn.neighbors import radius_neighbors_graph

    images, labels = load_digits(return_X_y=True)
    heldout = _heldout(radius_neighbors_graph(images, radius=8.0), share=0.2)
    (folder / "png").mkdir(parents=True, exist_ok=True)
    pictures: Pictures = {"train": [], "heldout": []}
    generator = random.Random(SPLIT_SEED)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        picture = Image.fromarray((image.reshape(8, 8) * 255 / 16).round().astype(np.uint8))
        variants = [picture] if heldout[number] else [picture, *(_varied(picture, generator) for _ in range(VARIANTS))]
        for letter, variant in zip("abcdefgh", variants, strict=False):
            file = f"png/{number:04d}{letter}.png"
            variant.save(folder / file)
            pictures["heldout" if heldout[number] else "train"].append((file, str(label)))
    _write_splits(
        folder,
        [
            document({"image": file}, asked(generator.choice(PICTURE_QUESTIONS)), answered(digit))
            for file, digit in pictures["train"]
        ],
        questions=[
            question([{"image": file}], PICTURE_QUESTIONS[0], DIGITS, digit) for file, digit in pictures["heldout"]
        ],
    )
    return {split: [(f"../digits/{file}", digit) for file, digit in kept] for split, kept in pictures.items()}


def _varied(picture: Image.Image, generator: random.Random) -> Image.Image:
    """The picture at four times its size, turned and sheared by up to 12°, scaled and shifted by up to a tenth."""
    size = picture.width * 4
    large = picture.resize((size, size), Image.Resampling.BILINEAR)
    angle, shear = (math.radians(generator.uniform(-12, 12)) for _ in range(2))
    wide, high = (1 / generator.uniform(0.9, 1.1) for _ in range(2))
    matrix = (
        np.array([[wide, 0], [0, high]])
        @ np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        @ np.array([[1, math.tan(shear)], [0, 1]])
    )
    middle = np.array([size / 2, size / 2])
    shift = middle - matrix @ (middle + [generator.uniform(-size / 10, size / 10) for _ in range(2)])
    terms = (*matrix[0], shift[0], *matrix[1], shift[1])
    return large.transform((size, size), Image.Transform.AFFINE, terms, Image.Resampling.BILINEAR)


def _write_speech(folder: Path) -> Pictures:
    """Spoken digits as wav; whole families of voices (f1, f2, …) lie on one side."""
    speaker = Speaker(SPLIT_SEED)
    voices = speaker.voices()
    family = np.array([re.sub(r"\d+$", "", voice) for voice in voices])
    heldout = _heldout(family[:, None] == family[None, :], share=0.16)
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    clips: Pictures = {"train": [], "heldout": []}
    for split, is_heldout in (("train", False), ("heldout", True)):
        chosen = [voice for voice, held in zip(voices, heldout, strict=True) if held == is_heldout]
        spoken = spoken_digits(speaker, chosen, TAKES, seed=int(is_heldout))
        for number, (voice, digit, samples) in enumerate(tqdm(spoken, desc=f"speak ({split})", unit="clip")):
            file = f"wav/{voice.replace(' ', '_')}-{digit}-{number:05d}.wav"
            write_wav(folder / file, samples, speaker.sample_rate)
            clips[split].append((file, str(digit)))
    _write_splits(
        folder,
        [document({"audio": file}, asked(SPEECH_QUESTION), answered(digit)) for file, digit in clips["train"]],
        questions=[question([{"audio": file}], SPEECH_QUESTION, DIGITS, digit) for file, digit in clips["heldout"]],
    )
    return {split: [(f"../speech/{file}", digit) for file, digit in kept] for split, kept in clips.items()}


def _write_videos(folder: Path, digits: Path, pictures: Pictures) -> None:
    """Each picture's digit moves over a black frame, as mp4; both questions are asked of every video."""
    generator = random.Random(SPLIT_SEED)
    (folder / "mp4").mkdir(parents=True, exist_ok=True)
    wanted = {
        "train": pictures["train"],
        "heldout": generator.sample(pictures["heldout"], VIDEO_QUESTIONS),
    }
    made: dict[str, list[tuple[str, str, str]]] = {"train": [], "heldout": []}
    # Processes: the encoder keeps Python's lock.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for split, chosen in wanted.items():
            films = []
            for number, (picture, digit) in enumerate(chosen):
                direction = generator.choice(sorted(DIRECTIONS))
                file = f"mp4/{split}-{number:05d}.mp4"
                with Image.open(digits / picture) as image:
                    large = image.resize((DIGIT_PIXELS, DIGIT_PIXELS), Image.Resampling.BICUBIC)
                films.append((folder / file, _film(np.asarray(large), direction, generator)))
                made[split].append((file, digit, direction))
            written = pool.map(write_mp4, *zip(*films, strict=True), repeat(VIDEO_RATE), chunksize=32)
            list(tqdm(written, desc=f"film ({split})", total=len(films), unit="video"))

    def told(file: str, digit: str, direction: str) -> dict[str, Any]:
        turns = [(VIDEO_QUESTION, digit), (MOTION_QUESTION, direction)]
        generator.shuffle(turns)
        return document({"video": file}, *(part for text, answer in turns for part in (asked(text), answered(answer))))

    digits_asked = [question([{"video": file}], VIDEO_QUESTION, DIGITS, digit) for file, digit, _ in made["heldout"]]
    motions_asked = [
        question([{"video": file}], MOTION_QUESTION, sorted(DIRECTIONS), way) for file, _, way in made["heldout"]
    ]
    _write_splits(folder, [told(*video) for video in made["train"]], questions=digits_asked, motion=motions_asked)


def _film(digit: np.ndarray, direction: str, generator: random.Random) -> np.ndarray:
    """uint8 (frames, height, width, 3): the digit crosses 12 to 16 of the 16 free pixels."""
    free = VIDEO_PIXELS - DIGIT_PIXELS
    travel = generator.randint(free - 4, free)
    start, across = generator.randint(0, free - travel), generator.randint(0, free)
    row_step, column_step = DIRECTIONS[direction]
    frames = np.zeros((VIDEO_FRAMES, VIDEO_PIXELS, VIDEO_PIXELS, 3), np.uint8)
    for number, frame in enumerate(frames):
        along = start + round(travel * number / (VIDEO_FRAMES - 1))
        along = along if row_step + column_step > 0 else free - along
        row, column = (along, across) if row_step else (across, along)
        frame[row : row + DIGIT_PIXELS, column : column + DIGIT_PIXELS] = digit[..., None]
    return frames


def _write_matching(folder: Path, pictures: Pictures, clips: Pictures) -> None:
    """A spoken and a pictured digit: are they the same? Half are.

    Training documents ask for both digits too; in half of them the pair is asked first, from the media alone.
    """
    generator = random.Random(SPLIT_SEED)

    def pairs(split: str, count: int) -> Iterator[tuple[list[dict[str, Any]], str, str, str]]:
        by_digit = {digit: [file for file, d in pictures[split] if d == digit] for digit in DIGITS}
        for number in range(count):
            clip, spoken = generator.choice(clips[split])
            others = [digit for digit in DIGITS if digit != spoken]
            shown = spoken if number % 2 else generator.choice(others)
            media = [{"audio": clip}, {"image": generator.choice(by_digit[shown])}]
            yield media, spoken, shown, YES_NO[int(spoken != shown)]

    def told(number: int, media: list[dict[str, Any]], spoken: str, shown: str, answer: str) -> dict[str, Any]:
        turns = [(MATCHING_QUESTION, answer), (SPEECH_QUESTION, spoken), (PICTURE_QUESTIONS[0], shown)]
        first = number // 2 % 2  # of each answer half
        turns[first:] = generator.sample(turns[first:], len(turns) - first)
        return document(*media, *(part for text, said in turns for part in (asked(text), answered(said))))

    _write_splits(
        folder,
        [told(number, *pair) for number, pair in enumerate(pairs("train", MATCHING_DOCUMENTS))],
        questions=[
            question(media, MATCHING_QUESTION, YES_NO, answer)
            for media, _, _, answer in pairs("heldout", MATCHING_QUESTIONS)
        ],
    )


def _write_needles(folder: Path, texts: dict[str, list[str]]) -> None:
    """Needle documents by length, measured with a vocabulary like the one the corpus will get."""
    ruler = train_tokenizer(iter(texts["train"]), RULER_VOCABULARY)
    for length, count in tqdm(DOCUMENTS.items(), desc="hide needles", unit="length"):
        documents = list(needle_documents(texts["train"], ruler, length, count, seed=length))
        for part in range(PARTS):
            write_jsonl(folder / f"train-{length}-{part}.jsonl", documents[part::PARTS])
        heldout = needle_documents(texts["heldout"], ruler, length, HELDOUT_NEEDLES, seed=length + 1)
        write_jsonl(folder / f"heldout-{length}.jsonl", heldout)


def _write_splits(folder: Path, train: list[dict[str, Any]], **questions: list[dict[str, Any]]) -> None:
    """train-*.jsonl, each <name>.jsonl of questions, and all of them with their answers as heldout.jsonl."""
    for part in range(PARTS):
        write_jsonl(folder / f"train-{part}.jsonl", train[part::PARTS])
    for name, asked_here in questions.items():
        write_jsonl(folder / f"{name}.jsonl", asked_here)
    write_jsonl(folder / "heldout.jsonl", map(_as_document, chain(*questions.values())))


def _as_document(question: dict[str, Any]) -> dict[str, Any]:
    """A question with its right answer."""
    *media, text = question["segments"]
    return document(*media, asked(text["text"]), answered(question["choices"][question["answer"]]))


def _heldout(is_near: Any, share: float) -> np.ndarray:
    """Choose `share` of the items, whole groups of near-duplicates at a time; bool (items,)."""
    from scipy.sparse.csgraph import connected_components
    from sklearn.model_selection import GroupShuffleSplit

    groups = connected_components(is_near, directed=False)[1]
    split = GroupShuffleSplit(n_splits=1, test_size=share, random_state=SPLIT_SEED)
    _, chosen = next(split.split(groups, groups=groups))
    return np.isin(np.arange(len(groups)), chosen)
