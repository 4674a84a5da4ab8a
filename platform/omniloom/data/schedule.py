"""What a configuration says of the stream, with the corpora it names: weights by source, phases, loss weights."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omniloom.data.config import DataConfig
from omniloom.data.corpus import Corpus
from omniloom.data.index import PREFERENCE
from omniloom.data.mixture import source_weights
from omniloom.data.plan import Phase, Schedule
from omniloom.errors import ConfigError


@dataclass(frozen=True)
class Appended:
    """A corpus that joins the stream at a sample, and the names of the sources before it."""

    from_sample: int
    before: list[str]


def open_corpora(folder: Path, data: DataConfig) -> list[Corpus]:
    """The corpora of a run in the order in which they join."""
    return [Corpus(folder), *(Corpus(Path(phase.append)) for phase in data.phases if phase.append)]


def read_schedule(corpora: list[Corpus], data: DataConfig, seed: int) -> Schedule:
    """The phases of the stream, each with a weight for every source of every corpus.

    Where a corpus is appended, the sources before it keep `replay` of the tokens in their proportions, and its own
    share the rest as its manifest weighs them.
    """
    _refuse_pairs(corpora, data)
    names = [source.name for corpus in corpora for source in corpus.index.sources]
    first, *others = (np.array([source.weight for source in corpus.index.sources]) for corpus in corpora)
    known = len(first)
    weights = np.concatenate([first, np.zeros(len(names) - known)])
    weights[:known] = source_weights(names[:known], first.tolist(), data.weights, "weights")
    phases, seq_len = [Phase(0, tuple(weights.tolist()), data.seq_len)], data.seq_len
    for phase in data.phases:
        if phase.append:
            own = others.pop(0)
            weights[:known] *= phase.replay_share / max(weights[:known].sum(), 1e-300)
            weights[known : known + len(own)] = own * (1 - phase.replay_share) / max(own.sum(), 1e-300)
            known += len(own)
        replaced = source_weights(names[:known], weights[:known].tolist(), phase.weights, f"{data.name(phase)}.weights")
        weights[:known] = replaced
        seq_len = phase.seq_len or seq_len
        phases.append(Phase(phase.from_sample, tuple(weights.tolist()), seq_len))
    return Schedule(tuple(phases), seed, data.long_documents)


def _refuse_pairs(corpora: list[Corpus], data: DataConfig) -> None:
    pairs = {source.name for corpus in corpora for source in corpus.index.sources if source.format == PREFERENCE}
    for key, weights in [
        ("weights", data.weights),
        *((data.name(phase) + ".weights", phase.weights) for phase in data.phases),
    ]:
        if named := sorted(pairs & weights.keys()):
            raise ConfigError(
                f"data.{key}.{named[0]}: a source of preference pairs stays out of the stream: half of its answers are "
                "no examples"
            )


def loss_weights(corpora: list[Corpus], data: DataConfig) -> list[float]:
    """The weight of each source's targets in the loss."""
    sources = [source for corpus in corpora for source in corpus.index.sources]
    manifest = [source.loss_weight for source in sources]
    return source_weights([source.name for source in sources], manifest, data.loss_weights, "loss_weights").tolist()


def appended(corpora: list[Corpus], data: DataConfig) -> list[Appended]:
    """Where corpora join the stream."""
    sizes = np.cumsum([len(corpus.index.sources) for corpus in corpora])
    names = [source.name for corpus in corpora for source in corpus.index.sources]
    joins = [phase.from_sample for phase in data.phases if phase.append]
    return [Appended(sample, names[: sizes[number]]) for number, sample in enumerate(joins)]
