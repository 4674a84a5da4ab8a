"""The terminal's side of a conversation: lines in, answers out as they come, commands that begin with /."""

import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

from omniloom.errors import ConfigError, DataError, did_you_mean
from omniloom.generate.chat import Part
from omniloom.generate.config import DecodingConfig
from omniloom.generate.prompt import Medium
from omniloom.generate.request import Answer
from omniloom.generate.session import Session
from omniloom.generate.writer import Meter
from omniloom.modality.dialogue import MEDIA

HELP = """\
/image FILE        a picture for the next message; /audio FILE, /video FILE; {image:FILE} inside a message
/regenerate        answer the last message again
/reset             forget what was said, but for the system prompt
/system [TEXT]     tell the model TEXT first of all; without TEXT, nothing
/keep TEXT         say TEXT, and never forget it, however long the conversation gets
/save FILE         what was said, as a line of messages, which tokenize (format: chat) and prompts= read
/stats             what the last answer took
/help, /exit       a line that ends in \\ goes on in the next; Ctrl-C stops an answer, Ctrl-D leaves"""


def show(text: str) -> None:
    """Print it at once, to a terminal without what would steer it."""
    if sys.stdout.isatty():
        text = "".join(one for one in text if unicodedata.category(one) != "Cc" or one in "\n\t")
    print(text, end="", flush=True)


class Terminal:
    """One conversation; where nobody sits at it, a message a line, and nothing but answers on stdout."""

    def __init__(self, session: Session, decoding: DecodingConfig) -> None:
        self.session, self._decoding, self._meter = session, decoding, Meter()
        self._attached: list[Medium] = []
        self._saved: set[Path] = set()
        self._is_seen = sys.stdin.isatty()
        self.failed = 0  # lines that could not be done
        self._commands: dict[str, Callable[[str], None]] = {
            **{kind: partial(self._attach, kind) for kind in MEDIA},
            "regenerate": self._regenerate,
            "reset": self._reset,
            "system": self._system,
            "save": self._save,
            "keep": lambda text: self._say(text, keep=True),
            "stats": lambda _: self._tell(self._meter.figures.told()),
            "help": lambda _: self._tell(HELP),
        }

    def run(self) -> None:
        """Until the end of the input, or /exit."""
        for line in self._lines():
            if line.strip() in ("/exit", "/quit", "/bye"):
                return
            try:
                self._do(line)
            except (ConfigError, DataError) as error:
                self.failed += 1
                self._tell(f"error: {error}")

    def _lines(self) -> Iterator[str]:
        if not self._is_seen:
            yield from (line.removesuffix("\n") for line in sys.stdin)
            return
        import readline  # noqa: F401 — input() then has a history of its own, which no file keeps

        lines: list[str] = []
        while True:
            try:
                lines.append(input(". " if lines else "> "))
            except EOFError:
                print()
                return
            except KeyboardInterrupt as interrupt:
                if str(interrupt):  # SIGTERM
                    raise
                lines = []
                print("\n(Ctrl-D leaves)")
                continue
            if lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1]
            else:
                yield "\n".join(lines)
                lines = []

    def _do(self, line: str) -> None:
        command, _, rest = line.strip().partition(" ")
        if command.startswith("/") and (name := command[1:]).isalpha():
            if name not in self._commands:
                raise ConfigError(f"unknown command {command}; {did_you_mean(name, [*self._commands, 'exit'])}")
            self._commands[name](rest.strip())
        elif line.strip():
            self._say(line)

    def _say(self, line: str, keep: bool = False) -> None:
        self._ask([*self._attached, *self.session.model.prompter.parts(line)], keep)
        self._attached = []

    def _ask(self, parts: list[Part], keep: bool = False) -> None:
        """Have a message answered; where no answer comes, it was not said."""
        session = self.session
        condensed = session.state.condensed
        answer = self._print(parts, keep)
        if session.state.condensed > condensed:
            context = session.model.prompter.context
            self._tell(f"(the context of {context:,} tokens was full: only what is kept, heavy or new is remembered)")
        if answer is None or not answer.text.strip():
            if answer is not None:
                session.take_back()
            self._tell("(no answer: the turn is taken back)")
        elif answer.finish == "length":
            self._tell(f"(cut after {len(answer.ids)} tokens: max_new_tokens={self._decoding.max_new_tokens}, or the "
                       "context is full)")  # fmt: skip

    def _print(self, parts: list[Part], keep: bool) -> Answer | None:
        """The answer, as it comes; what there is of it where Ctrl-C stopped it."""
        answer = None
        events = self._meter.watch(self.session.ask(parts, self._decoding, keep), self.session.cache)
        try:
            for event in events:
                text = event.text if answer is not None else event.text.removeprefix(" ")
                answer = event.answer
                show(text)
        except KeyboardInterrupt as interrupt:
            if str(interrupt) or not self._is_seen:
                raise
            self._tell("\n(stopped)")
            return answer
        finally:
            events.close()
        print(flush=True)
        return answer

    def _tell(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    # Commands.

    def _attach(self, kind: str, name: str) -> None:
        if not name:
            raise ConfigError(f"/{kind} needs a file")
        unquoted = name[1:-1] if name[0] == name[-1] and name[0] in "'\"" and len(name) > 1 else name
        medium = self.session.model.prompter.medium(kind, unquoted)
        self._attached.append(medium)
        self._tell(f"({sum(map(len, medium.segments)):,} tokens, for the next message)")

    def _regenerate(self, _: str) -> None:
        parts, keep = self.session.take_back()
        if not self._decoding.temperature:
            self._tell("(temperature=0 gives the same answer)")
        self._ask(parts, keep)

    def _reset(self, _: str) -> None:
        self._attached = []
        self.session.begin_again(self.session.system)

    def _system(self, text: str) -> None:
        self.session.begin_again(text or None, self.session.turns)

    def _save(self, name: str) -> None:
        if not name:
            raise ConfigError("/save needs a file")
        path = Path(os.path.expanduser(name))
        if path.exists() and path not in self._saved:
            raise ConfigError(f"{path} exists: name another file")
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps({"messages": self.session.messages()}) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise ConfigError(f"/save {path}: {error.strerror}") from error
        self._saved.add(path)


def utf8(stream: TextIO) -> None:
    """Read what is not UTF-8 too: whoever uses it says what is wrong with it."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(encoding="utf-8", errors="surrogateescape")
