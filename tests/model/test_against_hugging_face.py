"""Whole models against the classes that transformers builds from their exports, and the other way round."""

import pytest
import torch
from exchanged import CASES, case, exported, gradients_apart, imported, logits_apart, random_ids, saved, theirs_of
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
)

from omniloom.model.hf_config import to_hugging_face
from omniloom.model.load import load_model
from tiny_decoders import enliven


@pytest.mark.parametrize("name", CASES)
def test_logits_of_an_export_equal_hugging_faces(tmp_path, name):
    config = case(name)
    saved(tmp_path / "ours", config)
    exported(tmp_path / "ours", tmp_path / "theirs")
    theirs = theirs_of(tmp_path / "theirs")
    logits_apart(load_model(tmp_path / "ours"), theirs, random_ids(config))
    logits_apart(load_model(tmp_path / "theirs"), theirs, random_ids(config))


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_an_export_equal_hugging_faces(tmp_path, name):
    config = case(name)
    saved(tmp_path / "ours", config)
    exported(tmp_path / "ours", tmp_path / "theirs")
    gradients_apart(tmp_path / "theirs", config, tmp_path / "gradients")


SIZES = {"vocab_size": 61, "num_hidden_layers": 2, "max_position_embeddings": 64}
WIDE = {**SIZES, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
LATENT = {
    **WIDE,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}
THEIRS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=61),
    "gpt2 untied": GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=61, tie_word_embeddings=False),
    "llama": LlamaConfig(**WIDE, head_dim=12),
    "llama YaRN, tied": LlamaConfig(**WIDE, rope_parameters=YARN, tie_word_embeddings=True, attention_bias=True),
    "mixtral": MixtralConfig(**WIDE, num_local_experts=4),
    "mixtral by its own defaults": MixtralConfig(
        **WIDE | {"num_attention_heads": 3, "num_key_value_heads": 1}, head_dim=8
    ),
    "deepseek": DeepseekV3Config(**LATENT, q_lora_rank=None, n_group=1, topk_group=1, num_nextn_predict_layers=0),
    "deepseek without shared experts, whose tensors it writes empty": DeepseekV3Config(
        **LATENT, q_lora_rank=None, n_group=1, topk_group=1, n_shared_experts=0, num_nextn_predict_layers=0
    ),
    "deepseek q_lora, groups, YaRN": DeepseekV3Config(
        **LATENT,
        q_lora_rank=10,
        n_group=4,
        topk_group=2,
        n_shared_experts=2,
        num_nextn_predict_layers=0,
        rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_logits_of_what_save_pretrained_writes_equal_hugging_faces(tmp_path, name):
    theirs = AutoModelForCausalLM.from_config(THEIRS[name], experts_implementation="eager").eval()
    enliven_theirs(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    logits_apart(ours, theirs, random_ids(ours.config))
    imported(tmp_path / "theirs", tmp_path / "ours")
    logits_apart(load_model(tmp_path / "ours"), theirs, random_ids(ours.config))


@torch.no_grad()
def enliven_theirs(model: torch.nn.Module) -> None:
    """As `enliven`, for their names and layouts."""
    enliven(model)
    generator = torch.Generator().manual_seed(5)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith((".wte.weight", ".wpe.weight")):
            tensor.normal_(generator=generator)
        elif ".c_" in name and tensor.dim() == 2:
            tensor.normal_(0, 1.5 * tensor.shape[0] ** -0.5, generator=generator)
        elif tensor.dim() == 3:
            tensor.normal_(0, 1.5 * tensor.shape[2] ** -0.5, generator=generator)
        elif name.endswith("e_score_correction_bias"):
            tensor.normal_(0, 0.3, generator=generator)


@pytest.mark.parametrize("name", [name for name in CASES if "interleaved" not in name and "apart" not in name])
def test_ours_to_theirs_and_back_is_exact(tmp_path, name):
    config = case(name)
    saved(tmp_path / "ours", config)
    exported(tmp_path / "ours", tmp_path / "theirs")
    imported(tmp_path / "theirs", tmp_path / "back")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert to_hugging_face(load_model(tmp_path / "back").config) == to_hugging_face(config)


def test_the_choosing_bias_chooses(tmp_path):
    """Without it the logits above would be others."""
    config = case("deepseek")
    decoder = saved(tmp_path / "ours", config)
    ids = random_ids(config)
    model = load_model(tmp_path / "ours")
    expected = model(ids)
    for layer in decoder.layers[1:]:
        layer.mlp.router.bias_E.zero_()
    model.decoder.load_state_dict(decoder.state_dict())
    assert (model(ids) - expected).abs().max() > 0.1
