"""What a run learned, in sentences, from its own files."""

import json
import re
from pathlib import Path
from typing import Any


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The results of the newest evaluated step of a run."""
    steps = sorted(folder.glob("evals/step_*"))
    return [json.loads(file.read_text()) for file in sorted(steps[-1].glob("*.json"))] if steps else []


def cell_of(metric: str) -> tuple[int, float] | None:
    """Length in tokens and depth of a needle task's cell, whose metric is named `acc/<length>/<depth>`."""
    match = re.fullmatch(r"acc/(\d+)/(\d+(?:\.\d+)?)", metric)
    return (int(match[1]), float(match[2])) if match else None


def _grid(result: dict[str, Any]) -> dict[tuple[int, float], dict[str, Any]]:
    named = ((cell_of(name), metric) for name, metric in result["metrics"].items())
    return {cell: metric for cell, metric in named if cell is not None}


def table(results: list[dict[str, Any]]) -> str:
    """One line a metric: value ± standard error, chance, each control; a needle task's cells as a grid under it."""
    lines = []
    for result in results:
        for name, metric in result["metrics"].items():
            if cell_of(name):
                continue
            cells = [f"{result['task']:20} {name:18} {_figure(metric['value'], metric['stderr']):>18}"]
            if metric["chance"] is not None:
                cells.append(f"chance {metric['chance']:.3f}")
            cells += [f"{control} {value:.3f}" for control, value in metric["control"].items()]
            lines.append("  ".join([*cells, f"n {result['n']}"]))
        lines += _grid_lines(_grid(result))
    return "\n".join(lines)


def _grid_lines(cells: dict[tuple[int, float], dict[str, Any]]) -> list[str]:
    depths = sorted({depth for _, depth in cells})
    lines = [f"{'tokens at depth':>24}" + "".join(f"{depth:>8.0%}" for depth in depths)] if cells else []
    for length in sorted({length for length, _ in cells}):
        found = (cells.get((length, depth)) for depth in depths)
        lines.append(f"{length:>24,}" + "".join(f"{cell['value']:>8.0%}" if cell else f"{'':8}" for cell in found))
    return lines


def verdict(results: list[dict[str, Any]]) -> list[str]:
    """What each result says: learned, or not told apart from chance or from its control."""
    sentences = []
    for result in results:
        metrics = result["metrics"]
        cells = _grid(result)
        if cells:
            sentences.append(_recall_sentence(result["task"], metrics["acc"], cells))
        elif "acc" in metrics:
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
        remarks.append("with its media " + " and ".join(f"{name} {v:.1%}" for name, v in acc["control"].items()))
    return f"{task}: {value:.1%} ± {stderr:.1%} right" + (f" ({'; '.join(remarks)})" if remarks else "")


def _recall_sentence(task: str, acc: dict[str, Any], cells: dict[tuple[int, float], dict[str, Any]]) -> str:
    (length, depth), worst = min(cells.items(), key=lambda item: item[1]["value"])
    return (
        f"{task}: {acc['value']:.1%} of the facts recalled; the worst of {len(cells)} cells is {worst['value']:.0%} at "
        f"{length:,} tokens, depth {depth:.0%}"
    )


def _text_sentence(task: str, bits: dict[str, Any]) -> str:
    unigram = bits["control"].get("unigram")
    if unigram is None:
        return f"{task}: {bits['value']:.2f} bits a byte"
    word = "under" if bits["value"] < unigram else "not under"
    return f"{task}: {bits['value']:.2f} bits a byte ({word} a unigram's {unigram:.2f})"
