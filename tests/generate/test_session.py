"""Conversations that outlive their process and their context."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from writing import save_writer

import omniloom
from omniloom.errors import CheckpointError, ConfigError
from omniloom.generate.chat import Turn, laid_out
from omniloom.generate.config import CacheConfig, DecodingConfig, EngineConfig
from omniloom.generate.model import WritingModel
from omniloom.generate.request import Request
from omniloom.generate.session import Session
from omniloom.modality.dialogue import STOPS
from omniloom.model.sparse_attention import visible_keys

DECODING = DecodingConfig(max_new_tokens=6, ignore_eos=True, temperature=0.8)
HUNDRED = replace(DECODING, max_new_tokens=100)
ANSWER_100 = """
import sys, json
from pathlib import Path
import torch
torch.set_num_threads(1)
import omniloom
from omniloom.generate.config import DecodingConfig
from omniloom.generate.session import Session
session = Session.open(Path(sys.argv[2]), omniloom.load(sys.argv[1]))
decoding = DecodingConfig(max_new_tokens=100, ignore_eos=True, temperature=0.8)
*_, last = session.ask(["and then?"], decoding)
print(json.dumps(last.answer.ids))
"""


def said(session: Session, text: str, decoding: DecodingConfig = DECODING, keep: bool = False) -> list[int]:
    *_, last = session.ask(session.model.prompter.parts(text), decoding, keep)
    return last.answer.ids


def alone(model: WritingModel, session: Session, text: str, decoding: DecodingConfig = DECODING) -> list[int]:
    """What a request with the whole conversation, and this turn behind it, gets."""
    told = [] if session.system is None else [Turn("system", [session.system])]
    before = [replace(turn, parts=[session._read(part) for part in turn.parts]) for turn in session.turns]
    asked = laid_out(model.prompter, [*told, *before, Turn("user", model.prompter.parts(text))])
    drawn = replace(decoding, seed=decoding.seed + session.state.answers, stop=[*decoding.stop, *STOPS])
    return model.answers([Request(asked, drawn)], EngineConfig(batch_size=1))[0].ids


@pytest.mark.parametrize("cache", [{}, {"precision": "int8"}, {"heavy_tokens": 20, "recent_tokens": 20}], ids=str)
def test_a_session_goes_on_in_another_process_with_the_same_100_tokens(tmp_path, cache):
    folder = save_writer(tmp_path / "model", "convolution", max_position_embeddings=400)
    Image.new("RGB", (4, 4), (200, 30, 90)).save(tmp_path / "red.png")
    session = Session(omniloom.load(folder), CacheConfig(**cache), system="the cat sat on the mat")
    said(session, f"what is {{image:{tmp_path}/red.png}}?")
    said(session, "the dog sat on the log and the cat sat on the dog, and the log, and the mat")
    session.save(tmp_path / "session")
    other = subprocess.run(
        [sys.executable, "-c", ANSWER_100, str(folder), str(tmp_path / "session")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    ids = said(session, "and then?", HUNDRED)
    assert json.loads(other.stdout) == ids
    assert len(ids) == 100


@pytest.mark.parametrize("kind", ["grouped", "sparse latent", "both ways", "convolution", "learned"])
def test_what_was_said_is_read_once_and_laid_out_as_in_training(tmp_path, kind):
    """Each answer is what a request with the whole conversation gets; what stopped an answer leaves no trace."""
    model = omniloom.load(save_writer(tmp_path / "model", kind, max_position_embeddings=400))
    Image.new("RGB", (4, 4), (200, 30, 90)).save(tmp_path / "red.png")
    session = Session(model, system="be kind")
    said(session, "the cat", replace(HUNDRED, max_new_tokens=20))
    middle = session.turns[1].parts[0][8:11]
    session = Session(model, system="be kind")
    for text, stop in (("the cat", middle), (f"{{image:{tmp_path}/red.png}} the dog", "sat"), ("sat on", "x")):
        decoding = replace(DECODING, max_new_tokens=20, stop=[stop])
        expected = alone(model, session, text, decoding)
        assert said(session, text, decoding) == expected
    assert session.turns[1].ids is None or len(session.turns[1].ids) < 20
    assert [turn.role for turn in session.turns] == ["user", "assistant"] * 3
    assert session.messages()[0] == {"role": "system", "content": "be kind"}


ROOMY = {"attention_pattern": "sparse", "window_tokens": 16, "global_stride": 2, "max_global_tokens": 32}
OVER = [
    ("grouped", {}, {}),
    ("convolution", {}, {"precision": "int8"}),
    ("latent", {}, {"heavy_tokens": 10, "recent_tokens": 10}),
    ("latent with yarn and log scale", {"yarn_original_tokens": 40}, {"heavy_tokens": 300, "recent_tokens": 300}),
    ("sparse latent", ROOMY, {}),
]


@pytest.mark.parametrize(("kind", "changes", "cache"), OVER, ids=str)
def test_a_conversation_over_the_context_keeps_facts_and_what_is_new(tmp_path, kind, changes, cache):
    is_sparse = "sparse" in kind
    context = 800 if is_sparse else 160
    model = omniloom.load(save_writer(tmp_path / "model", kind, max_position_embeddings=context, **changes))
    session, pad = Session(model, CacheConfig(**cache), system="the cat"), "and the mat " * (16 if is_sparse else 1)
    for turn in range(16):
        assert len(said(session, f"the dog sat on the log {pad}{turn}", keep=turn == 1 and not is_sparse)) == 6
        assert session.cache.lengths[0] <= context
    assert session.state.condensed >= 2
    facts = session._told_tokens()
    asked = f"\n\nuser: the dog sat on the log {pad}1\n\nassistant:"
    kept = 0 if is_sparse else 1 + len(model.prompter.text.encode(asked))  # and the answer's last token before it
    for layer in session.cache.layers:
        index = layer.index[0, : layer.held[0]]
        assert (index.diff() > 0).all()
        assert int(index[-1]) == session.cache.lengths[0] - 1
        pinned = layer.pinned[0, : layer.held[0]]
        assert int(pinned.sum()) == facts + kept
        assert pinned[:facts].all()
        if is_sparse:  # they stand where the window's end does not matter
            limits = (16, 2, 32)
            assert visible_keys(torch.tensor([session.cache.lengths[0]]), index, *limits)[0][pinned].all()
    session.save(tmp_path / "kept")
    again = Session.open(tmp_path / "kept", model)
    assert said(again, "go on") == said(session, "go on")
    assert len(session.turns) == 34


@pytest.mark.parametrize("kind", ["grouped", "learned", "sparse latent"])
def test_a_turn_that_is_refused_was_never_said(tmp_path, kind):
    model = omniloom.load(save_writer(tmp_path / "model", kind, max_position_embeddings=160))
    session, other = (Session(model, system="the cat sat") for _ in range(2))
    for turn in range(3):
        said(session, f"the dog sat on the log {turn}")
        said(other, f"the dog sat on the log {turn}")
    with pytest.raises(ConfigError, match="leaves no room"):
        said(session, "the cat sat on the mat " * 100)
    assert session.cache.lengths == other.cache.lengths
    assert len(session.turns) == 6
    assert said(session, "go") == said(other, "go")


def test_another_system_prompt_leaves_out_the_oldest_where_the_context_is_short(tmp_path):
    model = omniloom.load(save_writer(tmp_path / "model", max_position_embeddings=160))
    session = Session(model, system="the cat sat")
    for turn in range(14):
        said(session, f"the dog sat on the log and the mat {turn}")
    session.begin_again("the dog", session.turns)
    assert 2 <= len(session.turns) < 28
    expected = alone(model, session, "go")
    assert said(session, "go") == expected


def test_where_keys_cannot_be_moved_the_oldest_exchanges_go(tmp_path):
    model = omniloom.load(save_writer(tmp_path / "model", "learned", max_position_embeddings=160))
    session = Session(model, system="the cat sat")
    for turn in range(8):
        assert len(said(session, f"the dog sat on the log and the mat {turn}")) == 6
    assert session.state.condensed
    assert len(session.turns) < 16
    whole = laid_out(model.prompter, [Turn("system", ["the cat sat"]), *session.turns])
    header = len(model.prompter.text.encode("\n\nassistant:"))
    assert session.cache.lengths[0] + len(session.state.pending) == len(whole) - header
    ids = said(session, "go")
    session.state.turns, session.state.answers = session.turns[:-2], session.state.answers - 1
    assert ids == alone(model, session, "go")


def test_an_answer_that_is_cut_short_stays_as_far_as_it_came(tmp_path):
    model = omniloom.load(save_writer(tmp_path / "model", max_position_embeddings=400))
    whole, cut = Session(model), Session(model)
    ids = said(whole, "the cat")
    stream = cut.ask(["the cat"], DECODING)
    for _ in range(3):
        next(stream)
    stream.close()
    assert cut.turns[-1].ids == ids[:3]
    assert cut.state.pending == ids[2:3]
    expected = alone(model, cut, "the dog")
    assert said(cut, "the dog") == expected


def test_an_exchange_can_be_taken_back(tmp_path):
    model = omniloom.load(save_writer(tmp_path / "model", "sparse latent", max_position_embeddings=400))
    session, other = Session(model, system="a"), Session(model, system="a")
    said(session, "the cat")
    said(other, "the cat")
    before = session.cache.state(0)
    said(session, "the dog")
    assert session.take_back() == (["the dog"], False)
    assert all(torch.equal(before[name], x) for name, x in session.cache.state(0).items())
    with pytest.raises(ConfigError, match="nothing was answered"):
        session.take_back()
    said(other, "x")
    other.take_back()
    assert said(session, "the log") == said(other, "the log")  # both their third answer


def test_sessions_that_cannot_be_taken_up_say_why(tmp_path):
    model = omniloom.load(save_writer(tmp_path / "model"))
    other = omniloom.load(save_writer(tmp_path / "other", seed=1))
    session = Session(model)
    said(session, "a")
    session.save(tmp_path / "kept")
    with pytest.raises(CheckpointError, match="saved by another model"):
        Session.open(tmp_path / "kept", other)
    half = omniloom.load(model.folder)
    half.decoder.bfloat16()
    with pytest.raises(CheckpointError, match="set precision= as it was"):
        Session.open(tmp_path / "kept", half)
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
    assert not session.turns
