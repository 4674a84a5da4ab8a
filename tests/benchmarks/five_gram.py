"""What a 5-gram over bytes knows of the demo's text: interpolated Kneser-Ney, bits per byte of the held-out topics.

python tests/benchmarks/five_gram.py [corpora/demo]      (makes the sample files where they are missing)
"""

import math
import sys
from collections import Counter, defaultdict
from pathlib import Path

from omniloom.data.samples import write_samples

ORDER, DISCOUNT = 5, 0.75
START = 256


class KneserNey:
    """p_n(w|h) = max(c(hw) − D, 0)/c(h·) + D·N₁₊(h·)/c(h·) · p_{n−1}(w|h′); lower orders count distinct histories."""

    def __init__(self, texts: list[bytes], order: int, discount: float) -> None:
        self.order, self.discount = order, discount
        counts: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order + 1)]
        for text in texts:
            symbols = [START] * (order - 1) + list(text)
            counts[order].update(zip(*(symbols[i:] for i in range(order)), strict=False))
        for n in range(order - 1, 0, -1):  # continuation counts: how many symbols stand before the n-gram
            counts[n].update(gram[1:] for gram in counts[n + 1])
        self.counts = counts
        self.total: list[dict[tuple[int, ...], int]] = []
        self.followers: list[dict[tuple[int, ...], int]] = []
        for n in range(order + 1):
            total: dict[tuple[int, ...], int] = defaultdict(int)
            followers: dict[tuple[int, ...], int] = defaultdict(int)
            for gram, count in counts[n].items():
                total[gram[:-1]] += count
                followers[gram[:-1]] += 1
            self.total.append(total)
            self.followers.append(followers)

    def probability(self, history: tuple[int, ...], symbol: int) -> float:
        value = 1 / 256
        for n in range(1, self.order + 1):
            context = history[len(history) - n + 1 :]
            total = self.total[n].get(context, 0)
            if total:
                count = self.counts[n].get((*context, symbol), 0)
                kept = max(count - self.discount, 0) / total
                value = kept + self.discount * self.followers[n][context] / total * value
        return value

    def bits_per_byte(self, texts: list[bytes]) -> float:
        bits = 0.0
        for text in texts:
            symbols = [START] * (self.order - 1) + list(text)
            for at in range(self.order - 1, len(symbols)):
                bits -= math.log2(self.probability(tuple(symbols[at - self.order + 1 : at]), symbols[at]))
        return bits / sum(map(len, texts))


def main(corpus: Path) -> None:
    write_samples("demo", corpus / "files")
    train, heldout = (
        [path.read_bytes() for path in sorted((corpus / "files" / "topics" / split).glob("*.txt"))]
        for split in ("train", "heldout")
    )
    print(f"{sum(map(len, train)):,} training bytes, {sum(map(len, heldout)):,} held out")
    for order in range(1, ORDER + 2):
        print(f"  {order}-gram: {KneserNey(train, order, DISCOUNT).bits_per_byte(heldout):.3f} bits a byte")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "corpora/demo"))
