"""The models whose memory is predicted and measured: each adds at least 1 GB to a rank."""

from typing import Any

from omniloom.model.config import ModelConfig
from omniloom.train.config import TrainingRun
from omniloom.train.groups import OptimizerConfig, ParallelConfig, TrainConfig

TEXT: dict[str, Any] = {"image_patch_pixels": None, "video_patch_pixels": None, "audio_mels": None}
SHAPES = {
    # Half of it activations.
    "llama": ModelConfig(
        vocab_size=8_192,
        hidden_size=768,
        num_hidden_layers=8,
        attention="grouped",
        num_attention_heads=12,
        num_key_value_heads=4,
        intermediate_size=2_048,
        n_routed_experts=0,
        **TEXT,
    ),
    # Most of it weights, gradients and moments; experts in tensors of 32 MiB; a prediction module.
    "experts": ModelConfig(
        vocab_size=8_192,
        hidden_size=512,
        num_hidden_layers=6,
        n_routed_experts=16,
        num_nextn_predict_layers=1,
        **TEXT,
    ),
    # A wide vocabulary, LayerNorm, biases, learned positions.
    "gpt": ModelConfig(
        vocab_size=16_384,
        hidden_size=512,
        num_hidden_layers=12,
        position="learned",
        norm="layer",
        attention="grouped",
        attention_bias=True,
        mlp_bias=True,
        activation="gelu_tanh",
        intermediate_size=2_048,
        n_routed_experts=0,
        max_position_embeddings=2_048,
        **TEXT,
    ),
    # The rest: no constant was fitted to them. Many thin layers, an untied head.
    "tall": ModelConfig(
        vocab_size=32_000,
        hidden_size=384,
        num_hidden_layers=16,
        attention="grouped",
        num_attention_heads=6,
        intermediate_size=1_536,
        n_routed_experts=0,
        tie_word_embeddings=False,
        **TEXT,
    ),
    # Softmax routing, no shared experts, every layer sparse.
    "mixtral": ModelConfig(
        vocab_size=8_192,
        hidden_size=512,
        num_hidden_layers=6,
        attention="grouped",
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=1_024,
        n_routed_experts=8,
        n_shared_experts=0,
        first_k_dense_replace=0,
        moe_intermediate_size=1_024,
        scoring_func="softmax",
        **TEXT,
    ),
}
FITTED = ("llama", "experts", "gpt")
MICRO_BATCH = 4
SEQ_LEN = {"llama": 256, "experts": 192, "gpt": 256, "tall": 384, "mixtral": 256}


def run_of(case: dict[str, Any], ranks: int) -> TrainingRun:
    """A run on `ranks` ranks, of one micro batch a step unless the case says otherwise."""
    run = TrainingRun(
        model=SHAPES[case["shape"]],
        train=TrainConfig(
            steps=10,
            global_batch_size=MICRO_BATCH * ranks // case.get("sequence", 1) * case.get("accumulation", 1),
            micro_batch_size=MICRO_BATCH,
            precision=case.get("precision", "fp32"),
            activation_checkpointing=case.get("checkpointing", False),
        ),
        parallel=ParallelConfig(
            zero_stage=case["zero_stage"], expert=case.get("expert", 1), sequence=case.get("sequence", 1)
        ),
    )
    if case.get("optimizer") == "sgd":
        run.optimizer = OptimizerConfig(kind="sgd", weight_decay=0.0, l2=0.1)
    run.parallel.bucket_numbers = case.get("bucket", run.parallel.bucket_numbers)
    run.data.seq_len = SEQ_LEN[case["shape"]]
    return run
