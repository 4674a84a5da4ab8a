"""Bytes that a forward pass keeps for the backward pass, a token, counted operation by operation.

D model width, H heads, K heads of keys and values, F feed-forward width, E experts, V vocabulary; c bytes of a number
in a product, r of one in the residual stream.
"""

from dataclasses import dataclass

from omniloom.plan.params import Sizes

COMPUTE_BYTES = {"fp32": 4, "bf16_autocast": 2, "bf16": 2, "fp16": 2, "fp8": 2}
RESIDUAL_BYTES = {"fp32": 4, "bf16_autocast": 4, "bf16": 2, "fp16": 2, "fp8": 2}


@dataclass(frozen=True)
class Numerics:
    """In which numbers a pass is kept: `train/precision.py` says what each precision means."""

    precision: str = "fp32"
    on_cpu: bool = False

    @property
    def compute(self) -> int:
        """Bytes of a product's number, c."""
        return COMPUTE_BYTES[self.precision]

    @property
    def residual(self) -> int:
        """Bytes of a number of the residual stream, r."""
        return RESIDUAL_BYTES[self.precision]

    def read(self, width: int, readers: int) -> int:
        """What `readers` linear layers keep of one normalised input; under autocast each casts a copy of its own."""
        return self.compute * width * (readers if self.precision == "bf16_autocast" else 1)

    def norm(self, width: int, kind: str = "rms") -> int:
        """RMSNorm keeps x and x / rms in float32 on a CPU, x alone where it is one kernel, as LayerNorm does."""
        if kind == "layer":
            return self.residual * width + 8
        return 8 * width + 4 if self.on_cpu else self.residual * width + 4


def layer_bytes(sizes: Sizes, layer: int, numerics: Numerics, tensor: int = 1) -> float:
    """What one layer keeps of a token; `tensor` ranks share what lies between the two products of each block."""
    outside = 2 * numerics.norm(sizes.hidden_size, sizes.norm) + 2 * sizes.hidden_size * (sizes.dropout > 0)
    return outside + _attention(sizes, numerics, tensor) + _feed_forward(sizes, layer, numerics, tensor)


def checkpointed_bytes(sizes: Sizes, numerics: Numerics) -> int:
    """What a layer keeps of a token under activation checkpointing: its input, r·D."""
    return numerics.residual * sizes.hidden_size


def _attention(sizes: Sizes, numerics: Numerics, tensor: int) -> float:
    """q, k, v and the output that the kernel keeps, the output again that o_proj reads, log Σ exp in float32."""
    c, heads = numerics.compute, sizes.num_attention_heads
    if sizes.attention == "latent":
        key, value = sizes.qk_nope_head_dim + sizes.qk_rope_head_dim, sizes.v_head_dim
        key_heads, padded = heads, max(key, value)
        latent, rope = sizes.kv_lora_rank, sizes.qk_rope_head_dim
        inputs = numerics.read(sizes.hidden_size, 2) + c * latent
        # The norm of the latent is a view of the product that also holds the rotary key.
        inputs += numerics.norm(latent) + (4 if numerics.precision == "fp32" or not numerics.on_cpu else 0) * rope
        if sizes.q_lora_rank is not None:
            inputs += numerics.norm(sizes.q_lora_rank) + c * sizes.q_lora_rank
    else:
        key = value = padded = sizes.head_width
        key_heads = sizes.key_value_heads
        inputs = numerics.read(sizes.hidden_size, 3)
    projected = c * (heads * key + key_heads * (key + padded))
    if sizes.attention_pattern == "linear":
        inside = projected + _linear_states(sizes, key, value)
    elif sizes.attention_pattern == "sparse":
        inside = projected  # its blocks run again in the backward pass
    else:
        inside = projected + c * heads * padded + 4 * heads
    return inputs + (inside + c * heads * value) / tensor


def _linear_states(sizes: Sizes, key: int, value: int) -> float:
    """Linear attention works in float32 on chunks of 64 tokens: φ(q), φ(k) and v with a column of ones, each chunk's
    state and what lies before it, the weights inside a chunk, the quotient."""
    heads, chunk = sizes.num_attention_heads, 64
    return 4 * heads * (4 * key + 2 * (value + 1) + 2 * key * (value + 1) / chunk + 2 * chunk + 2 * value)


def _feed_forward(sizes: Sizes, layer: int, numerics: Numerics, tensor: int) -> float:
    c, width = numerics.compute, sizes.hidden_size
    if not sizes.is_sparse(layer):
        kept = {"swiglu": 4, "relu": 1}.get(sizes.activation, 2)  # of F: gate, its silu, up and their product
        readers = 2 if sizes.activation == "swiglu" else 1
        return numerics.read(width, readers) + kept * c * sizes.intermediate_size / tensor
    chosen, inner, experts = sizes.num_experts_per_tok, sizes.moe_intermediate_size, sizes.n_routed_experts
    router = 4 * width + 4 * experts + 12 * chosen + 4
    balance = 12 * experts  # scores, shares and choices by document
    sort = 16 * chosen + c * chosen
    inside = c * (4 * chosen * inner) / tensor
    routed = c * chosen * width + inside + (c + numerics.residual) * chosen * width
    shared = sizes.n_shared_experts * inner
    if not shared:
        return router + balance + sort + routed
    read = 0 if numerics.precision == "fp32" else numerics.read(width, 2)
    return router + balance + sort + routed + read + 4 * c * shared / tensor


@dataclass(frozen=True)
class HeadBytes:
    """Of one position with a target: what its logits keep until the backward pass, and what that adds at its height."""

    kept: float
    passing: float


def head_bytes(sizes: Sizes, numerics: Numerics) -> HeadBytes:
    """The head's input and the log-softmax of its logits in float32 are kept, c·D + 4·V, for each prediction module
    too; above them stand at the height the logits, or the gradient, as c and in float32."""
    c, vocabulary = numerics.compute, sizes.vocab_size
    one = c * sizes.hidden_size + 4 * vocabulary
    passing = 4 * vocabulary + (0 if numerics.precision == "fp32" else c * vocabulary)
    return HeadBytes(one * (1 + sizes.num_nextn_predict_layers), passing)


def ends_bytes(sizes: Sizes, numerics: Numerics, has_head: bool = True) -> float:
    """Outside of layers and head: the ids, RoPE's table, the convolution; before the head the final norm, and of each
    prediction module its junction's two norms and its own."""
    norm = numerics.norm(sizes.hidden_size, sizes.norm)
    rope = 4 * sizes.rotary_width if sizes.position == "rope" else 0
    convolution = (sizes.embedding_conv_tokens or 0) * numerics.residual * sizes.hidden_size
    junction = 3 * norm + numerics.compute * 2 * sizes.hidden_size
    before_head = norm + sizes.num_nextn_predict_layers * junction
    return 5 + rope + convolution + (before_head if has_head else 0)


def encoder_bytes(sizes: Sizes, numerics: Numerics) -> dict[str, float]:
    """What a medium's encoder keeps of one of its tokens: the patch, c·3·patch², and its norm; of sound each
    convolution's three frames, its norm and the input of its GELU, of all frames that make a token."""
    width, c = sizes.hidden_size, numerics.compute
    norm = numerics.norm(width)
    kept: dict[str, float] = {}
    for medium, pixels in (("image", sizes.image_patch_pixels), ("video", sizes.video_patch_pixels)):
        if pixels:
            kept[medium] = c * 3 * pixels**2 + norm
    if sizes.audio_mels:
        outputs, channels, total = sizes.audio_frames_per_token // 2, sizes.audio_mels, 0.0
        while outputs:
            gelu = 0 if channels == sizes.audio_mels else 2 * numerics.residual * width
            total += outputs * (c * 3 * channels + norm + gelu)
            outputs, channels = outputs // 2, width
        kept["audio"] = total
    return kept
