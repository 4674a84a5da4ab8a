"""Tiny models of each kind that both sides know, and how far apart two of them are."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder
from omniloom.model.exchange import Exchanged, export_model, import_model
from omniloom.model.load import load_model, save_model
from tiny_decoders import enliven, tiny_config

SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
TEXT_ONLY: dict[str, Any] = {"image_patch_pixels": None, "video_patch_pixels": None, "audio_mels": None}
GROUPED: dict[str, Any] = {**TEXT_ONLY, "attention": "grouped", "num_attention_heads": 4, "rope_interleave": False}
GPT2 = {
    **GROUPED,
    "norm": "layer",
    "norm_eps": 1e-5,
    "position": "learned",
    "attention_bias": True,
    "mlp_bias": True,
    "activation": "gelu_tanh",
    "n_routed_experts": 0,
}
LLAMA = {**GROUPED, "norm_eps": 1e-5, "n_routed_experts": 0}
MIXTRAL = {
    **GROUPED,
    "first_k_dense_replace": 0,
    "n_shared_experts": 0,
    "scoring_func": "softmax",
    "routed_scaling_factor": 1.0,
}
DEEPSEEK = {**TEXT_ONLY, "num_hidden_layers": 3, "routed_scaling_factor": 2.5}
YARN = {"yarn_factor": 4.0, "yarn_original_tokens": 16}
# What each kind may be: heads that do not divide the width, shared keys, groups, tied heads, stretched positions.
CASES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt2 untied, gelu, narrow": {**GPT2, "activation": "gelu", "num_attention_heads": 2, "intermediate_size": 40},
    "gpt2 tied, relu": {**GPT2, "activation": "relu", "tie_word_embeddings": True},
    "llama": LLAMA,
    "llama multi-query, wide heads, tied": {
        **LLAMA,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "tie_word_embeddings": True,
    },
    "llama 8:2, biases": {
        **LLAMA,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama interleaved, biases": {**LLAMA, "rope_interleave": True, "attention_bias": True, "num_key_value_heads": 2},
    "llama YaRN": {**LLAMA, **YARN, "num_key_value_heads": 2, "head_dim": 16, "yarn_beta_fast": 4.0},
    "mixtral": {**MIXTRAL, "num_key_value_heads": 2},
    "mixtral three heads of 8 in 32, tied, YaRN": {
        **MIXTRAL,
        **YARN,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "num_experts_per_tok": 3,
    },
    "mixtral interleaved, one of two experts": {
        **MIXTRAL,
        "rope_interleave": True,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
    },
    "deepseek": DEEPSEEK,
    "deepseek q_lora, 2 of 4 groups, YaRN": {
        **DEEPSEEK,
        **YARN,
        "yarn_mscale": 1.0,
        "yarn_mscale_all_dim": 0.7,
        "q_lora_rank": 10,
        "qk_rope_head_dim": 8,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
    },
    "deepseek YaRN without mscale, no dense layer, wide values, tied": {
        **DEEPSEEK,
        **YARN,
        "first_k_dense_replace": 0,
        "v_head_dim": 16,
        "tie_word_embeddings": True,
    },
    "deepseek mscale_all_dim alone": {**DEEPSEEK, **YARN, "yarn_mscale_all_dim": 1.0},
    "deepseek pairs apart, q_lora, gates not normalised": {
        **DEEPSEEK,
        "rope_interleave": False,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 10,
        "norm_topk_prob": False,
    },
    "deepseek pairs apart, no q_lora": {**DEEPSEEK, "rope_interleave": False, "qk_rope_head_dim": 8},
    "deepseek without shared experts": {**DEEPSEEK, "n_shared_experts": 0},
    "deepseek with two modules ahead, one token chosen": {
        **DEEPSEEK,
        "num_nextn_predict_layers": 2,
        "num_experts_per_tok": 1,
    },
    "deepseek dense": {**DEEPSEEK, "n_routed_experts": 0},
}


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def case(name: str, **changes: Any) -> ModelConfig:
    return tiny_config(**CASES[name] | changes)


def saved(folder: Path, config: ModelConfig, seed: int = 0) -> Decoder:
    """A decoder with lively weights, also saved in `folder`."""
    decoder = Decoder(config).eval()
    enliven(decoder, seed)
    save_model(folder, config, decoder.state_dict())
    return decoder


def exported(folder: Path, to: Path, dtype: str | None = None, max_shard_bytes: int = 1 << 30) -> Exchanged:
    return export_model(folder, to, SPECIAL, dtype, max_shard_bytes, force=False)


def imported(source: Path, to: Path, **changes: Any) -> Exchanged:
    settings: dict[str, Any] = {"tokenizer": None, "reading_rules": b"{}", "max_shard_bytes": 1 << 30, "force": False}
    return import_model(source, to, **settings | changes)


def theirs_of(folder: Path) -> PreTrainedModel:
    """What transformers makes of a folder, as it computes by default, with the plain loop over experts."""
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()


def random_ids(config: ModelConfig, tokens: int = 29) -> Tensor:
    return torch.randint(0, config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits_apart(ours: nn.Module, theirs: PreTrainedModel, ids: Tensor, atol: float = 1e-4) -> float:
    """The largest difference of two models' logits; asserts that the logits are lively and the difference small."""
    expected, ours_now = theirs(ids).logits.float(), ours(ids).float()
    assert expected.std() >= 1
    apart = (ours_now - expected).abs().max().item()
    assert apart <= atol, apart
    return apart


def gradients(logits: Tensor, ids: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Of the mean negative log-likelihood of the next tokens, by parameter."""
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


def gradients_apart(folder: Path, config: ModelConfig, work: Path, atol: float = 1e-4) -> float:
    """The largest difference of any parameter's gradient, over that gradient's largest number, in a folder of theirs.

    Their gradients are laid out as ours by saving them as weights and loading those as ours.
    """
    ours, theirs, ids = load_model(folder), theirs_of(folder), random_ids(config)
    expected = gradients(theirs(ids).logits, ids, theirs)
    mine = gradients(ours(ids), ids, ours.decoder)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(expected[name])
    theirs.save_pretrained(work)
    laid_out = dict(load_model(work).decoder.named_parameters())
    # What moves nothing, a key's bias without RoPE or the router of one gate, has a gradient of rounding errors.
    nothing = 1e-6 * max(gradient.abs().max().item() for gradient in laid_out.values())
    worst = 0.0
    for name, gradient in mine.items():
        if name.startswith("mtp."):
            continue
        largest = laid_out[name].abs().max().item()
        apart = (gradient - laid_out[name]).abs().max().item()
        worst = max(worst, apart / largest if largest > nothing else apart)
        assert worst <= atol, (name, worst)
    return worst
