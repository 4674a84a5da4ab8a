"""Documents of the unified sequence on disk: Arrow files, read by memory map."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from omniloom.data.source import RawDocument
from omniloom.modality.config import Widths
from omniloom.modality.sequence import MODALITIES, TEXT, Document

SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("kind", pa.string()),  # of a preference pair chosen or rejected, else document
        ("input_ids", pa.large_list(pa.int32())),
        ("segment_starts", pa.large_list(pa.int32())),
        ("modality", pa.large_binary()),
        ("position", pa.large_binary()),
        ("loss_mask", pa.large_binary()),
        ("image", pa.large_binary()),
        ("audio", pa.large_binary()),
        ("audio_frames", pa.large_list(pa.int32())),
        ("video", pa.large_binary()),
    ]
)
LISTS = [field.name for field in SCHEMA if pa.types.is_large_list(field.type)]
BLOBS = [field.name for field in SCHEMA if pa.types.is_large_binary(field.type)]  # arrays as their bytes
DOCUMENTS_PER_BATCH = 256
BATCH_BYTES = 32 << 20  # what is held at once while a shard is written, unless one document is larger


def write_documents(path: Path, documents: Iterable[tuple[RawDocument, Document]]) -> Iterator[Document]:
    """Write documents to an Arrow file and give each back; the file is whole when they have ended."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        batch: list[tuple[RawDocument, Document]] = []
        held = 0
        for raw, document in documents:
            size = document.nbytes
            if batch and (len(batch) == DOCUMENTS_PER_BATCH or held + size > BATCH_BYTES):
                writer.write_batch(_to_arrow(batch))
                batch, held = [], 0
            batch.append((raw, document))
            held += size
            yield document
        if batch:
            writer.write_batch(_to_arrow(batch))


def _to_arrow(batch: list[tuple[RawDocument, Document]]) -> pa.RecordBatch:
    columns = {name: pa.array([getattr(raw, name) for raw, _ in batch], pa.string()) for name in ("name", "kind")}
    for field in (*LISTS, *BLOBS):
        arrays = [getattr(document, field) for _, document in batch]
        if field in LISTS:
            offsets = pa.array(np.cumsum([0, *map(len, arrays)]), pa.int64())
            columns[field] = pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(arrays), pa.int32()))
        else:
            offsets = np.cumsum([0, *(array.nbytes for array in arrays)], dtype=np.int64)
            # One document's medium is written from where it lies: an hour of video is not copied.
            joined = arrays[0] if len(arrays) == 1 else np.concatenate([array.reshape(-1) for array in arrays])
            buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(joined))]
            columns[field] = pa.Array.from_buffers(pa.large_binary(), len(batch), buffers)
    return pa.record_batch([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def is_plain(document: Document) -> bool:
    """Whether it is one text, which may be cut anywhere."""
    return len(document.segment_starts) <= 1 and not document.modality.any()


def count_by_modality(document: Document) -> np.ndarray:
    """Its tokens of each modality, int64 (4,)."""
    return np.bincount(document.modality, minlength=len(MODALITIES))


def target_ids(document: Document) -> np.ndarray:
    """The ids of its text that are targets."""
    return document.input_ids[(document.loss_mask > 0) & (document.modality == TEXT)]


class Shard:
    """One Arrow file, opened by memory map: a document is read without touching the others."""

    def __init__(self, path: Path, widths: Widths) -> None:
        self._widths = widths
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def document(self, index: int) -> Document:
        """The document at `index` of this shard."""
        batch, row = self._find(index)

        def blob(field: str, dtype: type) -> np.ndarray:
            # By the column's buffers: Arrow's scalar would be a copy, of an hour of video for one of its frames.
            _, offsets, values = batch.column(field).buffers()
            start, stop = np.frombuffer(offsets, np.int64, 2, 8 * row).tolist()
            return np.frombuffer(values, dtype, (stop - start) // np.dtype(dtype).itemsize, start)

        def numbers(field: str) -> np.ndarray:
            return batch.column(field)[row].values.to_numpy()

        return Document(
            input_ids=numbers("input_ids"),
            modality=blob("modality", np.uint8),
            position=blob("position", np.int32).reshape(-1, 3),
            loss_mask=blob("loss_mask", np.uint8),
            segment_starts=numbers("segment_starts"),
            image=blob("image", np.uint8).reshape(-1, self._widths.image),
            audio=blob("audio", np.float16).reshape(-1, self._widths.audio),
            audio_frames=numbers("audio_frames"),
            video=blob("video", np.uint8).reshape(-1, self._widths.video),
        )

    def name(self, index: int) -> str:
        """Where that document came from."""
        batch, row = self._find(index)
        return batch.column("name")[row].as_py()

    def _find(self, index: int) -> tuple[Any, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._batches[number], index - int(self._starts[number])
