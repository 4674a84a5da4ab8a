"""Trained weights on disk and back: safetensors and a config.json, without DeepSpeed, without pickle."""

import json
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import save_torch_state_dict
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from omniloom.errors import CheckpointError, ConfigError, DataError, did_you_mean
from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder, text_fields
from omniloom.model.hf import KINDS, HuggingFaceWeights, Shapes
from omniloom.model.hf_config import from_hugging_face
from omniloom.model.weights import Weights


class Model(nn.Module):
    """A trained decoder and the folder it came from (its tokenizer.json and modality.json lie there)."""

    def __init__(self, decoder: Decoder, folder: Path) -> None:
        super().__init__()
        self.decoder, self.folder = decoder, folder

    @property
    def config(self) -> ModelConfig:
        """The decoder's sizes."""
        return self.decoder.config

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, T, V) of plain text ids (B, T), each row one document; raises DataError on other ids."""
        self.check_ids(input_ids)
        inputs = text_fields(input_ids, self.config)
        output = self.decoder(**inputs, predict_at=torch.ones_like(input_ids, dtype=torch.bool))
        return output.logits.unflatten(0, input_ids.shape)

    def check_ids(self, input_ids: Tensor) -> None:
        """Raise DataError where these are no ids (B, T) of this model."""
        if input_ids.dim() != 2 or not input_ids.numel():
            raise DataError(f"ids are (B, T), at least one of each: these are {tuple(input_ids.shape)}")
        low, high = (int(bound) for bound in input_ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise DataError(f"ids lie between 0 and {self.config.vocab_size - 1}, these between {low} and {high}")


class Source(Protocol):
    """Weights under our names, wherever they lie."""

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor, as it is kept."""

    def fill(self, name: str, into: Tensor) -> None:
        """Write one tensor."""


class OwnWeights(Weights):
    """The weights of a folder of ours."""

    def fill(self, name: str, into: Tensor) -> None:
        """Write one tensor."""
        into.copy_(self.read(name))


def save_model(folder: Path, config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Write config.json and the weights as safetensors, sharded by size."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config)
    kept = {name: tensor for name, tensor in weights.items() if not _is_tied_copy(name, config)}
    # Cloned: the engine keeps all parameters as views of one buffer.
    save_torch_state_dict({name: tensor.detach().cpu().clone() for name, tensor in kept.items()}, str(folder))


def write_config(folder: Path, config: ModelConfig) -> None:
    """Write config.json."""
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=1))


def _is_tied_copy(name: str, config: ModelConfig) -> bool:
    return config.tie_word_embeddings and name == "lm_head.weight"


def shapes_of(config: ModelConfig) -> Shapes:
    """Names and shapes of a decoder's weights, each once; nothing is allocated."""
    with torch.device("meta"):
        state = Decoder(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if not _is_tied_copy(name, config)}


def load_model(path: Path) -> Model:
    """Load a run (its newest complete checkpoint), a checkpoint, or a model folder, ours or Hugging Face's.

    Weights go one by one from their files into the decoder's float32. Raises CheckpointError.
    """
    folder = model_folder(path)
    config, weights = open_weights(folder)
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder = decoder.to_empty(device="cpu")
    if config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.embed_tokens.weight  # apart since to_empty
    for name, tensor in decoder.state_dict().items():
        if not _is_tied_copy(name, config):
            weights.fill(name, tensor)
    return Model(decoder, folder).eval()


def config_of(folder: Path) -> ModelConfig:
    """The config of a model folder, ours or Hugging Face's; no weights are opened."""
    theirs = read_config(folder)
    return from_hugging_face(theirs, str(folder / "config.json"))[1] if is_hugging_face(theirs) else own_config(folder)


def open_weights(folder: Path) -> tuple[ModelConfig, Source]:
    """The config and the weights of a model folder, ours or Hugging Face's, whole and checked; nothing is read yet."""
    theirs = read_config(folder)
    if is_hugging_face(theirs):
        return _open_hugging_face(folder, theirs)
    config = own_config(folder)
    weights = OwnWeights(folder)
    if config.num_hidden_layers > len(weights.names):
        raise CheckpointError(
            f"{folder}: its weights are not its config.json's: model.num_hidden_layers={config.num_hidden_layers} has "
            f"{len(weights.names)} tensors"
        )
    weights.check(shapes_of(config))
    return config, weights


def _open_hugging_face(folder: Path, theirs: dict[str, Any]) -> tuple[ModelConfig, Source]:
    name, config = from_hugging_face(theirs, str(folder / "config.json"))
    kind, held = KINDS[name], len(Weights(folder).names)
    for key in ("num_hidden_layers", "n_routed_experts", "num_nextn_predict_layers"):  # each with a tensor of its own
        if getattr(config, key) > held:
            raise CheckpointError(
                f"{folder}: its weights are not its config.json's: what would be model.{key}={getattr(config, key)} "
                f"has {held} tensors"
            )
    ahead, first = config.num_nextn_predict_layers, kind.layers.format(i=config.num_hidden_layers)
    if ahead and not any(name.startswith(first) for name in Weights(folder).names):
        warnings.warn(
            f"{folder}: config.json names num_nextn_predict_layers={ahead} and the files hold no such module: "
            "there is no multi-token prediction",
            stacklevel=2,
        )
        config = replace(config, num_nextn_predict_layers=0)
    return config, HuggingFaceWeights(folder, kind, config, shapes_of(config))


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json, whosever it is."""
    try:
        content = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is no model's: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder / 'config.json'} is no model's: it is no mapping")
    return content


def is_hugging_face(config: dict[str, Any]) -> bool:
    """Whether a config.json is theirs."""
    return "model_type" in config or "architectures" in config


def own_config(folder: Path) -> ModelConfig:
    """The config of a folder of ours; raises CheckpointError."""
    content = read_config(folder)
    known = {field.name for field in fields(ModelConfig)}
    if unknown := sorted(content.keys() - known):
        near = did_you_mean(unknown[0], known)
        raise CheckpointError(f"{folder / 'config.json'} is no model of ours: unknown key {unknown[0]}; {near}")
    try:
        config = TypeAdapter(ModelConfig).validate_python(content)
        config.check()
    except ValidationError as error:
        raise CheckpointError(f"{folder / 'config.json'} is no model of ours: {error.errors()[0]['msg']}") from error
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    return config


def model_folder(path: Path) -> Path:
    """The folder with config.json that `path` stands for; raises CheckpointError saying what is missing."""
    if (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        if not (path / "COMPLETE").is_file():
            raise CheckpointError(f"checkpoint {path} is not complete: it was interrupted while it was written")
        return path / "model"
    complete = sorted(path.glob("checkpoints/step_*/COMPLETE"))
    if complete:
        return complete[-1].parent / "model"
    if path.is_dir():
        raise CheckpointError(f"{path} holds no complete checkpoint and no model")
    near = did_you_mean(path.name, (p.name for p in path.parent.glob("*"))) if path.parent.is_dir() else ""
    raise CheckpointError(f"no run, checkpoint or model at {path}; {near}")
