"""What int8 and selective caches cost in quality, and a prompt of a million tokens.

`python tests/benchmarks/caches.py [int8] [selective] [million]`. On the demo's model (`runs/demo`, or the run that
OMNILOOM_DEMO names; where there is none the demo runs first): perplexity of real text read token by token out of an
int8 cache against the full one; and of the needles that the full cache finds, how many are found with a quarter of the
positions kept. `million`: a prompt of a million tokens read in chunks by a small model of sparse attention.
"""

import math
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from generate import ROOT, demo_model, forget_peak_mb, held_mb
from omniloom.evaluation.needle import Grid, needle_items
from omniloom.generate.config import CacheConfig
from omniloom.generate.forward import Piece, as_document, forward, read
from omniloom.generate.kv_cache import KVCache
from omniloom.generate.model import WritingModel
from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder

REAL = Path(os.environ.get("OMNILOOM_TEST_DATA", ROOT.parent / "shared" / "data"))
HELD_OUT = ROOT / "corpora" / "demo" / "files" / "topics" / "heldout"
SHARE, RECENT = 0.25, 8


@torch.no_grad()
def negative_log_likelihoods(model: WritingModel, windows: list[list[int]], config: CacheConfig) -> list[float]:
    """Of each token of the windows but the first, every one read out of the cache that holds those before it."""
    cache = KVCache(model.decoder, config, len(windows))
    found: list[float] = []
    for at in tqdm(range(len(windows[0]) - 1), desc=config.precision):
        passed = forward(model.decoder, cache, [Piece(slot, ids[at : at + 1]) for slot, ids in enumerate(windows)])
        log_BV = torch.cat(passed.logits).float().log_softmax(-1)
        found += [-float(log_BV[slot, ids[at + 1]]) for slot, ids in enumerate(windows)]
    return found


def int8() -> None:
    model = demo_model()
    text, context = model.prompter.text, model.config.max_position_embeddings
    texts = {
        "wikitext-2": (REAL / "text" / "wikitext-2" / "test.txt").read_text(encoding="utf-8")[:100_000],
        "the demo's held-out topics": "\n".join(file.read_text() for file in sorted(HELD_OUT.glob("*.txt"))),
    }
    for name, whole in texts.items():
        ids = text.encode(whole).tolist()
        step = context - 1
        windows = [[text.bos_id, *ids[at : at + step]] for at in range(0, len(ids) - step, step)][:24]
        full, coarse = (negative_log_likelihoods(model, windows, CacheConfig(kind)) for kind in ("fp32", "int8"))
        one, other = (math.exp(statistics.fmean(each)) for each in (full, coarse))
        print(
            f"int8: {name}, {len(full):,} tokens: perplexity {one:.4f} with the full cache, {other:.4f} with int8: "
            f"{100 * (other / one - 1):+.4f}%",
            flush=True,
        )


@torch.no_grad()
def finds(model: WritingModel, item: dict[str, object], config: CacheConfig | None) -> bool:
    """Whether greedy decoding gives the item's answer; without a config a quarter of its prompt's positions is kept."""
    text = model.prompter.text
    prompt, answer = (text.encode(str(item[key])).tolist() for key in ("prompt", "answer"))
    prompt, answer = [text.bos_id, *prompt], text.encode(f" {item['answer']}").tolist()
    kept = int(SHARE * len(prompt))
    if config is None:
        config = CacheConfig(heavy_tokens=max(1, kept - RECENT), recent_tokens=RECENT)
    cache = KVCache(model.decoder, config, 1)
    next_V = read(model.decoder, cache, 0, as_document(prompt, model.config), len(prompt))
    cache.settle(0, lazily=False)
    if config.heavy_tokens is not None:
        assert all(layer.held[0] <= max(kept, RECENT + 1) for layer in cache.layers)
    for id in answer:
        if int(next_V.argmax()) != id:
            return False
        next_V = forward(model.decoder, cache, [Piece(0, [id])]).logits[0][0]
        cache.settle(0, lazily=False)
    return True


def selective() -> None:
    model = demo_model()
    texts = [file.read_text() for file in sorted(HELD_OUT.glob("*.txt"))]
    for length in (128, 256, 512):
        items = needle_items(texts, model.folder, Grid(lengths=[length], per_cell=20, seed=1))
        full = [finds(model, item, CacheConfig()) for item in tqdm(items, desc=f"full {length}")]
        found = [item for item, hit in zip(items, full, strict=True) if hit]
        kept = [finds(model, item, None) for item in tqdm(found, desc=f"selective {length}")]
        print(
            f"selective: {length} tokens: the full cache finds {sum(full)} of {len(items)} needles, a quarter of its "
            f"positions {sum(kept)} of those: {100 * sum(kept) / max(1, len(kept)):.1f}%",
            flush=True,
        )


def million() -> None:
    """Two layers of four heads, 512 of the window and 1,024 globals, chunks of 1,024 tokens."""
    tokens = 1_000_000
    config = ModelConfig(
        vocab_size=1_280, hidden_size=128, num_hidden_layers=2, max_position_embeddings=1 << 20,
        attention_pattern="sparse", num_attention_heads=4, kv_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=32,
        v_head_dim=32, n_routed_experts=0, intermediate_size=384, image_patch_pixels=None, video_patch_pixels=None,
        audio_mels=None,
    )  # fmt: skip
    torch.manual_seed(0)
    decoder = Decoder(config).eval()
    ids = torch.randint(5, 1_280, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    cache, before, begun = KVCache(decoder, CacheConfig(), 1), forget_peak_mb(), time.perf_counter()
    for at in tqdm(range(0, tokens, 1_024), desc="million"):
        forward(decoder, cache, [Piece(0, ids[at : at + 1_024])])
        cache.settle(0)
    took, peak = time.perf_counter() - begun, held_mb("VmHWM") - before
    held = max(layer.held[0] for layer in cache.layers)
    one = time.perf_counter()
    for _ in range(32):
        forward(decoder, cache, [Piece(0, [7])])
        cache.settle(0)
    print(
        f"million: {tokens:,} tokens read in {took:.0f} s, {tokens / took:,.0f} a second; peak {peak:.0f} MB above the "
        f"model and its prompt; {held:,} positions cached, {cache.bytes_held(0) / 1e6:.1f} MB; a token after it "
        f"{1e3 * (time.perf_counter() - one) / 32:.1f} ms",
        flush=True,
    )


def main() -> None:
    parts = {"int8": int8, "selective": selective, "million": million}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
