"""What a run learned, in sentences, from its own files."""

import json
from pathlib import Path
from typing import Any


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The results of the newest evaluated step of a run."""
    steps = sorted(folder.glob("evals/step_*"))
    return [json.loads(file.read_text()) for file in sorted(steps[-1].glob("*.json"))] if steps else []


def table(results: list[dict[str, Any]]) -> str:
    """One line a metric: value ± standard error, chance, each control."""
    lines = []
    for result in results:
        for name, metric in result["metrics"].items():
            cells = [f"{result['task']:20} {name:18} {_figure(metric['value'], metric['stderr']):>18}"]
            if metric["chance"] is not None:
                cells.append(f"chance {metric['chance']:.3f}")
            cells += [f"{control} {value:.3f}" for control, value in metric["control"].items()]
            lines.append("  ".join([*cells, f"n {result['n']}"]))
    return "\n".join(lines)


def verdict(results: list[dict[str, Any]]) -> list[str]:
    """What each result says: learned, or not told apart from chance or from its control."""
    sentences = []
    for result in results:
        metrics = result["metrics"]
        if "acc" in metrics:
            sentences.append(_accuracy_sentence(result["task"], metrics["acc"]))
        elif "bits_per_byte" in metrics:
            sentences.append(_text_sentence(result["task"], metrics["bits_per_byte"]))
    return sentences


def _figure(value: float, stderr: float | None) -> str:
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"


def _accuracy_sentence(task: str, acc: dict[str, Any]) -> str:
    value, stderr, chance = acc["value"], acc["stderr"] or 0.0, acc["chance"]
    remarks = []
    if chance is not None:
        learned = value - 2 * stderr > chance
        remarks.append(f"{'above' if learned else 'not told apart from'} chance {chance:.1%}")
    if acc["control"]:
        remarks.append("with the pictures " + " and ".join(f"{name} {v:.1%}" for name, v in acc["control"].items()))
    return f"{task}: {value:.1%} ± {stderr:.1%} right" + (f" ({'; '.join(remarks)})" if remarks else "")


def _text_sentence(task: str, bits: dict[str, Any]) -> str:
    unigram = bits["control"].get("unigram")
    if unigram is None:
        return f"{task}: {bits['value']:.2f} bits a byte"
    word = "under" if bits["value"] < unigram else "not under"
    return f"{task}: {bits['value']:.2f} bits a byte ({word} a unigram's {unigram:.2f})"
