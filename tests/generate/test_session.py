"""Conversations that outlive their process and their context."""

import json
import subprocess
import sys

import pytest
from PIL import Image
from writing import KINDS, save_writer

import omniloom
from omniloom.errors import CheckpointError, ConfigError
from omniloom.generate.config import CacheConfig, DecodingConfig
from omniloom.generate.session import Session

DECODING = DecodingConfig(max_new_tokens=6, ignore_eos=True, temperature=0.8)
ANSWER_100 = """
import sys, json
from pathlib import Path
import torch
torch.set_num_threads(1)
import omniloom
from omniloom.generate.config import DecodingConfig
from omniloom.generate.session import Session
model = omniloom.load(sys.argv[1])
session = Session.open(Path(sys.argv[2]), model)
decoding = DecodingConfig(max_new_tokens=100, ignore_eos=True, temperature=0.8)
*_, last = session.say("and then?", decoding)
print(json.dumps(last.answer.ids))
"""


def said(session: Session, text: str, **options) -> list[int]:
    *_, last = session.say(text, DECODING, **options)
    return last.answer.ids


@pytest.mark.parametrize("cache", [{}, {"precision": "int8"}, {"heavy_tokens": 20, "recent_tokens": 20}], ids=str)
def test_a_session_goes_on_in_another_process_with_the_same_100_tokens(tmp_path, cache):
    folder = save_writer(tmp_path / "model", "convolution", max_position_embeddings=400)
    Image.new("RGB", (4, 4), (200, 30, 90)).save(tmp_path / "red.png")
    session = Session(omniloom.load(folder), CacheConfig(**cache))
    session.tell("the cat sat on the mat")
    said(session, f"what is {{image:{tmp_path}/red.png}}?")
    said(session, "the dog sat on the log and the cat sat on the dog, and the log, and the mat")
    session.save(tmp_path / "session")
    other = subprocess.run(
        [sys.executable, "-c", ANSWER_100, str(folder), str(tmp_path / "session")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    decoding = DecodingConfig(max_new_tokens=100, ignore_eos=True, temperature=0.8)
    *_, last = session.say("and then?", decoding)
    assert json.loads(other.stdout) == last.answer.ids
    assert len(last.answer.ids) == 100


def test_what_was_said_is_read_once_and_laid_out_as_in_training(tmp_path):
    model = omniloom.load(save_writer(tmp_path / "model", max_position_embeddings=400))
    session = Session(model)
    session.tell("be kind")
    first = said(session, "the cat")
    text = model.prompter.text
    whole = "system: be kind\n\nuser: the cat\n\nassistant:"
    again = model.write(
        whole, max_new_tokens=6, ignore_eos=True, temperature=0.8, seed=DECODING.seed + _said_before(model)
    )
    assert again[0].ids == first
    cached = session.cached_tokens
    said(session, "the dog")
    assert session.cached_tokens - cached == len(text.encode("\n\nuser: the dog\n\nassistant:")) + 1 + 5
    assert [(turn.role, turn.text) for turn in session.turns][:2] == [("system", "be kind"), ("user", "the cat")]
    assert len(session.turns) == 5


def _said_before(model) -> int:
    return 1 + len(model.prompter.text.encode("system: be kind"))


@pytest.mark.parametrize("kind", ["grouped", "latent", "sparse latent", "convolution"])
def test_a_conversation_over_the_context_keeps_facts_and_what_is_new(tmp_path, kind):
    model = omniloom.load(save_writer(tmp_path / "model", kind, max_position_embeddings=160))
    session = Session(model)
    session.tell("the cat sat")
    facts = session.cached_tokens
    for turn in range(12):
        assert len(said(session, f"the dog sat on the log and the mat {turn}")) == 6
        assert session.cached_tokens <= 160
    assert session.condensed >= 2
    assert session.said > 2 * 160
    if "sparse" not in kind:  # which lets go by its own rule
        assert all(layer.pinned[0].sum() == facts for layer in session._engine.cache.layers)
    for layer in session._engine.cache.layers:
        index = layer.index[0, : layer.held[0]]
        assert (index.diff() > 0).all()
        assert int(index[-1]) == session.cached_tokens - 1
    session.save(tmp_path / "kept")
    again = Session.open(tmp_path / "kept", model)
    assert said(again, "go on") == said(session, "go on")


def test_an_answer_that_is_cut_short_stays_as_far_as_it_came(tmp_path):
    model = omniloom.load(save_writer(tmp_path / "model", max_position_embeddings=400))
    whole, cut = Session(model), Session(model)
    ids = said(whole, "the cat")
    stream = cut.say("the cat", DECODING)
    for _ in range(3):
        next(stream)
    stream.close()
    assert cut._pending == ids[2:3]
    assert len(said(cut, "the dog")) == 6


def test_sessions_that_cannot_be_taken_up_say_why(tmp_path):
    model = omniloom.load(save_writer(tmp_path / "model"))
    other = omniloom.load(save_writer(tmp_path / "other", seed=1))
    session = Session(model)
    said(session, "a")
    session.save(tmp_path / "kept")
    with pytest.raises(CheckpointError, match="saved by another model"):
        Session.open(tmp_path / "kept", other)
    with pytest.raises(CheckpointError, match="no session at"):
        Session.open(tmp_path / "nowhere", model)
    (file,) = (tmp_path / "kept").glob("cache-*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        Session.open(tmp_path / "kept", model)
    (tmp_path / "kept" / "session.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        Session.open(tmp_path / "kept", model)


def test_saving_again_leaves_one_cache(tmp_path):
    model = omniloom.load(save_writer(tmp_path / "model", max_position_embeddings=400))
    session = Session(model)
    for text in ("a", "b"):
        said(session, text)
        session.save(tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert said(Session.open(tmp_path / "kept", model), "c") == said(session, "c")


def test_a_turn_over_the_context_is_refused(tmp_path):
    session = Session(omniloom.load(save_writer(tmp_path / "model")))
    with pytest.raises(ConfigError, match="max_position_embeddings=64"):
        said(session, "the cat sat on the mat " * 40)
    assert KINDS
