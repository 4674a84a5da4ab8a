"""`omniloom chat`: a conversation by lines, in a terminal, laid out as training has it, read once."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import omniloom
from omniloom.cli import run_verb
from omniloom.data.config import Reading
from omniloom.data.readers.chat import chat_document
from omniloom.data.readers.record import Place
from omniloom.generate.chat import laid_out, read_turns, written_ids
from omniloom.generate.config import DecodingConfig
from omniloom.generate.model import WritingModel
from omniloom.generate.request import Answer
from omniloom.generate.session import Session
from omniloom.modality.sequence import weave
from tiny_folders import colourful, save_tiny

CONTEXT = 160


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    save_tiny(folder / "model", max_position_embeddings=CONTEXT)
    colourful(folder / "pictures", 2)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> WritingModel:
    return omniloom.load(folder / "model")


@pytest.fixture
def say(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Lines of a conversation: stdout, stderr, exit status."""

    def say(text: str, *words: str) -> tuple[str, str, int]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        status = 0
        try:
            run_verb("chat", ["model", "max_new_tokens=6", *words])
        except SystemExit as ended:
            status = int(ended.code or 0)
        said = capsys.readouterr()
        return said.out, said.err, status

    return say


def messages(folder: Path) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "the log"},
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat on"},
        {"role": "user", "content": [{"type": "image", "image": "pictures/0.png"}, {"type": "text", "text": "dog?"}]},
    ]


def test_a_prompt_is_laid_out_as_training_lays_out_the_conversation(folder: Path, model: WritingModel) -> None:
    """What comes before the last answer, id by id."""
    said, prompter = messages(folder), model.prompter
    whole = [*said, {"role": "assistant", "content": "x"}]
    (read,) = chat_document({"messages": whole}, Place("a", str(folder / "a.jsonl")), Reading())
    segments = []
    for one in read.segments:
        if isinstance(one.content, str):
            segments.append(prompter.text.segment(one.content, one.is_target))
        else:
            segments += prompter.medium(one.kind, str(one.content.content)).segments
    text = prompter.text
    trained = weave(segments, text.bos_id, text.eos_id, text.placeholder_ids, prompter.modality.widths)
    asked = laid_out(prompter, read_turns(prompter, said, folder))
    answer = len(text.encode(" x"))
    assert asked.input_ids.tolist() == trained.input_ids[: -answer - 1].tolist()
    assert (asked.image == trained.image).all()


def test_what_was_written_before_a_stop_keeps_its_ids(model: WritingModel) -> None:
    text = model.prompter.text
    ids = text.encode(" the cat\n\nuser: dog").tolist()
    assert written_ids(text, Answer(ids=ids, text=" the cat", finish="stop")) == text.encode(" the cat").tolist()
    assert written_ids(text, Answer(ids=ids, text=" the ca", finish="stop")) in (None, text.encode(" the ca").tolist())
    assert written_ids(text, Answer(ids=[*ids, text.eos_id], text="", finish="eos")) == ids
    assert written_ids(text, Answer(ids=ids, text="", finish="length")) == ids
    assert written_ids(text, Answer(ids=ids, text="", finish="")) == ids  # Ctrl-C


def test_lines_are_messages_and_stdout_has_the_answers_alone(say: Any, model: WritingModel, folder: Path) -> None:
    out, err, status = say("the cat\n\n{image:pictures/1.png} the dog\n/stats\n", "system=the 'log' ${x}")
    session, told = Session(model, system="the 'log' ${x}"), ""
    for text in ("the cat", "{image:pictures/1.png} the dog"):
        *_, last = session.ask(model.prompter.parts(text), DecodingConfig(max_new_tokens=6))
        told += last.answer.text.removeprefix(" ") + "\n"
    assert (out, status) == (told, 0)
    assert "tokens read; 6 written, " in err


def test_commands(say: Any, folder: Path) -> None:
    lines = [
        "/help", "/regenerate", "/image pictures/0.png", "/image nowhere.png", "/imagee a", "/image", "the cat",
        "/regenerate", "/save saved.jsonl", "/save saved.jsonl", "/save", "/system", "/reset", "the dog",
        "/save again.jsonl", "/save model/config.json", "/exit", "never",
    ]  # fmt: skip
    out, err, status = say("\n".join(lines), "system=the log", "temperature=0.9")
    assert status == 1
    assert err.count("error: ") == 7  # and one that says so at the end
    for told in (
        "/regenerate        answer the last message again",
        "error: nothing was answered here yet",
        "(4 tokens, for the next message)",
        "error: cannot read nowhere.png",
        "error: unknown command /imagee; did you mean 'image'?",
        "error: /image needs a file",
        "error: /save needs a file",
        "error: model/config.json exists: name another file",
        "6 of the lines could not be done",
    ):
        assert told in err, told
    assert out.count("\n") >= 3
    (saved,) = map(json.loads, (folder / "saved.jsonl").read_text().splitlines())
    system, user, answer = saved["messages"]
    assert system == {"role": "system", "content": "the log"}
    picture = {"type": "image", "image": str(folder / "pictures" / "0.png")}
    assert user == {"role": "user", "content": [picture, {"type": "text", "text": "the cat"}]}
    assert answer["role"] == "assistant"
    assert out.endswith(f"{json.loads((folder / 'again.jsonl').read_text())['messages'][-1]['content']}\n")
    assert [turn["role"] for turn in json.loads((folder / "again.jsonl").read_text())["messages"]] == [
        "user", "assistant",
    ]  # fmt: skip


def test_a_session_goes_on_where_it_was_left(say: Any) -> None:
    whole, _, _ = say("the cat\nthe dog\n/keep the log\n", "system=a", "temperature=0.5")
    first, _, _ = say("the cat\n", "system=a", "temperature=0.5", "session=kept")
    second, err, _ = say("the dog\n/keep the log\n", "temperature=0.5", "session=kept")
    assert first + second == whole
    assert "kept: goes on after 2 turns" in err
    _, err, status = say("x\n", "session=kept", "system=b")
    assert "begun with another system prompt" in err
    assert status == 1


def test_another_answer_is_drawn_anew_and_a_script_draws_the_same_again(say: Any) -> None:
    once = say("the cat\n/regenerate\n", "temperature=1", "seed=3", "max_new_tokens=12")[0]
    again = say("the cat\n/regenerate\n", "temperature=1", "seed=3", "max_new_tokens=12")[0]
    other = say("the cat\n/regenerate\n", "temperature=1", "seed=9", "max_new_tokens=12")[0]
    assert once == again != other
    greedy, err, _ = say("the cat\n/regenerate\n")
    half = greedy[: len(greedy) // 2]
    assert greedy == half * 2
    assert "(temperature=0 gives the same answer)" in err


def test_over_the_context_what_is_neither_heavy_nor_new_is_forgotten(say: Any) -> None:
    out, err, status = say("the cat sat on the mat\n" * 14, "max_new_tokens=5")
    assert (status, "error" in err) == (0, False)
    assert f"(the context of {CONTEXT} tokens was full: only what is kept, heavy or new is remembered)" in err
    assert out.count("\n") >= 14
    _, err, status = say(f"the cat\n{'dog ' * CONTEXT}\nthe dog\n")
    assert "leaves no room in the model's context, model.max_position_embeddings=160" in err
    assert (status, err.count("error: ")) == (1, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["temprature=1"], "did you mean 'temperature'?"),
        (["temperature=nan"], "temperature=nan must be a number"),
        (["beams=3"], "unknown key beams"),
        (["init=modle"], "init=modle is neither a run"),
    ],
)
def test_bad_input_is_one_message(words: list[str], message: str, say: Any) -> None:
    out, err, status = say("the cat\n", *words)
    assert (out, status) == ("", 1)
    assert err.startswith("error: ")
    assert message in err


class Seat:
    """Somebody at a terminal."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "omniloom", "chat", "model", *words]
        environment = {**os.environ, "HOME": str(folder), "TERM": "dumb"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=environment, start_new_session=True
        )
        os.close(slave)
        self.seen = ""

    def until(self, text: str, seconds: float = 120) -> str:
        """What is seen up to and with `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            if not select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"{text!r} did not come: {self.seen!r}")
            self.seen += os.read(self.master, 1 << 16).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def interrupt(self, text: str) -> str:
        """Ctrl-C, again where readline missed it just before it began to wait; what is seen up to and with `text`."""
        for _ in range(20):
            os.kill(self.process.pid, signal.SIGINT)
            if select.select([self.master], [], [], 3.0)[0]:
                break
        return self.until(text)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def test_in_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(folder: Path) -> None:
    # Whoever is asked goes on until the context is full.
    long = folder / "long" / "model"
    if not long.exists():
        save_tiny(long, max_position_embeddings=100_000)
    seat = Seat(long.parent, "max_new_tokens=90000", "temperature=1")
    seat.until("a message, or /help")
    seat.until("> ")
    seat.type("the cat\\\nsat\n")
    seat.until(". sat\r\n")
    deadline = time.monotonic() + 60
    while len(seat.seen) < 40 and time.monotonic() < deadline:
        seat.seen += os.read(seat.master, 1 << 16).decode(errors="replace")
    assert "\x1b" not in seat.interrupt("(stopped)")
    seat.until("> ")
    seat.type("half a line")
    seat.until("half a line")
    seat.interrupt("(Ctrl-D leaves)")
    seat.type("/save said.jsonl\n/stats\n")
    seat.until("tokens read")
    seat.until("> ")
    seat.type("\x04")
    assert seat.process.wait(timeout=60) == 0
    os.close(seat.master)
    user, answer = json.loads((long.parent / "said.jsonl").read_text())["messages"]
    assert user["content"] == "the cat\nsat"
    assert answer["content"]
    assert {path.name for path in long.parent.iterdir()} == {"model", "said.jsonl"}  # HOME is left alone


def test_the_help_has_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    run_verb("chat", ["--cfg", "job"])
    keys = yaml.safe_load(capsys.readouterr().out)
    assert {"init", "system", "temperature", "max_new_tokens", "cache", "session"} <= keys.keys()
