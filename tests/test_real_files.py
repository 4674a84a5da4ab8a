"""The demo's architecture on real files: digits spoken by people, one of them never heard before, and MNIST."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from omniloom.cli import run_verb

HELDOUT_SPEAKER = "theo"
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


def speech(real_data: Path) -> dict[str, list[tuple[dict[str, str], str]]]:
    found: dict[str, list[tuple[dict[str, str], str]]] = {"train": [], "heldout": []}
    for path in sorted((real_data / "audio" / "fsdd").glob("*.wav")):
        digit, speaker, _ = path.stem.split("_")
        found["heldout" if speaker == HELDOUT_SPEAKER else "train"].append(({"audio": str(path)}, digit))
    return found


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
        "speech": write_source(tmp_path, "speech", speech(real_data)),
        "pictures": write_source(tmp_path, "pictures", pictures(real_data, tmp_path)),
    }
    (tmp_path / "manifest.yaml").write_text(yaml.safe_dump({"sources": sources}))
    run_verb(
        "train",
        [
            "experiment=demo",
            "run=real",
            "samples=null",
            f"manifest={tmp_path}/manifest.yaml",
            f"corpus={tmp_path}/corpus",
            f"runs_dir={tmp_path}/runs",
            "tokenizer.vocab_size=300",
            "model.vocab_size=320",
            "modality.image={size_pixels: 28, patch_pixels: 7}",
            "~data.weights",
            "~data.phases",
            "train.steps=250",
            "train.save_every=250",
        ],
    )
    run_verb(
        "evaluate",
        [
            "init=real",
            f"runs_dir={tmp_path}/runs",
            "tasks=[omniloom_speech,omniloom_pictures]",
            f"task_args.omniloom_speech.files={tmp_path}/speech-questions.jsonl",
            f"task_args.omniloom_pictures.files={tmp_path}/pictures-questions.jsonl",
        ],
    )
    (step,) = (tmp_path / "runs" / "real" / "evals").iterdir()
    for task, least in (("omniloom_speech", 0.5), ("omniloom_pictures", 0.9)):
        accuracy = json.loads((step / f"{task}.json").read_text())["metrics"]["acc"]
        print(task, accuracy)
        assert accuracy["value"] >= least
        assert max(accuracy["control"].values()) < 0.25
