"""How a model is decoded: what its cache keeps, how a token is drawn, how many requests go at once."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar

from omniloom.errors import ConfigError, refuse_unless_one_of

PRECISIONS = ("model", "fp32", "bf16", "int8")
MOST_TAKEN_BACK = 64  # tokens that a cache can take back: guesses, and what was written behind an answer's end


@dataclass
class CacheConfig:
    """What is cached of a token, and of which tokens.

    A model of latent attention caches its latents, another its keys and values; of sparse attention's positions those
    are kept that it may still see.
    """

    precision: str = "model"  # or fp32, bf16, int8: a scale a token, the rotary part of a latent stays bf16
    heavy_tokens: int | None = None  # keep so many, those that recent queries attend to most; None: all
    recent_tokens: int = 256  # and the newest beside them: half of these go at once, so that it is seldom
    observed_queries: int = 16  # the recent ones

    def check(self) -> None:
        """Raise ConfigError where a number cannot hold."""
        refuse_unless_one_of("cache.precision", self.precision, PRECISIONS)
        for key in ("heavy_tokens", "recent_tokens", "observed_queries"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"cache.{key}={value} must be at least 1")


@dataclass
class SamplingConfig:
    """How the next token is drawn from softmax(logits).

    In this order: the repetition penalty divides positive logits of tokens that occurred and multiplies negative ones;
    logits / temperature; then only the `top_k` likeliest, of these the smallest set whose mass reaches `top_p` (the
    likeliest always among them), of these such as have at least `min_p` times the likeliest's probability.
    """

    temperature: float = 0.0  # 0: the likeliest token
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError where a number cannot hold, not-a-numbers too."""
        if not 0.0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature} must be a number of at least 0; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} must be at least 1; leave it out to keep all tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p={self.top_p} must lie in (0, 1]; 1 keeps all tokens")
        if not 0.0 <= self.min_p <= 1.0:
            raise ConfigError(f"min_p={self.min_p} must lie in [0, 1]; 0 keeps all tokens")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty={self.repetition_penalty} must be a number above 0; 1 is none")
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} must fit 64 bits")


@dataclass
class DecodingConfig(SamplingConfig):
    """One request's decoding."""

    max_new_tokens: int = 256
    stop: list[str] = field(default_factory=list)  # ends before the first of these
    beams: int | None = None  # beam search of so many
    length_penalty: float = 1.0  # beam search: the sum of log-probabilities / length ^ this
    ignore_eos: bool = False

    def check(self) -> None:
        """Raise ConfigError where a number cannot hold or two keys contradict each other."""
        super().check()
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if any(not text for text in self.stop):
            raise ConfigError("stop holds an empty text, which would end everything at once")
        if self.beams is not None:
            if self.beams < 1:
                raise ConfigError(f"beams={self.beams} must be at least 1")
            drawn = self.temperature or self.top_k or self.top_p < 1 or self.min_p or self.repetition_penalty != 1
            if drawn:
                raise ConfigError(
                    f"beams={self.beams} searches, it does not draw: leave out temperature, top_k, top_p, min_p and "
                    "repetition_penalty"
                )
        if not -math.inf < self.length_penalty < math.inf:
            raise ConfigError(f"length_penalty={self.length_penalty} must be a number")


@dataclass
class EngineConfig:
    """How many requests are decoded at once."""

    batch_size: int = 8  # requests
    prefill_tokens: int = 2_048  # of prompts in one forward pass, so that memory is bounded whatever their length
    draft_tokens: int = 0  # speculative decoding: so many are guessed ahead
    cache: CacheConfig = field(default_factory=CacheConfig)

    def check(self) -> None:
        """Raise ConfigError where a number cannot hold."""
        self.cache.check()
        for key, least in (("batch_size", 1), ("prefill_tokens", 1), ("draft_tokens", 0)):
            if (value := getattr(self, key)) < least:
                raise ConfigError(f"{key}={value} must be at least {least}")
        if self.draft_tokens > MOST_TAKEN_BACK:
            raise ConfigError(f"draft_tokens={self.draft_tokens} is over the {MOST_TAKEN_BACK} that can be taken back")
        if self.draft_tokens and self.cache.heavy_tokens is not None:
            raise ConfigError(
                f"draft_tokens={self.draft_tokens} with cache.heavy_tokens={self.cache.heavy_tokens}: what is kept "
                "would hang on guesses; leave out one"
            )


Part = TypeVar("Part", DecodingConfig, EngineConfig)


@dataclass
class WriterConfig(SamplingConfig):
    """Which model writes, and how; what generating and chatting share."""

    init: str | None = None  # a run, a checkpoint or a model folder
    precision: str = "fp32"  # of the weights; or bf16
    max_new_tokens: int = DecodingConfig.max_new_tokens
    stop: list[str] = field(default_factory=list)
    prefill_tokens: int = EngineConfig.prefill_tokens
    cache: CacheConfig = field(default_factory=CacheConfig)
    runs_dir: str = "runs"

    def taken(self, kind: type[Part]) -> Part:
        """The fields that `kind` has, as one."""
        return kind(**{one.name: getattr(self, one.name) for one in fields(kind) if hasattr(self, one.name)})

    def check(self) -> None:
        """Raise ConfigError where no model is named or a number cannot hold."""
        if self.init is None:
            raise ConfigError("no model to write: set init=<run, checkpoint or model folder>")
        refuse_unless_one_of("precision", self.precision, ("fp32", "bf16"))
        self.taken(DecodingConfig).check()
        self.taken(EngineConfig).check()


@dataclass
class GenerateConfig(WriterConfig):
    """What comes after one prompt, or after many."""

    prompt: str | None = None  # text with {image:file}, {audio:file}, {video:file} in it, verbatim
    prompts: str | None = None  # a file: a prompt a line, or a jsonl of {"prompt": …} and {"messages": […]}
    out: str | None = None  # a jsonl, one line a prompt
    draft: str | None = None  # a smaller model, named as init, that guesses draft_tokens ahead
    draft_tokens: int = EngineConfig.draft_tokens
    n: int = 1  # samples of each prompt; number i of all draws with seed + i
    beams: int | None = None
    length_penalty: float = DecodingConfig.length_penalty
    ignore_eos: bool = False
    batch_size: int = EngineConfig.batch_size
    force: bool = False  # replace `out`

    def check(self) -> None:
        """Raise ConfigError where not exactly one of prompt and prompts is given, or keys contradict each other."""
        super().check()
        if (self.prompt is None) == (self.prompts is None):
            both = "both are given" if self.prompt is not None else "neither is given"
            raise ConfigError(f"exactly one of prompt=… and prompts=<file> says what to go on from: {both}")
        if self.draft is not None and not self.draft_tokens:
            raise ConfigError(f"draft={self.draft} guesses nothing with draft_tokens=0: set draft_tokens=4, or so")
        if self.prompts is not None and self.out is None:
            raise ConfigError(f"prompts={self.prompts} needs a file for the answers: set out=<name>.jsonl")
        if self.n < 1:
            raise ConfigError(f"n={self.n} must be at least 1")
        if self.n > 1 and (self.beams is not None or not self.temperature):
            how = "temperature=0" if self.beams is None else f"beams={self.beams}"
            raise ConfigError(f"n={self.n} samples with {how} would all be the same: set temperature=1, or leave out n")
        if self.beams is not None and self.draft_tokens:
            raise ConfigError(f"beam search takes no guesses: leave out draft_tokens={self.draft_tokens}")
        if self.out is not None and not Path(self.out).parent.is_dir():
            raise ConfigError(f"out={self.out}: there is no folder {Path(self.out).parent}")


@dataclass
class ChatConfig(WriterConfig):
    """A conversation in the terminal."""

    system: str | None = None  # what the model is told first, verbatim
    session: str | None = None  # a folder: the conversation goes on from there, and is kept there at the end
