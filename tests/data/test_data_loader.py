"""One stream of rows, whatever the number of ranks, micro batches and loader processes."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from handmade import TINY, build

from omniloom.data.corpus import Corpus, Documents
from omniloom.data.loader import Batch, Rows, Share, batch_hash, rank_batches, row_digest
from omniloom.data.pack import Piece, pack, windows
from omniloom.data.plan import Phase, Schedule, Stream, heldout_rows
from omniloom.data.samples import write_samples
from omniloom.modality.batch import MODEL_INPUTS
from omniloom.modality.sequence import AUDIO, IMAGE, MEDIA_FIELDS, TOKEN_FIELDS, VIDEO, Row

SEQ_LEN, STEPS, GLOBAL = 48, 3, 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The smoke samples: words, pictures, clips and videos."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("loader")
    return build(write_samples("smoke", folder / "files"), folder / "corpus")


@pytest.fixture(scope="module")
def documents(corpus: Corpus) -> Documents:
    return Documents([corpus], "train")


def schedule(*phases: tuple[int, list[float]]) -> Schedule:
    return Schedule(tuple(Phase(first, tuple(weights), SEQ_LEN) for first, weights in phases), 0, "segment")


def planned(documents: Documents, plan: Schedule, rows: int) -> list:
    return [row for block in Stream(documents, plan).blocks(rows) for row in block]


ALIKE = schedule((0, [1.0] * 4))


@pytest.fixture(scope="module")
def rows(documents: Documents) -> Rows:
    # Spread out: the windows of one long text follow one another.
    return Rows(documents, planned(documents, ALIKE, 8 * STEPS * GLOBAL)[::8], ALIKE)


def digests(rows: Rows, rank: int, ranks: int, micro: int, workers: int = 0, first: int = 0) -> list[list[bytes]]:
    """One rank's row digests, a list a step."""
    steps = rank_batches(rows, Share(GLOBAL, micro, rank, ranks, first, STEPS), workers)
    return [[digest for batch in batches for digest in batch.digests] for batches in steps]


def step_hashes(rows: Rows, ranks: int, micro: int) -> list[str]:
    """Each step's hash, the ranks' digests joined in rank order."""
    parts = [digests(rows, rank, ranks, micro) for rank in range(ranks)]
    return [batch_hash([d for part in parts for d in part[step]]) for step in range(STEPS)]


def test_ranks_and_micro_batches_do_not_change_a_steps_hash(rows: Rows) -> None:
    expected = [
        batch_hash([row_digest(rows[index]) for index in range(step * GLOBAL, (step + 1) * GLOBAL)])
        for step in range(STEPS)
    ]
    assert len(set(expected)) == STEPS
    for ranks in (1, 2, 4):
        for micro in (1, 2):
            assert step_hashes(rows, ranks, micro) == expected, (ranks, micro)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_ranks_share_each_steps_samples_in_order(ranks: int, micro: int) -> None:
    parts = [list(Share(GLOBAL, micro, rank, ranks, 5, 6)) for rank in range(ranks)]
    assert [i for part in parts for batch in part for i in batch] == list(range(40, 48))
    assert [len(Share(GLOBAL, micro, 0, ranks, 5, 8))] == [3 * len(parts[0])]
    assert all(len(batch) == micro for part in parts for batch in part)


def test_a_resumed_run_goes_on_with_the_same_batches(rows: Rows) -> None:
    assert digests(rows, 1, 2, 2, first=2) == digests(rows, 1, 2, 2)[2:]


def test_the_hash_knows_the_order_of_rows(rows: Rows) -> None:
    one, two = row_digest(rows[0]), row_digest(rows[1])
    assert batch_hash([one, two]) != batch_hash([two, one])
    assert batch_hash([one, two]) == batch_hash([one + two])


def with_medium(rows: Rows, name: str) -> Row:
    return next(row for row in (rows[index] for index in range(len(rows))) if len(getattr(row, name)))


@pytest.mark.parametrize("name", [*TOKEN_FIELDS, *MEDIA_FIELDS])
def test_one_changed_value_of_a_field_changes_the_digest(name: str, rows: Rows) -> None:
    row = with_medium(rows, name)
    for place in (0, -1):
        changed = getattr(row, name).copy()
        changed.reshape(-1).view(f"u{changed.itemsize}")[place] ^= 1
        assert row_digest(replace(row, **{name: changed})) != row_digest(row)
    assert row_digest(replace(row, **{name: getattr(row, name).copy()})) == row_digest(row)


def test_dtype_and_shape_change_the_digest(rows: Rows) -> None:
    row = with_medium(rows, "image")
    assert row_digest(replace(row, modality=row.modality.view(np.int8))) != row_digest(row)
    assert row_digest(replace(row, image=row.image.reshape(-1, row.image.shape[1] // 2))) != row_digest(row)


def test_loader_processes_give_the_same_batches(rows: Rows) -> None:
    alone = list(rank_batches(rows, Share(GLOBAL, 2, 0, 2, 0, 2), 0))
    helped = list(rank_batches(rows, Share(GLOBAL, 2, 0, 2, 0, 2), 2))
    assert [len(step) for step in alone] == [len(step) for step in helped] == [2, 2]
    for one, other in zip(chain(*alone), chain(*helped), strict=True):
        assert one.digests == other.digests
        assert all(torch.equal(one.fields[name], other.fields[name]) for name in one.fields)


@pytest.mark.parametrize("name", MEDIA_FIELDS)
def test_a_batch_joins_media_in_order_of_appearance(name: str, rows: Rows) -> None:
    chosen = [rows[index] for index in range(len(rows))]
    assert 2 <= sum(len(getattr(row, name)) > 0 for row in chosen) < len(chosen)
    batch = Batch(chosen)
    assert batch.fields.keys() == {*TOKEN_FIELDS, *MEDIA_FIELDS}
    joined = np.concatenate([getattr(row, name) for row in chosen])
    assert torch.equal(batch.fields[name], torch.from_numpy(joined))
    for index, row in enumerate(chosen):
        for field in TOKEN_FIELDS:
            assert np.array_equal(batch.fields[field][index].numpy(), getattr(row, field)), field


def test_a_batch_has_as_many_media_rows_as_its_tokens_say(rows: Rows) -> None:
    fields = Batch([rows[index] for index in range(len(rows))]).fields
    tokens = torch.bincount(fields["modality"].flatten().long(), minlength=4).tolist()
    assert min(tokens) > 0
    assert (tokens[IMAGE], tokens[VIDEO]) == (len(fields["image"]), len(fields["video"]))
    assert fields["audio_frames"].sum() == len(fields["audio"])
    assert sum(-(-int(frames) // TINY.audio.frames_per_token) for frames in fields["audio_frames"]) == tokens[AUDIO]


def test_a_batch_has_the_contracts_dtypes_and_shapes(rows: Rows) -> None:
    fields = Batch([rows[0], rows[1]]).fields
    assert {name: (field.dtype, tuple(field.shape)) for name, field in fields.items() if name in TOKEN_FIELDS} == {
        "input_ids": (torch.int32, (2, SEQ_LEN)),
        "modality": (torch.uint8, (2, SEQ_LEN)),
        "position": (torch.int32, (2, SEQ_LEN, 3)),
        "document": (torch.int32, (2, SEQ_LEN)),
        "source": (torch.uint8, (2, SEQ_LEN)),
        "loss_mask": (torch.uint8, (2, SEQ_LEN)),
    }
    assert {name: (fields[name].dtype, tuple(fields[name].shape[1:])) for name in MEDIA_FIELDS} == {
        "image": (torch.uint8, (12,)),
        "video": (torch.uint8, (12,)),
        "audio": (torch.float16, (4,)),
        "audio_frames": (torch.int32, ()),
    }
    assert set(MODEL_INPUTS) <= fields.keys()


def test_a_row_holds_its_documents_side_by_side(documents: Documents, rows: Rows) -> None:
    for index, pieces in enumerate(rows._plan[:10]):
        row, at = rows[index], 0
        for number, piece in enumerate(pieces):
            document = documents.document(piece.document).window(piece.start, piece.stop)
            here = slice(at, at + len(document))
            assert np.array_equal(row.input_ids[here], document.input_ids)
            assert np.array_equal(row.loss_mask[here], document.loss_mask)
            assert (row.document[here] == number).all()
            assert (row.source[here] == documents.source(piece.document)).all()
            at += len(document)
        assert (row.document[at:] == -1).all()
        assert (row.input_ids[at:] == documents.tokenizer.eos_id).all()
        assert not row.loss_mask[at:].any()


def test_the_heldout_rows_of_a_corpus_hold_each_source(corpus: Corpus) -> None:
    heldout = Documents([corpus], "heldout")
    rows = Rows(heldout, heldout_rows(heldout, SEQ_LEN, 8, "segment"), ALIKE)
    seen = {int(s) for i in range(len(rows)) for s in rows[i].source[rows[i].document >= 0]}
    assert seen == {0, 1, 2, 3}


def test_the_stream_with_phases_is_the_same_for_any_number_of_ranks(documents: Documents) -> None:
    """Phases are counted in samples of the global stream; the first step of the second begins within a batch."""
    phases = schedule((0, [1.0, 0, 0, 0]), (12, [0, 1.0, 1.0, 1.0]))
    rows = Rows(documents, planned(documents, phases, STEPS * GLOBAL), phases)
    hashes = [step_hashes(rows, ranks, micro) for ranks in (1, 2, 4) for micro in (1, 2)]
    assert all(other == hashes[0] for other in hashes)
    assert {int(s) for i in range(12) for s in rows[i].source} == {0}
    assert {int(s) for i in range(12, len(rows)) for s in rows[i].source} > {0}


def test_a_row_is_as_long_as_its_phase_says(documents: Documents) -> None:
    lengths = [Phase(0, (1.0,) * 4, 32), Phase(8, (1.0,) * 4, 64)]
    plan = Schedule(tuple(lengths), 0, "segment")
    rows = Rows(documents, planned(documents, plan, 16), plan)
    assert [len(rows[index].input_ids) for index in range(16)] == [32] * 8 + [64] * 8


def test_the_targets_of_a_long_text_come_to_the_whole_text(documents: Documents) -> None:
    """Every token but bos is learned once, over the windows of real rows."""
    ids = documents.document(0).input_ids.tolist()
    rows = Rows(documents, list(pack(windows(Piece(0, 0, len(ids)), SEQ_LEN), SEQ_LEN)), ALIKE)
    assert len(rows) > 5
    learned: list[int] = []
    for index in range(len(rows)):
        row = rows[index]
        learned += row.input_ids[(row.document == 0) & (row.loss_mask == 1)].tolist()[0 if index == 0 else 1 :]
    assert learned == ids[1:]
