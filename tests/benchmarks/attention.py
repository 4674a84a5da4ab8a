"""Sparse and linear attention against full attention, and absorbed latent decoding against the training form.

Each line times the two side by side in this process (median of 5, forward and backward, float32, one thread) and
measures each one's peak of live tensors in a process of its own: `python tests/benchmarks/attention.py`.
"""

import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from omniloom.model.attention import attend_fully, attend_linearly
from omniloom.model.config import ModelConfig
from omniloom.model.mla import LatentAttention
from omniloom.model.position import find_places
from omniloom.model.sparse_attention import attend_sparsely

HEADS, WIDTH = 4, 64
KINDS: dict[str, Callable[..., torch.Tensor]] = {
    "full": lambda *inputs: attend_fully(*inputs, [], WIDTH**-0.5),
    "sparse": lambda *inputs: attend_sparsely(*inputs, [], WIDTH**-0.5, 512, 64, 1_024),
    "linear": attend_linearly,
}


def run(kind: str, tokens: int) -> None:
    inputs = [torch.randn(tokens, HEADS, WIDTH, requires_grad=True) for _ in range(3)]
    KINDS[kind](*inputs).sum().backward()


def seconds(function: Callable[[], None], times: int = 5) -> float:
    function()
    measured = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        measured.append(time.perf_counter() - start)
    return statistics.median(measured)


def peak_kib() -> int:
    """This process's own high-water mark; getrusage's begins at the parent's."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def peak_mib(kind: str, tokens: int) -> float:
    """What a pass adds to the peak of a fresh process."""
    code = [sys.executable, __file__, kind, str(tokens)]
    return float(subprocess.run(code, capture_output=True, text=True, check=True).stdout)


def decode_ratio(cached: int) -> tuple[float, float]:
    """Seconds to attend one token with `cached` before it: absorbed, and by the keys and values of every head."""
    config = ModelConfig(
        hidden_size=512, num_attention_heads=16, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32,
        v_head_dim=64, q_lora_rank=None, max_position_embeddings=cached,
    )  # fmt: skip
    attention = LatentAttention(config)
    document = torch.zeros(1, cached, dtype=torch.long)
    places = find_places(document, document, torch.zeros(1, cached, 3), config)
    hidden = torch.randn(1, cached, 512)
    with torch.no_grad():
        latent, key_rope = attention.compress(hidden, places)
        last = places._replace(rope=places.rope[:, -1:])
        absorbed = seconds(
            lambda: attention.absorbed(*attention._queries(hidden[:, -1:], last), latent, key_rope, None)
        )

        def by_heads() -> None:
            key, value = attention.kv_b_proj(latent).unflatten(-1, (16, -1)).split([64, 64], dim=-1)
            query = attention.q_proj(hidden[:, -1:]).unflatten(-1, (16, -1))
            key = torch.cat([key, key_rope[:, :, None].expand(-1, -1, 16, -1)], dim=-1)
            attend_fully(query[0], key[0], value[0], [(0, 1)], attention.scale)

        return absorbed, seconds(by_heads)


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'tokens':>8} {'full s':>8} {'sparse ×':>9} {'linear ×':>9}   peak MiB: full, sparse, linear")
    for tokens in (2_048, 8_192, 32_768):
        took = {kind: seconds(lambda kind=kind, tokens=tokens: run(kind, tokens)) for kind in KINDS}
        peaks = ", ".join(f"{peak_mib(kind, tokens):.0f}" for kind in KINDS)
        faster = [took["full"] / took[kind] for kind in ("sparse", "linear")]
        print(f"{tokens:>8,} {took['full']:>8.3f} {faster[0]:>9.2f} {faster[1]:>9.2f}   {peaks}")
    for cached in (1_024, 8_192):
        absorbed, by_heads = decode_ratio(cached)
        times = by_heads / absorbed
        print(f"decode after {cached:,}: absorbed {1e3 * absorbed:.2f} ms, {times:.1f} × faster than by heads")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        run(sys.argv[1], 64)
        before = peak_kib()
        run(sys.argv[1], int(sys.argv[2]))
        print((peak_kib() - before) / 1024)
    else:
        main()
