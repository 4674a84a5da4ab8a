"""Folders that come and go: what is in them, what is refused, and that nothing half-written is left."""

import json
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from exchanged import (
    GROUPED,
    case,
    exported,
    files_of,
    imported,
    logits_apart,
    random_ids,
    saved,
    theirs_of,
)
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import MtpModel

from conftest import REPOSITORY
from omniloom.cli import run_verb
from omniloom.errors import CheckpointError
from omniloom.modality.text import TextTokenizer, train_tokenizer
from omniloom.model.config import ModelConfig
from omniloom.model.decoder import text_fields
from omniloom.model.hf import KINDS, tensors
from omniloom.model.hf_config import FIELDS, MUST, ROPE_THETA, kind_of, to_hugging_face
from omniloom.model.load import load_model, save_model, shapes_of
from omniloom.model.weights import Planned, write_shards
from tiny_decoders import tiny_config


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A folder of ours that DeepSeek's class holds."""
    saved(tmp_path / "ours", case("deepseek q_lora, 2 of 4 groups, YaRN"))
    return tmp_path / "ours"


@pytest.fixture
def theirs(tmp_path: Path, ours: Path) -> Path:
    exported(ours, tmp_path / "theirs")
    return tmp_path / "theirs"


# --- what is written


def test_small_shards_have_an_index_and_load_again(tmp_path, ours):
    exported(ours, tmp_path / "theirs", max_shard_bytes=20_000)
    shards = sorted((tmp_path / "theirs").glob("*.safetensors"))
    assert len(shards) > 3
    assert [path.name for path in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    assert all(path.stat().st_size < 20_000 + 4_000 for path in shards), "each shard also has a header"
    index = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: path.name for path in shards for name in load_file(path)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights_of(tmp_path / "theirs").values())
    theirs = theirs_of(tmp_path / "theirs")
    logits_apart(load_model(ours), theirs, random_ids(load_model(ours).config))
    imported(tmp_path / "theirs", tmp_path / "back", max_shard_bytes=20_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    before, after = weights_of(ours), weights_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_one_shard_is_in_memory_at_a_time(tmp_path):
    alive, most = {}, 0

    def make(number: int) -> torch.Tensor:
        nonlocal most
        made = torch.full((1_000,), float(number))
        alive[number] = 4_000
        weakref.finalize(made, alive.pop, number)
        most = max(most, sum(alive.values()))
        return made

    planned = [Planned(f"t{i}", (1_000,), torch.float32, lambda i=i: make(i)) for i in range(20)]
    write_shards(tmp_path, planned, 8_000, "test")
    assert most == 8_000
    assert {name: tensor[0].item() for name, tensor in weights_of(tmp_path).items()} == {f"t{i}": i for i in range(20)}


@pytest.mark.parametrize("name", ["llama", "deepseek"])
def test_bf16_is_asked_for_or_kept(tmp_path, name):
    config = case(name)
    saved(tmp_path / "ours", config)
    exported(tmp_path / "ours", tmp_path / "theirs", dtype="bf16")
    told = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert (told["dtype"], told["torch_dtype"]) == ("bfloat16", "bfloat16")
    full, half = load_model(tmp_path / "ours"), load_model(tmp_path / "theirs")
    for key, tensor in full.decoder.state_dict().items():
        kept = tensor if key.endswith("router.bias_E") else tensor.bfloat16().float()
        assert torch.equal(half.decoder.state_dict()[key], kept), key
    stored = weights_of(tmp_path / "theirs")
    assert {n for n, t in stored.items() if t.dtype == torch.float32} == {n for n in stored if "correction_bias" in n}
    theirs = theirs_of(tmp_path / "theirs")
    assert theirs.dtype == torch.bfloat16
    logits_apart(half, theirs.float(), random_ids(config))
    imported(tmp_path / "theirs", tmp_path / "back")
    exported(tmp_path / "back", tmp_path / "again")
    again = weights_of(tmp_path / "again")
    assert all(again[n].dtype == t.dtype and torch.equal(again[n], t) for n, t in stored.items())


def test_what_text_does_not_pass_through_is_left_out_and_named_once(tmp_path):
    media = {"image_patch_pixels": 2, "audio_mels": 5, "num_nextn_predict_layers": 1}
    config = tiny_config(**GROUPED | {"n_routed_experts": 0} | media)
    decoder = saved(tmp_path / "ours", config)
    told = exported(tmp_path / "ours", tmp_path / "theirs")
    encoders, ahead = (sum(p.numel() for p in m.parameters()) for m in (decoder.media, decoder.mtp))
    assert told.notes[0].startswith(
        f"left out: media encoders ({encoders:,} parameters) and multi-token prediction ({ahead:,} parameters)"
    )
    assert told.parameters == sum(p.numel() for p in decoder.parameters()) - encoders - ahead
    logits_apart(load_model(tmp_path / "ours"), theirs_of(tmp_path / "theirs"), random_ids(config))


# --- multi-token prediction


def test_published_names_of_multi_token_prediction(tmp_path):
    config = case("deepseek", num_nextn_predict_layers=2)
    decoder = saved(tmp_path / "ours", config)
    exported(tmp_path / "ours", tmp_path / "theirs")
    stored = weights_of(tmp_path / "theirs")
    for k in range(2):
        at = f"model.layers.{config.num_hidden_layers + k}"
        assert torch.equal(stored[f"{at}.eh_proj.weight"], decoder.mtp[k].junction.eh_proj.weight)
        assert torch.equal(stored[f"{at}.shared_head.norm.weight"], decoder.mtp[k].norm.weight)
        assert torch.equal(stored[f"{at}.shared_head.head.weight"], decoder.lm_head.weight)
        assert torch.equal(stored[f"{at}.embed_tokens.weight"], decoder.embed_tokens.weight)
        assert {
            f"{at}.{name}" for name in ("enorm.weight", "hnorm.weight", "self_attn.kv_b_proj.weight")
        } <= stored.keys()
        assert f"{at}.mlp.experts.5.down_proj.weight" in stored
    imported(tmp_path / "theirs", tmp_path / "back")
    before, after = weights_of(tmp_path / "ours"), weights_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_model(tmp_path / "back").config.num_nextn_predict_layers == 2

    shared = "model.layers.3.shared_head.head.weight"
    without = {name: tensor for name, tensor in stored.items() if not name.endswith(("3.embed_tokens.weight", shared))}
    save_file(without, tmp_path / "theirs" / "model.safetensors")
    load_model(tmp_path / "theirs")  # some publish them, some do not
    save_file(stored | {shared: stored[shared] + 1}, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers.3.shared_head.head.weight is shared with lm_head.weight"):
        load_model(tmp_path / "theirs")


@torch.no_grad()
def test_transformers_reads_the_modules_ahead(tmp_path):
    """Its pattern for them names layer 61, as DeepSeek-V3 has it."""
    config = case("deepseek", num_hidden_layers=61, num_nextn_predict_layers=1)
    decoder = saved(tmp_path / "ours", config)
    for name, parameter in decoder.named_parameters():  # sixty layers of lively ones drown the first
        if name.startswith("layers.") and name.endswith(("o_proj.weight", "down_proj.weight", "down_EFD")):
            parameter.mul_(0.1)
    save_model(tmp_path / "ours", config, decoder.state_dict())
    exported(tmp_path / "ours", tmp_path / "theirs")
    theirs = theirs_of(tmp_path / "theirs")
    module = MtpModel.from_pretrained(theirs).eval()
    ids = random_ids(config, tokens=17)
    hidden = theirs(ids, output_hidden_states=True).hidden_states[-1]
    places = torch.arange(1, 17)[None]
    ahead = module.forward_layer(0, hidden[:, :-1], places, None, input_ids=ids[:, 1:])
    expected = theirs.lm_head(ahead)
    inside = torch.zeros_like(ids, dtype=torch.bool)
    inside[:, :-1] = True
    output = decoder(**text_fields(ids, config), predict_ahead_at=[inside])
    assert expected.std() >= 1
    torch.testing.assert_close(output.mtp[0].view_as(expected), expected, atol=1e-4, rtol=0)


def test_modules_ahead_that_the_files_lack_are_told(tmp_path):
    """save_pretrained writes none, whatever its config.json says."""
    config = case("deepseek", num_nextn_predict_layers=1)
    saved(tmp_path / "ours", config)
    exported(tmp_path / "ours", tmp_path / "theirs")
    theirs_of(tmp_path / "theirs").save_pretrained(tmp_path / "again")
    with pytest.warns(UserWarning, match="num_nextn_predict_layers=1 and the files hold no such module"):
        model = load_model(tmp_path / "again")
    assert model.config.num_nextn_predict_layers == 0


# --- tokenizers


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(iter(["the cat sat on the mat, 1984 times", "naïve café ☃"] * 20), 300)


def test_the_exported_tokenizer_encodes_as_ours_with_bos_before(tmp_path, tokenizer):
    saved(tmp_path / "ours", case("llama", vocab_size=tokenizer.vocab_size))
    tokenizer.save(tmp_path / "ours" / "tokenizer.json")
    told = exported(tmp_path / "ours", tmp_path / "theirs")
    assert told.notes == []
    assert files_of(tmp_path / "theirs") == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    for text in ("the cat", " 1984 cafés ☃\n\n", "<|eos|> and <|image|> are text here", ""):
        assert theirs(text).input_ids == [tokenizer.bos_id, *tokenizer.encode(text).tolist()]
        assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert theirs.model_max_length == 64
    config = AutoConfig.from_pretrained(tmp_path / "theirs")
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    model = theirs_of(tmp_path / "theirs")
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
    )
    written = model.generate(**theirs("the cat", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    expected = load_model(tmp_path / "ours")(written[:, :-1]).argmax(-1)
    count = written.shape[1] - len(theirs("the cat").input_ids)
    assert count
    assert torch.equal(written[0, -count:], expected[0, -count:])


def test_an_imported_tokenizer_stays_as_it_is_and_goes_out_again(tmp_path, tokenizer):
    saved(tmp_path / "ours", case("llama", vocab_size=tokenizer.vocab_size))
    tokenizer.save(tmp_path / "ours" / "tokenizer.json")
    (tmp_path / "ours" / "modality.json").write_text('{"mine": 1}')
    exported(tmp_path / "ours", tmp_path / "theirs")
    (tmp_path / "theirs" / "chat_template.jinja").write_text("{{ messages }}")
    imported(tmp_path / "theirs", tmp_path / "back", reading_rules=b"{}")
    exported(tmp_path / "back", tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        original = (tmp_path / "theirs" / name).read_bytes()
        assert (tmp_path / "back" / name).read_bytes() == original, name
        assert (tmp_path / "again" / name).read_bytes() == original, name
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "theirs" / "config.json").read_bytes()


def test_a_missing_tokenizer_is_told(tmp_path, ours):
    assert exported(ours, tmp_path / "theirs").notes == [f"{ours} has no tokenizer.json: the export has none"]
    assert imported(tmp_path / "theirs", tmp_path / "back").notes == [
        f"no tokenizer.json in {tmp_path / 'theirs'}: name one with tokenizer_path="
    ]


# --- the tables against whole models of theirs


@pytest.mark.parametrize("preset", ["gpt2_small", "llama_7b", "llama_8b", "mixtral_8x7b", "deepseek_v3"])
def test_a_presets_export_has_their_names_and_shapes(preset):
    """Of the whole size, on the meta device; experts and repeated tensors are theirs only in files."""
    config = TypeAdapter(ModelConfig).validate_python(
        yaml.safe_load((REPOSITORY / f"conf/model/{preset}.yaml").read_text())
    )
    kind = KINDS[kind_of(config)]
    planned = {t.name: t.shape for t in tensors(kind, config, shapes_of(config), kind.interleave)}
    written = to_hugging_face(config)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(AutoConfig.for_model(**written))
    theirs = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    if config.tie_word_embeddings:
        del theirs["lm_head.weight"]
    if preset == "mixtral_8x7b":
        theirs = {name.replace(".mlp.", ".block_sparse_moe."): shape for name, shape in theirs.items()}
    ahead = f"layers.{config.num_hidden_layers}."
    plain = {name: shape for name, shape in planned.items() if ".experts." not in name and ahead not in name}
    assert plain == {name: shape for name, shape in theirs.items() if ".experts." not in name}
    fused = sum(torch.Size(shape).numel() for name, shape in theirs.items() if ".experts." in name)
    experts = [shape for name, shape in planned.items() if ".experts." in name and ahead not in name]
    assert sum(torch.Size(shape).numel() for shape in experts) == fused


@pytest.mark.parametrize("kind", FIELDS)
def test_what_a_config_leaves_out_is_as_their_class_has_it(kind):
    theirs = AutoConfig.for_model(kind)
    set_by_others = {"num_key_value_heads", "head_dim", "num_nextn_predict_layers"}  # by heads; by what the files hold
    for name, (_, default) in FIELDS[kind].names.items():
        if default is not MUST and name not in set_by_others:
            assert getattr(theirs, name) == default, name
    if kind != "gpt2":
        assert theirs.rope_parameters["rope_theta"] == ROPE_THETA[kind]


# --- the command line


def test_the_verbs_do_the_whole_thing(tmp_path, tokenizer, monkeypatch, capsys):
    """A run's newest checkpoint goes out, comes in, and is what it was."""
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "runs" / "first" / "checkpoints" / "step_00000007"
    decoder = saved(checkpoint / "model", case("mixtral", vocab_size=tokenizer.vocab_size))
    tokenizer.save(checkpoint / "model" / "tokenizer.json")
    (checkpoint / "COMPLETE").write_text("{}")
    (tmp_path / "runs" / "first" / "run.json").write_text("{}")

    run_verb("export", ["first", "out/theirs", "max_shard_bytes=30000"])
    count = sum(parameter.numel() for parameter in decoder.parameters())
    told = capsys.readouterr().out
    size = sum(path.stat().st_size for path in Path("out/theirs").iterdir())
    files = len(files_of(Path("out/theirs")))
    assert told == f"out/theirs: MixtralForCausalLM, {count:,} parameters, {files} files, {size:,} bytes\n"
    run_verb("import", ["out/theirs", "back"])
    assert capsys.readouterr().out.startswith(f"back: MixtralForCausalLM, {count:,} parameters, 6 files, ")
    assert files_of(Path("back")) >= {"modality.json", "tokenizer.json", "config.json"}
    before, after = decoder.state_dict(), load_model(Path("back")).decoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    logits_apart(load_model(Path("back")), theirs_of(Path("out/theirs")), random_ids(decoder.config))
    run_verb("export", ["init=first@7", "to=bf16", "dtype=bf16"])
    assert theirs_of(Path("bf16")).dtype == torch.bfloat16
    run_verb("export", ["back", "bf16", "force=true"])
    assert theirs_of(Path("bf16")).dtype == torch.float32


@pytest.mark.parametrize(
    ("verb", "words", "message"),
    [
        ("export", [], "name a model and a new folder: omniloom export RUN FOLDER"),
        ("export", ["nowhere", "there"], "init=nowhere is neither a run in runs nor a folder"),
        ("export", ["ours", "there", "dtype=fp8"], "dtype=fp8 is none of fp32, bf16, fp16"),
        ("export", ["ours", "there", "max_shard_bytes=0"], "max_shard_bytes=0 must be at least 1"),
        ("export", ["theirs", "there"], "theirs is a Hugging Face folder already"),
        ("import", ["theirs"], "name a source and a new folder: omniloom import SOURCE FOLDER"),
        ("import", ["their", "there"], "source=their does not exist; did you mean 'theirs'?"),
        ("import", ["ours", "there"], "ours is a model of ours or none: its config.json has no model_type"),
        ("import", ["theirs", "there", "tokenizer_path=no.json"], "tokenizer_path=no.json is no file"),
        ("import", ["theirs", "ours"], "to=ours exists: name another folder, or set force=true to replace it"),
    ],
)
def test_a_wrong_word_gives_one_message(tmp_path, theirs, monkeypatch, capsys, verb, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_verb(verb, words)
    assert ended.value.code == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ")
    assert message in told
    assert files_of(tmp_path) == {"ours", "theirs"}
