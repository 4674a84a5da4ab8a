"""A conversation with a trained model: `omniloom chat init=first`."""

import sys
from pathlib import Path

from omniloom.compose import run_job
from omniloom.errors import ConfigError
from omniloom.settings import ChatSettings


def main(settings: ChatSettings) -> None:
    settings.check()
    from omniloom.generate.config import CacheConfig, DecodingConfig
    from omniloom.generate.model import ready
    from omniloom.generate.session import FILE, Session
    from omniloom.generate.terminal import Terminal, utf8
    from omniloom.track.run_directory import locate

    model = ready(locate(settings.init or "", settings.runs_dir).with_model(), settings.precision)
    folder = None if settings.session is None else Path(settings.session)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)  # before anything is said
        except OSError as error:
            raise ConfigError(f"session={folder} cannot be a folder: {error.strerror}") from error
    if folder is not None and (folder / FILE).is_file():
        session = Session.open(folder, model, settings.prefill_tokens)
        if settings.system is not None and settings.system != session.system:
            raise ConfigError(f"session={folder} was begun with another system prompt: leave out system=, or /system")
        if settings.cache not in (CacheConfig(), session.cache.config):
            raise ConfigError(f"session={folder} was begun with another cache: leave out cache.…, or name a new one")
        print(f"{folder}: goes on after {len(session.turns)} turns", file=sys.stderr)
    else:
        session = Session(model, settings.cache, settings.system, settings.prefill_tokens)
    utf8(sys.stdin)
    terminal = Terminal(session, settings.taken(DecodingConfig))
    if sys.stdin.isatty():
        print(f"{settings.init}: a message, or /help", file=sys.stderr)
    try:
        terminal.run()
    finally:  # also where it is told to end
        if folder is not None and (session.turns or (folder / FILE).is_file()):
            session.save(folder)
    if terminal.failed and not sys.stdin.isatty():
        raise ConfigError(f"{terminal.failed} of the lines could not be done")


if __name__ == "__main__":
    run_job("chat", ChatSettings, main)
