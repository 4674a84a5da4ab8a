"""The whole decoder against transformers' DeepseekV3ForCausalLM with the same weights."""

import pytest
import torch
from tiny_decoders import all_logits, tiny_decoder
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from omniloom.model.decoder import Decoder, text_fields

SAME_NAMES = {
    "self_attn.q_proj.weight": "self_attn.q_proj.weight",
    "self_attn.q_proj.0.weight": "self_attn.q_a_proj.weight",
    "self_attn.q_proj.1.weight": "self_attn.q_a_layernorm.weight",
    "self_attn.q_proj.2.weight": "self_attn.q_b_proj.weight",
    "mlp.router.weight_ED": "mlp.gate.weight",
    "mlp.router.bias_E": "mlp.gate.e_score_correction_bias",
}


def hugging_face_weights(decoder: Decoder) -> dict[str, Tensor]:
    """Our weights under their names; their experts are stored (E, out, in), ours (E, in, out)."""
    theirs = {}
    for name, tensor in decoder.state_dict().items():
        if name.startswith(("media.image.", "media.audio.", "media.video.")):
            continue
        if name == "lm_head.weight":
            theirs[name] = tensor
        elif name == "embed_tokens.weight":
            theirs["model.embed_tokens.weight"] = tensor
        elif name.endswith("experts.gate_up_EDF"):
            theirs[f"model.{name.removesuffix('gate_up_EDF')}gate_up_proj"] = tensor.transpose(1, 2)
        elif name.endswith("experts.down_EFD"):
            theirs[f"model.{name.removesuffix('down_EFD')}down_proj"] = tensor.transpose(1, 2)
        else:
            ours = next((ours for ours in SAME_NAMES if name.endswith(ours)), None)
            theirs[f"model.{name if ours is None else name.removesuffix(ours) + SAME_NAMES[ours]}"] = tensor
    return theirs


def hugging_face_model(decoder: Decoder) -> DeepseekV3ForCausalLM:
    config = decoder.config
    names = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "n_shared_experts",
        "n_routed_experts",
        "routed_scaling_factor",
        "kv_lora_rank",
        "q_lora_rank",
        "qk_rope_head_dim",
        "v_head_dim",
        "qk_nope_head_dim",
        "num_experts_per_tok",
        "first_k_dense_replace",
        "max_position_embeddings",
        "rms_norm_eps",
    ]
    theirs = DeepseekV3Config(
        **{name: getattr(config, name) for name in names},
        num_key_value_heads=config.num_attention_heads,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        rope_interleave=True,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=False,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = DeepseekV3ForCausalLM(theirs)
    model.load_state_dict(hugging_face_weights(decoder), strict=True)
    return model.eval()


@pytest.mark.parametrize("v_head_dim", [4, 16])
@pytest.mark.parametrize("q_lora_rank", [None, 10])
@torch.no_grad()
def test_logits_equal_hugging_faces(q_lora_rank, v_head_dim):
    decoder = tiny_decoder(num_hidden_layers=3, q_lora_rank=q_lora_rank, v_head_dim=v_head_dim)
    ids = torch.randint(0, decoder.config.vocab_size, (2, 13), generator=torch.Generator().manual_seed(3))
    logits = all_logits(decoder, text_fields(ids, decoder.config))
    expected = hugging_face_model(decoder)(ids).logits
    assert expected.std() >= 1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)

    for layer in decoder.layers[1:]:
        layer.mlp.router.bias_E.zero_()
    without_bias = all_logits(decoder, text_fields(ids, decoder.config))
    assert (without_bias - expected).abs().max() > 0.1  # the bias did choose
