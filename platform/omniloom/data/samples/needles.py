"""Facts hidden in text, and questions for all of them: how a model learns to look back."""

import random
import string
from collections.abc import Iterator
from typing import Any

from omniloom.data.samples.files import answered, asked, document
from omniloom.modality.text import TextTokenizer

NEEDLE = "The code of {key} is {value}."
QUESTION = "What is the code of {key}?"
# Documents of each length: a model that sees one often learns its answers by heart and never to look them up.
DOCUMENTS = {64: 6_000, 128: 4_500, 256: 3_600, 512: 2_400}
MOST_NEEDLES = 8
KEYS = (
    "apple bread chair dream eagle flame grape horse island jacket kettle lemon mirror needle ocean paper queen river "
    "stone table uncle valley window yellow zebra anchor basket candle desert engine forest garden hammer iron jungle "
    "knight ladder market north orange pencil quartz rocket silver tiger umbrella violin winter"
)


def haystacks(texts: list[str], tokenizer: TextTokenizer, tokens: int, generator: random.Random) -> list[str]:
    """About `tokens` tokens of consecutive sentences of a random text, as sentences."""
    sentences: list[str] = []
    left = tokens
    while left > 0:
        words = generator.choice(texts).split()
        at = generator.randrange(len(words))
        while left > 0 and at < len(words):
            sentence = " ".join(words[at : at + generator.randint(4, 12)])
            at += len(sentence.split())
            left -= len(tokenizer.encode(sentence)) + 1
            if left >= 0:
                sentences.append(sentence)
    return sentences


def needle_documents(
    texts: list[str], tokenizer: TextTokenizer, length: int, count: int, seed: int
) -> Iterator[dict[str, Any]]:
    """`count` documents of half of `length` to `length` tokens: 1 to 8 needles each, all asked, in another order.

    Many needles oftener than few: where there is one, no key need be looked at.
    """
    generator = random.Random(seed)
    cost = len(tokenizer.encode(NEEDLE.format(key="apple", value=1234))) + 1
    cost += len(tokenizer.encode(QUESTION.format(key="apple") + " 1234"))
    for _ in range(count):
        size = generator.randint(length // 2, length) - 4
        most = max(1, min(MOST_NEEDLES, size // (cost + 4)))
        needles = max(generator.randint(1, most), generator.randint(1, most))
        facts = dict(zip(generator.sample(KEYS.split(), needles), _values(needles, generator), strict=True))
        lines = haystacks(texts, tokenizer, size - needles * cost, generator)
        for key, value in facts.items():
            lines.insert(generator.randint(0, len(lines)), NEEDLE.format(key=key, value=value))
        segments = [asked(" ".join(lines))]
        for key in generator.sample(list(facts), needles):
            segments += [asked(f" {QUESTION.format(key=key)}"), answered(facts[key])]
        yield document(*segments)


def _values(count: int, generator: random.Random) -> list[str]:
    """Four digits each; in every second document alike in the first two, so that only the key tells them apart."""
    leading = generator.choice([string.digits, generator.sample(string.digits, 2)])
    return ["".join(generator.choices(leading, k=2) + generator.choices(string.digits, k=2)) for _ in range(count)]
