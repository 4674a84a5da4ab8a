"""The demo's architecture on real files: digits spoken by people, one of them never heard before, and MNIST."""

import json
import wave
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from omniloom.cli import run_verb
from omniloom.data.samples.files import write_wav

HELDOUT_SPEAKER = "theo"
VARIANTS = 7  # of each training clip
DIGITS = [str(digit) for digit in range(10)]
QUESTIONS = {"speech": "Which digit is spoken?", "pictures": "Which digit is this?"}


def write_source(folder: Path, name: str, items: dict[str, list[tuple[dict[str, str], str]]]) -> dict[str, object]:
    """One interleaved source, and its held-out half as questions."""
    for split, chosen in items.items():
        lines = [
            {"segments": [medium, {"text": QUESTIONS[name], "loss": False}, {"text": f" {answer}"}]}
            for medium, answer in chosen
        ]
        (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = (
        {"segments": [medium, {"text": QUESTIONS[name]}], "choices": DIGITS, "answer": int(answer)}
        for medium, answer in items["heldout"]
    )
    (folder / f"{name}-questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    return {"format": "interleaved", "train": [f"{name}-train.jsonl"], "heldout": [f"{name}-heldout.jsonl"]}


def speech(real_data: Path, folder: Path) -> dict[str, list[tuple[dict[str, str], str]]]:
    """The held-out speaker's clips as they are; the others' each again in variants: three voices alone teach little."""
    (folder / "wav").mkdir()
    generator = np.random.default_rng(0)
    found: dict[str, list[tuple[dict[str, str], str]]] = {"train": [], "heldout": []}
    for path in sorted((real_data / "audio" / "fsdd").glob("*.wav")):
        digit, speaker, _ = path.stem.split("_")
        if speaker == HELDOUT_SPEAKER:
            found["heldout"].append(({"audio": str(path)}, digit))
            continue
        found["train"].append(({"audio": str(path)}, digit))
        with wave.open(str(path)) as clip:
            rate, samples = clip.getframerate(), np.frombuffer(clip.readframes(clip.getnframes()), "<i2")
        for number in range(VARIANTS):
            varied = folder / "wav" / f"{path.stem}-{number}.wav"
            write_wav(varied, louder_and_noisier(samples, generator), round(rate * generator.uniform(0.8, 1.25)))
            found["train"].append(({"audio": str(varied)}, digit))
    return found


def louder_and_noisier(samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Another loudness, noise up to a thirtieth of the peak, some silence before and after; int16."""
    peak = np.abs(samples.astype(np.float32)).max()
    clean = np.pad(samples.astype(np.float32) / peak, generator.integers(0, 1_600, 2))
    noisy = clean + generator.normal(0, generator.uniform(0, 1 / 30), len(clean))
    return (noisy * generator.uniform(4_000, 24_000)).clip(-32_768, 32_767).astype(np.int16)


def pictures(real_data: Path, folder: Path) -> dict[str, list[tuple[dict[str, str], str]]]:
    mnist = np.load(real_data / "image" / "mnist_t10k_5000.npz")
    (folder / "png").mkdir()
    found: dict[str, list[tuple[dict[str, str], str]]] = {"train": [], "heldout": []}
    for number, (image, label) in enumerate(zip(mnist["images"], mnist["labels"], strict=True)):
        path = folder / "png" / f"{number:04d}.png"
        Image.fromarray(image).save(path)
        found["heldout" if number >= 4_500 else "train"].append(({"image": str(path)}, str(label)))
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_new_speaker_and_new_handwriting_are_read(ray_cluster: None, real_data: Path, tmp_path: Path) -> None:
    sources = {
        "speech": write_source(tmp_path, "speech", speech(real_data, tmp_path)),
        "pictures": write_source(tmp_path, "pictures", pictures(real_data, tmp_path)),
    }
    (tmp_path / "manifest.yaml").write_text(yaml.safe_dump({"sources": sources}))
    run_verb(
        "train",
        [
            "run=real",
            "model=tiny",
            "cluster=local_two",
            "parallel=zero0",
            f"manifest={tmp_path}/manifest.yaml",
            f"corpus={tmp_path}/corpus",
            f"runs_dir={tmp_path}/runs",
            "tokenizer.vocab_size=300",
            "modality.image={size_pixels: 28, patch_pixels: 7}",
            "modality.audio.mels=40",
            "model.vocab_size=320",
            "model.image_patch_pixels=7",
            "model.audio_mels=40",
            "model.embedding_conv_tokens=6",
            "model.attention_log_scale_tokens=512",
            "data.seq_len=512",
            "train={steps: 200, global_batch_size: 8, micro_batch_size: 4, save_every: 200, val_every: 50}",
            "optimizer={kind: muon, lr: 2e-3, muon_lr: 1.5e-2}",
            "schedule={kind: warmup_stable_decay, warmup_steps: 20, floor: 0.0}",
        ],
    )
    run_verb(
        "evaluate",
        [
            "init=real",
            "batch_tokens=4096",
            f"runs_dir={tmp_path}/runs",
            "tasks=[omniloom_speech,omniloom_pictures]",
            f"task_args.omniloom_speech.files={tmp_path}/speech-questions.jsonl",
            f"task_args.omniloom_pictures.files={tmp_path}/pictures-questions.jsonl",
        ],
    )
    (step,) = (tmp_path / "runs" / "real" / "evals").iterdir()
    # Three voices teach a fourth one's digits only in part; chance is a tenth.
    for task, least in (("omniloom_speech", 0.3), ("omniloom_pictures", 0.9)):
        accuracy = json.loads((step / f"{task}.json").read_text())["metrics"]["acc"]
        print(task, accuracy)
        assert accuracy["value"] >= least
        assert max(accuracy["control"].values()) < 0.25
