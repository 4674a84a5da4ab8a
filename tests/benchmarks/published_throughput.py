"""Throughput and memory that others published, beside what the planner predicts of them; nothing is tuned to them.

Each point twice: by the data sheet's peaks, and by what large products were measured to reach (conf/cluster/device/).
`python tests/benchmarks/published_throughput.py`
"""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from omegaconf import OmegaConf

from omniloom.model.config import ModelConfig
from omniloom.plan.config import DeviceConfig, HardwareConfig, Workload
from omniloom.plan.memory import count_memory
from omniloom.plan.step_time import predict_step

CONF = Path(__file__).resolve().parents[2] / "conf"
GIB = 2**30
Config = TypeVar("Config")


def load(schema: type[Config], file: str) -> Config:
    loaded = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(CONF / file)))
    assert isinstance(loaded, schema)
    return loaded


def device(name: str) -> DeviceConfig:
    return load(DeviceConfig, f"cluster/device/{name}.yaml")


def llama(width: int, layers: int, heads: int, groups: int, inner: int, vocabulary: int) -> ModelConfig:
    """Llama's shape; RoPE's scaling, which ours lacks, costs nothing that is counted."""
    config = replace(load(ModelConfig, "model/llama_8b.yaml"), vocab_size=vocabulary, hidden_size=width)
    config = replace(config, num_hidden_layers=layers, num_attention_heads=heads)
    return replace(config, num_key_value_heads=groups, intermediate_size=inner)


MODELS = {
    "Llama 2 7B": llama(4_096, 32, 32, 32, 11_008, 32_000),
    "Llama 2 13B": llama(5_120, 40, 40, 40, 13_824, 32_000),
    "Llama 2 70B": llama(8_192, 80, 64, 8, 28_672, 32_000),
    "Llama 3 8B": load(ModelConfig, "model/llama_8b.yaml"),
    "Llama 3 70B": llama(8_192, 80, 64, 8, 28_672, 128_256),
    "Llama 3 405B": llama(16_384, 126, 128, 8, 53_248, 128_256),
    "GPT-3 175B": load(ModelConfig, "model/gpt3_175b.yaml"),
    "DeepSeek-V3": load(ModelConfig, "model/deepseek_v3.yaml"),
}
# Selective checkpointing lies between ours off and on: both are shown.
RECOMPUTES = {"nothing": (False,), "all": (True,), "some": (False, True)}


@dataclass(frozen=True)
class Source:
    """A page of published figures: nodes of eight, ranks by ZeRO's stage, and a line for each point.

    A line: the page's own name for it; model; precision; GPUs; TP, PP, CP, EP; tokens a row; rows a step; rows a micro
    batch; what is recomputed; tokens/s a GPU; the most that any GPU's allocator reserved, GiB.
    """

    name: str
    device: DeviceConfig
    node_bytes_per_s: float
    network_bytes_per_s: float
    zero_stage: int
    lines: tuple[tuple, ...]

    def hardware(self, ranks: int, is_measured: bool) -> HardwareConfig:
        rates = {} if is_measured else {"matmul_flops_per_s": {}, "attention_flops_per_s": {}}
        return HardwareConfig(
            name=self.device.name,
            device=replace(self.device, **rates),
            nodes=ranks // 8,
            devices_per_node=8,
            node_bytes_per_s=self.node_bytes_per_s,
            network_bytes_per_s=self.network_bytes_per_s,
        )


# The report, sections 1, 3.2 and 4.2; "Insights into DeepSeek-V3" (ISCA 2025), table 4: 19.926 s a step, 2.06 of them
# the bubble. The micro batch is what DeepEP's page calls the pre-training setting, 4,096 tokens; some is recomputed.
DEEPSEEK = Source(
    "DeepSeek-V3, 2,048 H800 (arXiv 2412.19437, 2505.09343)",
    device("h800"),
    200e9,
    50e9,
    1,
    (
        ("180K hours/1T", "DeepSeek-V3", "fp8", 2_048, 1, 16, 1, 64, 4_096, 15_360, 1, "some", 1543.2, None),
        ("272.8B a day", "DeepSeek-V3", "fp8", 2_048, 1, 16, 1, 64, 4_096, 15_360, 1, "some", 1541.7, None),
    ),
)
# FSDP is ZeRO 3; 8,192 tokens and as many micro batches as stages are its defaults. The GPUs are held to 500 W; their
# peak is "between SXM and NVL" and taken as SXM's, as that page does.
TITAN_H100 = Source(
    "torchtitan, H100 96 GB, 500 W (benchmarks/llama3_h100_202412_torchtitan.md)",
    replace(device("h100_sxm"), memory_bytes=96_000_000_000, memory_bytes_per_s=2.4e12, watts=500),
    450e9,
    50e9,
    3,
    (
        ("table 1", "Llama 3 8B", "bf16", 8, 1, 1, 1, 1, 8_192, 16, 2, "some", 5_762, 82.4),
        ("table 1, compiled", "Llama 3 8B", "bf16", 8, 1, 1, 1, 1, 8_192, 16, 2, "some", 6_667, 77.0),
        ("table 1, compiled", "Llama 3 8B", "fp8", 8, 1, 1, 1, 1, 8_192, 16, 2, "some", 8_532, 76.8),
        ("table 2", "Llama 3 8B", "fp8", 8, 1, 1, 1, 1, 32_768, 8, 1, "all", 3_890, 83.9),
        ("table 2", "Llama 3 8B", "fp8", 8, 1, 1, 2, 1, 65_536, 4, 1, "all", 2_540, 84.2),
        ("table 2", "Llama 3 8B", "fp8", 8, 1, 1, 4, 1, 131_072, 2, 1, "all", 1_071, 84.0),
        ("table 2", "Llama 3 8B", "fp8", 8, 1, 1, 8, 1, 262_144, 1, 1, "all", 548, 84.5),
        ("table 3", "Llama 3 8B", "bf16", 128, 1, 1, 1, 1, 8_192, 256, 2, "some", 5_605, 67.0),
        ("table 3, compiled", "Llama 3 8B", "bf16", 128, 1, 1, 1, 1, 8_192, 256, 2, "some", 6_514, 62.0),
        ("table 3, compiled", "Llama 3 8B", "fp8", 128, 1, 1, 1, 1, 8_192, 256, 2, "some", 8_380, 61.8),
        ("table 4", "Llama 3 70B", "fp8", 256, 8, 1, 1, 1, 8_192, 512, 16, "all", 829, 71.9),
        ("table 4, async TP", "Llama 3 70B", "fp8", 256, 8, 1, 1, 1, 8_192, 512, 16, "all", 876, 67.6),
        ("table 5, 1F1B", "Llama 3 405B", "fp8", 512, 8, 8, 1, 1, 8_192, 256, 4, "all", 100, 82.5),
        ("table 5, interleaved", "Llama 3 405B", "fp8", 512, 8, 8, 1, 1, 8_192, 256, 4, "all", 128, 72.7),
        ("table 6", "Llama 3 405B", "fp8", 512, 8, 8, 1, 1, 32_768, 64, 1, "all", 76, 75.3),
        ("table 6", "Llama 3 405B", "fp8", 512, 8, 8, 2, 1, 65_536, 32, 1, "all", 47, 75.9),
        ("table 6", "Llama 3 405B", "fp8", 512, 8, 8, 4, 1, 131_072, 16, 1, "all", 31, 77.1),
        ("table 6", "Llama 3 405B", "fp8", 512, 8, 8, 8, 1, 262_144, 8, 1, "all", 16, 84.9),
    ),
)
TITAN_H200 = Source(
    "torchtitan, H200 (benchmarks/llama3_8b_h200_2025-06_torchtitan.md)",
    device("h200"),
    450e9,
    50e9,
    3,
    (
        ("4 nodes, compiled", "Llama 3 8B", "fp8", 32, 1, 1, 1, 1, 8_192, 64, 2, "some", 10_938, 47.96),
        ("8 nodes, compiled", "Llama 3 8B", "fp8", 64, 1, 1, 1, 1, 8_192, 128, 2, "some", 10_753, 46.97),
    ),
)
# Its network is not published: 200 Gb/s a GPU is a guess.
TITAN_A100 = Source(
    "torchtitan, A100 80 GB, network guessed (docs/performance.md)",
    device("a100_80gb"),
    300e9,
    25e9,
    3,
    (
        ("Llama 3", "Llama 3 8B", "bf16", 64, 1, 1, 1, 1, 8_192, 64, 1, "some", 2_973, None),
        ("Llama 3", "Llama 3 70B", "bf16", 64, 1, 1, 1, 1, 8_192, 64, 1, "all", 331, None),
        ("Llama 2", "Llama 2 13B", "bf16", 64, 1, 1, 1, 1, 4_096, 128, 2, "nothing", 2_162, None),
    ),
)
# Its distributed optimizer is ZeRO 1; what is recomputed is not published, its recipes for these say nothing.
MEGATRON = Source(
    "Megatron-Core, DGX H100 (NeMo 24.07, docs/source/performance/performance_summary.md)",
    device("h100_sxm"),
    450e9,
    50e9,
    1,
    (
        ("interleaved 1", "Llama 2 7B", "fp8", 8, 1, 1, 1, 1, 4_096, 128, 1, "nothing", 16_847, None),
        ("interleaved 10", "Llama 2 13B", "fp8", 16, 1, 4, 1, 1, 4_096, 128, 1, "nothing", 8_646, None),
        ("interleaved 20", "Llama 2 70B", "fp8", 64, 4, 4, 1, 1, 4_096, 128, 1, "nothing", 1_707, None),
        ("interleaved 1", "Llama 3 8B", "fp8", 8, 1, 1, 2, 1, 8_192, 128, 1, "nothing", 12_036, None),
        ("interleaved 5", "Llama 3 70B", "fp8", 64, 4, 4, 2, 1, 8_192, 128, 1, "nothing", 1_533, None),
        ("interleaved 6", "GPT-3 175B", "fp8", 128, 4, 8, 1, 1, 2_048, 256, 1, "nothing", 726, None),
        ("interleaved 6", "GPT-3 175B", "fp8", 512, 4, 8, 1, 1, 2_048, 2_048, 2, "nothing", 782, None),
    ),
)
SOURCES = (DEEPSEEK, TITAN_H100, TITAN_H200, TITAN_A100, MEGATRON)
LEFT_OUT = """
What this arithmetic leaves out. Kernels: all run at the rate of the largest products, of torch's own attention
forward (on H100, H800 and H200; elsewhere as products), or of memory; attention's backward does not, nor does what is
not compiled into one kernel (table 1's first line against its second), nor float8's scales and casts. Clocks: GPUs
held to 500 W are reckoned at what others reach with 700 W. Networks: latency, links slower than their name; ZeRO 3's
exchanges are taken to hide behind all that is computed, those of tensors and experts behind nothing: async TP hides
them, and DeepSeek-V3 sends a token in fp8 to at most four nodes, beside other products. Schedules: 1F1B over even
shares of the layers, so that the last stage's heads come on top and set the pace; interleaved schedules and DualPipe
have less of a bubble, and torchtitan's CP is a ring. Balance: each expert gets as many tokens as any other. Memory:
what DeepSpeed would hold and not FSDP or Megatron, who also share out, by tokens, what TP ranks hold between the
blocks; published is what the allocator reserved, free blocks included. Selective checkpointing lies between nothing
recomputed and all.
"""


def describe(workload: Workload, what: str, model: str) -> str:
    degrees = {"TP": workload.tensor, "PP": workload.pipeline, "CP": workload.sequence, "EP": workload.expert}
    shape = [f"{name} {degree}" for name, degree in degrees.items() if degree > 1]
    recomputes = ["recomputed"] if workload.activation_checkpointing else []
    return ", ".join([what, model, workload.precision, f"{workload.ranks:,} GPUs", *shape, *recomputes])


def workloads(source: Source, line: tuple) -> list[Workload]:
    """A line's configuration, without activation checkpointing, with it, or both where it is selective."""
    _, model, precision, ranks, *degrees, tokens, batch, micro, recomputed, _, _ = line
    one = Workload(
        sizes=replace(MODELS[model], max_position_embeddings=tokens),
        seq_len=tokens,
        global_batch_size=batch,
        micro_batch_size=micro,
        ranks=ranks,
        zero_stage=source.zero_stage,
        **dict(zip(("tensor", "pipeline", "sequence", "expert"), degrees, strict=True)),
        precision=precision,
    )
    return [replace(one, activation_checkpointing=checkpointing) for checkpointing in RECOMPUTES[recomputed]]


def show(source: Source) -> list[float]:
    """Print a source's points; give predicted over published tokens/s, by measured rates."""
    print(f"\n{source.name}")
    ratios = []
    for line in source.lines:
        published, gib = line[-2:]
        for workload in workloads(source, line):
            steps = [predict_step(workload, source.hardware(workload.ranks, known)) for known in (False, True)]
            peaks, rates = (step.tokens_per_s / workload.ranks for step in steps)
            memory = count_memory(workload).total / GIB
            beside = f"{'–':>6} {memory:6.1f}" if gib is None else f"{gib:6.1f} {memory:6.1f} {memory / gib - 1:+5.0%}"
            print(
                f"{describe(workload, *line[:2]):75} {published:8,.0f}  {peaks:8,.0f} {peaks / published - 1:+5.0%}  "
                f"{rates:8,.0f} {rates / published - 1:+5.0%}  {beside}"
            )
            ratios.append(rates / published)
    print(f"{'median deviation':75} {'':8}  {'':14}  {'':8} {statistics.median(ratios) - 1:+5.0%}")
    return ratios


def show_split(source: Source) -> None:
    """Print where a step's time is predicted to go, of a source's first line."""
    line = source.lines[0]
    workload = workloads(source, line)[0]
    step = predict_step(workload, source.hardware(workload.ranks, True))
    parts = sorted(step.seconds.items(), key=lambda part: -part[1])
    print(f"\na step of {describe(workload, *line[:2])}: {step.total_s:.1f} s by measured rates")
    print("  " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts))
    print("  published: 19.93 s, of which the bubble 2.06 and the optimizer 0.29")


if __name__ == "__main__":
    print(
        f"{'':75} {'tokens/s a GPU':>8}\n{'':75} published    by peaks       by measured    GiB: published, predicted"
    )
    every = [ratio for source in SOURCES for ratio in show(source)]
    show_split(DEEPSEEK)
    print(
        f"\npredicted over published, by measured rates, {len(every)} lines: median {statistics.median(every):.2f}, "
        f"from {min(every):.2f} to {max(every):.2f}"
    )
    print(LEFT_OUT)
