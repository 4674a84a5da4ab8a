"""The arithmetic of the plan against published sizes and against the decoder itself."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from conftest import REPOSITORY
from omniloom.cli import run_verb
from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder
from omniloom.plan.params import count_parameters, short

PRESETS = {path.stem: path for path in sorted((REPOSITORY / "conf" / "model").glob("*.yaml"))}
PUBLISHED = {
    "gpt2_small": 124_439_808,
    "gpt3_175b": 174_604_259_328,
    "llama_7b": 6_738_415_616,
    "llama_8b": 8_030_261_248,
    "mixtral_8x7b": 46_702_792_704,
    "deepseek_v3": 671_026_419_200,
}
PARTS = {  # how the names of a part begin, the first that fits; {} is a layer
    "mtp.": "mtp",
    "embed_tokens.": "embedding",
    "embed_positions.": "positions",
    "embed_convolution.": "convolution",
    "media.image.": "image_encoder",
    "media.audio.": "audio_encoder",
    "media.video.": "video_encoder",
    "layers.{}.input_layernorm.": "norms",
    "layers.{}.post_attention_layernorm.": "norms",
    "layers.{}.self_attn.": "attention",
    "layers.{}.mlp.router.": "router",
    "layers.{}.mlp.experts.": "routed_experts",
    "layers.{}.mlp.shared_experts.": "shared_experts",
    "layers.{}.mlp.": "dense_feed_forward",
    "norm.": "norms",
    "lm_head.": "head",
}


def preset(name: str) -> ModelConfig:
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(PRESETS[name])))
    assert isinstance(config, ModelConfig)
    config.check()
    return config


def measured(config: ModelConfig) -> dict[str, int]:
    """Parameters, and the routers' biases, of the decoder on the meta device, by part."""
    with torch.device("meta"):
        decoder = Decoder(config)
    tensors = dict(decoder.named_parameters())  # a tied head is no tensor of its own
    tensors |= {name: held for name, held in decoder.named_buffers() if name.endswith("router.bias_E")}
    found: Counter[str] = Counter()
    for name, tensor in tensors.items():
        words = name.split(".")
        layerless = ".".join([words[0], "{}", *words[2:]]) if words[0] == "layers" else name
        found[next(part for start, part in PARTS.items() if layerless.startswith(start))] += tensor.numel()
    return dict(found)


def counted(config: ModelConfig) -> dict[str, int]:
    return {part: count for part, count in count_parameters(config).by_part.items() if count}


@pytest.mark.parametrize(("name", "total"), PUBLISHED.items())
def test_a_published_model_has_its_published_size(name: str, total: int) -> None:
    config = preset(name)
    assert count_parameters(config).params_total == total
    parts = measured(config)
    assert sum(parts.values()) - parts.get("mtp", 0) == total


@pytest.mark.parametrize("name", PRESETS)
def test_the_arithmetic_is_the_decoders_part_by_part(name: str) -> None:
    config = preset(name)
    assert counted(config) == measured(config)


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_first_line_tells_its_counts(name: str) -> None:
    count = count_parameters(preset(name))
    ahead = f", {short(count.params_mtp)} more in MTP" if count.params_mtp else ""
    told = f": {count.params_total:,} parameters, {short(count.params_active)} active{ahead}."
    assert PRESETS[name].read_text().splitlines()[0].endswith(told)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    def size(most: int, step: int = 1) -> int:
        return draw(st.integers(1, most)) * step

    layers, heads, is_latent = size(3), draw(st.sampled_from([1, 2, 4])), draw(st.booleans())
    changes: dict[str, Any] = {
        "vocab_size": size(40),
        "hidden_size": 4 * heads * size(3, 2),
        "num_hidden_layers": layers,
        "max_position_embeddings": size(50),
        "tie_word_embeddings": draw(st.booleans()),
        "norm": draw(st.sampled_from(["rms", "layer"])),
        "norm_position": draw(st.sampled_from(["pre", "post"])),
        "num_attention_heads": heads,
        "first_k_dense_replace": draw(st.integers(0, layers)),
        "intermediate_size": size(20),
        "num_nextn_predict_layers": draw(st.integers(0, 2)),
        "image_patch_pixels": draw(st.sampled_from([None, 2, 3])),
        "video_patch_pixels": draw(st.sampled_from([None, 2, 3])),
        "audio_mels": draw(st.sampled_from([None, 4, 7])),
        "audio_frames_per_token": draw(st.sampled_from([2, 4, 8])),
        "embedding_conv_tokens": draw(st.sampled_from([None, 1, 5])),
    }
    if is_latent:
        changes |= {"q_lora_rank": draw(st.sampled_from([None, 3, 8])), "kv_lora_rank": size(9)}
        changes |= {"qk_nope_head_dim": size(9), "qk_rope_head_dim": size(4, 2), "v_head_dim": size(9)}
    else:
        changes |= {"attention": "grouped", "attention_bias": draw(st.booleans())}
        changes |= {"num_key_value_heads": draw(st.sampled_from([None, 1, heads]))}
        changes |= {"head_dim": draw(st.sampled_from([None, 2, 6]))}
        changes |= {"position": draw(st.sampled_from(["rope", "learned", "sinusoidal"]))}
    if draw(st.booleans()):
        groups, per_group = draw(st.sampled_from([1, 2, 3])), draw(st.integers(2, 4))
        changes |= {"n_group": groups, "topk_group": groups, "n_routed_experts": groups * per_group}
        changes |= {"num_experts_per_tok": size(per_group), "n_shared_experts": draw(st.integers(0, 2))}
        changes |= {"moe_intermediate_size": size(3, 8), "scoring_func": draw(st.sampled_from(["sigmoid", "softmax"]))}
        changes |= {"router_bias": draw(st.booleans()), "hidden_size": 8 * heads * size(2)}
    else:
        changes |= {"n_routed_experts": 0, "mlp_bias": draw(st.booleans())}
        changes |= {"activation": draw(st.sampled_from(["swiglu", "gelu", "gelu_tanh", "relu"]))}
    return ModelConfig(**changes)


@settings(max_examples=100, deadline=None)
@given(configs())
def test_the_arithmetic_is_the_decoders_for_any_sizes(config: ModelConfig) -> None:
    assert counted(config) == measured(config)


def test_a_text_token_meets_what_a_count_by_hand_says() -> None:
    """Two layers of width 16, the second of 6 experts with 2 chosen; nothing but literals on the right."""
    config = ModelConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        tie_word_embeddings=True,
        attention="grouped",
        num_attention_heads=4,
        num_key_value_heads=2,
        first_k_dense_replace=1,
        intermediate_size=24,
        n_routed_experts=6,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        num_nextn_predict_layers=1,
    )
    attention = 16 * 16 + 16 * 8 + 16 * 8 + 16 * 16  # queries of 4 heads of 4, keys and values of 2, out
    dense, expert = 3 * 16 * 24, 3 * 16 * 8
    router = 6 * 16 + 6
    head, norms = 50 * 16, 5 * 16
    count = count_parameters(config)
    assert count.params_active == 2 * attention + dense + (2 + 1) * expert + router + norms + head == 4_822
    encoders = 16 * 588 + 16 + 16 * 588 + 16 + 16 * 240 + 16 + 16 * 48 + 16
    assert count.params_total == 2 * attention + dense + (6 + 1) * expert + router + norms + head + encoders == 29_846
    assert count.params_mtp == 2 * 16 * 16 + 5 * 16 + attention + router + 7 * expert == 4_150


@pytest.mark.parametrize(
    ("name", "active"), [("deepseek_v3", "36.6B"), ("mixtral_8x7b", "12.7B"), ("gpt3_175b", "174.6B")]
)
def test_a_published_model_activates_what_is_published(name: str, active: str) -> None:
    """DeepSeek-V3's figure leaves the embedding out, Mixtral's 12.9B holds its 131M."""
    assert short(count_parameters(preset(name)).params_active) == active


def test_gpt3_takes_the_published_compute() -> None:
    """3.14e23 FLOPs for 300B tokens by 6·N·D."""
    assert 6 * count_parameters(preset("gpt3_175b")).params_active * 300e9 == pytest.approx(3.14e23, rel=0.01)


def test_plan_prints_one_json_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    run_verb("plan", ["model=deepseek_v3", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert (answer["params_total"], answer["params_active"]) == (671_026_419_200, 36_625_618_432)
    assert answer["params_mtp"] == answer["params_by_part"]["mtp"] == 11_610_068_224
    assert sum(answer["params_by_part"].values()) == answer["params_total"] + answer["params_mtp"]


def test_plan_takes_the_keys_of_train_and_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    run_verb(
        "plan",
        [
            "experiment=smoke",
            "model.num_hidden_layers=1",
            "data.seq_len=32",
            "parallel.zero_stage=0",
            "optimizer.kind=muon",
        ],
    )
    table = capsys.readouterr().out
    smoke = preset("smoke")
    smoke.num_hidden_layers = 1
    count = count_parameters(smoke)
    for name, value in {
        "dense feed forward": 6_144,
        "total": count.params_total,
        "active, a": count.params_active,
    }.items():
        (line,) = (line for line in table.splitlines() if line.startswith(name))
        assert f" {value:,} " in line
        assert line.endswith(short(value))
    assert "routed experts" not in table
    assert "{" not in table


def test_plan_counts_the_tokens_of_the_run_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    run_verb("plan", ["model=gpt2_small", "--json"])
    without = json.loads(capsys.readouterr().out)
    assert (without["document_tokens"], without["train_tokens"], without["train_flops"]) == (1_024, None, None)
    batch = ["train.global_batch_size=4", "train.micro_batch_size=4"]
    run_verb("plan", ["model=gpt2_small", "--json", "train.steps=10", *batch, "data.seq_len=512"])
    answer = json.loads(capsys.readouterr().out)
    assert (answer["document_tokens"], answer["train_tokens"]) == (512, 10 * 4 * 512)
    assert answer["train_flops_6nd"] == 6 * answer["params_active"] * 20_480
    assert answer["train_flops"] == 3 * answer["forward_flops_per_token"] * 20_480
    assert answer["kv_cache_bytes_per_token"] == 2 * 768 * 12 * 2
    run_verb("plan", ["model=gpt2_small", "train.steps=10"])
    table = capsys.readouterr().out
    assert "in documents of 1,024 tokens" in table
    assert "FLOP over 327,680 tokens; 6·N·D " in table
    with pytest.raises(SystemExit):
        run_verb("plan", ["model=gpt2_small", "train.steps=-3"])
    assert "train.steps=-3 must be at least 1" in capsys.readouterr().err


def test_plan_loads_no_torch(tmp_path: Path) -> None:
    """It answers in half a second that way, of a model of any size."""
    code = "import sys; from omniloom.cli import run_verb; run_verb('plan', ['model=gpt3_175b', '--json']); "
    code += "assert not {'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert json.loads(answer.stdout)["params_total"] == PUBLISHED["gpt3_175b"]
    assert list(tmp_path.iterdir()) == []


def test_plan_names_the_nearest_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_verb("plan", ["model=deepseek_v33", "--json"])
    assert ended.value.code == 1
    answer = capsys.readouterr()
    assert (answer.out, answer.err) == ("", "error: unknown model=deepseek_v33; did you mean 'deepseek_v3'?\n")


def test_plan_refuses_a_model_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_verb("plan", ["model=deepseek_v3", "model.num_experts_per_tok=257"])
    assert ended.value.code == 1
    assert "model.num_experts_per_tok=257 is over model.n_routed_experts=256" in capsys.readouterr().err
