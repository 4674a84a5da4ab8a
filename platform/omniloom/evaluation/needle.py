"""Needles in a haystack: facts hidden at chosen depths of texts of chosen lengths, and a question for one of them."""

import random
import string
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

from omniloom.errors import ConfigError, DataError
from omniloom.modality.text import TextTokenizer, load_tokenizer
from omniloom.model.load import config_of

KEYS = "apple bread chair river stone table window garden"


@dataclass
class Grid:
    """Which cells are measured, and in which words; `task_args.needle.<field>=` sets each."""

    lengths: list[int] = field(default_factory=list)  # tokens of prompt and answer; empty: 64, 128, … up to the context
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])  # 0 is the beginning
    per_cell: int = 20
    # Facts of an item, in turn, fewer where they would fill over half of it; one of them is asked.
    needles: list[int] = field(default_factory=lambda: [1, 4])
    digits: int = 4
    needle: str = "The code of {key} is {value}."
    question: str = "What is the code of {key}?"
    keys: list[str] = field(default_factory=lambda: KEYS.split())
    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError naming a key that cannot hold, with its rule."""
        rules = {
            "lengths": (all(length >= 1 for length in self.lengths), "each at least 1"),
            "depths": (self.depths and all(0 <= depth <= 1 for depth in self.depths), "one or more, 0 to 1"),
            "per_cell": (self.per_cell >= 1, "at least 1"),
            "needles": (self.needles and min(self.needles) >= 1, "one or more, each at least 1"),
            "digits": (self.digits >= 1, "at least 1"),
            "needle": (_fields(self.needle) == {"key", "value"}, "with {key} and {value}"),
            "question": (_fields(self.question) == {"key"}, "with {key}"),
            "keys": (self.keys, "one or more"),
        }
        for key, (holds, rule) in rules.items():
            if not holds:
                raise ConfigError(f"task_args.needle.{key}={getattr(self, key)} must be {rule}")


def _fields(template: str) -> set[str]:
    try:
        return {name for _, name, *_ in Formatter().parse(template) if name is not None}
    except ValueError:  # a brace alone
        return set()


def needle_items(texts: list[str], model: Path, grid: Grid) -> list[dict[str, Any]]:
    """One item a line of the grid: {prompt, answer, length, depth}, both together of `length` tokens or just under.

    The asked fact stands at word `depth` of the haystack, the others anywhere. Values are drawn anew for each item, so
    that nothing can be known by heart. Raises ConfigError where a length is over the model's context or too short.
    """
    grid.check()
    tokenizer = load_tokenizer(model / "tokenizer.json", may_be_foreign=True)
    context = config_of(model).max_position_embeddings
    lengths = grid.lengths or [2**power for power in range(6, 31) if 2**power <= context]
    for length in lengths:
        if length > context:
            raise ConfigError(f"task_args.needle.lengths: {length} is over the model's context of {context} tokens")
    if not lengths:
        raise ConfigError(f"the model's context of {context} tokens holds no needle task: set task_args.needle.lengths")
    words = " ".join(texts).split()
    if not words:
        raise DataError("task needle: its haystack holds no word: set task_args.needle.files=[…]")
    generator = random.Random(grid.seed)
    return [
        _item(words, tokenizer, length, depth, grid.needles[number % len(grid.needles)], grid, generator)
        for length in lengths
        for depth in grid.depths
        for number in range(grid.per_cell)
    ]


def _item(
    words: list[str],
    tokenizer: TextTokenizer,
    length: int,
    depth: float,
    needles: int,
    grid: Grid,
    generator: random.Random,
) -> dict[str, Any]:
    keys = generator.sample(grid.keys, min(needles, len(grid.keys)))
    facts = {key: "".join(generator.choices(string.digits, k=grid.digits)) for key in keys}
    question = " " + grid.question.format(key=keys[0])
    asked, *others = [grid.needle.format(key=key, value=value) for key, value in facts.items()]
    places = [generator.random() for _ in others]
    start = generator.randrange(len(words))

    def prompt(count: int) -> str:
        hay = [words[(start + i) % len(words)] for i in range(count)]
        inserted = sorted(
            [(round(depth * count), asked), *((round(p * count), o) for p, o in zip(places, others, strict=True))]
        )
        for place, fact in reversed(inserted):
            hay.insert(place, fact)
        return " ".join(hay) + question

    def tokens(count: int) -> int:
        return 1 + len(tokenizer.encode(prompt(count) + f" {facts[keys[0]]}"))  # 1: bos

    # A haystack is hay: the facts take at most half of it and leave room for some, so that a short one holds fewer.
    while others and (2 * len(tokenizer.encode(" ".join([asked, *others]))) > length or tokens(4) > length):
        others.pop()
        places.pop()
    if tokens(0) > length:
        raise DataError(f"a needle and its question take {tokens(0)} tokens: task_args.needle.lengths has {length}")
    low, high = 0, length
    while low < high:  # the most words that fit
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tokens(middle) <= length else (low, middle - 1)
    return {"prompt": prompt(low), "answer": facts[keys[0]], "length": length, "depth": depth}
