"""How many parameters a decoder has, by part.

D model width, V vocabulary, C context, H heads, G heads of keys and values, d width of a head, F feed-forward width,
E routed experts, S shared experts, K experts per token, L layers.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol


class Sizes(Protocol):
    """What is read of a model's configuration; `model.config.ModelConfig` is one."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    norm: str
    norm_position: str
    position: str
    rope_interleave: bool
    attention: str
    attention_pattern: str
    window_tokens: int
    global_stride: int
    max_global_tokens: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    attention_bias: bool
    activation: str
    mlp_bias: bool
    intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    scoring_func: str
    router_bias: bool
    num_nextn_predict_layers: int
    image_patch_pixels: int | None
    video_patch_pixels: int | None
    audio_mels: int | None
    audio_frames_per_token: int
    embedding_conv_tokens: int | None
    dropout: float

    @property
    def head_width(self) -> int: ...

    @property
    def key_value_heads(self) -> int: ...

    @property
    def rotary_width(self) -> int: ...

    def is_sparse(self, layer: int) -> bool: ...


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the main model by part, those of its MTP modules, and those that one text token meets.

    embedding V·D; positions C·D where learned; convolution k·D; head V·D, 0 where it is the embedding.
    attention, a layer: grouped 2·D·(H + G)·d, and (H + 2G)·d + D biases; latent D·H·(nope + rope), or
    D·r + r + r·H·(nope + rope) with q_lora_rank r, then D·(c + rope) + c + c·H·(nope + v) + H·v·D with kv_lora_rank c.
    dense_feed_forward, a layer: swiglu 3·D·F, others 2·D·F; biases 2F + D and F + D. routed_experts E·3·D·F and
    shared_experts S·3·D·F, a sparse layer, with F of moe_intermediate_size; router E·D, with E more for the selection
    bias of sigmoid scores, which is no trained weight but is counted in published totals, and E for a logit bias.
    norms: 2L + 1 (2L where they stand after the sums) of D, 2·D with a bias. Encoders: patches D·3·patch² and a gain
    of D; sound 3·mels·D, then 3·D² for each further convolution, and a gain of D for each.
    mtp, a module: 2·D² and two norms where hidden state and next embedding meet, one layer, one norm.

    `params_total` leaves the MTP modules out, as published totals do. `params_active` is what one text token meets: the
    head also where it is tied, K of E routed experts, the router and its bias; no lookup in embedding and positions, no
    media encoder, no MTP module.
    """

    embedding: int
    positions: int
    image_encoder: int
    audio_encoder: int
    video_encoder: int
    convolution: int
    attention: int
    dense_feed_forward: int
    router: int
    routed_experts: int
    shared_experts: int
    norms: int
    head: int
    mtp: int
    params_active: int

    @property
    def by_part(self) -> dict[str, int]:
        """Every part, the MTP modules last."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "params_active"}

    @property
    def params_mtp(self) -> int:
        """The MTP modules'."""
        return self.mtp

    @property
    def params_total(self) -> int:
        """The main model's, the router's bias included."""
        return sum(self.by_part.values()) - self.mtp

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        """For --json."""
        return {
            "params_total": self.params_total,
            "params_active": self.params_active,
            "params_mtp": self.params_mtp,
            "params_by_part": self.by_part,
        }

    def as_table(self) -> str:
        """For reading: the parts that there are, then the three sums."""
        parts = {name.replace("_", " "): count for name, count in self.by_part.items() if count and name != "mtp"}
        sums = {"total": self.params_total, "active, a text token": self.params_active, "MTP modules": self.params_mtp}
        lines = [f"{name:20} {count:>19,} {short(count):>8}" for name, count in {**parts, **sums}.items()]
        lines.insert(len(parts), "-" * len(lines[0]))
        return "\n".join(lines)


def count_parameters(sizes: Sizes) -> ParameterCount:
    """Count a decoder's parameters from its sizes alone, exactly; the formulas are at `ParameterCount`."""
    width, layers = sizes.hidden_size, sizes.num_hidden_layers
    sparse = sum(sizes.is_sparse(layer) for layer in range(layers))
    embedding, experts = sizes.vocab_size * width, sizes.n_routed_experts
    is_post = sizes.norm_position == "post"
    main = {
        "convolution": (sizes.embedding_conv_tokens or 0) * width,
        "attention": layers * _attention(sizes),
        "dense_feed_forward": (layers - sparse) * _dense(sizes),
        "router": sparse * _router(sizes),
        "shared_experts": sparse * sizes.n_shared_experts * expert_parameters(sizes),
        "norms": (2 * layers + (not is_post)) * norm_parameters(sizes),
    }
    routed = sparse * experts * expert_parameters(sizes)
    chosen = routed // experts * sizes.num_experts_per_tok if routed else 0
    return ParameterCount(
        embedding=embedding,
        positions=sizes.max_position_embeddings * width if sizes.position == "learned" else 0,
        image_encoder=_encoder(sizes, "image"),
        audio_encoder=_encoder(sizes, "audio"),
        video_encoder=_encoder(sizes, "video"),
        **main,
        routed_experts=routed,
        head=0 if sizes.tie_word_embeddings else embedding,
        mtp=sizes.num_nextn_predict_layers * _mtp_module(sizes),
        params_active=embedding + sum(main.values()) + chosen,  # the head is as large as the embedding, tied or not
    )


def short(count: int) -> str:
    """A count in thousands, millions or billions."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:,.1f}{letter}"
    return str(count)


def norm_parameters(sizes: Sizes) -> int:
    """Of one norm over the width."""
    return sizes.hidden_size * (2 if sizes.norm == "layer" else 1)


class Matrix(NamedTuple):
    """What a token's `inputs` numbers are multiplied by."""

    inputs: int
    outputs: int

    @property
    def parameters(self) -> int:
        """Its numbers."""
        return self.inputs * self.outputs


def attention_matrices(sizes: Sizes) -> list[Matrix]:
    """Of one layer, in the forward pass's order."""
    width, heads = sizes.hidden_size, sizes.num_attention_heads
    if sizes.attention == "grouped":
        query, key_value = heads * sizes.head_width, sizes.key_value_heads * sizes.head_width
        return [Matrix(width, query), Matrix(width, key_value), Matrix(width, key_value), Matrix(query, width)]
    query = heads * (sizes.qk_nope_head_dim + sizes.qk_rope_head_dim)
    rank, latent = sizes.q_lora_rank, sizes.kv_lora_rank
    into_query = [Matrix(width, query)] if rank is None else [Matrix(width, rank), Matrix(rank, query)]
    out_of_latent = Matrix(latent, heads * (sizes.qk_nope_head_dim + sizes.v_head_dim))
    return [
        *into_query,
        Matrix(width, latent + sizes.qk_rope_head_dim),
        out_of_latent,
        Matrix(heads * sizes.v_head_dim, width),
    ]


def feed_forward_matrices(sizes: Sizes, inner: int) -> list[Matrix]:
    """Of one dense feed-forward network, `inner` wide; shared experts are one."""
    into = [Matrix(sizes.hidden_size, inner)] * (2 if sizes.activation == "swiglu" else 1)
    return [*into, Matrix(inner, sizes.hidden_size)]


def expert_matrices(sizes: Sizes) -> list[Matrix]:
    """Of one routed expert."""
    inner = sizes.moe_intermediate_size
    return [Matrix(sizes.hidden_size, 2 * inner), Matrix(inner, sizes.hidden_size)]


class LayerMatrices(NamedTuple):
    """Of one layer: those that every token meets, the router's, and those of each expert that it chooses."""

    always: list[Matrix]
    router: list[Matrix]
    chosen: list[Matrix]


def layer_matrices(sizes: Sizes, layer: int) -> LayerMatrices:
    """Of one layer; a dense one has no router and no experts."""
    attention = attention_matrices(sizes)
    if not sizes.is_sparse(layer):
        return LayerMatrices(attention + feed_forward_matrices(sizes, sizes.intermediate_size), [], [])
    shared = sizes.n_shared_experts * sizes.moe_intermediate_size
    always = attention + (feed_forward_matrices(sizes, shared) if shared else [])
    return LayerMatrices(always, [Matrix(sizes.hidden_size, sizes.n_routed_experts)], expert_matrices(sizes))


class LayerParameters(NamedTuple):
    """Of one layer: in matrices that every token meets, in norms and router, in routed experts."""

    matrices: int
    others: int
    routed: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def layer_parameters(sizes: Sizes, layer: int) -> LayerParameters:
    """Of one layer, as `count_parameters` adds them up."""
    norms = 2 * norm_parameters(sizes)
    if not sizes.is_sparse(layer):
        return LayerParameters(_attention(sizes) + _dense(sizes), norms, 0)
    expert = expert_parameters(sizes)
    matrices = _attention(sizes) + sizes.n_shared_experts * expert
    return LayerParameters(matrices, norms + _router(sizes), sizes.n_routed_experts * expert)


def parameters(matrices: list[Matrix]) -> int:
    """Of all of them."""
    return sum(matrix.parameters for matrix in matrices)


def _attention(sizes: Sizes) -> int:
    matrices = attention_matrices(sizes)
    if sizes.attention == "latent":
        vectors = (sizes.q_lora_rank or 0) + sizes.kv_lora_rank  # the norms' gains
    else:
        vectors = sum(matrix.outputs for matrix in matrices) if sizes.attention_bias else 0
    return parameters(matrices) + vectors


def _dense(sizes: Sizes) -> int:
    matrices = feed_forward_matrices(sizes, sizes.intermediate_size)
    return parameters(matrices) + (sum(matrix.outputs for matrix in matrices) if sizes.mlp_bias else 0)


def expert_parameters(sizes: Sizes) -> int:
    """Of one expert."""
    return parameters(expert_matrices(sizes))


def _router(sizes: Sizes) -> int:
    biases = (sizes.scoring_func == "sigmoid") + sizes.router_bias
    return sizes.n_routed_experts * (sizes.hidden_size + biases)


def _mtp_module(sizes: Sizes) -> int:
    """Its layer is the one after the last: sparse where any experts are."""
    experts = sizes.n_routed_experts + sizes.n_shared_experts
    is_sparse = sizes.is_sparse(sizes.num_hidden_layers)
    feed_forward = _router(sizes) + experts * expert_parameters(sizes) if is_sparse else _dense(sizes)
    return 2 * sizes.hidden_size**2 + 5 * norm_parameters(sizes) + _attention(sizes) + feed_forward


def encoder_matrices(sizes: Sizes) -> dict[str, list[tuple[Matrix, int]]]:
    """Of each medium that has an encoder, with how often one of its tokens meets them: each convolution halves."""
    media: dict[str, list[tuple[Matrix, int]]] = {}
    for medium, pixels in (("image", sizes.image_patch_pixels), ("video", sizes.video_patch_pixels)):
        if pixels:
            media[medium] = [(Matrix(3 * pixels**2, sizes.hidden_size), 1)]
    if sizes.audio_mels is not None:
        layers = sizes.audio_frames_per_token.bit_length() - 1
        inputs = [3 * sizes.audio_mels] + [3 * sizes.hidden_size] * (layers - 1)
        outputs = [2 ** (layers - 1 - index) for index in range(layers)]
        media["audio"] = [(Matrix(i, sizes.hidden_size), o) for i, o in zip(inputs, outputs, strict=True)]
    return media


def _encoder(sizes: Sizes, medium: str) -> int:
    """Its matrices, and a gain for the norm of each."""
    matrices = encoder_matrices(sizes).get(medium, [])
    return sum(matrix.parameters + sizes.hidden_size for matrix, _ in matrices)
