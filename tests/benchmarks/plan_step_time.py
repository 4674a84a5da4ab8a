"""Predicted against measured step time, after measuring this machine's peaks once: shapes that no peak was measured on.

Real training steps (engine and all) in ranks of a job, each shape in processes of its own, on made-up rows that one
document fills: `python tests/benchmarks/plan_step_time.py [shape …]`. Needs a quiet machine and some minutes: where a
step took much longer than rank 0 computed, others were in the way.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omniloom.cluster.config import ClusterConfig
from omniloom.cluster.session import ray_session
from omniloom.data.config import DataConfig
from omniloom.model.config import ModelConfig
from omniloom.plan.config import HardwareConfig
from omniloom.plan.measured import describe, read_measurements
from omniloom.plan.params import count_parameters
from omniloom.plan.step_time import predict_step
from omniloom.train.config import TrainingRun
from omniloom.train.groups import ParallelConfig, TrainConfig

# Experts' products have shapes of their own at first, for each of which oneDNN builds a program in half precision.
WARM_UP, EXPERTS_WARM_UP, STEPS = 2, 40, 5
TEXT = ModelConfig(image_patch_pixels=None, video_patch_pixels=None, audio_mels=None)
LLAMA = replace(TEXT, attention="grouped", n_routed_experts=0)
GPT = replace(LLAMA, norm="layer", position="learned", attention_bias=True, activation="gelu_tanh", mlp_bias=True)


def sized(
    like: ModelConfig, vocabulary: int, width: int, layers: int, heads: int, inner: int, **rest: Any
) -> ModelConfig:
    return replace(
        like,
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        **rest,
    )


SPARSE = {"attention_pattern": "sparse", "window_tokens": 256, "global_stride": 64, "max_global_tokens": 64}
LATENT = {"q_lora_rank": 192, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
EXPERTS = {"n_routed_experts": 16, "moe_intermediate_size": 384, "num_nextn_predict_layers": 1}
MIXTRAL = {"scoring_func": "softmax", "first_k_dense_replace": 0, "n_shared_experts": 0, "num_key_value_heads": 2}
WIDE_EXPERTS = {"n_routed_experts": 8, "moe_intermediate_size": 1_024}
MODELS = {
    "gpt": sized(GPT, 16_384, 512, 8, 8, 2_048),
    "wide gpt": sized(GPT, 8_192, 1_024, 12, 16, 4_096),
    "llama": sized(
        LLAMA, 32_000, 768, 8, 12, 2_048, num_key_value_heads=4, rope_interleave=False, tie_word_embeddings=False
    ),
    "small": sized(LLAMA, 8_192, 256, 10, 8, 768),
    "long rows": sized(LLAMA, 4_096, 320, 6, 5, 1_280),
    "vocabulary": sized(LLAMA, 100_352, 512, 4, 8, 1_536),
    "sparse attention": sized(LLAMA, 8_192, 384, 6, 6, 1_024, **SPARSE),
    "latent experts": sized(TEXT, 16_384, 384, 6, 6, 1_536, **LATENT, **EXPERTS),
    "softmax experts": sized(LLAMA, 8_192, 512, 8, 8, 1_024, **MIXTRAL, **WIDE_EXPERTS),
}


@dataclass(frozen=True)
class Shape:
    """A model, its rows and micro batches on one rank, and how it is trained."""

    model: str
    seq_len: int
    micro_batch_size: int
    accumulation: int
    precision: str
    zero_stage: int
    ranks: int
    checkpointing: bool = False

    def __str__(self) -> str:
        rows = f"{self.accumulation}×{self.micro_batch_size}×{self.seq_len}"
        again = " twice" if self.checkpointing else ""
        return f"{self.model:17} {rows:11} {self.precision:13} ZeRO {self.zero_stage} {self.ranks} ranks{again}"

    @property
    def warm_up(self) -> int:
        """Steps that are not timed."""
        return EXPERTS_WARM_UP if MODELS[self.model].n_routed_experts else WARM_UP

    def run(self) -> TrainingRun:
        """As the train job has it."""
        config = replace(MODELS[self.model], max_position_embeddings=self.seq_len)
        batch = self.micro_batch_size * self.accumulation * self.ranks
        train = TrainConfig(
            steps=100,
            global_batch_size=batch,
            micro_batch_size=self.micro_batch_size,
            precision=self.precision,
            activation_checkpointing=self.checkpointing,
        )
        data, parallel = DataConfig(seq_len=self.seq_len), ParallelConfig(zero_stage=self.zero_stage)
        return TrainingRun(model=config, data=data, train=train, parallel=parallel)


SHAPES = [
    Shape("gpt", 512, 4, 1, "fp32", 0, 1),
    Shape("wide gpt", 256, 2, 2, "bf16_autocast", 1, 1),
    Shape("llama", 512, 2, 1, "bf16_autocast", 1, 1),
    Shape("llama", 512, 2, 1, "bf16", 2, 1, checkpointing=True),
    Shape("small", 1_024, 2, 2, "fp32", 2, 1),
    Shape("long rows", 4_096, 1, 1, "fp32", 1, 1),
    Shape("vocabulary", 256, 4, 1, "fp32", 1, 1),
    Shape("sparse attention", 4_096, 1, 1, "bf16_autocast", 0, 1),
    Shape("latent experts", 256, 4, 2, "bf16_autocast", 3, 1),
    Shape("softmax experts", 512, 2, 1, "fp32", 1, 1),
    Shape("gpt", 512, 2, 1, "fp32", 1, 2),
    Shape("wide gpt", 256, 2, 1, "fp32", 0, 2),
    Shape("llama", 512, 2, 1, "bf16_autocast", 2, 2),
    Shape("small", 1_024, 2, 2, "bf16_autocast", 1, 2),
    Shape("long rows", 4_096, 1, 1, "bf16_autocast", 3, 2),
    Shape("vocabulary", 256, 4, 1, "bf16_autocast", 3, 2),
    Shape("latent experts", 256, 4, 1, "fp32", 2, 2),
    Shape("softmax experts", 512, 2, 1, "bf16_autocast", 1, 2),
]


def train_steps(asked: tuple[Shape, str]) -> None:
    """One rank's steps; rank 0 writes their seconds."""
    import numpy as np
    import torch

    from omniloom.data.loader import Batch
    from omniloom.modality.sequence import Row
    from omniloom.model.decoder import Decoder
    from omniloom.train.engine import Engine, shut_down
    from omniloom.train.step import training_step

    shape, path = asked
    run, tokens = shape.run(), shape.seq_len
    torch.manual_seed(0)
    model = Decoder(run.model)
    engine = Engine(model, run)
    rng = np.random.default_rng(engine.rank)

    def row() -> Row:
        zeros = np.zeros(tokens, np.uint8)
        return Row(
            input_ids=rng.integers(0, run.model.vocab_size, tokens, np.int32), modality=zeros,
            position=np.zeros((tokens, 3), np.int32), document=np.zeros(tokens, np.int32), source=zeros,
            loss_mask=np.ones(tokens, np.uint8), image=np.zeros((0, 1), np.uint8), video=np.zeros((0, 1), np.uint8),
            audio=np.zeros((0, 1), np.float16), audio_frames=np.zeros(0, np.int32),
        )  # fmt: skip

    took, computed = [], []
    for _ in range(shape.warm_up + STEPS):
        batches = [Batch([row() for _ in range(shape.micro_batch_size)]) for _ in range(shape.accumulation)]
        start, begun = time.perf_counter(), time.process_time()
        training_step(engine, model, batches, torch.ones(1), run.train, 0.5)
        took.append(time.perf_counter() - start)
        computed.append(time.process_time() - begun)
    if engine.rank == 0:
        Path(path).write_text(json.dumps({"threads": torch.get_num_threads(), "seconds": took, "computed": computed}))
    shut_down()


def main() -> None:
    from omniloom.cluster.launch import run_on_ranks
    from omniloom.train.machine import Task, measure

    shapes = [shape for shape in SHAPES if not sys.argv[1:] or shape.model in sys.argv[1:]]
    print(f"load {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")
    ratios = {}
    with tempfile.TemporaryDirectory() as folder:
        cluster = ClusterConfig(workers=max(shape.ranks for shape in shapes))
        task = Task(folder, "here", "cpu")
        task.progress.parent.mkdir()
        with ray_session(cluster):
            run_on_ranks(measure, task, cluster)
            measured = read_measurements(Path(folder), "here")
            assert measured is not None
            print("\n".join(f"{name}: {what}" for name, what in describe(measured).items()), flush=True)
            for shape in shapes:
                path = Path(folder) / "seconds.json"
                run_on_ranks(train_steps, (shape, str(path)), ClusterConfig(workers=shape.ranks))
                answer = json.loads(path.read_text())
                assert answer["threads"] == measured.threads
                timed = answer["seconds"][shape.warm_up :]
                median = statistics.median(timed)
                workload = shape.run().workload(shape.ranks)
                step = predict_step(workload, HardwareConfig(), measured)
                assert step.total_s is not None
                counted = count_parameters(workload.sizes)
                millions = (counted.params_total + counted.params_mtp) / 1e6
                ratios[str(shape)] = step.total_s / median
                parts = ", ".join(f"{part} {took:.2f}" for part, took in step.seconds.items())
                core = statistics.median(answer["computed"][shape.warm_up :])
                spread = f"{min(timed):.2f} … {max(timed):.2f}"
                print(
                    f"{shape} {millions:5.0f}M  predicted {step.total_s:6.2f} s  measured {median:6.2f} s ({spread}; "
                    f"{core:.2f} on its core)  "
                    f"ratio {step.total_s / median:.2f}   {parts}; load {os.getloadavg()[0]:.1f}",
                    flush=True,
                )
    worst = max(ratios, key=lambda name: abs(ratios[name] - 1))
    within = sum(abs(ratio - 1) <= 0.3 for ratio in ratios.values())
    print(f"within 30%: {within} of {len(ratios)}; worst: {worst}, ratio {ratios[worst]:.2f}")


if __name__ == "__main__":
    main()
