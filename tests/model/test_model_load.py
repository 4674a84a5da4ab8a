"""Weights on disk and back."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from omniloom.errors import CheckpointError, DataError
from omniloom.modality.sequence import MEDIA_FIELDS
from omniloom.model import load as load_module
from omniloom.model.load import load_model, model_folder, save_model
from tiny_decoders import all_logits, batch_of, document, picture, text, tiny_decoder


@pytest.fixture
def saved(tmp_path):
    decoder = tiny_decoder()
    save_model(tmp_path / "model", decoder.config, decoder.state_dict())
    return tmp_path / "model"


def fields():
    return batch_of([[document(text([10, 11]), picture(2, 2, seed=1), text([12]))]], 10)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_saved_model_loads_with_equal_logits(tmp_path, tied):
    decoder = tiny_decoder(tie_word_embeddings=tied)
    save_model(tmp_path / "model", decoder.config, decoder.state_dict())
    model = load_model(tmp_path / "model")
    assert not model.decoder.training
    assert model.config == decoder.config
    assert model.folder == tmp_path / "model"
    torch.testing.assert_close(all_logits(model.decoder, fields()), all_logits(decoder, fields()), atol=0, rtol=0)
    assert (model.decoder.lm_head.weight is model.decoder.embed_tokens.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "model" / "model.safetensors")) != tied  # stored once
    bias = model.decoder.layers[1].mlp.router.bias_E
    assert bias.tolist() == decoder.layers[1].mlp.router.bias_E.tolist()


@torch.no_grad()
def test_a_model_gives_the_logits_of_plain_text(saved):
    model = load_model(saved)
    ids = torch.arange(10, 24).view(2, 7)
    logits = model(ids)
    assert logits.shape == (2, 7, 61)
    for row in range(2):
        alone = batch_of([[document(text(ids[row].tolist()))]], 9)
        alone = {name: tensor if name in MEDIA_FIELDS else tensor[:, 1:8] for name, tensor in alone.items()}
        torch.testing.assert_close(logits[row], all_logits(model.decoder, alone)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_large_weights_are_sharded_and_load_again(tmp_path, monkeypatch):
    decoder = tiny_decoder()
    save = load_module.save_torch_state_dict
    monkeypatch.setattr(load_module, "save_torch_state_dict", lambda *a: save(*a, max_shard_size=20_000))
    save_model(tmp_path / "model", decoder.config, decoder.state_dict())
    names = {path.name for path in (tmp_path / "model").iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    assert len(shards) > 1
    assert names == shards | {"config.json", "model.safetensors.index.json"}
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == shards
    model = load_model(tmp_path / "model")
    torch.testing.assert_close(all_logits(model.decoder, fields()), all_logits(decoder, fields()), atol=0, rtol=0)
    (tmp_path / "model" / sorted(shards)[0]).unlink()
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "model")


def test_weights_that_are_views_of_one_buffer_are_saved_apart(tmp_path):
    decoder = tiny_decoder()
    buffer = torch.cat([tensor.flatten() for tensor in decoder.state_dict().values()])
    views, at = {}, 0
    for name, tensor in decoder.state_dict().items():
        views[name] = buffer[at : at + tensor.numel()].view(tensor.shape)
        at += tensor.numel()
    save_model(tmp_path / "model", decoder.config, views)
    loaded = load_model(tmp_path / "model").decoder.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in views.items())


def test_only_safetensors_and_json_are_written(saved):
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors"}


class Bomb:
    def __reduce__(self):
        return (print, ("this pickle was opened",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_folder_with_only_a_pickle_is_refused_unopened(saved, capsys, name):
    for path in saved.glob("*.safetensors*"):
        path.unlink()
    torch.save({"weights": Bomb()}, saved / name)
    with pytest.raises(CheckpointError):
        load_model(saved)
    assert "opened" not in capsys.readouterr().out


def test_a_pickle_that_the_index_names_is_refused_unopened(saved, capsys):
    for path in saved.glob("*.safetensors*"):
        path.unlink()
    torch.save({"weights": Bomb()}, saved / "pytorch_model-00001-of-00001.bin")
    for index in ("pytorch_model.bin.index.json", "model.safetensors.index.json"):
        (saved / index).write_text(
            json.dumps({"metadata": {}, "weight_map": {"norm.weight": "pytorch_model-00001-of-00001.bin"}})
        )
    with pytest.raises(CheckpointError):
        load_model(saved)
    assert "opened" not in capsys.readouterr().out


def test_a_folder_without_weights_is_refused(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot load"):
        load_model(saved)


def test_a_truncated_weights_file_is_refused_in_one_message(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model"):
        load_model(saved)


def test_weights_of_another_shape_or_name_are_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is \(61, 32\) and should be \(61, 64\)"):
        load_model(saved)
    (saved / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="missing"):
        load_model(saved)
    (saved / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match="unknown"):
        load_model(saved)


def test_an_unknown_key_of_a_config_is_refused_with_the_nearest(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"attention_patern": "linear"}))
    with pytest.raises(CheckpointError, match="unknown key attention_patern; did you mean 'attention_pattern'"):
        load_model(saved)


@pytest.mark.parametrize("ids", [[], [[]], [1, 2], [[1, 61]], [[-1, 2]]], ids=str)
def test_ids_that_are_none_are_refused(saved, ids):
    with pytest.raises(DataError, match=r"^ids "):
        load_model(saved)(torch.tensor(ids, dtype=torch.long))


@pytest.mark.parametrize("content", ["", "{", '{"hidden_size": "wide"}', "[]", "[" * 100_000])
def test_a_config_that_is_none_is_refused(saved, content):
    (saved / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(saved)


def checkpoint(run, step, saved, complete=True):
    folder = run / "checkpoints" / f"step_{step:08d}"
    shutil.copytree(saved, folder / "model")
    if complete:
        (folder / "COMPLETE").write_text("{}")
    return folder


def test_a_run_stands_for_its_newest_complete_checkpoint(tmp_path, saved):
    run = tmp_path / "runs" / "first"
    checkpoint(run, 9, saved)
    newest = checkpoint(run, 100, saved)
    checkpoint(run, 200, saved, complete=False)
    assert model_folder(run) == newest / "model"
    assert model_folder(newest) == newest / "model"
    assert model_folder(newest / "model") == newest / "model"
    assert load_model(run).folder == newest / "model"


def test_an_incomplete_checkpoint_is_refused(tmp_path, saved):
    folder = checkpoint(tmp_path / "run", 5, saved, complete=False)
    with pytest.raises(CheckpointError, match="not complete"):
        model_folder(folder)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        model_folder(tmp_path / "run")


def test_a_missing_folder_is_refused_with_the_nearest_name(tmp_path, saved):
    checkpoint(tmp_path / "runs" / "digits_large", 5, saved)
    with pytest.raises(CheckpointError, match="did you mean 'digits_large'"):
        load_model(tmp_path / "runs" / "digit_large")
    with pytest.raises(CheckpointError, match="nowhere"):
        load_model(tmp_path / "nowhere" / "at" / "all")
