"""Which stretches of packed rows are pairs, and how they are laid apart."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniloom.data.pairs import find_pairs, lay_apart
from omniloom.modality.batch import MODEL_INPUTS, stack_rows
from omniloom.modality.config import Widths
from omniloom.modality.sequence import AUDIO, IMAGE, TEXT, VIDEO, Document, Segment, lay_row, weave

ALL = ("image_text", "audio_text", "video_text", "image_audio", "image_video", "audio_video")
FRAMES_PER_TOKEN = 2
SEQ_LEN = 40


def segment(kind: str, seed: int) -> Segment:
    """`ask` is text that is read, `say` a target; media of different lengths."""
    rng = np.random.default_rng(seed)
    if kind in ("ask", "say"):
        ids = rng.integers(5, 99, 2 + seed % 3).astype(np.int32)
        return Segment(TEXT, ids, np.zeros((len(ids), 3), np.int32), kind == "say")
    if kind == "audio":
        frames = 3 + seed % 4
        place = [(t, 0, 0) for t in range(-(-frames // FRAMES_PER_TOKEN))]
        return Segment(AUDIO, rng.normal(size=(frames, 4)).astype(np.float16), np.array(place, np.int32))
    times = 1 if kind == "image" else 2
    place = [(t, r, c) for t in range(times) for r in range(2) for c in range(2)]
    content = rng.integers(0, 256, (len(place), 12)).astype(np.uint8)
    return Segment(IMAGE if kind == "image" else VIDEO, content, np.array(place, np.int32))


def woven(*kinds: str, seed: int = 0) -> Document:
    parts = [segment(kind, seed + number) for number, kind in enumerate(kinds)]
    return weave(parts, 1, 0, (0, 2, 3, 4), Widths(12, 4, 12))


def batch_of(*rows: list[Document]) -> dict[str, Tensor]:
    return stack_rows([lay_row([(held, 0) for held in row], SEQ_LEN, 0, Widths(12, 4, 12)) for row in rows])


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (("image", "say"), ["image_text"]),
        (("image", "ask", "say"), ["image_text"]),
        (("image", "ask"), []),
        (("say", "image"), []),
        (("say",), []),
        (("image", "say", "audio", "say"), ["image_text", "audio_text"]),
        (("image", "ask", "audio", "say"), ["audio_text"]),
        (("video", "say"), ["video_text"]),
        (("image", "image", "say"), ["image_text"]),
        (("audio", "image", "say"), ["image_audio"]),
        (("image", "audio"), ["image_audio"]),
        (("video", "audio", "video", "audio", "say"), []),
        (("ask", "image", "ask", "say", "ask", "say"), ["image_text"]),
    ],
)
def test_pairs_of_one_document(kinds: tuple[str, ...], expected: list[str]) -> None:
    assert [pair.kind for pair in find_pairs(batch_of([woven(*kinds)]), ALL)] == expected


def test_the_text_is_its_targets_and_the_end_that_is_one() -> None:
    (pair,) = find_pairs(batch_of([woven("ask", "image", "ask", "say", "ask", "say")]), ALL)
    # bos, 2 asked, 4 of the picture, 4 asked, 2 said, 3 asked, 4 said, eos
    assert pair.sides[0].tolist() == [3, 4, 5, 6]
    assert pair.sides[1].tolist() == [11, 12, 16, 17, 18, 19, 20]


def test_nothing_reaches_over_the_border_of_a_document_or_a_row() -> None:
    fields = batch_of([woven("image"), woven("say")], [woven("audio")], [woven("say"), woven("image", "say")])
    (pair,) = find_pairs(fields, ALL)
    assert all(side.min() >= 2 * SEQ_LEN for side in pair.sides)
    assert {int(fields["document"].flatten()[at]) for side in pair.sides for at in side} == {1}


def test_only_the_kinds_that_are_asked_for_are_found() -> None:
    fields = batch_of([woven("image", "say", "audio", "say")])
    assert [pair.kind for pair in find_pairs(fields, ["audio_text"])] == ["audio_text"]
    assert find_pairs(fields, []) == []


def test_hashes_tell_contents_apart_and_know_them_again() -> None:
    fields = batch_of(
        [woven("image", "say", seed=1), woven("image", "say", seed=1), woven("image", "say", seed=7)],
        [woven("audio", "say", seed=1), woven("audio", "say", seed=5), woven("audio", "say", seed=1)],
    )
    first, again, other, *clips = (pair.hashes for pair in find_pairs(fields, ALL))
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]
    assert clips[0] == clips[2]
    assert clips[0][0] != clips[1][0]
    assert clips[0][1] == first[1], "the same text"
    assert all(-(2**63) <= value < 2**63 for pair in (first, other, *clips) for value in pair)


def alone(held: Segment) -> dict[str, Tensor]:
    """What a segment is as a row of its own."""
    fields = stack_rows(
        [lay_row([(weave([held], 1, 0, (0, 2, 3, 4), Widths(12, 4, 12)), 0)], len(held) + 2, 0, Widths(12, 4, 12))]
    )
    inner = {name: fields[name][:, 1:-1] for name in ("input_ids", "modality", "position", "document")}
    return fields | inner


PARTS = st.lists(st.sampled_from(["ask", "say", "image", "audio", "video"]), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(PARTS, min_size=1, max_size=4), st.integers(0, 50))
def test_each_side_is_laid_as_the_segment_it_came_from(rows: list[list[str]], seed: int) -> None:
    """Of documents where pairs are of whole segments, each side has the fields that its segments have alone."""
    plans = [[kind for number, kind in enumerate(row) if number == 0 or kind != row[number - 1]] for row in rows]
    plans = [plan[:4] for plan in plans]
    fields = batch_of(*([woven(*plan, seed=seed + 10 * number)] for number, plan in enumerate(plans)))
    pairs = find_pairs(fields, ALL)
    laid = lay_apart(fields, pairs)
    assert tuple(laid) == MODEL_INPUTS
    assert {name: laid[name].dtype for name in laid} == {name: fields[name].dtype for name in laid}
    assert laid["document"].max() == 2 * len(pairs), "and a token that belongs to nobody"
    (last,) = laid["modality"][laid["document"] == 2 * len(pairs)].tolist()
    assert last == TEXT
    took: dict[str, int] = {"image": 0, "video": 0, "audio_frames": 0, "audio": 0}
    flat = {name: fields[name].flatten(0, 1) for name in ("input_ids", "modality", "position")}
    for number, side in enumerate(side for pair in pairs for side in pair.sides):
        at = laid["document"][0] == number
        for name, whole in flat.items():
            assert torch.equal(laid[name][0][at], whole[torch.from_numpy(side)])
        kind = int(laid["modality"][0][at][0])
        document = plans[side[0] // SEQ_LEN]
        source = seed + 10 * int(side[0] // SEQ_LEN)
        held = {TEXT: None, IMAGE: "image", AUDIO: "audio", VIDEO: "video"}[kind]
        if held is None:
            continue
        contents = [alone(segment(held, source + place)) for place, name in enumerate(document) if name == held]
        took_here = {name: laid[name][took[name] :] for name in took}
        matching = [
            content
            for content in contents
            if len(content["input_ids"][0]) == len(side)
            and all(torch.equal(took_here[name][: len(content[name])], content[name]) for name in took)
        ]
        assert matching, "the medium is none of its document's"
        for name in took:
            took[name] += len(matching[0][name])
    assert {name: len(laid[name]) for name in took} == took, "media of no pair were left in"


def test_a_batch_without_a_pair_is_one_token_of_text_and_no_media() -> None:
    fields = batch_of([woven("image")], [woven("say", "audio")])
    fields["input_ids"] = fields["input_ids"].roll(-1, 1)  # a row may begin with a medium
    fields["modality"], fields["position"] = fields["modality"].roll(-1, 1), fields["position"].roll(-1, 1)
    laid = lay_apart(fields, [])
    assert {name: tuple(laid[name].shape) for name in laid} == {
        "input_ids": (1, 1),
        "modality": (1, 1),
        "position": (1, 1, 3),
        "document": (1, 1),
        "image": (0, 12),
        "video": (0, 12),
        "audio": (0, 4),
        "audio_frames": (0,),
    }
    assert not laid["modality"].any()
    assert not laid["position"].any()


def test_the_rows_are_left_as_they_are() -> None:
    fields: dict[str, Any] = batch_of([woven("image", "say")], [woven("audio", "say")])
    before = {name: field.clone() for name, field in fields.items()}
    lay_apart(fields, find_pairs(fields, ALL))
    assert all(torch.equal(fields[name], before[name]) for name in before)
