"""Which document comes next: sources by weight, each shuffled anew every epoch. A function of its arguments alone."""

import numpy as np

from omniloom.data.corpus import Documents
from omniloom.data.pack import PIECE
from omniloom.data.shuffle import shuffled
from omniloom.errors import ConfigError, did_you_mean

CHUNK_TOKENS = 1 << 16  # drawn at a time; how many does not change what comes


def source_weights(names: list[str], manifest: list[float], replaced: dict[str, float], key: str) -> np.ndarray:
    """The manifest's weights with `replaced` put over them; raises ConfigError for an unknown source."""
    for name in replaced:
        if name not in names:
            raise ConfigError(f"data.{key}.{name} names no source of the corpus; {did_you_mean(name, names)}")
    return np.array([replaced.get(name, weight) for name, weight in zip(names, manifest, strict=True)])


class DocumentOrder:
    """Documents without end: each source in its own order, the sources merged by virtual time.

    Source s has a share p_s of the tokens, counted from where the weights were last set: a document begins at the
    time (tokens of s before it) / p_s, and the next to come is the one that begins first; at the same time the larger
    share goes first. So no source is ever further behind its share than one document. Epoch e of source s is the
    permutation that (seed, s, e) names, and goes on over changes of weight. Source: start-time fair queueing (Goyal,
    Vin and Cheng 1996).
    """

    def __init__(self, documents: Documents, seed: int) -> None:
        self._documents, self._seed = documents, seed
        self._drawn_S = np.zeros(len(documents.names), np.int64)  # documents, whatever was put back
        self._returned = [np.zeros(0, PIECE) for _ in documents.names]  # what comes before documents not drawn yet
        self._begun_S = np.zeros(len(documents.names), np.int64)  # documents whose first token was not put back

    @property
    def epochs_S(self) -> np.ndarray:
        """How often each source was gone through, in documents that were begun."""
        return self._begun_S / np.maximum(np.diff(self._documents.first_S), 1)

    def weigh(self, weights_S: np.ndarray) -> None:
        """Set the weights, shares of tokens up to their sum; raises ConfigError where none has a document."""
        counts_S = np.diff(self._documents.first_S)
        share_S = np.where((counts_S > 0) & self._documents.is_streamed_S, weights_S, 0.0)
        if share_S.sum() <= 0:
            raise ConfigError("no source with a weight above 0 holds a training document: set data.weights.<source>")
        self._share_S = share_S / share_S.sum()
        self._given_S = np.zeros(len(share_S))
        self._now = 0.0

    def take(self) -> np.ndarray:
        """The next documents, of about CHUNK_TOKENS tokens, PIECE; none where none begins so soon."""
        self._now += CHUNK_TOKENS
        drawn = [self._begin_before_now(int(s)) for s in np.flatnonzero(self._share_S)]
        pieces, begins, shares = (np.concatenate(column) for column in zip(*drawn, strict=True))
        return pieces[np.lexsort((-shares, begins))]

    def put_back(self, pieces: np.ndarray) -> None:
        """Have documents, or parts of some, PIECE, come again before any that was not drawn; `weigh` must be next."""
        source = self._documents.sources(pieces["document"])
        for s in np.unique(source):
            mine = pieces[source == s]
            self._returned[s] = np.concatenate([mine, self._returned[s]])
            self._begun_S[s] -= (mine["start"] == 0).sum()

    def _begin_before_now(self, source: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A source's next documents, when each begins, and the source's share beside each."""
        share = self._share_S[source]
        pieces, begins = [np.zeros(0, PIECE)], [np.zeros(0)]
        while self._given_S[source] / share < self._now:
            offered = self._offered(source, self._now * share - self._given_S[source])
            given = self._given_S[source] + np.cumsum([0, *(offered["stop"] - offered["start"])])
            begin = given[:-1] / share
            taken = int(np.searchsorted(begin, self._now))
            pieces.append(offered[:taken])
            begins.append(begin[:taken])
            self._begun_S[source] += (offered["start"][:taken] == 0).sum()
            self._given_S[source] = given[taken]
            if len(self._returned[source]):
                self._returned[source] = self._returned[source][taken:]
            else:
                self._drawn_S[source] += taken
        found = np.concatenate(pieces)
        return found, np.concatenate(begins), np.full(len(found), share)

    def _offered(self, source: int, tokens: float) -> np.ndarray:
        """What was put back, or else the source's next documents, of about so many tokens, over the ends of epochs."""
        if len(self._returned[source]):
            return self._returned[source]
        lengths, first = self._documents.lengths_S[source], self._documents.first_S[source]
        mean = self._documents.tokens_S[source] / len(lengths)
        count = min(int(tokens / mean) + 1, CHUNK_TOKENS)
        epoch, place = np.divmod(self._drawn_S[source] + np.arange(count), len(lengths))
        places = shuffled(place, len(lengths), self._seed, source, epoch)
        pieces = np.zeros(count, PIECE)
        pieces["document"], pieces["stop"] = first + places, lengths["tokens"][places]
        return pieces
