"""Which document comes next: sources by weight, each shuffled anew every epoch. Pure: a function of its arguments."""

from collections.abc import Iterator

import numpy as np

from omniloom.errors import ConfigError, did_you_mean


def source_weights(names: list[str], manifest: list[float], replaced: dict[str, float], key: str) -> np.ndarray:
    """The manifest's weights with `replaced` put over them; raises ConfigError for an unknown source."""
    for name in replaced:
        if name not in names:
            raise ConfigError(f"data.{key}.{name} names no source of the corpus; {did_you_mean(name, names)}")
    return np.array([replaced.get(name, weight) for name, weight in zip(names, manifest, strict=True)])


def document_order(tokens: np.ndarray, source: np.ndarray, weights: np.ndarray, seed: int) -> Iterator[int]:
    """Document numbers without end: the next comes from the source furthest behind its share of the tokens.

    tokens and source int (documents,); weights (sources,), shares of tokens up to their sum. Epoch e of source s is
    the permutation drawn from (seed, s, e). Raises ConfigError where no source with weight has a document.
    """
    members = [np.flatnonzero(source == s) for s in range(len(weights))]
    share = np.array([w if len(m) else 0.0 for w, m in zip(weights, members, strict=True)])
    if share.sum() <= 0:
        raise ConfigError("no source with a weight above 0 holds a training document: set data.weights.<source>")
    share = share / share.sum()
    streams = [_epochs(m, seed, s) for s, m in enumerate(members)]
    given = np.zeros(len(weights))
    while True:
        behind = np.where(share > 0, share * given.sum() - given, -np.inf)
        # Ties, the very first choice among them, go to the largest share.
        chosen = int(np.lexsort((-share, -behind))[0])
        document = next(streams[chosen])
        given[chosen] += tokens[document]
        yield document


def _epochs(members: np.ndarray, seed: int, source: int) -> Iterator[int]:
    epoch = 0
    while True:
        yield from np.random.default_rng([seed, source, epoch]).permutation(members).tolist()
        epoch += 1
