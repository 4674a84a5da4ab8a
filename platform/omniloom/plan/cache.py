"""What a token leaves in each kind of cache, in bytes.

L layers, G heads of keys and values, d width of a head, c latent width.
"""

from omniloom.plan.params import Sizes

BF16_BYTES, SCALE_BYTES = 2, 4
SELECTED_SHARE = 0.25  # of the positions, that a selective cache is said to keep here


def numbers_per_layer(sizes: Sizes) -> int:
    """What one layer caches of a token: 2·G·d, or the latent and the rotary key, c + rope; linear attention keeps a
    state instead, and no token leaves anything."""
    if sizes.attention_pattern == "linear":
        return 0
    if sizes.attention == "latent":
        return sizes.kv_lora_rank + sizes.qk_rope_head_dim
    return 2 * sizes.key_value_heads * sizes.head_width


def kv_cache_bytes_per_token(sizes: Sizes) -> int:
    """Of the model's own cache in bf16."""
    return BF16_BYTES * sizes.num_hidden_layers * numbers_per_layer(sizes)


def kv_cache_bytes_by_kind(sizes: Sizes) -> dict[str, float]:
    """A token's bytes in every kind of cache that the model can have.

    full: keys and values of all heads, bf16. latent: c + rope; uncompressed, which no cache is, what the same heads
    would take, H·(nope + v). int8: one byte a number and a float32 scale for keys, for values or for the latent; the
    rotary key stays bf16. selective: a share of the positions of the model's own cache. windowed: of the positions that
    sparse attention still sees after its whole context, spread over all of them.
    """
    if sizes.attention_pattern == "linear":
        return {}
    layers, own = sizes.num_hidden_layers, kv_cache_bytes_per_token(sizes)
    kinds: dict[str, float] = {}
    if sizes.attention == "latent":
        heads = sizes.num_attention_heads * (sizes.qk_nope_head_dim + sizes.v_head_dim)
        kinds["latent"] = own
        kinds["uncompressed"] = BF16_BYTES * layers * heads
        kinds["int8"] = layers * (sizes.kv_lora_rank + SCALE_BYTES + BF16_BYTES * sizes.qk_rope_head_dim)
    else:
        kinds["full"] = own
        kinds["int8"] = layers * (numbers_per_layer(sizes) + 2 * SCALE_BYTES)
    kinds["selective"] = SELECTED_SHARE * own
    if sizes.attention_pattern == "sparse":
        context = sizes.max_position_embeddings
        kinds["windowed"] = own * _still_seen(sizes) / context
    return kinds


def _still_seen(sizes: Sizes) -> int:
    """Positions of a whole context that the next token would see: window − 1, and multiples of its stride before."""
    after, window = sizes.max_position_embeddings, sizes.window_tokens
    if after < window:
        return after
    stride = sizes.global_stride << (after // (sizes.global_stride * sizes.max_global_tokens)).bit_length()
    return window - 1 + (after - window) // stride + 1
