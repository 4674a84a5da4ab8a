"""Which document comes next: sources by weight, each shuffled anew every epoch. A function of its arguments alone."""

import numpy as np

from omniloom.data.corpus import Documents
from omniloom.data.shuffle import shuffled
from omniloom.errors import ConfigError, did_you_mean

CHUNK_TOKENS = 1 << 20  # drawn at a time; how many does not change what comes


def source_weights(names: list[str], manifest: list[float], replaced: dict[str, float], key: str) -> np.ndarray:
    """The manifest's weights with `replaced` put over them; raises ConfigError for an unknown source."""
    for name in replaced:
        if name not in names:
            raise ConfigError(f"data.{key}.{name} names no source of the corpus; {did_you_mean(name, names)}")
    return np.array([replaced.get(name, weight) for name, weight in zip(names, manifest, strict=True)])


class DocumentOrder:
    """Document numbers without end: each source in its own order, the sources merged by virtual time.

    Source s has a share p_s of the tokens, counted from where the weights were last set: a document begins at the
    time (tokens of s before it) / p_s, and the next to come is the one that begins first; at the same time the larger
    share goes first. So no source is ever further behind its share than one document. Epoch e of source s is the
    permutation that (seed, s, e) names, and goes on over changes of weight. Source: start-time fair queueing (Goyal,
    Vin and Cheng 1996). State: `drawn_S`, documents so far.
    """

    def __init__(self, documents: Documents, seed: int) -> None:
        self._documents, self._seed = documents, seed
        self.drawn_S = np.zeros(len(documents.names), np.int64)

    def weigh(self, weights_S: np.ndarray) -> None:
        """Set the weights, shares of tokens up to their sum; raises ConfigError where none has a document."""
        counts_S = np.diff(self._documents.first_S)
        share_S = np.where(counts_S > 0, weights_S, 0.0)
        if share_S.sum() <= 0:
            raise ConfigError("no source with a weight above 0 holds a training document: set data.weights.<source>")
        self._share_S = share_S / share_S.sum()
        self._given_S = np.zeros(len(share_S))
        self._now = 0.0

    def take(self) -> np.ndarray:
        """The next documents, of about CHUNK_TOKENS tokens, int64; none where none begins so soon."""
        self._now += CHUNK_TOKENS
        drawn = [self._begin_before_now(int(s)) for s in np.flatnonzero(self._share_S)]
        numbers, begins, shares = (np.concatenate(column) for column in zip(*drawn, strict=True))
        return numbers[np.lexsort((-shares, begins))]

    def put_back(self, numbers: np.ndarray) -> None:
        """Undo the drawing of the last documents that were taken; the weights must be set next."""
        source = np.searchsorted(self._documents.first_S, numbers, side="right") - 1
        self.drawn_S -= np.bincount(source, minlength=len(self.drawn_S))

    def _begin_before_now(self, source: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A source's next documents, when each begins, and the source's share beside each."""
        documents, share = self._documents, self._share_S[source]
        lengths = documents.lengths_S[source]
        mean = documents.tokens_S[source] / len(lengths)
        numbers, begins = [np.zeros(0, np.int64)], [np.zeros(0)]
        while self._given_S[source] / share < self._now:
            asked = int((self._now * share - self._given_S[source]) / mean) + 1
            places = self._places(source, len(lengths), min(asked, CHUNK_TOKENS))
            given = self._given_S[source] + np.cumsum([0, *lengths["tokens"][places]])
            begin = given[:-1] / share
            taken = int(np.searchsorted(begin, self._now))
            numbers.append(documents.first_S[source] + places[:taken])
            begins.append(begin[:taken])
            self._given_S[source] = given[taken]
            self.drawn_S[source] += taken
        found = np.concatenate(numbers)
        return found, np.concatenate(begins), np.full(len(found), share)

    def _places(self, source: int, count: int, asked: int) -> np.ndarray:
        """Where the source's next documents lie within it, over the ends of epochs."""
        drawn = self.drawn_S[source] + np.arange(asked)
        epoch, place = np.divmod(drawn, count)
        return shuffled(place, count, self._seed, source, epoch)
