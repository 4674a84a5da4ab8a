"""Many prompts from a file, their answers to another, line by line."""

import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Self

from omniloom.errors import ConfigError, DataError, did_you_mean
from omniloom.generate.chat import laid_out, read_turns
from omniloom.generate.config import DecodingConfig
from omniloom.generate.prompt import Prompter
from omniloom.generate.request import Answer, Request
from omniloom.generate.writer import Figures, Writer, record
from omniloom.modality.dialogue import STOPS

RECORDS = (".jsonl", ".ndjson", ".json")
BATCHES_AT_ONCE = 16  # whose prompts are in memory together


@dataclass(frozen=True)
class Prompt:
    """A prompt as it was asked: a text, or a conversation's messages."""

    where: str  # what errors call it
    asked: dict[str, Any]  # {"prompt": …} or {"messages": […]}
    folder: Path  # where relative paths begin

    def request(self, prompter: Prompter, decoding: DecodingConfig) -> Request:
        """Read its files; raises ConfigError and DataError, with its place."""
        try:
            if "prompt" in self.asked:
                document = prompter.document(self.asked["prompt"], self.folder)
            else:
                document = laid_out(prompter, read_turns(prompter, self.asked["messages"], self.folder))
                decoding = replace(decoding, stop=[*decoding.stop, *STOPS])
        except (ConfigError, DataError) as error:
            raise type(error)(f"{self.where}{error}") from error
        if len(document) >= (context := prompter.context):
            raise ConfigError(
                f"{self.where}a prompt of {len(document):,} tokens leaves no room in the model's context: "
                f"model.max_position_embeddings={context:,}"
            )
        return Request(document, decoding)


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a jsonl, or of a text file with one a line; empty lines are none.

    Raises ConfigError where there is no such file or nothing in it, DataError naming a line that is no prompt.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*") if p.is_file()))
        raise ConfigError(f"prompts={path} cannot be read ({error.strerror}); {near}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"prompts={path} is not UTF-8 at byte {error.start}") from error
    prompts = []
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}: "
            asked = _asked(line, where) if path.suffix in RECORDS else {"prompt": line.removesuffix("\r")}
            prompts.append(Prompt(where, asked, path.parent))
    if not prompts:
        raise ConfigError(f"prompts={path} holds no prompt")
    return prompts


def _asked(line: str, where: str) -> dict[str, Any]:
    try:
        read = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}not JSON: {error}") from error
    if not isinstance(read, dict) or ("prompt" in read) == ("messages" in read):
        raise DataError(f'{where}a line is {{"prompt": …}} or {{"messages": […]}}')
    if "messages" in read:
        return {"messages": read["messages"]}
    if not isinstance(read["prompt"], str):
        raise DataError(f"{where}prompt is no text")
    return {"prompt": read["prompt"]}


class AnswerFile:
    """Answers in the prompts' order, one line each; the file takes its name when all are there.

    Until then they stand beside it, behind a line that says what was asked of the model: the same command goes on after
    the last whole line that answers a prompt of the file as it is now.
    """

    def __init__(self, path: Path, asked: dict[str, Any], prompts: list[Prompt]) -> None:
        self._path, self._partial = path, path.with_name(f".{path.name}.partial")
        self._head = json.dumps(asked).encode() + b"\n"
        try:
            self._stream: BinaryIO = open(self._partial, "a+b")  # noqa: SIM115 — held until the end
        except OSError as error:
            raise ConfigError(f"out={path} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of when the process dies
        except OSError as error:
            self._stream.close()
            raise ConfigError(f"out={path} is being written by another command") from error
        self.done = self._take_up(prompts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def _take_up(self, prompts: list[Prompt]) -> int:
        """Cut the file back to what can be kept of it: how many answers."""
        self._stream.seek(0)
        head, done = self._stream.readline(), 0
        if head != self._head:
            self._stream.truncate(0)
            self._stream.write(self._head)
            self._stream.flush()
            return 0
        whole = self._stream.tell()
        for line in self._stream:
            if not line.endswith(b"\n") or done == len(prompts):
                break
            if _said(line) != prompts[done].asked:
                break
            whole, done = whole + len(line), done + 1
        self._stream.truncate(whole)
        return done

    def append(self, line: dict[str, Any]) -> None:
        """The next prompt's answer; it reaches the operating system before this returns."""
        self._stream.write(json.dumps(line).encode() + b"\n")
        self._stream.flush()

    def finish(self) -> None:
        """All are there: give the file its name, without the first line."""
        whole = self._path.with_name(f".{self._path.name}.whole")
        self._stream.seek(len(self._head))
        with whole.open("wb") as out:
            while part := self._stream.read(1 << 20):
                out.write(part)
            out.flush()
            os.fsync(out.fileno())
        whole.replace(self._path)
        self._partial.unlink()


def answer_all(
    writer: Writer, prompts: list[Prompt], decoding: DecodingConfig, n: int, batch_size: int, first: int = 0
) -> Iterator[dict[str, Any]]:
    """A line for each prompt from `first` on, in order; sample s of prompt i draws with seed + i·n + s.

    `writer.figures` are then those of all of them.
    """
    total, at_once = Figures(), max(1, BATCHES_AT_ONCE * batch_size // n)
    for start in range(first, len(prompts), at_once):
        group = prompts[start : start + at_once]
        requests = []
        for place, prompt in enumerate(group, start):
            one = prompt.request(writer.model.prompter, decoding)
            seeds = range(decoding.seed + place * n, decoding.seed + place * n + n)
            requests += [replace(one, decoding=replace(one.decoding, seed=seed)) for seed in seeds]
        answers: dict[int, Answer] = {}
        told = 0
        for event in writer.stream(requests):
            if event.answer.finish:
                answers[event.number] = event.answer
            while told < len(group) and all(told * n + sample in answers for sample in range(n)):
                samples = [answers.pop(told * n + sample) for sample in range(n)]
                yield {"index": start + told, **group[told].asked, **record(samples)}
                told += 1
        total = total.plus(writer.figures)
    writer.figures = total


def _said(line: bytes) -> dict[str, Any] | None:
    """What an answer's line says was asked; None where it is damaged."""
    try:
        return {key: value for key, value in json.loads(line).items() if key in ("prompt", "messages")}
    except (ValueError, AttributeError):
        return None
