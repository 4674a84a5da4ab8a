"""Sizes of the decoder and the rules they obey; names as Hugging Face writes them. Imports nothing heavy."""

import math
from dataclasses import dataclass

from omniloom.errors import ConfigError, refuse_unless_one_of

GROUPED_MULTIPLE = 8
MAY_BE_ZERO = ("first_k_dense_replace", "num_nextn_predict_layers", "n_routed_experts", "n_shared_experts")
CHOICES = {
    "norm": ("rms", "layer"),
    "norm_position": ("pre", "post"),
    "initializer": ("residual", "normal", "he"),
    "position": ("rope", "learned", "sinusoidal"),
    "attention": ("latent", "grouped"),
    "attention_pattern": ("full", "sparse", "linear"),
    "activation": ("swiglu", "gelu", "gelu_tanh", "relu"),
    "scoring_func": ("sigmoid", "softmax"),
}


@dataclass
class ModelConfig:
    """A decoder over the unified sequence: dense or sparse, its attention latent or grouped, its media encoders."""

    vocab_size: int = 32_768
    hidden_size: int = 512
    num_hidden_layers: int = 8
    max_position_embeddings: int = 4_096
    tie_word_embeddings: bool = True
    dropout: float = 0.0
    norm: str = "rms"  # or layer
    norm_eps: float = 1e-6
    norm_position: str = "pre"  # or post: after the residual sum, and none after the last layer
    initializer: str = "residual"  # normal(0, initializer_range), less into the residual stream; or normal, or he
    initializer_range: float = 0.02

    # positions of tokens in their document
    position: str = "rope"  # or learned, or sinusoidal: added to the embeddings
    rope_theta: float = 10_000.0
    rope_interleave: bool = True  # pairs (0, 1), (2, 3), …; otherwise (0, n/2), (1, n/2 + 1), …
    partial_rotary_factor: float = 1.0  # of each head's width, grouped attention only
    yarn_factor: float | None = None  # how many times longer than yarn_original_tokens the context became
    yarn_original_tokens: int | None = None
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float | None = None
    yarn_mscale_all_dim: float | None = None  # latent attention only

    # attention
    attention: str = "latent"  # or grouped: num_key_value_heads = num_attention_heads is multi-head, 1 multi-query
    attention_pattern: str = "full"  # or sparse, or linear
    num_attention_heads: int = 8
    attention_log_scale_tokens: int | None = None  # queries × ln(position) / ln of this
    media_bidirectional: bool = False  # tokens of one picture or frame see each other both ways
    # latent
    q_lora_rank: int | None = None
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    # grouped
    num_key_value_heads: int | None = None  # as many as heads
    head_dim: int | None = None  # hidden_size / num_attention_heads
    attention_bias: bool = False
    # sparse pattern
    window_tokens: int = 512
    global_stride: int = 64
    max_global_tokens: int = 1_024

    # feed-forward: the first layers dense, the others mixtures of experts; 0 routed experts: all dense
    activation: str = "swiglu"  # or gelu, gelu_tanh, relu: two matrices instead of three
    mlp_bias: bool = False
    first_k_dense_replace: int = 1
    intermediate_size: int = 1_536
    n_routed_experts: int = 8
    n_shared_experts: int = 1
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 512
    scoring_func: str = "sigmoid"  # with a bias for the choice alone; or softmax
    norm_topk_prob: bool = True
    n_group: int = 1  # a token chooses among the experts of its topk_group best groups
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    router_bias: bool = False  # a trained one, in the logits

    # multi-token prediction: modules after the last layer, each one token further ahead
    num_nextn_predict_layers: int = 0

    # media, as the corpus has them; None: no encoder for that medium
    image_patch_pixels: int | None = 14
    video_patch_pixels: int | None = 14
    audio_mels: int | None = 80
    audio_frames_per_token: int = 4

    # for recall in small models
    embedding_conv_tokens: int | None = None  # width of a causal convolution over the embeddings

    @property
    def widths(self) -> tuple[int, int, int]:
        """Numbers in one row of the image, audio and video fields; 1 where there is no encoder."""
        image, video = self.image_patch_pixels, self.video_patch_pixels
        return (image**2 * 3 if image else 1, self.audio_mels or 1, video**2 * 3 if video else 1)

    @property
    def head_width(self) -> int:
        """Width of one head's query and key in grouped attention."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values in grouped attention."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def rotary_width(self) -> int:
        """How much of a head RoPE turns."""
        if self.attention == "latent":
            return self.qk_rope_head_dim
        return int(self.head_width * self.partial_rotary_factor)

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer's feed-forward is a mixture of experts."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace

    def check(self) -> None:
        """Raise ConfigError naming the keys, the rule and both numbers, before anything is allocated."""
        for name, choices in CHOICES.items():
            refuse_unless_one_of(f"model.{name}", getattr(self, name), choices)
        for name, value in vars(self).items():
            least = 0 if name in MAY_BE_ZERO else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise ConfigError(f"a size must be at least {least}: model.{name}={value}")
            if isinstance(value, float) and name != "dropout" and not 0.0 < value < math.inf:
                raise ConfigError(f"model.{name}={value} must be a number above 0")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"model.dropout={self.dropout} must lie in [0, 1)")
        self._check_positions()
        self._check_attention()
        self._check_experts()
        per_token = self.audio_frames_per_token
        if per_token < 2 or per_token & (per_token - 1):
            raise ConfigError(f"each convolution halves: model.audio_frames_per_token={per_token} must be 2, 4, 8, …")

    def _check_positions(self) -> None:
        if not 0.0 < self.partial_rotary_factor <= 1.0:
            raise ConfigError(f"model.partial_rotary_factor={self.partial_rotary_factor} must lie in (0, 1]")
        if self.position == "rope" and (self.rotary_width % 2 or not self.rotary_width):
            where = (
                f"model.qk_rope_head_dim={self.qk_rope_head_dim}"
                if self.attention == "latent"
                else f"model.head_dim={self.head_width} × model.partial_rotary_factor={self.partial_rotary_factor}"
            )
            raise ConfigError(f"RoPE turns pairs: {where} must be even")
        if self.position != "rope" and self.yarn_factor is not None:
            raise ConfigError(
                f"YaRN stretches RoPE: model.yarn_factor={self.yarn_factor} needs model.position=rope, "
                f"it is {self.position}"
            )
        if (self.yarn_factor is None) != (self.yarn_original_tokens is None):
            raise ConfigError(
                f"YaRN stretches a context: model.yarn_factor={self.yarn_factor} and model.yarn_original_tokens="
                f"{self.yarn_original_tokens} go together"
            )
        if self.yarn_factor is not None and self.yarn_original_tokens is not None:
            if self.yarn_factor < 1.0:
                raise ConfigError(f"model.yarn_factor={self.yarn_factor} must be at least 1")
            if self.rope_theta <= 1.0:
                raise ConfigError(
                    f"YaRN needs slower and slower pairs: model.rope_theta={self.rope_theta} must be over 1"
                )
            if self.yarn_beta_fast <= self.yarn_beta_slow:
                raise ConfigError(
                    f"model.yarn_beta_fast={self.yarn_beta_fast} must be over "
                    f"model.yarn_beta_slow={self.yarn_beta_slow}"
                )
            stretched = self.yarn_factor * self.yarn_original_tokens
            if self.max_position_embeddings > stretched:
                raise ConfigError(
                    f"the context is longer than YaRN makes it: model.max_position_embeddings="
                    f"{self.max_position_embeddings} is over model.yarn_factor={self.yarn_factor} × "
                    f"model.yarn_original_tokens={self.yarn_original_tokens} = {stretched:g}"
                )
        if self.yarn_mscale_all_dim is not None and self.attention != "latent":
            raise ConfigError(
                f"model.yarn_mscale_all_dim={self.yarn_mscale_all_dim} scales the scores of latent attention; "
                f"model.attention={self.attention}"
            )
        if self.attention_log_scale_tokens == 1:
            raise ConfigError("ln 1 is 0: model.attention_log_scale_tokens=1 must be at least 2")

    def _check_attention(self) -> None:
        if self.attention == "latent":
            if self.attention_bias:
                raise ConfigError("latent attention has no biases: set model.attention_bias=false")
            for name, default in (("head_dim", None), ("num_key_value_heads", None), ("partial_rotary_factor", 1.0)):
                if getattr(self, name) != default:
                    raise ConfigError(
                        f"model.{name}={getattr(self, name)} is grouped attention's; latent attention has widths of "
                        "its own: unset it, or set model.attention=grouped"
                    )
            if self.position != "rope":
                raise ConfigError(
                    f"latent attention has a rotary key of its own: model.position={self.position} must be rope"
                )
        else:
            if self.head_dim is None and self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"heads share the width: model.hidden_size={self.hidden_size} is no multiple of "
                    f"model.num_attention_heads={self.num_attention_heads}; change one, or set model.head_dim"
                )
            if self.num_attention_heads % self.key_value_heads:
                raise ConfigError(
                    f"each key serves as many heads: model.num_attention_heads={self.num_attention_heads} is no "
                    f"multiple of model.num_key_value_heads={self.key_value_heads}"
                )
        if self.attention_pattern == "linear" and self.media_bidirectional:
            raise ConfigError("linear attention runs one way: set model.media_bidirectional=false")

    def _check_experts(self) -> None:
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            raise ConfigError(
                f"model.first_k_dense_replace={self.first_k_dense_replace} must lie between 0 and "
                f"model.num_hidden_layers={self.num_hidden_layers}"
            )
        if not self.n_routed_experts:
            return
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ConfigError(
                f"a token cannot choose more experts than exist: model.num_experts_per_tok={self.num_experts_per_tok} "
                f"is over model.n_routed_experts={self.n_routed_experts}"
            )
        if self.n_routed_experts % self.n_group:
            raise ConfigError(
                f"groups are of one size: model.n_routed_experts={self.n_routed_experts} is no multiple of "
                f"model.n_group={self.n_group}"
            )
        per_group = self.n_routed_experts // self.n_group
        if self.n_group > 1 and per_group < 2:
            raise ConfigError(
                f"a group's score is the sum of its two best: model.n_routed_experts={self.n_routed_experts} / "
                f"model.n_group={self.n_group} leaves {per_group}"
            )
        if self.topk_group > self.n_group or self.topk_group * per_group < self.num_experts_per_tok:
            raise ConfigError(
                f"model.topk_group={self.topk_group} of model.n_group={self.n_group} groups hold "
                f"{self.topk_group * per_group} experts, model.num_experts_per_tok={self.num_experts_per_tok} are "
                "chosen: no more groups than there are, and as many experts as are chosen"
            )
        if self.activation != "swiglu" or self.mlp_bias:
            raise ConfigError(
                f"experts are SwiGLU networks without biases: model.activation={self.activation} and model.mlp_bias="
                f"{self.mlp_bias} are for dense models, model.n_routed_experts=0"
            )
        for name in ("hidden_size", "moe_intermediate_size"):
            if getattr(self, name) % GROUPED_MULTIPLE:
                raise ConfigError(
                    f"grouped matrix products read 16 bytes at a time, {GROUPED_MULTIPLE} numbers of bf16: "
                    f"model.{name}={getattr(self, name)} must be a multiple of {GROUPED_MULTIPLE}"
                )
