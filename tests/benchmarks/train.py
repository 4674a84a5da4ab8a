"""What the platform adds to a step: Ray Train, DeepSpeed and tracking over a bare torch loop, by ZeRO stage.

`python tests/benchmarks/train.py [tiny wide …]`: one rank, as Ray Train starts it; in its process whole runs of
`omniloom train` (each ZeRO stage) and a plain loop of the same model on the same rows take turns. A step costs what a
long run takes more than a short one, divided by the steps between them; medians of three. Needs a quiet machine.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from ray import cloudpickle

from omniloom.cluster.config import ClusterConfig
from omniloom.cluster.launch import run_on_ranks
from omniloom.cluster.session import ray_session
from omniloom.data.build import open_or_build
from omniloom.data.config import DataConfig
from omniloom.model.config import ModelConfig
from omniloom.settings import ClusterSettings, TrainSettings
from omniloom.train.groups import ParallelConfig, TrainConfig
from omniloom.train.schedule import ScheduleConfig

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a benchmark

ROOT = Path(__file__).resolve().parents[2]
STAGES, REPEATS, SHORT, LONG = (0, 1, 2, 3), 3, 5, 25
TINY = yaml.safe_load((ROOT / "conf" / "model" / "tiny.yaml").read_text())
SHAPES = {
    "tiny": TINY,
    "wide": TINY | {"hidden_size": 512, "intermediate_size": 1_536, "moe_intermediate_size": 512, "kv_lora_rank": 256},
}
PARTS = ("data_wait_s", "forward_s", "backward_s", "optimizer_s", "communication_s", "step_s")


def settings_of(folder: Path, shape: str) -> TrainSettings:
    """A run of one rank on the smoke samples, whose media the model reads too."""
    media = {"image_patch_pixels": 8, "video_patch_pixels": 8, "audio_mels": 16, "audio_frames_per_token": 4}
    settings = TrainSettings(
        runs_dir=str(folder / "runs"),
        corpus=str(folder / "corpus"),
        model=ModelConfig(**SHAPES[shape] | media),
        data=DataConfig(seq_len=256),
        train=TrainConfig(steps=LONG, global_batch_size=8, micro_batch_size=4, val_every=10**6, save_every=10**6),
        schedule=ScheduleConfig(warmup_steps=2),
        cluster=ClusterSettings(workers=1),
    )
    smoke = yaml.safe_load((ROOT / "conf" / "data" / "smoke.yaml").read_text())
    settings.samples = smoke["samples"]
    settings.tokenizer = replace(settings.tokenizer, vocab_size=TINY["vocab_size"])
    for key, value in smoke.get("modality", {}).items():
        setattr(settings.modality, key, replace(getattr(settings.modality, key), **value))
    return settings


def measure(settings: TrainSettings) -> None:
    """The rank's part: seconds a step of every side, written beside the runs."""
    from omniloom.train import loop

    loop.shut_down = lambda: None  # one process group serves all the runs of this process
    seconds: dict[str, list[float]] = {str(stage): [] for stage in STAGES} | {"bare": []}
    parts: dict[str, list[dict[str, float]]] = {str(stage): [] for stage in STAGES}
    for repeat in range(REPEATS):
        for stage in STAGES:
            run = replace(settings, parallel=ParallelConfig(zero_stage=stage))
            took = {steps: train_for(run, f"{stage}-{steps}-{repeat}", steps) for steps in (SHORT, LONG)}
            seconds[str(stage)].append((took[LONG] - took[SHORT]) / (LONG - SHORT))
            lines = Path(settings.runs_dir, f"{stage}-{LONG}-{repeat}", "metrics.jsonl").read_text().splitlines()
            parts[str(stage)] += [json.loads(line) for line in lines[SHORT:]]
        seconds["bare"].append(bare(settings))
    middle = {stage: {p: statistics.median(line[p] for line in lines) for p in PARTS} for stage, lines in parts.items()}
    Path(settings.runs_dir, "answer.json").write_text(json.dumps({"seconds": seconds, "parts": middle}))


def train_for(settings: TrainSettings, name: str, steps: int) -> float:
    """Seconds that a whole run of so many steps takes."""
    from omniloom.track.run_directory import open_run
    from omniloom.train.loop import train

    run = replace(settings, run=name, train=replace(settings.train, steps=steps))
    open_run(run.folder, asdict(run))
    begun = time.perf_counter()
    train(run)
    return time.perf_counter() - begun


def bare(settings: TrainSettings) -> float:
    """Seconds a step of what one would write without a platform: forward, losses, backward, clipping, AdamW."""
    import torch

    from omniloom.data.loader import Share, rank_batches
    from omniloom.data.schedule import loss_weights, open_corpora
    from omniloom.model.decoder import Decoder
    from omniloom.objective.balance import count_documents, sequence_balance
    from omniloom.objective.next_token import next_token_nll, shifted_targets
    from omniloom.train.optimizer import parameter_groups
    from omniloom.train.stream import training_rows

    train, optimizer = settings.train, settings.optimizer
    corpora = open_corpora(Path(settings.corpus or ""), settings.data)
    rows, _ = training_rows(settings, corpora)
    weight_S = torch.tensor(loss_weights(corpora, settings.data))
    torch.manual_seed(settings.seed)
    model = Decoder(settings.model)
    groups = parameter_groups(model, optimizer)
    adamw = torch.optim.AdamW(groups, optimizer.lr, (optimizer.beta1, optimizer.beta2), optimizer.eps)
    share = Share(train.global_batch_size, train.micro_batch_size, 0, 1, 0, LONG)
    for step, batches in enumerate(rank_batches(rows, share, settings.data.loader_workers)):
        if step == SHORT:
            begun = time.perf_counter()
        targets = [
            shifted_targets(batch.fields["input_ids"], batch.fields["document"], batch.fields["loss_mask"], 1)
            for batch in batches
        ]
        weights = [weight_S[batch.fields["source"][at].long()] for batch, (at, _) in zip(batches, targets, strict=True)]
        total = sum(float(weight_M.sum()) for weight_M in weights)
        documents = sum(int(count_documents(batch.fields["document"])) for batch in batches)
        for batch, (at_BT, ids_M), weight_M in zip(batches, targets, weights, strict=True):
            output = model(**batch.model_inputs(), predict_at=at_BT)
            loss = (weight_M * next_token_nll(output.logits, ids_M)).sum() / total
            balance = [
                sequence_balance(layer.scores_BTE, batch.fields["document"], settings.model.num_experts_per_tok)
                for layer in output.router
            ]
            (loss + train.balance_loss_weight * torch.stack(balance).mean() / documents).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.gradient_clipping)
        adamw.step()
        adamw.zero_grad()
        loss.item()
    return (time.perf_counter() - begun) / (LONG - SHORT)


def show(shape: str, answer: dict[str, Any]) -> None:
    """One line a stage: the ratio, and where the difference lies."""
    seconds = answer["seconds"]
    plain = statistics.median(seconds["bare"])
    print(f"{shape}: a bare step takes {plain * 1000:,.0f} ms (each {[round(s * 1000) for s in seconds['bare']]})")
    for stage in map(str, STAGES):
        each, parts = seconds[stage], answer["parts"][stage]
        median = statistics.median(each)
        split = ", ".join(f"{name.removesuffix('_s')} {parts[name] * 1000:,.0f}" for name in PARTS[:-1])
        rest = median - sum(parts[name] for name in PARTS[:-1])
        print(
            f"  ZeRO {stage}: {median / plain:.2f} of it, {median * 1000:,.0f} ms (each "
            f"{[round(s * 1000) for s in each]}): {split}, the rest {rest * 1000:,.0f} ms"
        )


def main() -> None:
    for shape in sys.argv[1:] or SHAPES:
        with tempfile.TemporaryDirectory() as scratch, ray_session(ClusterConfig(workers=1)):
            settings = settings_of(Path(scratch), shape)
            open_or_build(settings)
            print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
            run_on_ranks(measure, settings, settings.cluster)
            show(shape, json.loads(Path(settings.runs_dir, "answer.json").read_text()))


if __name__ == "__main__":
    main()
