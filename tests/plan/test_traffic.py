"""Bytes moved outside of products and attention kernels, against what torch's dispatcher sees of a real pass."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder, text_fields
from omniloom.objective.balance import sequence_balance
from omniloom.objective.next_token import next_token_nll, shifted_targets
from omniloom.plan.activations import Numerics
from omniloom.plan.params import count_parameters
from omniloom.plan.traffic import Traffic, embedding_traffic, head_traffic, junction_traffic, layer_traffic

TOKENS = 2_048
PRODUCTS = ("mm", "addmm", "bmm", "_grouped_mm", "_scaled_dot_product_flash_attention_for_cpu")
MAKES_NOTHING = ("detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
READS_NOTHING = ("zeros", "zeros_like", "fill_", "zero_", "ones_like", "full_like", "new_zeros", "arange")
READS_WHAT_IT_WRITES = ("index", "gather", "embedding", "index_select")
TEXT = ModelConfig(
    vocab_size=256, hidden_size=128, num_hidden_layers=2, max_position_embeddings=TOKENS, num_attention_heads=4,
    intermediate_size=384, n_routed_experts=0, attention="grouped",
    image_patch_pixels=None, video_patch_pixels=None, audio_mels=None,
)  # fmt: skip
LATENT = replace(
    TEXT, attention="latent", kv_lora_rank=48, q_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
)
MODELS = {
    "swiglu": TEXT,
    "turned apart": replace(TEXT, rope_interleave=False, num_key_value_heads=2),
    "gpt": replace(
        TEXT, norm="layer", position="learned", activation="gelu", attention_bias=True, mlp_bias=True, dropout=0.0
    ),
    "latent": LATENT,
    "experts": replace(LATENT, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=128),
    "module ahead": replace(TEXT, num_nextn_predict_layers=1),
    "sparse": replace(TEXT, attention_pattern="sparse", window_tokens=128, global_stride=32, max_global_tokens=16),
    "linear": replace(TEXT, attention_pattern="linear"),
    "vocabulary": replace(TEXT, vocab_size=2_048, tie_word_embeddings=False),
}


class Moved(TorchDispatchMode):
    """Each operation's operands and results once; views and matrix products nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.phase = "forward"

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if views or name in MAKES_NOTHING or name.startswith(PRODUCTS):
            return out
        operands = args[1:] if name == "copy_" else (args, kwargs)
        read = 0 if name in READS_NOTHING else sum(map(held, tree_leaves(operands)))
        written = sum(map(held, tree_leaves(out)))
        self.bytes[self.phase] += written * 2 if name in READS_WHAT_IT_WRITES else read + written
        return out


def held(leaf: Any) -> int:
    """Bytes that a tensor really has: what is expanded lies there once."""
    if not isinstance(leaf, torch.Tensor):
        return 0
    numbers = 1
    for size, stride in zip(leaf.shape, leaf.stride(), strict=True):
        numbers *= size if stride else 1
    return numbers * leaf.element_size()


def moved(config: ModelConfig, precision: str) -> Counter[str]:
    """Of one micro batch, forward and backward."""
    torch.manual_seed(0)
    decoder = Decoder(config)
    decoder = decoder.bfloat16() if precision == "bf16" else decoder
    fields = text_fields(torch.randint(0, config.vocab_size, (1, TOKENS)), config)
    mask, depths = torch.ones(1, TOKENS), range(1, 2 + config.num_nextn_predict_layers)
    with Moved() as mode:
        targets = [shifted_targets(fields["input_ids"], fields["document"], mask, ahead) for ahead in depths]
        main, *ahead = (at for at, _ in targets)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16_autocast"):
            output = decoder(**fields, predict_at=main, predict_ahead_at=ahead)
        losses = [
            next_token_nll(logits, ids).sum()
            for logits, (_, ids) in zip((output.logits, *output.mtp), targets, strict=True)
        ]
        losses += [sequence_balance(router.scores_BTE, fields["document"], 2) for router in output.router]
        loss = torch.stack(losses).sum()
        mode.phase = "backward"
        loss.backward()
    return mode.bytes


def predicted(config: ModelConfig, precision: str) -> list[Traffic]:
    numerics = Numerics(precision, on_cpu=True)
    ahead = config.num_nextn_predict_layers
    parts = embedding_traffic(config, numerics) + (1 + ahead) * head_traffic(config, numerics, 1.0)
    for layer in range(config.num_hidden_layers + ahead):
        parts += layer_traffic(config, layer, numerics)
    return parts + ahead * junction_traffic(config, numerics)


@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_bytes_moved_are_those_that_torch_dispatches(name: str, precision: str) -> None:
    config = MODELS[name]
    counted, parts = moved(config, precision), predicted(config, precision)
    parameters = count_parameters(config).params_total
    # Weights are cast under autocast, and the embedding's gradient is zeroed and added up: not a token's traffic.
    weights = parameters * (12 if precision == "bf16_autocast" else 0) + 16 * config.vocab_size * config.hidden_size
    forward, backward = (TOKENS * sum(getattr(part, way) for part in parts) for way in ("forward", "backward"))
    tolerance = 0.25 if config.attention_pattern == "linear" else 0.12
    print(name, precision, f"forward {forward / counted['forward']:.3f} backward {backward / counted['backward']:.3f}")
    assert forward + backward + weights == pytest.approx(counted.total(), rel=tolerance)
