"""Sizes of the decoder and the rules they obey; names as Hugging Face writes them. Imports nothing heavy."""

from dataclasses import dataclass

from omniloom.errors import ConfigError

GROUPED_MULTIPLE = 8


@dataclass
class ModelConfig:
    """A DeepSeek-V3-shaped decoder: latent attention, shared and routed experts, pictures in the same sequence."""

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

    # pictures: side of one patch; must be the corpus's own
    image_patch_pixels: int = 14

    @property
    def image_patch_values(self) -> int:
        """Numbers in one patch."""
        return self.image_patch_pixels**2 * 3

    def check(self) -> None:
        """Raise ConfigError naming the keys, the rule and both numbers, before anything is allocated."""
        sizes = {
            name: value
            for name, value in vars(self).items()
            if isinstance(value, int) and not isinstance(value, bool) and name != "first_k_dense_replace"
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
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"model.dropout={self.dropout} must lie in [0, 1)")
