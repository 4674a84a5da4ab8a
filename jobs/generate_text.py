"""What a trained model writes: `omniloom generate init=demo prompt="{image:seven.png} Which digit is this?"`."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omniloom.compose import run_job
from omniloom.errors import ConfigError
from omniloom.settings import GenerateSettings

if TYPE_CHECKING:
    from omniloom.generate.prompts import Prompt
    from omniloom.generate.writer import Writer


def to_terminal(writer: "Writer", prompt: "Prompt", settings: GenerateSettings) -> None:
    """One prompt's answer as it comes, or all of several."""
    from omniloom.generate.config import DecodingConfig
    from omniloom.generate.prompts import answer_all
    from omniloom.generate.terminal import show

    decoding = settings.taken(DecodingConfig)
    if settings.json or settings.n > 1:
        (line,) = answer_all(writer, [prompt], decoding, settings.n, settings.batch_size)
        if settings.json:
            print(json.dumps(line | writer.figures.as_dict()))
            return
        for number, sample in enumerate(line["samples"]):
            print(f"--- {number}, ended by {sample['finish']}")
            show(f"{sample['text']}\n")
    else:
        for event in writer.stream([prompt.request(writer.model.prompter, decoding)]):
            show(event.text)
        print()
        print(f"ended by {event.answer.finish}; ", end="", file=sys.stderr)
    print(writer.figures.told(), file=sys.stderr)


def to_file(writer: "Writer", prompts: list["Prompt"], settings: GenerateSettings, asked: dict[str, str]) -> None:
    """Every prompt's answer as a line of `out`."""
    from tqdm import tqdm

    from omniloom.generate.config import DecodingConfig
    from omniloom.generate.prompts import AnswerFile, answer_all

    decoding = settings.taken(DecodingConfig)
    with AnswerFile(Path(settings.out or ""), asked, prompts) as file:
        if file.done:
            print(f"{file.done:,} of {len(prompts):,} are answered already", file=sys.stderr)
        lines = answer_all(writer, prompts, decoding, settings.n, settings.batch_size, file.done)
        for line in tqdm(lines, "prompts", len(prompts), initial=file.done, disable=None):
            file.append(line)
        file.finish()
    if settings.json:
        print(json.dumps({"out": settings.out, "prompts": len(prompts)} | writer.figures.as_dict()))
    else:
        print(settings.out)
        print(writer.figures.told(), file=sys.stderr)


def main(settings: GenerateSettings) -> None:
    settings.check()
    if settings.cluster.address is not None and "RAY_ADDRESS" not in os.environ:  # which every job has
        raise ConfigError(
            f"generate runs in this process; as a job of cluster.address={settings.cluster.address}: omniloom submit "
            "generate …"
        )
    if settings.out is not None and Path(settings.out).exists() and not settings.force:
        raise ConfigError(f"out={settings.out} exists: name another file, or set force=true")
    from omniloom.generate.config import DecodingConfig, EngineConfig
    from omniloom.generate.model import ready
    from omniloom.generate.prompts import Prompt, read_prompts
    from omniloom.generate.writer import Writer
    from omniloom.track.run_directory import locate

    named = None if settings.prompts is None else Path(settings.prompts)
    prompts = [Prompt("", {"prompt": settings.prompt}, Path())] if named is None else read_prompts(named)
    places = [locate(name, settings.runs_dir, key) for key in ("init", "draft") if (name := getattr(settings, key))]
    model, *draft = [ready(place.with_model(), settings.precision) for place in places]
    writer = Writer(model, settings.taken(EngineConfig), *draft)
    if settings.out is None:
        to_terminal(writer, prompts[0], settings)
        return
    keys = ("init", "draft", "draft_tokens", "precision", "n", "cache")  # and what `init` stands for now
    asked = {key: str(getattr(settings, key)) for key in keys} | {"model": str(model.folder)}
    to_file(writer, prompts, settings, asked | {"decoding": str(settings.taken(DecodingConfig))})


if __name__ == "__main__":
    run_job("generate_text", GenerateSettings, main)
