"""Sizes of the decoder and the rules they obey; names as Hugging Face writes them. Imports nothing heavy."""

from dataclasses import dataclass

from omniloom.errors import ConfigError

GROUPED_MULTIPLE = 8
MAY_BE_ZERO = ("first_k_dense_replace", "num_nextn_predict_layers")


@dataclass
class ModelConfig:
    """A DeepSeek-V3-shaped decoder: latent attention, shared and routed experts, media in the same sequence."""

    vocab_size: int = 32_768
    hidden_size: int = 512
    num_hidden_layers: int = 8
    max_position_embeddings: int = 4_096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    dropout: float = 0.0

    # latent attention
    num_attention_heads: int = 8
    q_lora_rank: int | None = None
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    rope_theta: float = 10_000.0

    # feed-forward: the first layers dense, the others mixtures of experts
    first_k_dense_replace: int = 1
    intermediate_size: int = 1_536
    n_routed_experts: int = 8
    n_shared_experts: int = 1
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 512
    routed_scaling_factor: float = 1.0

    # multi-token prediction: modules after the last layer, each one token further ahead
    num_nextn_predict_layers: int = 0

    # media, as the corpus has them; None: no encoder for that medium
    image_patch_pixels: int | None = 14
    video_patch_pixels: int | None = 14
    audio_mels: int | None = 80
    audio_frames_per_token: int = 4

    # for recall in small models
    embedding_conv_tokens: int | None = None  # width of a causal convolution over the embeddings
    attention_log_scale_tokens: int | None = None  # queries × ln(position) / ln of this

    @property
    def widths(self) -> tuple[int, int, int]:
        """Numbers in one row of the image, audio and video fields; 1 where there is no encoder."""
        image, video = self.image_patch_pixels, self.video_patch_pixels
        return (image**2 * 3 if image else 1, self.audio_mels or 1, video**2 * 3 if video else 1)

    def check(self) -> None:
        """Raise ConfigError naming the keys, the rule and both numbers, before anything is allocated."""
        sizes = {
            name: value
            for name, value in vars(self).items()
            if isinstance(value, int) and not isinstance(value, bool) and name not in MAY_BE_ZERO
        }
        for name, value in sizes.items():
            if value < 1:
                raise ConfigError(f"a size must be at least 1: model.{name}={value}")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ConfigError(
                f"a token cannot choose more experts than exist: model.num_experts_per_tok={self.num_experts_per_tok} "
                f"is over model.n_routed_experts={self.n_routed_experts}"
            )
        for name in ("hidden_size", "moe_intermediate_size"):
            if getattr(self, name) % GROUPED_MULTIPLE:
                raise ConfigError(
                    f"grouped matrix products read 16 bytes at a time, {GROUPED_MULTIPLE} numbers of bf16: "
                    f"model.{name}={getattr(self, name)} must be a multiple of {GROUPED_MULTIPLE}"
                )
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"RoPE turns pairs: model.qk_rope_head_dim={self.qk_rope_head_dim} must be even")
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            raise ConfigError(
                f"model.first_k_dense_replace={self.first_k_dense_replace} must lie between 0 and "
                f"model.num_hidden_layers={self.num_hidden_layers}"
            )
        if self.num_nextn_predict_layers < 0:
            raise ConfigError(f"model.num_nextn_predict_layers={self.num_nextn_predict_layers} must not be negative")
        per_token = self.audio_frames_per_token
        if per_token < 2 or per_token & (per_token - 1):
            raise ConfigError(f"each convolution halves: model.audio_frames_per_token={per_token} must be 2, 4, 8, …")
        if self.attention_log_scale_tokens == 1:
            raise ConfigError("ln 1 is 0: model.attention_log_scale_tokens=1 must be at least 2")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"model.dropout={self.dropout} must lie in [0, 1)")
