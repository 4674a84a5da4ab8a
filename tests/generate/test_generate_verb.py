"""`omniloom generate` as it is typed: what it prints and writes, what it refuses, where it goes on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import omniloom
from omniloom.cli import run_verb
from omniloom.compose import run_job
from omniloom.generate import prompts as prompts_module
from omniloom.overrides import absolute_paths
from omniloom.settings import GenerateSettings
from tiny_folders import audible, colourful, save_tiny

CONTEXT = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a picture, a sound, a picture that is none, and a model of text alone."""
    folder = tmp_path_factory.mktemp("generate")
    save_tiny(folder / "model", max_position_embeddings=CONTEXT, num_nextn_predict_layers=1)
    save_tiny(folder / "text", max_position_embeddings=CONTEXT, image_patch_pixels=None, audio_mels=None)
    colourful(folder / "pictures", 2)
    audible(folder / "sounds", 1)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not a picture")
    return folder


@pytest.fixture
def there(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own, to be in; the models and files are linked there."""
    for name in ("model", "text", "pictures", "sounds", "broken.png"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generate(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    run_verb("generate", ["init=model", "max_new_tokens=8", *words])
    said = capsys.readouterr()
    return said.out, said.err


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        run_verb("generate", list(words))
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (1, "")
    assert said.err.startswith("error: ")
    assert said.err.count("error") == 1
    return said.err


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_answer_goes_to_stdout_and_what_it_took_to_stderr(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "{image:pictures/0.png} the cat {audio:sounds/0.wav}"
    out, err = generate(capsys, f"prompt={prompt}")
    (answer,) = omniloom.load(there / "model").write(prompt, max_new_tokens=8)
    assert out == f"{answer.text}\n"
    assert err.startswith(f"ended by {answer.finish}; {answer.prompt_tokens} tokens read; {len(answer.ids)} written, ")
    assert "96 bytes cached of each" in err


def test_json_is_one_object(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = generate(capsys, "prompt=the cat", "--json", "draft_tokens=1")
    said = json.loads(out)
    (answer,) = omniloom.load(there / "model").write("the cat", max_new_tokens=8)
    assert err == ""
    assert (said["text"], said["ids"], said["finish"]) == (answer.text, answer.ids, answer.finish)
    assert said["logprobs"] == pytest.approx(answer.logprobs, abs=1e-4)
    assert said["entropies"] == pytest.approx(answer.entropies, abs=1e-4)
    assert said["tokens"] == len(answer.ids)
    assert said["tokens_per_s"] > 0
    assert said["cache_bytes_per_token"] > 0
    assert said["drafted"] >= said["accepted"]


def test_samples_draw_with_seeds_that_follow_each_other(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("prompt=the cat", "temperature=1", "--json")
    samples = json.loads(generate(capsys, *words, "n=3", "seed=5")[0])["samples"]
    alone = [json.loads(generate(capsys, *words, f"seed={seed}")[0]) for seed in (5, 6, 7)]
    assert [one["ids"] for one in samples] == [one["ids"] for one in alone]
    assert len({tuple(one["ids"]) for one in samples}) > 1
    assert generate(capsys, *words[:2], "n=2")[0].startswith("--- 0, ended by ")


def test_beams_a_draft_and_a_cache_of_int8(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = generate(capsys, "prompt=the cat")[0]
    assert generate(capsys, "prompt=the cat", "beams=1")[0] == greedy
    assert generate(capsys, "prompt=the cat", "draft=text", "draft_tokens=2")[0] == greedy
    assert generate(capsys, "prompt=the cat", "precision=bf16")[0]
    eight = json.loads(generate(capsys, "prompt=the cat", "cache.precision=int8", "--json")[0])
    full = json.loads(generate(capsys, "prompt=the cat", "--json")[0])
    assert eight["cache_bytes_per_token"] < full["cache_bytes_per_token"]


def test_a_prompt_is_taken_verbatim(monkeypatch: pytest.MonkeyPatch) -> None:
    """Braces, quotes, interpolations, line ends: whatever Hydra's grammar would make of them."""
    draw = random.Random(0)
    pieces = [*"\\'\"{}[](),=: \n\tab$#%~+", "${", "\\${", "${oc.env:HOME}", "null", "{image:a.png}"]
    texts = ["", " a ", "null", "[1,2]", *("".join(draw.choices(pieces, k=draw.randint(1, 9))) for _ in range(25))]
    seen: list[str | None] = []
    for text in texts:
        monkeypatch.setattr("sys.argv", ["omniloom generate", f"prompt={text}"])
        run_job("generate_text", GenerateSettings, lambda settings: seen.append(settings.prompt))
    assert seen == texts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompt=a"], "no model to write: set init="),
        (["init=modle", "prompt=a"], "init=modle is neither a run in runs nor a folder"),
        (["init=model"], "exactly one of prompt=… and prompts=<file> says what to go on from: neither is given"),
        (["init=model", "prompt=a", "prompts=b"], "both are given"),
        (["init=model", "prompts=b.txt"], "prompts=b.txt needs a file for the answers: set out="),
        (["init=model", "prompt="], "the prompt is empty"),
        (["init=model", "prompt= \n"], "the prompt is empty"),
        (["init=model", f"prompt={'the cat ' * CONTEXT}"], f"model.max_position_embeddings={CONTEXT}"),
        (["init=model", "prompt=a", "temprature=1"], "unknown key temprature; did you mean 'temperature'?"),
        (["init=model", "prompt=a", "cache.precison=int8"], "did you mean 'cache.precision'?"),
        (["init=model", "prompt=a", "temperature=nan"], "temperature=nan must be a number of at least 0"),
        (["init=model", "prompt=a", "top_p=0"], "top_p=0.0 must lie in (0, 1]"),
        (["init=model", "prompt=a", "cache.precision=int4"], "cache.precision=int4 is none of model, fp32, bf16, int8"),
        (["init=model", "prompt=a", "precision=fp64"], "precision=fp64 is none of fp32, bf16"),
        (["init=model", "prompt=a", "n=3"], "n=3 samples with temperature=0 would all be the same"),
        (["init=model", "prompt=a", "beams=2", "draft_tokens=1"], "beam search takes no guesses"),
        (["init=model", "prompt=a", "draft=text"], "draft=text guesses nothing with draft_tokens=0"),
        (["init=model", "prompt=a", "draft=tixt", "draft_tokens=1"], "draft=tixt is neither a run"),
        (["init=text", "prompt=a", "draft_tokens=1"], "the model has 0 modules that predict ahead"),
        (["init=text", "prompt={image:pictures/0.png}"], "the model has no encoder for image"),
        (["init=model", "prompt={imagee:pictures/0.png}"], "did you mean 'image'?"),
        (["init=model", "prompt=a {image:nowhere.png}"], "cannot read nowhere.png: No such file"),
        (["init=model", "prompt={image:broken.png}"], "broken.png"),
        (["init=model", "prompt={image:https://a/b.png}"], "is no file"),
        (["init=model", "prompt=\udcff"], "the prompt is not UTF-8, from character 0 on"),
        (["init=model", "prompts=nowhere.txt", "out=a.jsonl"], "prompts=nowhere.txt cannot be read"),
        (["init=model", "prompt=a", "out=nowhere/a.jsonl"], "there is no folder nowhere"),
        (["init=model", "prompt=a", "cluster.address=head:6379"], "omniloom submit generate"),
    ],
)
def test_bad_input_is_one_message(
    words: list[str], message: str, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, *words)


ASKED = [
    {"prompt": "the cat"},
    {"prompt": "{image:pictures/1.png} the dog"},
    {
        "messages": [
            {"role": "system", "content": "the log"},
            {"role": "user", "content": "{image:pictures/0.png} c"},
        ]
    },
    {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "sounds/0.wav"}]}]},
    {"prompt": "sat on the mat"},
]


def ask(path: Path, asked: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in asked))


def test_a_file_of_prompts_becomes_a_file_of_answers_in_order(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files are named from the prompts' own folder."""
    (there / "asked").mkdir()
    for name in ("pictures", "sounds"):
        (there / "asked" / name).symlink_to(there / name)
    ask(there / "asked" / "asked.jsonl", ASKED)
    out, _ = generate(capsys, "prompts=asked/asked.jsonl", "out=told.jsonl", "batch_size=2")
    assert out == "told.jsonl\n"
    told = lines(there / "told.jsonl")
    assert [{key: one[key] for key in ASKED[i]} for i, one in enumerate(told)] == ASKED
    assert [one["index"] for one in told] == [0, 1, 2, 3, 4]
    model = omniloom.load(there / "model")
    for i in (0, 1, 4):
        assert told[i]["ids"] == model.write(ASKED[i]["prompt"], max_new_tokens=8)[0].ids
    laid_out = "system: the log\n\nuser:{image:pictures/0.png} c\n\nassistant:"  # no blank before a picture
    assert told[2]["ids"] == model.write(laid_out, max_new_tokens=8)[0].ids
    assert list(there.glob(".*")) == []
    assert "out=told.jsonl exists" in refused(capsys, "init=model", "prompt=a", "out=told.jsonl")
    said = json.loads(generate(capsys, "prompt=a", "out=told.jsonl", "force=true", "--json")[0])
    assert (said["prompts"], len(lines(there / "told.jsonl"))) == (1, 1)


def test_a_text_file_has_a_prompt_a_line(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (there / "asked.txt").write_text("the cat\n\nthe dog\r\n")
    generate(capsys, "prompts=asked.txt", "out=told.jsonl", "n=2", "temperature=1")
    told = lines(there / "told.jsonl")
    assert [one["prompt"] for one in told] == ["the cat", "the dog"]
    model = omniloom.load(there / "model")
    for i, one in enumerate(told):
        for s, sample in enumerate(one["samples"]):
            alone = model.write(one["prompt"], max_new_tokens=8, temperature=1.0, seed=2 * i + s)
            assert sample["ids"] == alone[0].ids


def test_a_bad_line_is_named_and_mended_the_same_command_goes_on(
    there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts_module, "BATCHES_AT_ONCE", 1)
    words = ("prompts=asked.jsonl", "out=told.jsonl", "batch_size=2")
    ask(there / "asked.jsonl", [*ASKED[:4], {"prompt": "{image:later.png}"}])
    message = refused(capsys, "init=model", "max_new_tokens=8", *words)
    assert "asked.jsonl:5: cannot read later.png" in message
    assert not (there / "told.jsonl").exists()
    with (there / ".told.jsonl.partial").open("ab") as partial:
        partial.write(b'{"index": 4, "prompt": "{im')  # torn off
    os.link(there / "pictures" / "0.png", there / "later.png")
    assert "4 of 5 are answered already" in generate(capsys, *words)[1]
    assert [one["index"] for one in lines(there / "told.jsonl")] == [0, 1, 2, 3, 4]
    # Another model, other keys or another prompt before are answered anew.
    whole = lines(there / "told.jsonl")
    (there / "told.jsonl").unlink()
    (there / "later.png").unlink()
    refused(capsys, "init=model", "max_new_tokens=8", *words)
    ask(there / "asked.jsonl", [ASKED[0], {"prompt": "on"}, *ASKED[2:4]])
    assert "1 of 4 are answered already" in generate(capsys, *words)[1]
    assert [one["ids"] for one in lines(there / "told.jsonl")][2:] == [one["ids"] for one in whole[2:4]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"promt": "a"}\n', 'asked.jsonl:2: a line is {"prompt": …} or {"messages": […]}'),
        ('{"prompt": 3}', "asked.jsonl:1: prompt is no text"),
        ('{"prompt": "a"', "asked.jsonl:1: not JSON"),
        ('{"prompt": ""}', "asked.jsonl:1: the prompt is empty"),
        ('{"messages": []}', "asked.jsonl:1: messages is no list of turns, or an empty one"),
        ('{"messages": [{"role": "usr", "content": "a"}]}', "did you mean 'user'?"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "there is nothing to answer"),
        ('{"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]}', "cannot read x.png"),
        (json.dumps({"prompt": "the cat " * CONTEXT}), "asked.jsonl:1: a prompt of"),
        ("\n", "prompts=asked.jsonl holds no prompt"),
    ],
)
def test_a_file_that_is_no_prompts(text: str, message: str, there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (there / "asked.jsonl").write_text(text)
    assert message in refused(capsys, "init=model", "prompts=asked.jsonl", "out=told.jsonl")
    assert not (there / "told.jsonl").exists()


def test_messages_end_where_the_next_turn_would_begin(there: Path) -> None:
    from omniloom.generate.config import DecodingConfig
    from omniloom.generate.prompts import Prompt

    prompter = omniloom.load(there / "model").prompter
    messages = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "dog"}, ASKED[2]["messages"][1]]
    request = Prompt("", {"messages": messages}, there).request(prompter, DecodingConfig(stop=["x"]))
    assert request.decoding.stop[:3] == ["x", "\n\nsystem:", "\n\ndeveloper:"]
    text = request.prompt.input_ids[request.prompt.modality == 0]
    assert prompter.text.decode(text) == "user: cat\n\nassistant: dog\n\nuser: c\n\nassistant:"


def test_ctrl_c_ends_it_with_one_line_and_the_status_of_a_shell(there: Path) -> None:
    words = ["init=model", "prompts=asked.jsonl", "out=told.jsonl", "batch_size=1", "max_new_tokens=90"]
    ask(there / "asked.jsonl", [{"prompt": "the cat"}] * 500)
    command = [sys.executable, "-m", "omniloom", "generate", *words, "ignore_eos=true"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    partial = there / ".told.jsonl.partial"
    deadline = time.monotonic() + 100
    while (not partial.exists() or partial.read_bytes().count(b"\n") < 4) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "interrupted: repeat the command to go on\n"
    assert not (there / "told.jsonl").exists()
    assert [json.loads(line)["index"] for line in partial.read_text().splitlines()[1:-1]][:2] == [0, 1]


def test_a_job_on_a_cluster_has_its_files_by_absolute_paths(there: Path) -> None:
    settings = GenerateSettings(init="model", draft="text", prompts="a.jsonl", out="b.jsonl", runs_dir="runs")
    words = absolute_paths(settings)
    assert words == [
        f"{key}='{there / name}'"
        for key, name in (("runs_dir", "runs"), ("prompts", "a.jsonl"), ("out", "b.jsonl"), ("init", "model"))
    ] + [f"draft='{there / 'text'}'"]
