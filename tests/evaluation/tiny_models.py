"""Tiny models in folders, as a checkpoint's model/ is, and requests for them."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from PIL import Image

from omniloom.data.samples.files import write_mp4, write_wav
from omniloom.evaluation.lm import OmniloomLM
from omniloom.modality.batch import MODEL_INPUTS, stack_rows
from omniloom.modality.config import AudioConfig, ImageConfig, ModalityConfig, VideoConfig
from omniloom.modality.sequence import Document, lay_row
from omniloom.modality.text import TextTokenizer, train_tokenizer
from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder
from omniloom.model.load import Model, load_model, save_model

torch.set_num_threads(1)

EVALS = Path(__file__).resolve().parents[2] / "evals"
CONTEXT_TOKENS = 32
PICTURE_TOKENS, CLIP_TOKENS, VIDEO_TOKENS = 4, 3, 8
TINY = ModalityConfig(
    ImageConfig(size_pixels=4, patch_pixels=2),
    AudioConfig(mels=4, frames_per_token=2),
    VideoConfig(size_pixels=4, patch_pixels=2, frames_per_second=2),
)
LETTERS = "the cat sat on the mat and the dog sat on the log; what is shown here? red green blue "


def tokenizer() -> TextTokenizer:
    return train_tokenizer(iter([LETTERS * 4]), 300)


def save_tiny(folder: Path, kind: str = "random", seed: int = 0, **changes: Any) -> Path:
    """A model folder: `random`; `uniform`, whose head is zero; `bigram`, whose layers add nothing."""
    text = tokenizer()
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=text.vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.7,  # large, so that every input shows in the scores
        tie_word_embeddings=False,
        num_attention_heads=2,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        intermediate_size=16,
        n_routed_experts=4,
        moe_intermediate_size=8,
        image_patch_pixels=2,
        video_patch_pixels=2,
        audio_mels=4,
        audio_frames_per_token=2,
    )
    config = replace(config, **changes)
    decoder = Decoder(config)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            silent = {"uniform": ("lm_head",), "bigram": ("o_proj", "down_proj", "down_EFD"), "random": ()}[kind]
            if any(part in name for part in silent):
                parameter.zero_()
    save_model(folder, config, decoder.state_dict())
    text.save(folder / "tokenizer.json")
    (folder / "modality.json").write_text(json.dumps(asdict(TINY)))
    return folder


def tiny_lm(folder: Path, control: Any = "kept", batch_tokens: int = 8_192) -> OmniloomLM:
    return OmniloomLM(load_model(folder), batch_tokens, control)


def ask(*arguments: Any, document: int = 0, task: str = "some_task", kind: Any = "loglikelihood") -> Instance:
    return Instance(kind, {}, arguments, 0, (task, document, 1))


def rolling(text: str) -> Instance:
    return ask(text, kind="loglikelihood_rolling")


def colourful(folder: Path, count: int) -> list[Path]:
    """Pictures that differ in every pixel."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def audible(folder: Path, count: int) -> list[Path]:
    """Clips of noise, each of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.wav" for number in range(count)]
    for number, path in enumerate(paths):
        write_wav(path, np.random.default_rng(number).integers(-8_000, 8_000, 800), 16_000)
    return paths


def moving(folder: Path, count: int) -> list[Path]:
    """Videos of noise, each of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.mp4" for number in range(count)]
    for number, path in enumerate(paths):
        write_mp4(path, np.random.default_rng(number).integers(0, 256, (4, 16, 16, 3), np.uint8), 4)
    return paths


@torch.no_grad()
def direct_document(model: Model, document: Document) -> tuple[float, bool]:
    """The same of the targets of one woven document, media and all."""
    fields = stack_rows([lay_row([(document, 0)], len(document), 0, TINY.widths)])
    everywhere = torch.ones_like(fields["input_ids"], dtype=torch.bool)
    output = model.decoder(**{name: fields[name] for name in MODEL_INPUTS}, predict_at=everywhere)
    logprob = output.logits.double().log_softmax(-1)
    targets = [(at, int(document.input_ids[at])) for at in np.flatnonzero(document.loss_mask)]
    likeliest = all(int(logprob[at - 1].argmax()) == i for at, i in targets)
    return sum(float(logprob[at - 1, i]) for at, i in targets), likeliest


@torch.no_grad()
def direct(model: Model, context: list[int], target: list[int]) -> tuple[float, bool]:
    """Σ log P(target | context) through model(input_ids), and whether every target is the likeliest id."""
    ids = torch.tensor([context + target])
    logprob = model(ids)[0].double().log_softmax(-1)
    before = range(len(context) - 1, len(context) + len(target) - 1)
    likeliest = [int(logprob[at].argmax()) for at in before]
    return sum(float(logprob[at, i]) for at, i in zip(before, target, strict=True)), likeliest == target
