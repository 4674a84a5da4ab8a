"""Which document comes next: sources by weight, each shuffled anew every epoch. A function of its arguments alone."""

from collections.abc import Iterator

import numpy as np

from omniloom.errors import ConfigError, did_you_mean


def source_weights(names: list[str], manifest: list[float], replaced: dict[str, float], key: str) -> np.ndarray:
    """The manifest's weights with `replaced` put over them; raises ConfigError for an unknown source."""
    for name in replaced:
        if name not in names:
            raise ConfigError(f"data.{key}.{name} names no source of the corpus; {did_you_mean(name, names)}")
    return np.array([replaced.get(name, weight) for name, weight in zip(names, manifest, strict=True)])


class DocumentOrder:
    """Document numbers without end: the next comes from the source furthest behind its share of the tokens.

    tokens and source int (documents,); `weights` (sources,), shares of tokens up to their sum, counted anew whenever
    they are set. Epoch e of source s is the permutation drawn from (seed, s, e), and goes on over changes of weight.
    """

    def __init__(self, tokens: np.ndarray, source: np.ndarray, weights: np.ndarray, seed: int) -> None:
        self._tokens = tokens
        self._members = [np.flatnonzero(source == s) for s in range(len(weights))]
        self._streams = [_epochs(members, seed, s) for s, members in enumerate(self._members)]
        self.weigh(weights)

    def weigh(self, weights: np.ndarray) -> None:
        """Set the weights; raises ConfigError where no source with weight has a document."""
        share = np.array([w if len(m) else 0.0 for w, m in zip(weights, self._members, strict=True)])
        if share.sum() <= 0:
            raise ConfigError("no source with a weight above 0 holds a training document: set data.weights.<source>")
        self._share = share / share.sum()
        self._given = np.zeros(len(weights))

    def __iter__(self) -> Iterator[int]:
        while True:
            behind = np.where(self._share > 0, self._share * self._given.sum() - self._given, -np.inf)
            # Ties, the very first choice among them, go to the largest share.
            chosen = int(np.lexsort((-self._share, -behind))[0])
            document = next(self._streams[chosen])
            self._given[chosen] += self._tokens[document]
            yield document


def _epochs(members: np.ndarray, seed: int, source: int) -> Iterator[int]:
    epoch = 0
    while True:
        yield from np.random.default_rng([seed, source, epoch]).permutation(members).tolist()
        epoch += 1
