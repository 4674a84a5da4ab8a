"""New tokens a second against transformers' generate with its cache, and what guessing ahead gains.

`python tests/benchmarks/generate.py [llama] [deepseek] [guesses]`: random weights, exported and loaded by both in one
process; prompts of 128 tokens, 64 new ones, greedy; sides take turns, medians of five. Memory is what a process of its
own holds at most while it generates, above what it held with the model loaded. `guesses` writes with the demo's model
(`runs/demo`, or the run that OMNILOOM_DEMO names; where there is none the demo runs first) and its prediction module.
Needs a quiet machine.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import omniloom
from omniloom.compose import preset
from omniloom.generate.model import WritingModel
from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder
from omniloom.model.exchange import export_model
from omniloom.model.load import save_model

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    "llama": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1_536},
    "deepseek": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "kv_lora_rank": 128},
}
PROMPT_TOKENS, NEW_TOKENS, REPEATS = 128, 64, 5
DEMO = Path(os.environ.get("OMNILOOM_DEMO", ROOT / "runs" / "demo"))


def make(folder: Path, shape: str) -> tuple[Path, Path]:
    """One model as ours and as theirs."""
    from omniloom.modality.text import train_tokenizer

    ours, theirs = folder / f"{shape}-ours", folder / f"{shape}-theirs"
    config = ModelConfig(**vars(preset(f"tiny_{shape}")) | SHAPES[shape] | {"num_nextn_predict_layers": 0})
    torch.manual_seed(0)
    save_model(ours, config, Decoder(config).state_dict())
    train_tokenizer(iter([(ROOT / "README.md").read_text()]), config.vocab_size).save(ours / "tokenizer.json")
    export_model(ours, theirs, {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}, None, 1 << 30, force=False)
    return ours, theirs


def our_side(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    model = omniloom.load(folder)
    return lambda ids: model.generate(ids, NEW_TOKENS, ignore_eos=True, batch_size=len(ids))


def their_side(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    asked = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    return lambda ids: model.generate(ids, attention_mask=torch.ones_like(ids), **asked)


def prompts(batch: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(5, vocabulary, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(batch))


def compare(shape: str, folder: Path) -> None:
    ours, theirs = make(folder, shape)
    sides = {"ours": our_side(ours), "theirs": their_side(theirs)}
    vocabulary = preset(f"tiny_{shape}").vocab_size
    for batch in (1, 8):
        ids, took, written = prompts(batch, vocabulary), {name: [] for name in sides}, {}
        for repeat in range(REPEATS + 1):
            for name, side in sides.items():
                begun = time.perf_counter()
                written[name] = side(ids)
                if repeat:  # the first warms up
                    took[name].append(time.perf_counter() - begun)
        speeds = {name: batch * NEW_TOKENS / statistics.median(each) for name, each in took.items()}
        peaks = {name: peak_mb(name, ours if name == "ours" else theirs, batch, vocabulary) for name in sides}
        alike = (written["ours"] == written["theirs"]).float().mean()
        print(
            f"{shape:8} batch {batch}: ours {speeds['ours']:7.1f} new tokens/s, transformers {speeds['theirs']:7.1f}: "
            f"{speeds['ours'] / speeds['theirs']:.2f} ×; peak above the model {peaks['ours']:.0f} and "
            f"{peaks['theirs']:.0f} MB; {100 * alike:.1f}% of ids alike",
            flush=True,
        )


def peak_mb(name: str, folder: Path, batch: int, vocabulary: int) -> float:
    """In a process of its own."""
    code = [sys.executable, __file__, "peak", name, str(folder), str(batch), str(vocabulary)]
    return float(subprocess.run(code, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure_peak(name: str, folder: str, batch: str, vocabulary: str) -> None:
    side = (our_side if name == "ours" else their_side)(Path(folder))
    before = forget_peak_mb()
    side(prompts(int(batch), int(vocabulary)))
    print(held_mb("VmHWM") - before)


def held_mb(what: str) -> float:
    return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1_024


def forget_peak_mb() -> float:
    """What the process holds now; its peak is counted from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return held_mb("VmRSS")


def demo_model() -> WritingModel:
    """The demo's; trained first where there is none."""
    if not list(DEMO.glob("checkpoints/*/COMPLETE")):
        words = ["demo", f"run={DEMO.name}", f"runs_dir={DEMO.parent}"]
        subprocess.run([sys.executable, "-m", "omniloom", *words], check=True)
    return omniloom.load(DEMO)


def guesses() -> None:
    """Acceptance and speed of the demo's prediction module, on what its topics begin with."""
    model = demo_model()
    files = sorted((ROOT / "corpora" / "demo" / "files" / "topics" / "heldout").glob("*.txt"))
    starts = [" ".join(file.read_text().split()[:24]) for file in files][:32]
    options = {"max_new_tokens": 96, "ignore_eos": True}
    for temperature in (0.0, 1.0):
        for batch in (1, 8):
            took, answers = {0: [], 1: []}, {}
            for _ in range(3):
                for tokens in took:
                    shared = {**options, "temperature": temperature, "batch_size": batch, "draft_tokens": tokens}
                    begun = time.perf_counter()
                    answers[tokens] = model.write(starts, **shared)
                    took[tokens].append(time.perf_counter() - begun)
            drafted, accepted = (sum(getattr(one, key) for one in answers[1]) for key in ("drafted", "accepted"))
            faster = statistics.median(took[0]) / statistics.median(took[1])
            alike = [one.ids for one in answers[0]] == [one.ids for one in answers[1]]
            print(
                f"guesses  batch {batch}, temperature {temperature:g}: {accepted} of {drafted} accepted, "
                f"{accepted / drafted:.3f}; {faster:.2f} × the speed without"
                + (f"; the same answers: {alike}" if not temperature else ""),
                flush=True,
            )


def main() -> None:
    asked = sys.argv[1:] or [*SHAPES, "guesses"]
    with tempfile.TemporaryDirectory(prefix="omniloom-bench-") as folder:
        for name in asked:
            guesses() if name == "guesses" else compare(name, Path(folder))


if __name__ == "__main__":
    measure_peak(*sys.argv[2:]) if sys.argv[1:2] == ["peak"] else main()
