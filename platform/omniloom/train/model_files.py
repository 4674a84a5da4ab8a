"""The model's part of a checkpoint: what model/load.py reads, put together from what the ranks have written."""

import json
from typing import Any

from omniloom.model.weights import INDEX
from omniloom.track.checkpoints import Folder
from omniloom.train.engine_state import Index, read_whole
from omniloom.train.fragments import BUFFER, MASTER
from omniloom.train.tensor_file import Entry, Writing, write_tensors

MAX_SHARD_BYTES = 5_000_000_000


def write_model(
    folder: Folder, index: Index, writing: Writing, max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, dict[str, Any]]:
    """Write model/*.safetensors, holding one tensor at a time; returns their entries in COMPLETE.

    What the model computes with is its masters, rounded to its own type.
    """
    shards: list[list[Entry]] = [[]]
    for name, tensor in index.tensors.items():
        entry = Entry(name, tensor.dtype, tuple(tensor.shape))
        if shards[-1] and sum(each.bytes for each in shards[-1]) + entry.bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    files: dict[str, dict[str, Any]] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        values = (_values(folder, index, entry.name) for entry in shard)
        files[f"model/{file}"] = write_tensors(folder, f"model/{file}", shard, values, writing)
        weight_map |= dict.fromkeys((entry.name for entry in shard), file)
    if len(shards) > 1:
        total = sum(entry.bytes for shard in shards for entry in shard)
        told = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files[f"model/{INDEX}"] = folder.write(f"model/{INDEX}", json.dumps(told, indent=1).encode())
    return files


def _values(folder: Folder, index: Index, name: str) -> Any:
    tensor = index.tensors[name]
    return read_whole(folder, name, tensor, MASTER if MASTER in tensor.states else BUFFER)
