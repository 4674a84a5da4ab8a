"""Contrastive alignment in the loop: the pairs of a global batch against each other, and retrieval on held-out ones.

A side of a pair is run through the decoder as a document of its own: in a causal decoder the text behind a picture sees
it, and to tell which text is which picture's would be no task. Its embedding is the mean of the last hidden states over
its tokens. There is no projection and no temperature to learn: the hidden states themselves are aligned, and a model
has no weights that it has not without.

Every pair of the global batch is compared with all others of its kind, whatever the ranks and micro batches, by the
gradient cache of Gao et al. 2021: first all embeddings without a graph, then the loss over all of them and its gradient
by each embedding, then each micro batch's forward pass again, with a graph, for that gradient to go back through. The
loss is a function of the samples alone, as the others are, and no graph is larger than a micro batch's.

P pairs of a micro batch, N pairs of all ranks, D model width.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from omniloom.data.loader import Batch
from omniloom.data.pairs import Pair, find_pairs, lay_apart
from omniloom.objective.contrastive import alike, retrieval_at_1, symmetric_contrastive
from omniloom.train.engine import Engine
from omniloom.train.groups import AlignConfig


class Alignment:
    """The contrastive loss of one global batch, Σ over pairs / pairs; nothing where no rank has a pair.

    Made before the step's forward passes; `share` is then each micro batch's part of the loss. Every rank calls both,
    as often as the others.
    """

    def __init__(self, engine: Engine, batches: list[Batch], config: AlignConfig) -> None:
        self._engine, self._batches = engine, batches
        # Dropout is the same in both passes, and the step's other draws are what they are without.
        self._seed = torch.initial_seed() + 1
        found = [find_pairs(batch.fields, config.pairs) for batch in batches]
        pairs = AllPairs(engine, [pair for of_batch in found for pair in of_batch], config.max_pairs)
        kept = iter(pairs.is_kept)
        self._pairs = [[pair for pair in of_batch if next(kept)] for of_batch in found]
        self.measured: dict[str, float] = {}  # by the keys of metrics.jsonl
        self._gradients: tuple[Tensor, ...] = ()
        if not len(pairs):
            return
        with torch.no_grad():
            sides = [self._embed(number) for number in range(len(batches))]
        sides_N2D = pairs.gather(torch.cat(sides)).requires_grad_()
        losses = {
            kind: symmetric_contrastive(left_ND, right_ND, alike_NN, config.temperature)
            for kind, left_ND, right_ND, alike_NN in pairs.kinds(sides_N2D)
        }
        loss = torch.cat(list(losses.values())).mean()
        (gradient_N2D,) = torch.autograd.grad(config.weight * loss, sides_N2D)
        self._gradients = pairs.own(gradient_N2D).split([len(side) for side in sides])
        self.measured["loss/contrastive"] = loss.item()
        for kind, losses_N in losses.items():
            self.measured[f"loss/contrastive/{kind}"] = losses_N.mean().item()
            self.measured[f"align/pairs/{kind}"] = len(losses_N)

    def share(self, number: int) -> Tensor | float:
        """A scalar whose gradient is this micro batch's part of the weighted loss's."""
        return (self._embed(number) * self._gradients[number]).sum() if self._gradients else 0.0

    def _embed(self, number: int) -> Tensor:
        with _seeded(self._seed + number, self._engine.device):
            return embed_sides(self._engine, self._batches[number], self._pairs[number])


class AllPairs:
    """The pairs of all ranks in global sample order, the first `max_pairs` of each kind: what each knows of all."""

    def __init__(self, engine: Engine, mine: list[Pair], max_pairs: int) -> None:
        self._engine = engine
        kept: list[tuple[str, int, int]] = []
        counts: dict[str, int] = {}
        for rank, pairs in enumerate(engine.gather([(pair.kind, *pair.hashes) for pair in mine])):
            if rank == engine.rank:
                self._first = len(kept)
            is_kept = []
            for pair in pairs:
                counts[pair[0]] = counts.get(pair[0], 0) + 1
                is_kept.append(counts[pair[0]] <= max_pairs)
                kept += [pair] if is_kept[-1] else []
            if rank == engine.rank:
                self.is_kept, self._stop = is_kept, len(kept)  # of each of mine
        self._kept = kept

    def __len__(self) -> int:
        return len(self._kept)

    def gather(self, mine_P2D: Tensor) -> Tensor:
        """The sides of all pairs that are kept, float32 (N, 2, D), of each rank's own."""
        sides_N2D = mine_P2D.new_zeros(len(self), *mine_P2D.shape[1:])
        self.own(sides_N2D).copy_(mine_P2D)
        return self._engine.sum_over_ranks(sides_N2D)

    def own(self, values_N: Tensor) -> Tensor:
        """The part of this rank's pairs."""
        return values_N[self._first : self._stop]

    def kinds(self, sides_N2D: Tensor) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Each kind with the left and the right sides of its pairs, and which of them are alike."""
        for kind in sorted({kind for kind, *_ in self._kept}):
            numbers = [number for number, pair in enumerate(self._kept) if pair[0] == kind]
            left_N, right_N = torch.tensor([self._kept[number][1:] for number in numbers], device=sides_N2D.device).T
            left_ND, right_ND = sides_N2D[numbers].unbind(1)
            yield kind, left_ND, right_ND, alike(left_N, right_N)


def embed_sides(engine: Engine, batch: Batch, pairs: list[Pair]) -> Tensor:
    """The mean of each side's last hidden states, float32 (P, 2, D); every rank calls it, with pairs or without."""
    inputs = lay_apart(batch.fields, pairs)
    (document_T,) = inputs["document"].long()
    (hidden_TD,) = engine.forward(**inputs).hidden.float()
    sums_SD = hidden_TD.new_zeros(2 * len(pairs) + 1, hidden_TD.shape[1]).index_add(0, document_T, hidden_TD)
    means_SD = sums_SD / document_T.bincount()[:, None]
    return means_SD[:-1].unflatten(0, (len(pairs), 2))


@torch.no_grad()
def heldout_retrieval(engine: Engine, batches: Iterable[list[Batch]], config: AlignConfig) -> dict[str, float]:
    """How often the nearest of all held-out texts is a picture's own, the nearest picture a text's, and so on.

    `val/retrieval_at_1/image_text` is the text found for a picture. Beside it, how many pairs there are, and what
    chance would find.
    """
    engine.train(False)
    found: list[Pair] = []
    sides = []
    for (batch,) in batches:
        pairs = find_pairs(batch.to(engine.device).fields, config.pairs)
        found += pairs
        sides.append(embed_sides(engine, batch, pairs))
    engine.train(True)
    everyone = AllPairs(engine, found, config.max_pairs)
    sides_N2D = everyone.gather(torch.cat(sides)[torch.tensor(everyone.is_kept, dtype=torch.bool)])
    measured: dict[str, float] = {}
    for kind, left_ND, right_ND, alike_NN in everyone.kinds(sides_N2D):
        one, other = kind.split("_")
        there, back, chance = retrieval_at_1(left_ND, right_ND, alike_NN)
        measured |= {f"val/retrieval_at_1/{one}_{other}": there, f"val/retrieval_at_1/{other}_{one}": back}
        measured |= {f"val/retrieval_chance/{kind}": chance, f"val/retrieval_pairs/{kind}": len(left_ND)}
    return measured


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed % 2**63)
        yield
