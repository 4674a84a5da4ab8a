"""A loaded model that writes: `omniloom.load(path).generate(…)`."""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omniloom.errors import ConfigError, did_you_mean
from omniloom.generate import beam
from omniloom.generate.config import CacheConfig, DecodingConfig, EngineConfig
from omniloom.generate.engine import Engine
from omniloom.generate.forward import as_document
from omniloom.generate.kv_cache import DTYPES, KVCache
from omniloom.generate.prompt import Prompter
from omniloom.generate.request import Answer, Event, Request
from omniloom.generate.speculative import Drafter, ModelDrafter, ModulesDrafter
from omniloom.model.load import Model, load_model


class WritingModel(Model):
    """A model and what it needs to write."""

    _prompter: Prompter | None = None

    @property
    def prompter(self) -> Prompter:
        """Reads prompts for this model."""
        if self._prompter is None:
            self._prompter = Prompter(self)
        return self._prompter

    def generate(self, input_ids: Tensor, max_new_tokens: int = 256, **options: Any) -> Tensor:
        """Ids (B, T + new) of prompts (B, T), greedy unless `temperature` says otherwise; rows that end sooner are
        filled with eos.

        `options` are fields of DecodingConfig, EngineConfig and CacheConfig. Raises DataError on other ids, ConfigError
        on unknown options.
        """
        self.check_ids(input_ids)
        decoding, engine = _configs({"max_new_tokens": max_new_tokens} | options)
        prompts = [as_document(row.tolist(), self.config) for row in input_ids]
        requests = [Request(prompt, replace(decoding, seed=decoding.seed + i)) for i, prompt in enumerate(prompts)]
        answers = self.answers(requests, engine)
        longest = max(len(answer.ids) for answer in answers)
        written = torch.full((len(answers), longest), self.prompter.text.eos_id, dtype=input_ids.dtype)
        for row, answer in zip(written, answers, strict=True):
            row[: len(answer.ids)] = torch.tensor(answer.ids)
        return torch.cat([input_ids, written.to(input_ids.device)], dim=1)

    def write(self, prompts: str | list[str], draft: Model | None = None, **options: Any) -> list[Answer]:
        """What comes after each prompt, text with files in it: `Which digit is this? {image:seven.png}`.

        `options` as for `generate`; prompt i draws with seed + i. `draft` is a smaller model that guesses ahead,
        `draft_tokens` at a time.
        """
        decoding, engine = _configs(options)
        texts = [prompts] if isinstance(prompts, str) else prompts
        documents = [self.prompter.document(text) for text in texts]
        requests = [Request(one, replace(decoding, seed=decoding.seed + i)) for i, one in enumerate(documents)]
        return self.answers(requests, engine, draft)

    def answers(self, requests: list[Request], engine: EngineConfig, draft: Model | None = None) -> list[Answer]:
        """The answers in the requests' order; beam search gives its best."""
        if any(request.decoding.beams is not None for request in requests):
            if engine.draft_tokens:
                raise ConfigError(f"beam search takes no guesses: leave out draft_tokens={engine.draft_tokens}")
            for request in requests:
                request.decoding.check()
            each = (engine.cache, engine.prefill_tokens)
            return [beam.search(self.decoder, self.prompter.text, request, *each)[0] for request in requests]
        return self.engine(engine, draft).generate(requests)

    def stream(self, requests: list[Request], engine: EngineConfig, draft: Model | None = None) -> Iterator[Event]:
        """Every token as it comes."""
        return self.engine(engine, draft).stream(requests)

    def engine(self, config: EngineConfig, draft: Model | None = None, observes: bool = False) -> Engine:
        """What decodes requests with this model."""
        engine = Engine(self.decoder, self.prompter.text, config, observes)
        engine.draft = self._drafter(config, engine.cache, draft)
        return engine

    def _drafter(self, config: EngineConfig, cache: KVCache, draft: Model | None) -> Drafter | None:
        if not config.draft_tokens:
            if draft is not None:
                raise ConfigError("a draft model guesses draft_tokens=4 or so ahead; draft_tokens=0 asks for none")
            return None
        if draft is None:
            return ModulesDrafter(self.decoder, cache, config.draft_tokens)
        tokenizers = [(model.folder / "tokenizer.json").read_bytes() for model in (self, draft)]
        if tokenizers[0] != tokenizers[1]:
            raise ConfigError(f"the draft model {draft.folder} has another tokenizer than {self.folder}")
        return ModelDrafter(draft.decoder, self.decoder, config.draft_tokens, config.batch_size)


def load(path: Path) -> WritingModel:
    """Load a run, a checkpoint or a model folder, ours or Hugging Face's; raises CheckpointError."""
    model = load_model(path)
    return WritingModel(model.decoder, model.folder).eval()


def ready(path: Path, precision: str) -> WritingModel:
    """Load a model to write with: on the accelerator, if there is one, its weights in fp32 or bf16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load(path).to(device=device, dtype=DTYPES[precision])


def _configs(options: dict[str, Any]) -> tuple[DecodingConfig, EngineConfig]:
    """Options by name as the two configurations that have them."""
    if isinstance(options.get("stop"), str):
        options |= {"stop": [options["stop"]]}
    names = [{field.name for field in fields(kind)} - {"cache"} for kind in (DecodingConfig, EngineConfig, CacheConfig)]
    for name in options:
        if not any(name in known for known in names):
            raise ConfigError(f"unknown option {name}; {did_you_mean(name, set().union(*names))}")
    first, second, third = ({n: v for n, v in options.items() if n in known} for known in names)
    decoding, engine = DecodingConfig(**first), EngineConfig(**second, cache=CacheConfig(**third))
    decoding.check()
    engine.check()
    return decoding, engine
