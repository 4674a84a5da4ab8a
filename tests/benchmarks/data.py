"""The data path next to what one would use instead: `python tests/benchmarks/data.py [text loader access packing …]`.

Sides take turns in one run, medians of three; memory is what the processes of a side hold of their own at most, by
the largest of them and in all. Needs the real files (OMNILOOM_TEST_DATA) and a quiet machine for anything but ratios.
"""

import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import yaml

from omniloom.cluster.config import ClusterConfig
from omniloom.cluster.session import ray_session
from omniloom.data.config import CorpusConfig, DataConfig
from omniloom.data.corpus import Corpus, Documents
from omniloom.data.index import LENGTH
from omniloom.data.loader import Rows, Share, rank_batches
from omniloom.data.plan import Phase, Plan, Schedule, Stream, open_plan
from omniloom.data.schedule import read_schedule
from omniloom.modality.config import TokenizerConfig
from omniloom.modality.text import adopt_tokenizer

ROOT = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("OMNILOOM_TEST_DATA", ROOT.parent / "shared" / "data"))
REPEATS, SEQ_LEN = 3, 1_024
LARGE_MB, SMALL_MB = 40, 4
DATASETS = """
import datasets, json, sys, tempfile, time
from itertools import chain
from transformers import PreTrainedTokenizerFast
datasets.disable_progress_bars()
path, tokenizer_path, seq_len = sys.argv[1], sys.argv[2], int(sys.argv[3])

def group_texts(examples):  # as the language modelling examples of transformers have it
    joined = {k: list(chain(*examples[k])) for k in examples}
    total = len(joined["input_ids"]) // seq_len * seq_len
    cut = {k: [t[i : i + seq_len] for i in range(0, total, seq_len)] for k, t in joined.items()}
    cut["labels"] = cut["input_ids"].copy()
    return cut

with tempfile.TemporaryDirectory() as cache:
    begun = time.perf_counter()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_path)
    raw = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)
    def encode(batch):
        return tokenizer(batch["text"])
    encoded = raw.map(encode, batched=True, num_proc=2, remove_columns=["text"])
    mapped = time.perf_counter() - begun
    encoded.map(group_texts, batched=True, num_proc=2)
    print(json.dumps([mapped, time.perf_counter() - begun]))
"""


class Peak:
    """What the processes under this one hold of their own, in MB: the largest of them, and all together."""

    largest = together = 0.0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Look at this process's children, and theirs, ten times a second."""
    peak, done = Peak(), threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            held = [0.0]
            for process in psutil.Process().children(recursive=True):
                try:
                    memory = process.memory_info()
                    held.append((memory.rss - memory.shared) / 1e6)
                except psutil.Error:
                    continue
            peak.largest, peak.together = max(peak.largest, *held), max(peak.together, sum(held))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def verdict(what: str, value: float, target: float, is_met: bool) -> None:
    print(f"  {what}: {value:.3g}, target {target:g}: {'met' if is_met else 'MISSED'}", flush=True)


def write_text(path: Path, megabytes: float) -> None:
    """Long-tailed documents of sentences drawn from all texts, so that neighbours share no more words than any two."""
    texts = [*REAL.glob("text/gutenberg/*.txt"), *REAL.glob("text/wikitext-2/*.txt"), REAL / "text/tinyshakespeare.txt"]
    sentences = [s for t in sorted(texts) for s in re.split(r"(?<=[.!?:;])\s+", t.read_text("utf-8")) if s.strip()]
    generator, size = random.Random(0), 0
    with path.open("w") as file:
        while size < megabytes * 1e6:
            count = min(int(4 * generator.paretovariate(1.1)), 2_000)
            size += file.write(json.dumps({"text": " ".join(generator.choices(sentences, k=count))}) + "\n")


def build(folder: Path, text: Path, tokenizer: TokenizerConfig, format: str = "jsonl") -> Corpus:
    from omniloom.data.build import build_corpus

    manifest = text.with_suffix(".yaml")
    manifest.write_text(json.dumps({"sources": {"text": {"format": format, "train": [text.name]}}}))
    return build_corpus(CorpusConfig(corpus=str(folder), manifest=str(manifest), tokenizer=tokenizer, force=True))


def plan_epoch(corpus: Corpus, folder: Path) -> tuple[Documents, Plan, Schedule]:
    """The packing plan of as many rows as one epoch fills."""
    documents = Documents([corpus], "train")
    schedule = read_schedule([corpus], DataConfig(seq_len=SEQ_LEN), 0)
    return documents, open_plan(documents, schedule, int(documents.tokens_S.sum()) // SEQ_LEN, folder), schedule


def text(folder: Path) -> None:
    """jsonl to rows: our job on a cluster that is up, and datasets.map with the same tokenizer and 2 processes."""
    adopt_tokenizer(str(REAL / "tokenizer" / "gpt2")).save(folder / "tokenizer.json")
    tokenizer = TokenizerConfig(path=str(folder / "tokenizer.json"))
    large, small = folder / "large.jsonl", folder / "small.jsonl"
    write_text(large, LARGE_MB)
    write_text(small, SMALL_MB)

    def ours(path: Path) -> tuple[float, float]:
        begun = time.perf_counter()
        corpus = build(folder / path.stem, path, tokenizer)
        built = time.perf_counter() - begun
        plan_epoch(corpus, folder / path.stem / "plans")
        return built, time.perf_counter() - begun

    def theirs(path: Path) -> tuple[float, float]:
        code = [sys.executable, "-c", DATASETS, str(path), str(folder / "tokenizer.json"), str(SEQ_LEN)]
        ran = subprocess.run(code, capture_output=True, text=True, check=True)
        mapped, grouped = json.loads(ran.stdout.splitlines()[-1])
        return mapped, grouped

    took: dict[str, dict[str, list[tuple[float, float]]]] = {side: {"large": [], "small": []} for side in SIDES}
    peaks: dict[str, list[Peak]] = {side: [] for side in SIDES}
    with ray_session(ClusterConfig(workers=2)):
        ours(small)  # a cluster that is up has workers that have imported
        for _ in range(REPEATS):
            for side, run in zip(SIDES, (ours, theirs), strict=True):
                took[side]["small"].append(run(small))
                with peak_memory() as peak:
                    took[side]["large"].append(run(large))
                peaks[side].append(peak)
    print(f"text: {LARGE_MB} MB of jsonl to rows of {SEQ_LEN}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    speeds = {}
    for side in SIDES:
        middle = {size: np.median(took[side][size], axis=0) for size in ("large", "small")}
        whole = LARGE_MB / middle["large"]
        net = (LARGE_MB - SMALL_MB) / (middle["large"] - middle["small"])
        speeds[side] = [*whole, *net]
        peak = peaks[side][-1]
        print(
            f"  {side:13} tokenised {middle['large'][0]:6.2f} s, packed {middle['large'][1]:6.2f} s;  "
            f"{whole[0]:5.2f}, {whole[1]:5.2f} MB/s; without the start {net[0]:5.2f}, {net[1]:5.2f} MB/s;  "
            f"largest process {peak.largest:,.0f} MB, all {peak.together:,.0f} MB"
        )
        print(f"    each: {[tuple(round(t, 2) for t in pair) for pair in took[side]['large']]}")
    a, b = (speeds[side] for side in SIDES)
    verdict("ours tokenised and packed / datasets.map tokenised and grouped", a[1] / b[1], 1.5, a[1] >= 1.5 * b[1])
    verdict("ours tokenised and packed / datasets.map tokenised only", a[1] / b[0], 1.5, a[1] >= 1.5 * b[0])
    verdict("the first without the start", a[3] / b[3], 1.5, a[3] >= 1.5 * b[3])
    verdict("the second without the start", a[3] / b[2], 1.5, a[3] >= 1.5 * b[2])


SIDES = ("omniloom", "datasets.map")


def loader(folder: Path) -> None:
    """Rows from the loader against the training step of the tiny model, at its default batch, on one rank."""
    rows = text_rows(folder)
    share = Share(32, 8, 0, 1, 0, len(rows) // 32)
    step = tiny_step(rows, share)
    speeds: dict[str, list[float]] = {"0 workers": [], "4 workers": [], "training step": []}
    peaks = {}
    for _ in range(REPEATS):
        for workers in (0, 4):
            with peak_memory() as peak:
                batches = rank_batches(rows, share, workers)
                next(batches)  # the workers have started
                begun = time.perf_counter()
                count = sum(batch.fields["input_ids"].numel() for step_batches in batches for batch in step_batches)
                speeds[f"{workers} workers"].append(count / (time.perf_counter() - begun))
            peaks[workers] = peak
        speeds["training step"].append(step())
    print(f"loader: rows of {SEQ_LEN}, tokens/s; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    middle = {name: statistics.median(each) for name, each in speeds.items()}
    for name, each in speeds.items():
        print(f"  {name:13} {middle[name]:12,.0f}  (each {[f'{value:,.0f}' for value in each]})")
    print(f"  a worker holds {peaks[4].largest:,.0f} MB of its own at most, all together {peaks[4].together:,.0f} MB")
    for workers in (0, 4):
        times = middle[f"{workers} workers"] / middle["training step"]
        verdict(f"loader with {workers} workers / training step", times, 50, times >= 50)


def text_rows(folder: Path) -> Rows:
    """The rows of one epoch of a text corpus with the tiny model's vocabulary."""
    write_text(folder / "text.jsonl", SMALL_MB)
    with ray_session(ClusterConfig(workers=2)):
        corpus = build(folder / "text", folder / "text.jsonl", TokenizerConfig(vocab_size=1_280))
    return Rows(*plan_epoch(corpus, folder / "plans"))


def tiny_step(rows: Rows, share: Share) -> Callable[[], float]:
    """A function that takes one training step of model=tiny and gives its tokens a second."""
    import torch

    from omniloom.model.config import ModelConfig
    from omniloom.model.decoder import Decoder
    from omniloom.train.config import TrainingRun
    from omniloom.train.engine import Engine
    from omniloom.train.groups import TrainConfig
    from omniloom.train.step import training_step

    tiny = ModelConfig(**yaml.safe_load((ROOT / "conf" / "model" / "tiny.yaml").read_text()))
    run = TrainingRun(model=tiny, train=TrainConfig(steps=100))
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    model = Decoder(tiny)
    engine = Engine(model, run)
    batches = next(rank_batches(rows, share, 0))

    def step() -> float:
        begun = time.perf_counter()
        training_step(engine, model, batches, torch.ones(1), run.train, 0.5)
        return share.global_batch_size * SEQ_LEN / (time.perf_counter() - begun)

    step()
    return step


def access(folder: Path) -> None:
    """Rows at random places, once their files are in memory."""
    lines = [
        [{"text": "see"}, {kind: str(file)}, {"text": "a picture, a sound or a film, as the case may be"}]
        for kind, pattern in (("image", "image/photos/*"), ("audio", "audio/speech/*"), ("video", "video/clips/*"))
        for file in sorted(REAL.glob(pattern))
    ]
    media = folder / "media.jsonl"
    media.write_text("".join(json.dumps({"segments": line}) + "\n" for line in lines))
    with ray_session(ClusterConfig(workers=2)):
        corpus = build(folder / "media", media, TokenizerConfig(vocab_size=300), "interleaved")
    print(f"access: microseconds for a row of {SEQ_LEN}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for name, rows in {
        "text": text_rows(folder),
        "all four": Rows(*plan_epoch(corpus, folder / "media-plans")),
    }.items():
        for index in range(len(rows)):
            rows[index]
        took = []
        for index in np.random.default_rng(0).integers(0, len(rows), 5_000).tolist():
            begun, computed = time.perf_counter(), time.thread_time()
            rows[index]
            took.append((1e6 * (time.perf_counter() - begun), 1e6 * (time.thread_time() - computed)))
        (middle, core_middle), (last, core_last) = np.percentile(took, [50, 99], axis=0)
        held = statistics.mean(sum(array.nbytes for array in rows[i].fields().values()) for i in range(len(rows)))
        print(
            f"  {name:9} {len(rows):6,} rows of {held / 1e3:4.0f} kB: median {middle:.0f}, 99th percentile {last:.0f}; "
            f"on its core, waits for others apart, {core_middle:6.0f} and {core_last:6.0f}"
        )
        verdict(f"{name}: milliseconds at the 99th percentile", last / 1e3, 1.0, last < 1e3)


class Lengths(Documents):
    """Documents of which nothing is known but their lengths."""

    def __init__(self, lengths_S: list[np.ndarray]) -> None:
        self.corpora, self.split, self.lengths_S = [], "train", lengths_S
        self.names = [f"source_{s}" for s in range(len(lengths_S))]
        self.first_S = np.cumsum([0, *map(len, lengths_S)])
        self.is_streamed_S = np.ones(len(lengths_S), bool)
        self.tokens_S = np.array([int(lengths["tokens"].sum()) for lengths in lengths_S])


def long_tailed(count: int, median: float, spread: float, least: int, is_plain: bool = True) -> np.ndarray:
    """Log-normal lengths, LENGTH."""
    lengths = np.zeros(count, LENGTH)
    tokens = np.random.default_rng(count).lognormal(np.log(median), spread, count)
    lengths["tokens"], lengths["plain"] = least + tokens.clip(2, 200_000), is_plain
    return lengths


def packing(folder: Path) -> None:
    """How full rows are, of pages, turns of a chat, whole books, and pictures with captions, which are never cut."""
    documents = Lengths(
        [
            long_tailed(200_000, 500, 1.3, 0),
            long_tailed(200_000, 120, 0.9, 0),
            long_tailed(2_000, 60_000, 0.8, 0),
            long_tailed(200_000, 25, 0.6, 259, is_plain=False),
        ]
    )
    whole = Lengths([lengths[lengths["tokens"] <= SEQ_LEN] for lengths in documents.lengths_S if len(lengths) > 2_000])
    print(f"packing: 3 repeats; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for name, mix, seq_len in (
        ("long-tailed", documents, 1_024),
        ("long-tailed", documents, 4_096),
        ("none over 1,024", whole, 1_024),
    ):
        schedule = Schedule((Phase(0, (1.0,) * len(mix.names), seq_len),), 0, "segment")
        seconds, rows, tokens = [], 20_000, 0
        for _ in range(REPEATS):
            begun = time.perf_counter()
            packed = [row for block in Stream(mix, schedule).blocks(rows) for row in block]
            seconds.append(time.perf_counter() - begun)
            tokens = sum(piece.tokens for row in packed for piece in row)
        filled, speed = tokens / (rows * seq_len), rows / statistics.median(seconds)
        print(f"  {name:16} seq_len {seq_len:5,}: {speed:9,.0f} rows/s, {speed * seq_len / 1e6:6.1f}M tokens/s planned")
        verdict("filled", filled, 0.97, filled >= 0.97)


def plan(folder: Path) -> None:
    """The plan of one epoch of ten million documents: built, then opened, each in a fresh process."""
    lengths = long_tailed(10_000_000, 150, 1.0, 0)
    lengths.tofile(folder / "lengths")
    for phase in ("build", "open"):
        subprocess.run([sys.executable, __file__, f"--{phase}", str(folder)], check=True)


def build_plan(folder: Path) -> None:
    documents = Lengths([np.memmap(folder / "lengths", LENGTH, "r")])
    before = held_mb()
    rows, begun = int(documents.tokens_S[0]) // SEQ_LEN, time.perf_counter()
    made = open_plan(documents, Schedule((Phase(0, (1.0,), SEQ_LEN),), 0, "segment"), rows, folder / "plans")
    seconds = time.perf_counter() - begun
    size = sum(file.stat().st_size for file in made.folder.iterdir()) / 1e6
    print(
        f"plan: {len(documents):,} documents to {rows:,} rows in {seconds:.0f} s, {rows / seconds:,.0f} rows/s, "
        f"{made.record.tokens / made.record.positions:.2%} filled; {size:,.0f} MB on disk; "
        f"memory {before:.0f} MB before, peak {held_mb('VmHWM'):.0f} MB (its mapped files included)"
    )


def open_built(folder: Path) -> None:
    (finished,) = (folder / "plans").glob("*/plan.json")
    before, begun = {what: held_mb(what) for what in ("RssAnon", "RssFile")}, time.perf_counter()
    made = Plan(finished.parent)
    opened = time.perf_counter() - begun
    for row in np.random.default_rng(0).integers(0, len(made), 1_000).tolist():
        made[row]
    own, mapped = (held_mb(what) - held for what, held in before.items())
    print(f"  opened in {1e3 * opened:.1f} ms; 1,000 random rows read: {own:.1f} MB of its own, {mapped:.0f} MB mapped")


def held_mb(what: str = "VmRSS") -> float:
    """A line of this process's status."""
    return int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0]) / 1_024


PARTS: dict[str, Callable[[Path], None]] = {
    "text": text,
    "loader": loader,
    "access": access,
    "packing": packing,
    "plan": plan,
}


def main() -> None:
    if sys.argv[1:2] in (["--build"], ["--open"]):
        (build_plan if sys.argv[1] == "--build" else open_built)(Path(sys.argv[2]))
        return
    for name in sys.argv[1:] or PARTS:
        with tempfile.TemporaryDirectory(prefix="omniloom-bench-") as folder:
            PARTS[name](Path(folder))


if __name__ == "__main__":
    main()
