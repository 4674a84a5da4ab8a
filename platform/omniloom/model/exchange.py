"""Models come and go: our folders to Hugging Face's, theirs and llama2.c's files to ours; one shard is in memory."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, processors
from torch import Tensor

from omniloom.errors import CheckpointError, ConfigError, did_you_mean, refuse_unless_one_of
from omniloom.model.config import ModelConfig
from omniloom.model.hf import KINDS, Theirs, tensors
from omniloom.model.hf_config import to_hugging_face
from omniloom.model.llama2c import BOS, EOS, Llama2cWeights, convert_tokenizer
from omniloom.model.load import (
    OwnWeights,
    Source,
    is_hugging_face,
    open_weights,
    own_config,
    read_config,
    shapes_of,
    write_config,
)
from omniloom.model.weights import Planned, new_folder, write_shards

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ALWAYS_FLOAT32 = "router.bias_E"  # moved by a thousandth at a time
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass
class Exchanged:
    """What was written."""

    folder: Path
    kind: str
    parameters: int
    notes: list[str]

    def __str__(self) -> str:
        """As the command line tells it."""
        files = [path for path in self.folder.iterdir() if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        told = f"{self.folder}: {self.kind}, {self.parameters:,} parameters, {len(files)} files, {size:,} bytes"
        return "\n".join([told, *(f"note: {note}" for note in self.notes)])


def export_model(
    folder: Path, to: Path, special: Mapping[str, str], dtype: str | None, max_shard_bytes: int, force: bool
) -> Exchanged:
    """Write a model folder of ours as one of Hugging Face's; what no text passes through is left out, with a note.

    `special` names our tokenizer's bos_token and eos_token. Raises ConfigError where no class of theirs gives the same
    logits of text, CheckpointError where the folder is damaged.
    """
    if is_hugging_face(read_config(folder)):
        raise ConfigError(f"{folder} is a Hugging Face folder already: `omniloom import` makes it one of ours")
    _refuse_same(folder, to)
    if dtype is not None:
        refuse_unless_one_of("dtype", dtype, DTYPES)
    config = own_config(folder)
    theirs = to_hugging_face(config)
    kind, shapes, weights = KINDS[theirs["model_type"]], shapes_of(config), OwnWeights(folder)
    weights.check(shapes)

    def plan(tensor: Theirs) -> Planned:
        first = tensor.pieces[0].ours
        wanted = weights.dtype(first) if dtype is None else DTYPES[dtype]
        wanted = torch.float32 if first.endswith(ALWAYS_FLOAT32) else wanted
        return Planned(tensor.name, tensor.shape, wanted, lambda: _assemble(tensor, weights))

    planned = tensors(kind, config, shapes, kind.interleave)
    written = {piece.ours for tensor in planned for piece in tensor.pieces}
    notes = _left_out({name: torch.Size(shape).numel() for name, shape in shapes.items() if name not in written})
    files = [plan(tensor) for tensor in planned]
    theirs["torch_dtype"] = theirs["dtype"] = str(files[0].dtype).removeprefix("torch.")
    with new_folder(to, force) as partial:
        ids, more = _write_tokenizer(folder, partial, config, special)
        (partial / "config.json").write_text(json.dumps(theirs | ids, indent=2))
        write_shards(partial, files, max_shard_bytes, f"to {to.name}")
    parameters = sum(torch.Size(shapes[name]).numel() for name in written)
    return Exchanged(to, kind.architecture, parameters, notes + more)


def _assemble(tensor: Theirs, weights: OwnWeights) -> Tensor:
    return torch.cat([piece.there(weights.read(piece.ours, piece.index)) for piece in tensor.pieces], dim=-1)


def _refuse_same(folder: Path, to: Path) -> None:
    if folder.resolve() == to.resolve():
        raise ConfigError(f"to={to} is where the model comes from: name another folder")


def _left_out(sizes: Mapping[str, int]) -> list[str]:
    """One line about what text does not pass through."""
    names = {"media": "media encoders", "mtp": "multi-token prediction"}
    counts: Counter[str] = Counter()
    for name, size in sizes.items():
        counts[names[name.split(".")[0]]] += size
    if not counts:
        return []
    parts = " and ".join(f"{what} ({count:,} parameters)" for what, count in counts.items())
    return [f"left out: {parts}, which that class has no place for; logits of text are the same without"]


def _write_tokenizer(
    folder: Path, to: Path, config: ModelConfig, special: Mapping[str, str]
) -> tuple[dict[str, int], list[str]]:
    """The tokenizer's files, and bos_token_id and eos_token_id as it has them; a note where there is no tokenizer.

    Ours becomes one that puts bos first, as our documents do, and takes special tokens in a text for ordinary text.
    """
    copied = _copy_tokenizer(folder, to)
    if not (to / "tokenizer.json").is_file():
        return {}, [f"{folder} has no tokenizer.json: the export has none"]
    if "generation_config.json" in copied:
        ids = _generation_config(to)
        return {name: ids[name] for name in ("bos_token_id", "eos_token_id") if ids.get(name) is not None}, []
    if "tokenizer_config.json" in copied:  # somebody's, unchanged
        return {}, []
    tokenizer = Tokenizer.from_file(str(to / "tokenizer.json"))
    ids = {f"{name}_id": tokenizer.token_to_id(token) for name, token in special.items()}
    if None in ids.values():
        return {}, [f"the tokenizer lacks {' or '.join(special.values())}: it is copied as it is"]
    bos = special["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, ids["bos_token_id"])]
    )
    tokenizer.save(str(to / "tokenizer.json"))
    write_tokenizer_config(to, special, ids, config.max_position_embeddings)
    return ids, []


def write_tokenizer_config(to: Path, special: Mapping[str, str], ids: Mapping[str, int], context: int) -> None:
    """Say beside tokenizer.json how to use it."""
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # written out in a text they are ordinary text
        **special,
    }
    (to / "tokenizer_config.json").write_text(json.dumps(told, indent=2))
    (to / "generation_config.json").write_text(json.dumps(dict(ids), indent=2))


def _generation_config(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "generation_config.json").read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{folder / 'generation_config.json'} is malformed: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder / 'generation_config.json'} is malformed: it is no mapping")
    return content


def _copy_tokenizer(folder: Path, to: Path) -> list[str]:
    copied = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    for name in copied:
        shutil.copyfile(folder / name, to / name)
    return copied


def import_model(
    source: Path, to: Path, tokenizer: Path | None, reading_rules: bytes, max_shard_bytes: int, force: bool
) -> Exchanged:
    """Write a Hugging Face folder, or a file of llama2.c's, as a model folder of ours; dtypes stay as they are.

    `reading_rules` is the modality.json where the source has none. Raises CheckpointError where the source is damaged,
    of a kind that is not read, or asks for what our decoder does not do.
    """
    if not source.exists():
        near = did_you_mean(source.name, (path.name for path in source.parent.glob("*")))
        raise ConfigError(f"source={source} does not exist; {near}")
    if tokenizer is not None and not tokenizer.is_file():
        raise ConfigError(f"tokenizer_path={tokenizer} is no file")
    _refuse_same(source, to)
    weights: Source
    if source.is_file():
        weights = Llama2cWeights(source)
        config, kind = weights.config, "llama2.c"
    else:
        theirs = read_config(source)
        if not is_hugging_face(theirs):
            raise CheckpointError(f"{source} is a model of ours or none: its config.json has no model_type")
        (config, weights), kind = open_weights(source), KINDS[theirs["model_type"]].architecture
    shapes = shapes_of(config)

    def plan(name: str) -> Planned:
        dtype = torch.float32 if name.endswith(ALWAYS_FLOAT32) else weights.dtype(name)
        return Planned(name, shapes[name], dtype, lambda: _filled(name, shapes[name], dtype, weights))

    with new_folder(to, force) as partial:
        write_config(partial, config)
        notes = _bring_tokenizer(source, partial, tokenizer, config)
        rules = source / "modality.json"
        (partial / "modality.json").write_bytes(rules.read_bytes() if rules.is_file() else reading_rules)
        write_shards(partial, [plan(name) for name in shapes], max_shard_bytes, f"to {to.name}")
    return Exchanged(to, kind, sum(torch.Size(shape).numel() for shape in shapes.values()), notes)


def _filled(name: str, shape: tuple[int, ...], dtype: torch.dtype, weights: Source) -> Tensor:
    whole = torch.empty(shape, dtype=dtype)
    weights.fill(name, whole)
    return whole


def _bring_tokenizer(source: Path, to: Path, tokenizer: Path | None, config: ModelConfig) -> list[str]:
    """The source's tokenizer files, unchanged, and the one that was named; ids of bos and eos go along."""
    if source.is_dir():
        if "generation_config.json" in _copy_tokenizer(source, to):
            _generation_config(to)
        theirs: dict[str, Any] = read_config(source)
        ids = {name: theirs[name] for name in ("bos_token_id", "eos_token_id") if theirs.get(name) is not None}
        if ids and not (to / "generation_config.json").is_file():
            (to / "generation_config.json").write_text(json.dumps(ids, indent=2))
    if tokenizer is not None and tokenizer.suffix == ".bin":
        convert_tokenizer(tokenizer, config.vocab_size).save(str(to / "tokenizer.json"))
        special = {"bos_token": BOS, "eos_token": EOS}
        ids = {"bos_token_id": 1, "eos_token_id": 2}
        write_tokenizer_config(to, special, ids, config.max_position_embeddings)
    elif tokenizer is not None:
        shutil.copyfile(tokenizer, to / "tokenizer.json")
    missing = not (to / "tokenizer.json").is_file()
    return [f"no tokenizer.json in {source}: name one with tokenizer_path="] if missing else []
