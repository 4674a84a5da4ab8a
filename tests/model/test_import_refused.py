"""What neither side may pass over in silence, and that nothing half-written is left."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exchanged import (
    CASES,
    DEEPSEEK,
    LLAMA,
    MIXTRAL,
    case,
    exported,
    files_of,
    imported,
    logits_apart,
    random_ids,
    saved,
    theirs_of,
)
from safetensors.torch import load_file, save_file

from conftest import REPOSITORY
from omniloom.errors import CheckpointError, ConfigError
from omniloom.model import weights as weights_module
from omniloom.model.exchange import export_model
from omniloom.model.hf_config import from_hugging_face, to_hugging_face
from omniloom.model.load import load_model
from tiny_decoders import tiny_config


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A folder of ours that DeepSeek's class holds."""
    saved(tmp_path / "ours", case("deepseek q_lora, 2 of 4 groups, YaRN"))
    return tmp_path / "ours"


# --- what is refused: models

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("base", "changes", "key"),
    [
        (LLAMA, {"norm_position": "post"}, "norm_position=pre; it is post"),
        (LLAMA, {"attention_pattern": "sparse"}, "attention_pattern=full; it is sparse"),
        (LLAMA, {"attention_pattern": "linear"}, "attention_pattern=full; it is linear"),
        (LLAMA, {"attention_log_scale_tokens": 512}, "attention_log_scale_tokens=null; it is 512"),
        (LLAMA, {"embedding_conv_tokens": 4}, "embedding_conv_tokens=null; it is 4"),
        (LLAMA, {"position": "sinusoidal"}, "position=rope; it is sinusoidal"),
        (LLAMA, {"activation": "relu"}, "activation=swiglu; it is relu"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=1.0; it is 0.5"),
        (LLAMA, {"num_attention_heads": 3, "head_dim": 8}, "num_attention_heads=a divisor of 32; it is 3"),
        (CASES["gpt2"], {"norm": "rms"}, "norm=layer; it is rms"),
        (CASES["gpt2"], {"position": "rope"}, "position=learned; it is rope"),
        (CASES["gpt2"], {"activation": "swiglu"}, "activation=gelu_tanh, gelu or relu; it is swiglu"),
        (CASES["gpt2"], {"attention_bias": False}, "attention_bias=true; it is False"),
        (CASES["gpt2"], {"num_key_value_heads": 2}, "num_key_value_heads=4; it is 2"),
        (CASES["gpt2"], {"head_dim": 4}, "head_dim=32 / 4; it is 4"),
        (MIXTRAL, {"router_bias": True}, "router_bias=false; it is True"),
        (MIXTRAL, {"n_shared_experts": 1}, "n_shared_experts=0; it is 1"),
        (MIXTRAL, {"scoring_func": "sigmoid"}, "scoring_func=softmax; it is sigmoid"),
        (MIXTRAL, {"norm_topk_prob": False}, "norm_topk_prob=true; it is False"),
        (MIXTRAL, {"first_k_dense_replace": 1}, "first_k_dense_replace=0; it is 1"),
        (MIXTRAL, {"routed_scaling_factor": 2.0}, "routed_scaling_factor=1.0; it is 2.0"),
        (MIXTRAL, {"n_group": 2}, "n_group=1; it is 2"),
        (DEEPSEEK, {"norm_eps": 1e-5}, "norm_eps=1e-06; it is 1e-05"),
        (DEEPSEEK, {"scoring_func": "softmax"}, "scoring_func=sigmoid; it is softmax"),
        (DEEPSEEK, {"router_bias": True}, "router_bias=false; it is True"),
        (DEEPSEEK, {"norm": "layer"}, "norm=rms; it is layer"),
        (DEEPSEEK, {"n_routed_experts": 1, "num_experts_per_tok": 1}, "n_routed_experts=at least 2"),
    ],
)
def test_a_model_that_no_class_holds_is_refused_naming_the_key(tmp_path, base, changes, key):
    config = tiny_config(**base | changes)
    saved(tmp_path / "ours", config)
    with pytest.raises(ConfigError) as error:
        exported(tmp_path / "ours", tmp_path / "theirs")
    assert f"needs model.{key}" in str(error.value)
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "lama"}, "model_type=lama is none that is read; did you mean 'llama'"),
        ("llama", {"model_type": "qwen2"}, "model_type=qwen2 is none that is read"),
        ("llama", {"hidden_act": "gelu"}, 'hidden_act=gelu cannot be honoured: it must be "silu"'),
        ("llama", {"hidden_size": None}, "hidden_size"),
        ("llama", {"hidden_size": "wide"}, "hidden_size"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type=llama3 cannot be honoured"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type=linear cannot be honoured"),
        ("llama", {"rope_scaling": "linear"}, "malformed"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        (
            "llama YaRN",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0}},
            "attention_factor",
        ),
        ("llama YaRN", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}, "truncate=False"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\)"),
        ("gpt2", {"activation_function": "silu"}, "activation_function=silu cannot be honoured"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"n_head": 5}, "no multiple of model.num_attention_heads=5"),
        ("mixtral", {"sliding_window": 16}, "sliding_window=16 cannot be honoured"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
        ("deepseek", {"attention_bias": True}, "attention_bias=True"),
        ("deepseek", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
        ("deepseek", {"scoring_func": "softmax"}, "scoring_func=softmax"),
        ("deepseek", {"topk_method": "greedy"}, "topk_method=greedy"),
        ("deepseek", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("deepseek", {"num_key_value_heads": 1}, "num_key_value_heads=1"),
        ("deepseek", {"quantization_config": {"quant_method": "fp8"}}, r"quantization_config \(fp8\)"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_naming_the_field(tmp_path, name, changes, message):
    saved(tmp_path / "ours", case(name))
    exported(tmp_path / "ours", tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(tmp_path / "theirs")
    assert str(path) in str(error.value)
    with pytest.raises(CheckpointError, match=message):
        imported(tmp_path / "theirs", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_window_over_the_whole_context_is_none(tmp_path):
    saved(tmp_path / "ours", case("mixtral"))
    exported(tmp_path / "ours", tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 64}))
    logits_apart(load_model(tmp_path / "theirs"), theirs_of(tmp_path / "theirs"), random_ids(case("mixtral")))


PUBLISHED = {
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "max_position_embeddings": 163840,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "ep_size": 1,
    "moe_layer_freq": 1,
}


def test_both_ways_of_writing_yarn_are_read():
    written = to_hugging_face(case("deepseek"))
    four = from_hugging_face(written | PUBLISHED, "four")[1]
    five = {**written, **PUBLISHED}
    scaling = dict(five.pop("rope_scaling"))
    five["rope_parameters"] = {"rope_type": scaling.pop("type"), **scaling, "rope_theta": five.pop("rope_theta")}
    assert from_hugging_face(five, "five")[1] == four
    assert (four.yarn_factor, four.yarn_original_tokens, four.yarn_mscale_all_dim) == (40, 4096, 1.0)
    back = to_hugging_face(four)
    assert {key: back[key] for key in PUBLISHED.keys() - {"rope_scaling", "ep_size"}} == {
        key: value for key, value in PUBLISHED.items() if key not in ("rope_scaling", "ep_size")
    }
    assert back["rope_scaling"] == {**PUBLISHED["rope_scaling"], "rope_type": "yarn"}


# --- what is refused: weights


@pytest.fixture
def theirs(tmp_path: Path, ours: Path) -> Path:
    exported(ours, tmp_path / "theirs")
    return tmp_path / "theirs"


def change(folder: Path, **changes: torch.Tensor | None) -> None:
    stored = load_file(folder / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, "1 missing: model.norm.weight"),
        ({"model.norm.weight_scale_inv": torch.ones(1)}, "1 unknown: model.norm.weight_scale_inv"),
        ({"model.norm.weight": torch.ones(31)}, r"model.norm.weight is \(31,\) and should be \(32,\)"),
        (
            {"model.layers.1.mlp.experts.7.up_proj.weight": torch.ones(32, 16)},
            r"experts.7.up_proj.weight is \(32, 16\) and should be \(16, 32\)",
        ),
        ({"model.norm.weight": torch.ones(32, dtype=torch.int8)}, "model.norm.weight is kept as I8"),
    ],
)
def test_weights_that_are_not_the_configs_are_refused(tmp_path, theirs, changes, message):
    change(theirs, **changes)
    with pytest.raises(CheckpointError, match=message):
        imported(theirs, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    if "kept as" not in message:
        with pytest.raises(CheckpointError, match=message):
            load_model(theirs)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts"])
def test_a_config_of_more_parts_than_there_are_tensors_is_refused_at_once(tmp_path, key):
    saved(tmp_path / "ours", case("mixtral"))
    exported(tmp_path / "ours", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config | {key: 50_000_000}))
    with pytest.raises(CheckpointError, match=r"=50000000 has \d+ tensors"):
        load_model(tmp_path / "theirs")


@pytest.mark.parametrize("content", ["[]", "{"])
def test_a_malformed_generation_config_is_refused(tmp_path, theirs, content):
    (theirs / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json is malformed"):
        imported(theirs, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_truncated_weights_are_refused_and_leave_nothing(tmp_path, theirs):
    path = theirs / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cannot load .*model\.safetensors"):
        imported(theirs, tmp_path / "back")
    assert files_of(tmp_path) == {"ours", "theirs"}


def test_a_pickle_is_refused_unopened_and_told_apart(tmp_path, theirs):
    (theirs / "model.safetensors").rename(theirs / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle, which may run anything"):
        imported(theirs, tmp_path / "back")


def test_an_index_reads_nothing_outside_its_folder(tmp_path, theirs):
    shutil.move(theirs / "model.safetensors", tmp_path / "secret.safetensors")
    index = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (theirs / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="only safetensors beside it"):
        load_model(theirs)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none_is_refused(theirs, index):
    (theirs / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load_model(theirs)


def test_a_missing_shard_is_named(tmp_path, ours):
    exported(ours, tmp_path / "sharded", max_shard_bytes=20_000)
    sorted((tmp_path / "sharded").glob("*.safetensors"))[2].unlink()
    with pytest.raises(CheckpointError, match="model-00003-of-"):
        load_model(tmp_path / "sharded")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_older_files_have_tables_beside_their_weights_and_no_prefix(tmp_path, name):
    """As openai-community/gpt2 is published, and what early Llama conversions hold."""
    config = case(name)
    saved(tmp_path / "ours", config)
    exported(tmp_path / "ours", tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    prefix = "transformer." if name == "gpt2" else "model."
    tables = {
        "h.0.attn.bias": torch.ones(1, 1, 64, 64),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
        "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    kept = [key for key in tables if key.startswith("h.") == (name == "gpt2")]
    bare = {key.removeprefix(prefix): tensor for key, tensor in stored.items()} | {key: tables[key] for key in kept}
    save_file(bare, tmp_path / "theirs" / "model.safetensors")
    before, after = (
        load_model(tmp_path / "ours").decoder.state_dict(),
        load_model(tmp_path / "theirs").decoder.state_dict(),
    )
    assert all(torch.equal(before[key], after[key]) for key in before)


# --- what is refused: places


def test_a_folder_that_holds_something_is_replaced_only_by_force_and_only_a_model(tmp_path, ours):
    exported(ours, tmp_path / "theirs")
    with pytest.raises(ConfigError, match="exists: name another folder, or set force=true"):
        exported(ours, tmp_path / "theirs")
    (tmp_path / "theirs" / "merges.txt").write_text("")
    again = {"special": {}, "dtype": None, "max_shard_bytes": 1 << 30, "force": True}

    export_model(ours, tmp_path / "theirs", **again)
    assert files_of(tmp_path / "theirs") == {"config.json", "model.safetensors"}
    (tmp_path / "empty").mkdir()
    exported(ours, tmp_path / "empty")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("")
    for beside in ("cat.png", "config.json"):
        (tmp_path / "photos" / beside).write_text("{}")
        with pytest.raises(ConfigError, match=r"is no model folder that force=true replaces \(it holds cat\.png\)"):
            export_model(ours, tmp_path / "photos", **again)
    assert files_of(tmp_path / "photos") == {"cat.png", "config.json"}
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "COMPLETE").write_text("{}")
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="or is a checkpoint's"):
        export_model(ours, tmp_path / "run" / "model", **again)
    with pytest.raises(ConfigError, match="is where the model comes from"):
        export_model(ours, ours, **again)
    assert files_of(tmp_path) == {"ours", "theirs", "empty", "photos", "run"}


def test_a_failure_while_writing_leaves_what_was_there(tmp_path, ours, monkeypatch):
    exported(ours, tmp_path / "theirs")
    before = {path: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_module, "save_file", fail)

    with pytest.raises(OSError, match="No space"):
        export_model(ours, tmp_path / "theirs", {}, "bf16", 1 << 30, force=True)
    with pytest.raises(OSError, match="No space"):
        imported(tmp_path / "theirs", tmp_path / "back")
    assert {path: path.read_bytes() for path in (tmp_path / "theirs").iterdir()} == before
    assert files_of(tmp_path) == {"ours", "theirs"}


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from omniloom.model import weights
save = weights.save_file
def save_one_and_wait(tensors, path, metadata):
    save(tensors, path, metadata=metadata)
    print("wrote one", flush=True)
    time.sleep(60)
weights.save_file = save_one_and_wait
from omniloom.model.exchange import export_model
from pathlib import Path
export_model(Path({ours!r}), Path({theirs!r}), {{}}, None, 20_000, force=False)
"""


def test_a_killed_export_leaves_no_destination_and_a_repeat_succeeds(tmp_path, ours):
    code = KILLED.format(tests=str(REPOSITORY / "tests"), ours=str(ours), theirs=str(tmp_path / "theirs"))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "wrote one\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "theirs").exists()
    exported(ours, tmp_path / "theirs")
    assert files_of(tmp_path) == {"ours", "theirs"}, "what the killed one had begun is gone"
    logits_apart(load_model(ours), theirs_of(tmp_path / "theirs"), random_ids(load_model(ours).config))
