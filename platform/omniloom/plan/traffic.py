"""Bytes that a training step reads and writes outside of its products and attention kernels, a token or a weight.

Operation by operation as torch runs them eagerly: each reads its operands and writes its result once; views are free.
c bytes of a product's number, r of the residual stream's, w of a weight; D model width, H heads, K heads of keys and
values, d head width, F feed-forward width, E experts, V vocabulary, C tokens of a chunk of linear attention.

    norm          RMSNorm of separate operations on a CPU, in float32: 28 and 92 (forward and backward) a number, and
                  what casts it there and back; one kernel on a GPU, and LayerNorm everywhere: 2r and 3r
    linear layers each casts its input from r to c where these differ, r + c, both ways; gradients of an input with n
                  readers are summed, 3r·(n − 1); a bias is summed, c
    RoPE          9 and 11 a turned number; 6 more each way to float32 and 6 back from it; 16 where pairs lie apart
    attention     keys and queries put together with what is not turned, 2c and 2c; values padded, 2c and 2c; documents
                  joined, 2c, and split, 2c of each of the three, and 2c of zeros
    feed-forward  SwiGLU 5c and 9c, others 2c and 3c
    experts       of each chosen one: tokens gathered 2r, cast r + c, F 5c and 13c, weighted 2c and 6c, cast c + r,
                  added 3r; scores and the balance loss 73 and 102 an expert
    head          logits cast to float32, 6, where c is 2; cross-entropy 8 and 16 a number of V
"""

from typing import NamedTuple

from omniloom.plan.activations import Numerics
from omniloom.plan.params import Sizes, attention_matrices

CHUNK_TOKENS = 64  # of linear attention


class Traffic(NamedTuple):
    """Bytes a token, and how many bytes of each token the tensors that are moved hold."""

    forward: float
    backward: float
    tensor: float


def layer_traffic(sizes: Sizes, layer: int, numerics: Numerics, tensor: int = 1) -> list[Traffic]:
    """One layer's; `tensor` ranks share what lies between the two products of each block."""
    width, c, r = sizes.hidden_size, numerics.compute, numerics.residual
    cast = (r + c) * (r != c)
    residual = Traffic(2 * (2 * r + c) * width, 2 * (3 * r + cast) * width, r * width)
    norms = [_norm(width, sizes.norm, numerics, r)] * 2
    return [residual, *norms, *_attention(sizes, numerics, tensor), *_feed_forward(sizes, layer, numerics, tensor)]


def embedding_traffic(sizes: Sizes, numerics: Numerics) -> list[Traffic]:
    """Lookup, positions, convolution, and a write over the placeholders for each medium that has an encoder."""
    width, r = sizes.hidden_size, numerics.residual
    row = r * width
    media = sum(x is not None for x in (sizes.image_patch_pixels, sizes.video_patch_pixels, sizes.audio_mels))
    moved = [Traffic(2 * row, 2 * row, row), Traffic(3 * media * row, 4 * media * row, row)]
    if sizes.position != "rope":
        moved.append(Traffic(5 * row, 2 * row, row))
    if sizes.embedding_conv_tokens:
        moved.append(Traffic(7 * sizes.embedding_conv_tokens * row, 15 * sizes.embedding_conv_tokens * row, row))
    return moved


def head_traffic(sizes: Sizes, numerics: Numerics, target_share: float, tensor: int = 1) -> list[Traffic]:
    """The norm before the head, the positions with a target picked, their logits and the loss."""
    width, c, r = sizes.hidden_size, numerics.compute, numerics.residual
    cast = (4 + c) * (c != 4)
    logits = target_share * sizes.vocab_size / tensor
    picked = target_share * width
    return [
        _norm(width, sizes.norm, numerics, r),
        Traffic(2 * r * picked, 4 * r * width, r * width),
        _read(picked, 1, numerics),
        Traffic((8 + cast) * logits, (16 + cast) * logits, 4 * logits),
    ]


def junction_traffic(sizes: Sizes, numerics: Numerics) -> list[Traffic]:
    """Where a prediction module joins the hidden state with the embedding of the token ahead."""
    row = numerics.residual * sizes.hidden_size
    norms = [_norm(sizes.hidden_size, sizes.norm, numerics, numerics.residual)] * 2
    return [*norms, Traffic(9 * row, 10 * row, row), _read(2 * sizes.hidden_size, 1, numerics)]


def _norm(width: int, kind: str, numerics: Numerics, stored: int) -> Traffic:
    r = numerics.residual
    if kind == "layer" or not numerics.on_cpu:
        return Traffic(2 * r * width, 3 * r * width, r * width)
    casts = 12 if r == 2 else (stored + 4) * (stored != 4)
    return Traffic((28 + casts) * width, (92 + casts) * width, 4 * width)


def _read(width: float, readers: int, numerics: Numerics) -> Traffic:
    """What linear layers do with an input of the residual stream's numbers that they share."""
    c, r = numerics.compute, numerics.residual
    cast = (r + c) * (r != c)
    return Traffic(readers * cast * width, (readers * cast + 3 * (readers - 1) * r) * width, r * width)


def _rope(numbers: float, sizes: Sizes, numerics: Numerics) -> Traffic:
    if sizes.position != "rope":
        return Traffic(0, 0, 0)
    extra = 12 * (numerics.compute != 4) + 16 * (not sizes.rope_interleave)
    return Traffic((9 + extra) * numbers, (11 + extra) * numbers, 4 * numbers)


def _attention(sizes: Sizes, numerics: Numerics, tensor: int) -> list[Traffic]:
    c, heads = numerics.compute, sizes.num_attention_heads
    matrices = attention_matrices(sizes)
    biases = c * sizes.attention_bias * sum(matrix.outputs for matrix in matrices)
    if sizes.attention == "grouped":
        query, key = heads * sizes.head_width, sizes.key_value_heads * sizes.head_width
        value, padded = key, key
        joined = 2 * c * (query + key) * (sizes.position == "rope")
        turned = sizes.rotary_width / sizes.head_width * (query + key)
        moved = [_read(sizes.hidden_size, 3, numerics), Traffic(joined, joined + biases, c * query)]
        out = query
    else:
        query = key = heads * (sizes.qk_nope_head_dim + sizes.qk_rope_head_dim)
        value = out = heads * sizes.v_head_dim
        padded = max(key, value)
        latent, rotary = sizes.kv_lora_rank, sizes.qk_rope_head_dim
        turned = rotary * (heads + 1)
        split = 2 * c * (query + heads * sizes.qk_nope_head_dim + value + latent + rotary)
        moved = [
            _read(sizes.hidden_size, 2, numerics),
            _norm(latent, "rms", numerics, c),
            _read(latent, 1, numerics),
            Traffic(4 * c * query, split + c * heads * rotary, c * query),
        ]
        if sizes.q_lora_rank is not None:
            moved += [_norm(sizes.q_lora_rank, "rms", numerics, c), _read(sizes.q_lora_rank, 1, numerics)]
    pad = c * (value + padded)
    moved += [
        Traffic(pad + 2 * c * out, pad + 2 * c * (query + key + value) + 2 * c * out, c * query),
        _rope(turned, sizes, numerics),
        _pattern(sizes, c, query + key + padded),
    ]
    return [Traffic(each.forward / tensor, each.backward / tensor, each.tensor / tensor) for each in moved]


def _pattern(sizes: Sizes, c: int, numbers: int) -> Traffic:
    """What sparse and linear attention move besides: keys gathered and masks made, twice; chunks and their states."""
    if sizes.attention_pattern == "linear":
        inside = 8 * CHUNK_TOKENS * sizes.num_attention_heads
        return Traffic(60 * numbers + inside, 90 * numbers + inside, 4 * numbers / 3)
    if sizes.attention_pattern == "sparse":
        seen = 2 * sizes.window_tokens + sizes.max_global_tokens
        again = seen / sizes.window_tokens
        mask, gathered = (11 + c) * seen, 2 * c * numbers / 3 * (1 + 2 * again)
        return Traffic(mask + gathered, mask + 2 * gathered + 3 * c * numbers, c * numbers / 3)
    return Traffic(0, 0, 0)


def _feed_forward(sizes: Sizes, layer: int, numerics: Numerics, tensor: int) -> list[Traffic]:
    width, c, r = sizes.hidden_size, numerics.compute, numerics.residual
    if not sizes.is_sparse(layer):
        return _network(sizes, sizes.intermediate_size / tensor, numerics)
    chosen, inner = sizes.num_experts_per_tok, sizes.moe_intermediate_size / tensor
    cast = (r + c) * (r != c)
    rows, router = chosen * width, 8 * (r != 4) * width
    moved = [
        Traffic((2 * r + 3 * r + 2 * c + 2 * cast) * rows, (4 * r + 6 * c + 2 * cast) * rows, c * rows),
        Traffic((3 * r) * width + router, 7 * r * width + router, r * width),
        Traffic(5 * c * chosen * inner, 13 * c * chosen * inner, c * chosen * inner),
        Traffic(73 * sizes.n_routed_experts, 102 * sizes.n_routed_experts, 4 * sizes.n_routed_experts),
    ]
    shared = sizes.n_shared_experts * sizes.moe_intermediate_size / tensor
    if shared:
        moved += [*_network(sizes, shared, numerics), Traffic((2 * r + c) * width, (3 * r + cast) * width, r * width)]
    return moved


def _network(sizes: Sizes, inner: float, numerics: Numerics) -> list[Traffic]:
    c = numerics.compute
    gated = sizes.activation == "swiglu"
    readers, forward, backward = (2, 5, 9) if gated else (1, 2, 3)
    bias = c * sizes.mlp_bias * (readers * inner + sizes.hidden_size)
    return [
        _read(sizes.hidden_size, readers, numerics),
        Traffic(forward * c * inner, backward * c * inner + bias, c * inner),
    ]


class Moved(NamedTuple):
    """Bytes read and written, and those of them that are written into new memory."""

    bytes: float
    fresh: float


class WeightTraffic(NamedTuple):
    """Of one weight: casts and sums at every micro batch, copies of its gradient, once or at every micro batch; and of
    one weight of the shard the optimizer's step."""

    casts: Moved
    sums: Moved
    exchange: Moved
    is_each_exchanged: bool
    step: Moved


def weight_traffic(precision: str, zero_stage: int) -> WeightTraffic:
    """What is done with weights and gradients besides multiplying, as DeepSpeed 0.19.8 does it with torch's AdamW.

    Autocast casts each weight and back its gradient, 6 and 6, at every micro batch; later gradients are added, 3w.
    ZeRO 0 flattens all gradients, exchanges them and copies them back, 4w once; 1 copies them into a bucket, divides
    them, copies them out and into the shard, 8w, once; 2 does at every micro batch; 3, too, by 10w, and its later sums
    cost w. AdamW's eight operations read and write 80 bytes a number, 8 of them new; with norms, clipping, masters and
    new weights ZeRO 0 comes to 92, or 118 in half precision, the others, who flatten the shard first, to 128.
    """
    w = Numerics(precision).residual
    casts = Moved(12, 6) if precision == "bf16_autocast" else Moved(0, 0)
    exchange = (Moved(4 * w, w), Moved(8 * w, 2 * w), Moved(8 * w, 2 * w), Moved(10 * w, w))[zero_stage]
    step = Moved(128, 16) if zero_stage else Moved(118, 12) if w == 2 else Moved(92, 8)
    sums = Moved(w if zero_stage == 3 else 3 * w, 0)
    return WeightTraffic(casts, sums, exchange, zero_stage >= 2, step)
