"""The token path, followed by hand and at random: text and media, one document, one row."""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from omniloom.modality.batch import MODEL_INPUTS, stack_rows
from omniloom.modality.config import ImageConfig, Widths
from omniloom.modality.files import Media
from omniloom.modality.image import read_image
from omniloom.modality.sequence import AUDIO, IMAGE, PADDING, TEXT, VIDEO, Document, Row, Segment, lay_row, weave
from omniloom.modality.text import TextTokenizer, train_tokenizer

TINY = ImageConfig(size_pixels=4, patch_pixels=2)
TOKENIZER = train_tokenizer(iter(["Hi"]), 261)  # bytes alone: bos 0, eos 1, image 2, audio 3, video 4, '!' 5, '"' 6, …
PATCH, MELS, FRAMES_PER_TOKEN = 12, 5, 4
WIDTHS = Widths(PATCH, MELS, PATCH)
FIELDS = {
    "input_ids": np.int32,
    "modality": np.uint8,
    "position": np.int32,
    "document": np.int32,
    "source": np.uint8,
    "loss_mask": np.uint8,
    "image": np.uint8,
    "video": np.uint8,
    "audio": np.float16,
    "audio_frames": np.int32,
}
OF_A_DOCUMENT = FIELDS | {"segment_starts": np.int32}
MEDIA = ("image", "video", "audio", "audio_frames")


def picture(first: int) -> Segment:
    """A 4 × 4 picture whose values count up from `first`."""
    stream = io.BytesIO()
    Image.fromarray(np.arange(first, first + 48, dtype=np.uint8).reshape(4, 4, 3)).save(stream, "PNG")
    return read_image(Media("picture", stream.getvalue()), TINY)


def sound(frames: int, first: int = 0) -> Segment:
    """A clip whose every frame holds its own number, counted up from `first`."""
    content = np.repeat(np.arange(first, first + frames, dtype=np.float16)[:, None], MELS, axis=1)
    token = np.arange(-(-frames // FRAMES_PER_TOKEN), dtype=np.int32)
    return Segment(AUDIO, content, np.stack([token, 0 * token, 0 * token], axis=1))


def film(frames: int, first: int = 0, side: int = 1) -> Segment:
    """`frames` frames of side × side patches, each patch holding its own number, counted up from `first`."""
    place = np.indices((frames, side, side), np.int32).reshape(3, -1).T
    numbers = np.arange(first, first + len(place)).astype(np.uint8)
    return Segment(VIDEO, np.repeat(numbers[:, None], PATCH, axis=1), place)


def woven(*segments: Segment, tokenizer: TextTokenizer = TOKENIZER) -> Document:
    return weave(list(segments), tokenizer.bos_id, tokenizer.eos_id, tokenizer.placeholder_ids, WIDTHS)


def patches_by_hand(first: int) -> list[list[int]]:
    """The four patches of `picture(first)`: pixels (0,0) (0,1) (1,0) (1,1) of each 2 × 2 square."""
    return [
        [first + 12 * (2 * r + y) + 3 * (2 * c + x) + k for y in (0, 1) for x in (0, 1) for k in (0, 1, 2)]
        for r in (0, 1)
        for c in (0, 1)
    ]


def test_a_sentence_and_a_picture_become_one_row() -> None:
    asked = woven(TOKENIZER.segment("Hi"), picture(0))
    told = woven(picture(100), TOKENIZER.segment('"', is_target=False), TOKENIZER.segment("!!"))
    row = lay_row([(asked, 3), (told, 1)], seq_len=20, pad_id=TOKENIZER.eos_id, widths=WIDTHS)
    # 'H' is 72 − 33 + 5, 'i' is 105 − 33 + 5; three positions are left over.
    #             bos  H   i |  picture  |eos|bos|  picture  | "| !  ! |eos| padding
    ids = np.array([0, 44, 77, 2, 2, 2, 2, 1, 0, 2, 2, 2, 2, 6, 5, 5, 1, 1, 1, 1])
    modality = np.array([0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    loss_mask = np.array([0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0])
    assert row.input_ids.tolist() == ids.tolist()
    assert row.modality.tolist() == modality.tolist()
    assert row.loss_mask.tolist() == loss_mask.tolist()
    assert row.document.tolist() == [0] * 8 + [1] * 9 + [-1] * 3
    assert row.source.tolist() == [3] * 8 + [1] * 9 + [0] * 3
    square = [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    nowhere = [[0, 0, 0]]
    assert row.position.tolist() == nowhere * 3 + square + nowhere * 2 + square + nowhere * 7
    assert row.image.tolist() == patches_by_hand(0) + patches_by_hand(100)


def test_row_fields_have_the_contracts_dtypes_and_order() -> None:
    for pieces in ([(woven(TOKENIZER.segment("Hi"), picture(0)), 255)], [(woven(TOKENIZER.segment("Hi")), 0)], []):
        row = lay_row(pieces, seq_len=12, pad_id=1, widths=WIDTHS)
        assert {name: array.dtype for name, array in row.fields().items()} == FIELDS
        assert list(row.fields()) == list(FIELDS)
        assert {name: array.shape for name, array in row.fields().items() if name not in MEDIA} == {
            name: (12, 3) if name == "position" else (12,) for name in FIELDS if name not in MEDIA
        }
        assert row.image.shape == (int((row.modality == IMAGE).sum()), PATCH)
        assert [row.video.shape, row.audio.shape, row.audio_frames.shape] == [(0, PATCH), (0, MELS), (0,)]


def test_document_fields_have_the_contracts_dtypes() -> None:
    for document in (woven(TOKENIZER.segment("Hi"), picture(0), sound(5), film(2)), woven()):
        assert {name: array.dtype for name, array in vars(document).items()} == {
            name: OF_A_DOCUMENT[name] for name in vars(document)
        }


def test_modalities_are_numbered_as_the_contract_says() -> None:
    assert (TEXT, IMAGE, AUDIO, VIDEO) == (0, 1, 2, 3)
    assert PADDING == -1


def test_a_full_row_has_no_padding_and_one_token_more_is_refused() -> None:
    document = woven(TOKENIZER.segment("Hi"))
    row = lay_row([(document, 0), (document, 0)], seq_len=8, pad_id=1, widths=WIDTHS)
    assert row.document.tolist() == [0] * 4 + [1] * 4
    with pytest.raises(ValueError, match="8 tokens do not fit a row of 7"):
        lay_row([(document, 0), (document, 0)], seq_len=7, pad_id=1, widths=WIDTHS)


def test_an_empty_row_is_all_padding() -> None:
    row = lay_row([], seq_len=3, pad_id=1, widths=WIDTHS)
    assert row.document.tolist() == [-1] * 3
    assert row.input_ids.tolist() == [1] * 3
    assert not row.loss_mask.any()


@pytest.mark.parametrize(
    ("segments", "mask"),
    [
        ([], [0, 0]),
        ([TOKENIZER.segment("!")], [0, 1, 1]),
        ([TOKENIZER.segment("!", is_target=False)], [0, 0, 0]),
        ([TOKENIZER.segment("!"), TOKENIZER.segment("!", is_target=False)], [0, 1, 0, 0]),
        ([TOKENIZER.segment("!"), picture(0)], [0, 1, 0, 0, 0, 0, 0]),
    ],
)
def test_the_end_is_learned_only_where_the_last_segment_is(segments: list[Segment], mask: list[int]) -> None:
    assert woven(*segments).loss_mask.tolist() == mask


def two_pictures() -> Document:
    """bos, picture 0 (1 to 4), '!!' (5, 6), picture 100 (7 to 10), '"' (11), eos."""
    return woven(picture(0), TOKENIZER.segment("!!"), picture(100), TOKENIZER.segment('"'))


@pytest.mark.parametrize(
    ("start", "stop", "patches"),
    [
        (0, 13, patches_by_hand(0) + patches_by_hand(100)),
        (5, 13, patches_by_hand(100)),
        (0, 6, patches_by_hand(0)),
        (5, 7, []),
        (3, 9, patches_by_hand(0)[2:] + patches_by_hand(100)[:2]),
        (8, 10, patches_by_hand(100)[1:3]),
        (11, 13, []),
    ],
)
def test_a_window_keeps_the_patches_of_its_own_tokens(start: int, stop: int, patches: list[list[int]]) -> None:
    document = two_pictures()
    window = document.window(start, stop)
    assert window.image.tolist() == patches
    assert window.image.shape == (len(patches), PATCH)
    for name in ("input_ids", "modality", "position", "loss_mask"):
        assert np.array_equal(getattr(window, name), getattr(document, name)[start:stop]), name
    assert len(window) == stop - start


def test_windows_laid_in_a_row_keep_each_patch_at_its_token() -> None:
    document = two_pictures()
    row: Row = lay_row([(document.window(5, 13), 0), (document.window(0, 6), 0)], seq_len=14, pad_id=1, widths=WIDTHS)
    assert row.image.tolist() == patches_by_hand(100) + patches_by_hand(0)
    assert np.flatnonzero(row.modality == IMAGE).tolist() == [2, 3, 4, 5, 9, 10, 11, 12]


def test_four_media_become_one_row() -> None:
    """bos, '!', clip of 5 frames (2 tokens), video of 2 frames, '"', clip of 3, eos | bos, picture, video, eos."""
    told = woven(TOKENIZER.segment("!"), sound(5), film(2), TOKENIZER.segment('"', is_target=False), sound(3, first=50))
    shown = woven(picture(0), film(1, first=90))
    row = lay_row([(told, 7), (shown, 2)], seq_len=18, pad_id=TOKENIZER.eos_id, widths=WIDTHS)
    #                               bos !| clip|video| "|clip|eos|bos| picture | video|eos
    assert row.input_ids.tolist() == [0, 5, 3, 3, 4, 4, 6, 3, 1, 0, 2, 2, 2, 2, 4, 1] + [1] * 2
    assert row.modality.tolist() == [0, 0, 2, 2, 3, 3, 0, 2, 0, 0, 1, 1, 1, 1, 3, 0] + [0] * 2
    assert row.loss_mask.tolist() == [0, 1] + [0] * 16
    assert row.source.tolist() == [7] * 9 + [2] * 7 + [0] * 2
    time = [0, 0, 0, 1, 0, 1] + [0] * 12
    assert row.position[:, 0].tolist() == time
    assert row.position[10:14].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    assert row.audio_frames.tolist() == [5, 3]
    assert row.audio.tolist() == [[float(n)] * MELS for n in (0, 1, 2, 3, 4, 50, 51, 52)]
    assert row.video.tolist() == [[n] * PATCH for n in (0, 1, 90)]
    assert row.image.tolist() == patches_by_hand(0)


def test_a_window_that_cuts_a_clip_is_refused_with_its_bounds() -> None:
    """bos, clip of 9 frames (1 to 3), '!' (4), clip (5, 6), clip (7), eos."""
    document = woven(sound(9), TOKENIZER.segment("!"), sound(8, first=20), sound(1, first=40))
    for start, stop in [(0, 2), (0, 3), (2, 9), (3, 4), (6, 7), (6, 9), (4, 6), (2, 3)]:
        with pytest.raises(ValueError, match=f"the window {start} … {stop} cuts a clip"):
            document.window(start, stop)
    whole = {(0, 9): [0, 20, 40], (0, 5): [0], (1, 4): [0], (4, 7): [20], (7, 9): [40], (5, 9): [20, 40], (8, 9): []}
    for (start, stop), firsts in whole.items():
        window = document.window(start, stop)
        assert len(window.audio_frames) == len(firsts)
        starts = np.cumsum([0, *window.audio_frames[:-1]])[: len(firsts)]
        assert [float(window.audio[at, 0]) for at in starts] == firsts
        assert len(window.audio) == window.audio_frames.sum()


segments = st.lists(
    st.one_of(
        st.builds(TOKENIZER.segment, st.text("abc!", max_size=5), st.booleans()),
        st.builds(picture, st.integers(0, 200)),
        st.builds(sound, st.integers(1, 13), st.integers(0, 900)),
        st.builds(film, st.integers(1, 3), st.integers(0, 200), st.integers(1, 2)),
    ),
    max_size=6,
)
documents = segments.map(lambda held: (held, woven(*held)))
quiet = settings(max_examples=60, deadline=None)


def media_of(held: list[Segment], modality: int) -> list[list[float]]:
    return [line for segment in held if segment.modality == modality for line in segment.content.tolist()]


def clips_of(audio: np.ndarray, audio_frames: np.ndarray) -> list[list[list[float]]]:
    """Each clip's frames: the flat field cut by the counts, all of it."""
    cut = np.split(audio, np.cumsum(audio_frames))
    assert len(cut[-1]) == 0
    return [clip.tolist() for clip in cut[:-1]]


def check_fields(row: Row | Document) -> None:
    """Every dtype is the contract's, media and their tokens agree in number."""
    for name, array in vars(row).items():
        assert array.dtype == OF_A_DOCUMENT[name], name
    assert len(row.image) == (row.modality == IMAGE).sum()
    assert len(row.video) == (row.modality == VIDEO).sum()
    assert len(row.audio) == row.audio_frames.sum()
    assert -(-row.audio_frames // FRAMES_PER_TOKEN).sum() == (row.modality == AUDIO).sum()
    placeholders = np.array(TOKENIZER.placeholder_ids)
    is_media = row.modality != TEXT
    assert np.array_equal(row.input_ids[is_media], placeholders[row.modality[is_media]])
    assert not row.position[~is_media].any()
    assert not row.loss_mask[is_media].any()


@quiet
@given(st.lists(st.tuples(documents, st.integers(0, 255)), max_size=4), st.integers(0, 9))
def test_a_row_of_random_documents_holds_each_token_and_medium_once_in_order(drawn, spare) -> None:
    pieces = [(document, source) for (_, document), source in drawn]
    used = sum(len(document) for document, _ in pieces)
    row = lay_row(pieces, used + spare, pad_id=TOKENIZER.eos_id, widths=WIDTHS)
    check_fields(row)
    held = [segment for (segments, _), _ in drawn for segment in segments]
    assert row.image.tolist() == media_of(held, IMAGE)
    assert row.video.tolist() == media_of(held, VIDEO)
    assert clips_of(row.audio, row.audio_frames) == [s.content.tolist() for s in held if s.modality == AUDIO]
    assert row.document.tolist() == [n for n, (d, _) in enumerate(pieces) for _ in range(len(d))] + [PADDING] * spare
    assert row.source.tolist() == [source for d, source in pieces for _ in range(len(d))] + [0] * spare
    for name in ("input_ids", "modality", "position", "loss_mask"):
        laid = [line for document, _ in pieces for line in getattr(document, name).tolist()]
        assert getattr(row, name)[:used].tolist() == laid, name
    assert row.input_ids[used:].tolist() == [TOKENIZER.eos_id] * spare
    assert not row.modality[used:].any()
    assert not row.loss_mask[used:].any()


@quiet
@given(segments)
def test_a_document_of_random_segments_holds_each_in_order_between_bos_and_eos(held) -> None:
    document = woven(*held)
    check_fields(document)
    ids, modality, position, mask = [0], [0], [[0, 0, 0]], [0]
    for segment in held:
        is_text = segment.modality == TEXT
        ids += segment.content.tolist() if is_text else [1 + segment.modality] * len(segment)
        modality += [segment.modality] * len(segment)
        position += segment.position.tolist()
        mask += [int(segment.is_target)] * len(segment)
    assert document.input_ids.tolist() == [*ids, 1]
    assert document.modality.tolist() == [*modality, 0]
    assert document.position.tolist() == [*position, [0, 0, 0]]
    assert document.loss_mask.tolist() == [*mask, int(bool(held) and held[-1].is_target)]


@quiet
@given(documents, st.data())
def test_windows_one_after_another_lose_and_mix_nothing(drawn, data) -> None:
    held, document = drawn
    inside_clip = (document.modality == AUDIO) & (document.position[:, 0] > 0)
    borders = [at for at in range(1, len(document)) if not inside_clip[at]]
    cuts = [0, *sorted(data.draw(st.sets(st.sampled_from(borders)))), len(document)]
    windows = [document.window(start, stop) for start, stop in pairwise(cuts)]
    for window in windows:
        check_fields(window)
    for name in vars(document):
        parts = [getattr(window, name) for window in windows]
        if name == "segment_starts":  # counted from the window's own first token
            parts = [part + np.int32(start) for part, start in zip(parts, cuts, strict=False)]
        joined = np.concatenate(parts)
        assert joined.dtype == OF_A_DOCUMENT[name]
        assert np.array_equal(joined, getattr(document, name)), name
    parts = [clip for window in windows for clip in clips_of(window.audio, window.audio_frames)]
    assert parts == [s.content.tolist() for s in held if s.modality == AUDIO]
    for at in np.flatnonzero(inside_clip).tolist():
        for start, stop in ((0, at), (at, len(document))):
            with pytest.raises(ValueError, match="cuts a clip"):
                document.window(start, stop)


@quiet
@given(st.lists(documents, min_size=1, max_size=3))
def test_stacked_rows_hold_each_rows_fields(drawn) -> None:
    length = max(len(document) for _, document in drawn)
    rows = [lay_row([(document, 0)], length, pad_id=TOKENIZER.eos_id, widths=WIDTHS) for _, document in drawn]
    fields = stack_rows(rows)
    assert {name: tensor.numpy().dtype for name, tensor in fields.items()} == FIELDS
    assert set(MODEL_INPUTS) <= set(fields)
    for name, tensor in fields.items():
        of_rows = [torch.from_numpy(getattr(row, name)) for row in rows]
        assert torch.equal(tensor, torch.cat(of_rows) if name in MEDIA else torch.stack(of_rows)), name


def test_a_batch_without_media_has_empty_fields_of_their_width() -> None:
    row = lay_row([(woven(), 0)], 3, pad_id=TOKENIZER.eos_id, widths=WIDTHS)
    fields = stack_rows([row, row])
    assert {name: tuple(fields[name].shape) for name in MEDIA} == {
        "image": (0, PATCH),
        "video": (0, PATCH),
        "audio": (0, MELS),
        "audio_frames": (0,),
    }
    assert fields["position"].shape == (2, 3, 3)
