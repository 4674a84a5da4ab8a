"""A conversation with a trained model: `omniloom chat init=first`."""

import sys

from omniloom.compose import run_job
from omniloom.errors import ConfigError
from omniloom.settings import ChatSettings


def main(settings: ChatSettings) -> None:
    settings.check()
    from omniloom.generate.chat import Conversation
    from omniloom.generate.config import DecodingConfig, EngineConfig
    from omniloom.generate.model import ready
    from omniloom.generate.terminal import Terminal, utf8
    from omniloom.generate.writer import Writer
    from omniloom.track.run_directory import locate

    places = [locate(name, settings.runs_dir, key) for key in ("init", "draft") if (name := getattr(settings, key))]
    model, *draft = [ready(place.with_model(), settings.precision) for place in places]
    engine = settings.taken(EngineConfig)
    engine.batch_size = 1  # whose cache the next turn goes on from
    writer = Writer(model, engine, *draft)
    utf8(sys.stdin)
    terminal = Terminal(writer, Conversation(model.prompter, settings.system), settings.taken(DecodingConfig))
    if sys.stdin.isatty():
        print(f"{settings.init}: a message, or /help", file=sys.stderr)
    terminal.run()
    if terminal.failed and not sys.stdin.isatty():
        raise ConfigError(f"{terminal.failed} of the lines could not be done")


if __name__ == "__main__":
    run_job("chat", ChatSettings, main)
