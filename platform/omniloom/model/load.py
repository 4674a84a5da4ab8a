"""Trained weights on disk and back: safetensors and a config.json, without DeepSpeed, without pickle."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub import load_torch_model, save_torch_state_dict
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from omniloom.errors import CheckpointError, did_you_mean
from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder, text_fields


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
        """Logits (B, T, V) of plain text ids (B, T), each row one document."""
        fields = text_fields(input_ids, self.config)
        output = self.decoder(**fields, predict_at=torch.ones_like(input_ids, dtype=torch.bool))
        return output.logits.unflatten(0, input_ids.shape)


def save_model(folder: Path, config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Write config.json and the weights as safetensors, sharded by size."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=1))
    kept = {name: tensor for name, tensor in weights.items() if not _is_tied_copy(name, config)}
    # Cloned: the engine keeps all parameters as views of one buffer.
    save_torch_state_dict({name: tensor.detach().cpu().clone() for name, tensor in kept.items()}, str(folder))


def _is_tied_copy(name: str, config: ModelConfig) -> bool:
    return config.tie_word_embeddings and name == "lm_head.weight"


def load_model(path: Path) -> Model:
    """Load a run (its newest complete checkpoint), a checkpoint, or a model folder; raises CheckpointError."""
    folder = model_folder(path)
    try:
        config = TypeAdapter(ModelConfig).validate_json((folder / "config.json").read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{folder / 'config.json'} is no model of ours: {error.errors()[0]['msg']}") from error
    decoder = Decoder(config)
    try:
        loaded = load_torch_model(decoder, folder, strict=False, safe=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot load {folder}: {error}") from error
    missing = [name for name in loaded.missing_keys if not _is_tied_copy(name, config)]
    if missing or loaded.unexpected_keys:
        raise CheckpointError(
            f"{folder}: its weights are not its config.json's: {len(missing)} missing {missing[:3]}, "
            f"{len(loaded.unexpected_keys)} unknown {loaded.unexpected_keys[:3]}"
        )
    return Model(decoder, folder).eval()


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
