"""The token path, followed by hand: text and pictures, one document, one row."""

import io

import numpy as np
import pytest
from PIL import Image

from omniloom.modality.config import ImageConfig
from omniloom.modality.image import read_image
from omniloom.modality.sequence import AUDIO, IMAGE, PADDING, TEXT, VIDEO, Document, Row, Segment, lay_row, weave
from omniloom.modality.text import TextTokenizer, train_tokenizer

TINY = ImageConfig(size_pixels=4, patch_pixels=2)
TOKENIZER = train_tokenizer(iter(["Hi"]), 261)  # bytes alone: bos 0, eos 1, image 2, audio 3, video 4, '!' 5, '"' 6, …
PATCH = TINY.patch_values
FIELDS = {
    "input_ids": np.int32,
    "modality": np.uint8,
    "position": np.int32,
    "document": np.int32,
    "source": np.uint8,
    "loss_mask": np.uint8,
    "image": np.uint8,
}


def picture(first: int) -> Segment:
    """A 4 × 4 picture whose values count up from `first`."""
    stream = io.BytesIO()
    Image.fromarray(np.arange(first, first + 48, dtype=np.uint8).reshape(4, 4, 3)).save(stream, "PNG")
    return read_image(stream.getvalue(), TINY)


def woven(*segments: Segment, tokenizer: TextTokenizer = TOKENIZER) -> Document:
    return weave(list(segments), tokenizer.bos_id, tokenizer.eos_id, tokenizer.placeholder_ids, PATCH)


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
    row = lay_row([(asked, 3), (told, 1)], seq_len=20, pad_id=TOKENIZER.eos_id, patch=PATCH)
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
        row = lay_row(pieces, seq_len=12, pad_id=1, patch=PATCH)
        assert {name: array.dtype for name, array in row.fields().items()} == FIELDS
        assert list(row.fields()) == list(FIELDS)
        assert {name: array.shape for name, array in row.fields().items() if name != "image"} == {
            name: (12, 3) if name == "position" else (12,) for name in FIELDS if name != "image"
        }
        assert row.image.shape == (int((row.modality == IMAGE).sum()), PATCH)


def test_document_fields_have_the_contracts_dtypes() -> None:
    document = woven(TOKENIZER.segment("Hi"), picture(0))
    assert {name: array.dtype for name, array in vars(document).items()} == {n: FIELDS[n] for n in vars(document)}


def test_modalities_are_numbered_as_the_contract_says() -> None:
    assert (TEXT, IMAGE, AUDIO, VIDEO) == (0, 1, 2, 3)
    assert PADDING == -1


def test_a_full_row_has_no_padding_and_one_token_more_is_refused() -> None:
    document = woven(TOKENIZER.segment("Hi"))
    row = lay_row([(document, 0), (document, 0)], seq_len=8, pad_id=1, patch=PATCH)
    assert row.document.tolist() == [0] * 4 + [1] * 4
    with pytest.raises(ValueError, match="8 tokens do not fit a row of 7"):
        lay_row([(document, 0), (document, 0)], seq_len=7, pad_id=1, patch=PATCH)


def test_an_empty_row_is_all_padding() -> None:
    row = lay_row([], seq_len=3, pad_id=1, patch=PATCH)
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
    row: Row = lay_row([(document.window(5, 13), 0), (document.window(0, 6), 0)], seq_len=14, pad_id=1, patch=PATCH)
    assert row.image.tolist() == patches_by_hand(100) + patches_by_hand(0)
    assert np.flatnonzero(row.modality == IMAGE).tolist() == [2, 3, 4, 5, 9, 10, 11, 12]
