"""How many floating-point operations a token costs.

T tokens of a document, H heads, d width of a head, L layers, N parameters, D tokens of a run.
"""

from dataclasses import dataclass
from typing import Any

from omniloom.plan.cache import kv_cache_bytes_by_kind, kv_cache_bytes_per_token
from omniloom.plan.params import Sizes, count_parameters, layer_matrices, parameters


def matmul_parameters(sizes: Sizes) -> int:
    """Parameters that one text token is multiplied by: `params_active` without norms, biases and convolution."""
    head = sizes.vocab_size * sizes.hidden_size
    return head + sum(_layer_parameters(sizes, layer) for layer in range(sizes.num_hidden_layers))


def _layer_parameters(sizes: Sizes, layer: int) -> int:
    always, router, chosen = layer_matrices(sizes, layer)
    return parameters(always + router) + sizes.num_experts_per_tok * parameters(chosen)


def attention_flops_per_key(sizes: Sizes) -> int:
    """Of one layer, for one query and one key that it sees: 2·H·d for the score, 2·H·d_v for the value."""
    if sizes.attention == "latent":
        return 2 * sizes.num_attention_heads * (sizes.qk_nope_head_dim + sizes.qk_rope_head_dim + sizes.v_head_dim)
    return 4 * sizes.num_attention_heads * sizes.head_width


def visible_keys(sizes: Sizes, tokens: int) -> float:
    """Keys that a query sees, the mean over a document of `tokens`: (T + 1) / 2, or by the sparse pattern's rule."""
    window = sizes.window_tokens
    if sizes.attention_pattern == "full" or tokens <= window:
        return (tokens + 1) / 2
    near = window * (window + 1) // 2 + (tokens - window) * window
    far, stride, begin = 0, sizes.global_stride, window
    while begin < tokens:
        end = min(tokens, max(begin, stride * sizes.max_global_tokens))  # up to here the stride holds
        far += _sum_of_floors(begin - window, end - window, stride) + (end - begin)
        begin, stride = end, 2 * stride
    return (near + far) / tokens


def _sum_of_floors(begin: int, end: int, divisor: int) -> int:
    """Σ ⌊x / divisor⌋ over begin ≤ x < end."""

    def below(bound: int) -> int:
        whole, rest = divmod(bound, divisor)
        return divisor * whole * (whole - 1) // 2 + whole * rest

    return below(end) - below(begin)


def attention_flops_per_token(sizes: Sizes, tokens: int) -> float:
    """Of one layer, the mean over a document of `tokens`; linear attention updates and reads H states of d × d_v."""
    if sizes.attention_pattern == "linear":
        key = value = sizes.head_width
        if sizes.attention == "latent":
            key, value = sizes.qk_nope_head_dim + sizes.qk_rope_head_dim, sizes.v_head_dim
        return 4 * sizes.num_attention_heads * key * value
    return attention_flops_per_key(sizes) * visible_keys(sizes, tokens)


def forward_flops_per_token(sizes: Sizes, tokens: int) -> float:
    """2 per matmul parameter, and attention's 2·H·(d + d_v) per visible key and layer: a text token in the main model.

    The mean over a document of `tokens`. Only the products are counted, as published figures do.
    """
    attention = sizes.num_hidden_layers * attention_flops_per_token(sizes, tokens)
    return 2 * matmul_parameters(sizes) + attention


def mtp_flops_per_token(sizes: Sizes, tokens: int) -> float:
    """What the multi-token-prediction modules add to the forward pass in training: each one layer, its junction, the
    head again."""
    if not sizes.num_nextn_predict_layers:
        return 0.0
    junction, head = 2 * sizes.hidden_size**2, sizes.vocab_size * sizes.hidden_size
    matmul = junction + _layer_parameters(sizes, sizes.num_hidden_layers) + head  # its layer is after the last
    return sizes.num_nextn_predict_layers * (2 * matmul + attention_flops_per_token(sizes, tokens))


def train_flops(sizes: Sizes, tokens: int, seen: int) -> float:
    """3 × the forward pass, the prediction modules included, over `seen` tokens in documents of `tokens`."""
    return 3 * (forward_flops_per_token(sizes, tokens) + mtp_flops_per_token(sizes, tokens)) * seen


def train_flops_6nd(sizes: Sizes, seen: int) -> int:
    """6·N_active·D, the figure that papers publish (Kaplan et al. 2020, section 2.1)."""
    return 6 * count_parameters(sizes).params_active * seen


@dataclass(frozen=True)
class Costs:
    """A token's costs in documents of `document_tokens`, and a run's where it says how long it is; FLOPs and bytes."""

    document_tokens: int
    kv_cache_bytes_per_token: int
    kv_cache_bytes_by_kind: dict[str, float]
    forward_flops_per_token: float
    train_flops_per_token: float
    train_tokens: int | None
    train_flops: float | None
    train_flops_6nd: int | None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return dict(vars(self))

    def as_table(self) -> str:
        """For reading."""
        documents = f"in documents of {self.document_tokens:,} tokens"
        kinds = ", ".join(f"{name} {size:,.0f}" for name, size in self.kv_cache_bytes_by_kind.items())
        lines = [
            f"forward, a token    {self.forward_flops_per_token / 1e9:,.4g} GFLOP, {documents}",
            f"training, a token   {self.train_flops_per_token / 1e9:,.4g} GFLOP",
            f"KV cache, a token   {kinds or 0} bytes; selective: a quarter of the positions",
        ]
        if self.train_tokens is not None:
            lines.append(
                f"training            {self.train_flops:.4g} FLOP over {self.train_tokens:,} tokens; "
                f"6·N·D {self.train_flops_6nd:.4g}"
            )
        return "\n".join(lines)


def count_costs(sizes: Sizes, document_tokens: int, train_tokens: int | None) -> Costs:
    """What one token costs, and `train_tokens` of them in training."""
    return Costs(
        document_tokens=document_tokens,
        kv_cache_bytes_per_token=kv_cache_bytes_per_token(sizes),
        kv_cache_bytes_by_kind=kv_cache_bytes_by_kind(sizes),
        forward_flops_per_token=forward_flops_per_token(sizes, document_tokens),
        train_flops_per_token=train_flops(sizes, document_tokens, 1),
        train_tokens=train_tokens,
        train_flops=None if train_tokens is None else train_flops(sizes, document_tokens, train_tokens),
        train_flops_6nd=None if train_tokens is None else train_flops_6nd(sizes, train_tokens),
    )
