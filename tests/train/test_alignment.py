"""Contrastive alignment of a whole global batch against pairs that are run one by one, and no side sees the other."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import test_step
import torch
from tiny_rows import SEQ_LEN, TINY, WIDTHS, segment, text
from torch import Tensor

from omniloom.data.loader import Batch
from omniloom.data.pairs import find_pairs
from omniloom.modality.batch import MODEL_INPUTS, stack_rows
from omniloom.modality.sequence import Document, Row, Segment, lay_row, weave
from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder
from omniloom.train.alignment import Alignment, embed_sides, heldout_retrieval
from omniloom.train.groups import AlignConfig, TrainConfig
from omniloom.train.step import training_step

torch.set_num_threads(1)
# The contrastive loss alone.
STAGE = TrainConfig(next_token_loss_weight=0.0, balance_loss_weight=0.0, mtp_loss_weight=0.0, expert_bias_rate=0.0)
ALIGN = AlignConfig(weight=0.7, temperature=0.2)
Sides = list[tuple[str, Segment, Segment]]


class OneRank(test_step.OneRank):
    """What alignment needs of an engine too."""

    def gather(self, mine: Any) -> list[Any]:
        return [mine]


def decoder(**changes: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig(**vars(TINY) | {"initializer_range": 0.3} | changes))


def pair(kind: str, rng: np.random.Generator) -> tuple[str, Segment, Segment]:
    return f"{kind}_text", segment(kind, rng), text(rng, int(rng.integers(2, 6)), True)


def content() -> tuple[list[Row], Sides]:
    """Four rows of pairs, of no pair, and of words, and the pairs in order."""
    rng = np.random.default_rng(5)
    kinds = [("image", "audio"), (), ("image", "video", "image"), ("audio", "image")]
    rows, sides = [], []
    for of_row in kinds:
        pairs = [pair(kind, rng) for kind in of_row]
        documents = [woven(text(rng, 3, True)), *(woven(text(rng, 1, False), *held[1:]) for held in pairs)]
        rows.append(lay_row([(document, 0) for document in documents], SEQ_LEN, 0, WIDTHS))
        sides += pairs
    return rows, sides


def woven(*segments: Segment) -> Document:
    return weave(list(segments), 1, 0, (0, 2, 3, 4), WIDTHS)


def batches(micro: int) -> list[Batch]:
    rows, _ = content()
    return [Batch(rows[start : start + micro]) for start in range(0, len(rows), micro)]


def embedded_alone(model: Decoder, held: Segment, is_text: bool) -> Tensor:
    """The mean hidden state of one segment, run as a row of its own without begin; a text has the end behind it."""
    document = weave([held], 1, 0, (0, 2, 3, 4), WIDTHS)
    tokens = document.window(1, len(document) - (not is_text))
    fields = stack_rows([lay_row([(tokens, 0)], len(tokens), 0, WIDTHS)])
    return model(**{name: fields[name] for name in MODEL_INPUTS}).hidden[0].mean(0)


def literal_losses(model: Decoder, temperature: float) -> dict[str, list[Tensor]]:
    """−log P(right given left) − log P(left given right) of each pair, by kind, everything one by one."""
    _, sides = content()
    losses: dict[str, list[Tensor]] = {}
    for kind in sorted({kind for kind, *_ in sides}):
        of_kind = [
            (embedded_alone(model, left, False), embedded_alone(model, right, True))
            for name, left, right in sides
            if name == kind
        ]

        def score(n: int, m: int, held: list[tuple[Tensor, Tensor]] = of_kind) -> Tensor:
            left, right = held[n][0].double(), held[m][1].double()
            return left @ right / (left.norm() * right.norm()) / temperature

        every = range(len(of_kind))
        losses[kind] = [
            -(score(n, n).exp() / sum(score(n, m).exp() for m in every)).log()
            - (score(n, n).exp() / sum(score(m, n).exp() for m in every)).log()
            for n in every
        ]
    return losses


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_loss_and_gradients_are_those_of_all_pairs_of_the_global_batch_one_by_one(micro: int) -> None:
    model = decoder()
    expected = literal_losses(model, ALIGN.temperature)
    every = [loss for losses in expected.values() for loss in losses]
    mean = torch.stack(every).mean()
    (ALIGN.weight * mean).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    result = training_step(OneRank(model), model, batches(micro), torch.ones(1), STAGE, 1.0, align=ALIGN)
    measured = result.alignment
    assert measured["loss/contrastive"] == pytest.approx(mean.item(), rel=1e-5)
    for kind, losses in expected.items():
        assert measured[f"loss/contrastive/{kind}"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
        assert measured[f"align/pairs/{kind}"] == len(losses)
    assert {len(losses) for losses in expected.values()} == {1, 2, 4}
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-2
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(
                p.grad,
                gradients.get(name, torch.zeros_like(p)),
                rtol=1e-3,
                atol=1e-6,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def changed(batch: Batch, name: str) -> Batch:
    batch.fields[name] = (batch.fields[name].float() * 0.5).to(batch.fields[name].dtype)
    return batch


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    ("change", "side"),
    [
        (lambda batch: changed(batch, "image"), 0),
        (lambda batch: changed(batch, "audio"), 0),
        (lambda batch: changed(batch, "video"), 0),
        (lambda batch: batch, None),
    ],
)
def test_no_side_sees_the_other(change: Callable[[Batch], Batch], side: int | None, bidirectional: bool) -> None:
    """Another picture moves its own embedding and not its text's; another text not its picture's."""
    model = decoder(media_bidirectional=bidirectional).eval()
    engine = OneRank(model)
    (batch,), (other,) = batches(4), batches(4)
    pairs = find_pairs(batch.fields, ALIGN.pairs)
    if side is None:
        for held in pairs:
            other.fields["input_ids"].view(-1)[torch.from_numpy(held.sides[1])] += 1
        other.fields["input_ids"] %= TINY.vocab_size
    with torch.no_grad():
        before = embed_sides(engine, batch, pairs)
        after = embed_sides(engine, change(other), pairs)
    moves = (before != after).any(-1)
    assert not moves[:, 0 if side is None else 1].any()
    assert moves[:, 1 if side is None else 0].any()


def test_dropout_is_the_same_in_both_passes_and_leaves_the_steps_own_draws_alone() -> None:
    torch.manual_seed(3)
    model = decoder(dropout=0.3)
    torch.manual_seed(77)
    first = torch.rand(1)
    torch.manual_seed(77)
    alignment = Alignment(OneRank(model), batches(2), ALIGN)
    once = [alignment._embed(number) for number in range(2)]
    assert torch.equal(torch.rand(1), first)  # as the step's forward pass of another micro batch draws
    again = [alignment._embed(number) for number in range(2)]
    for one, other in zip(once, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.manual_seed(78)
    other_step = Alignment(OneRank(model), batches(2), ALIGN)
    assert other_step.measured != alignment.measured


def test_more_pairs_than_max_pairs_are_left_out_from_the_end_of_the_global_batch() -> None:
    few = AlignConfig(weight=1.0, temperature=0.2, max_pairs=2)
    whole = [Alignment(OneRank(decoder()), batches(micro), few).measured for micro in (1, 4)]
    assert whole[0] == pytest.approx(whole[1])
    counts = {key: value for key, value in whole[0].items() if key.startswith("align/")}
    assert counts == {"align/pairs/image_text": 2, "align/pairs/audio_text": 2, "align/pairs/video_text": 1}
    # The two first pictures stand in the first row and in the third.
    rows, _ = content()
    first = Alignment(OneRank(decoder()), [Batch([rows[0], rows[2]])], few).measured
    assert first["loss/contrastive/image_text"] == pytest.approx(whole[0]["loss/contrastive/image_text"])


def test_a_batch_without_a_pair_is_what_it_is_without_alignment() -> None:
    words = lay_row([(woven(text(np.random.default_rng(0), 9, True)), 0)], SEQ_LEN, 0, WIDTHS)
    with_it, without = (
        training_step(OneRank(decoder()), decoder(), [Batch([words])], torch.ones(1), TrainConfig(), 1.0, align=align)
        for align in (ALIGN, AlignConfig())
    )
    assert with_it.alignment == without.alignment == {}
    assert (with_it.next_token, with_it.grad_norm) == (without.next_token, without.grad_norm)


def test_heldout_retrieval_is_over_all_batches_and_in_evaluation() -> None:
    model = decoder(dropout=0.5)
    measured = [heldout_retrieval(OneRank(model), [[b] for b in batches(micro)], ALIGN) for micro in (1, 2, 4)]
    assert measured[0] == pytest.approx(measured[1])
    assert measured[0] == pytest.approx(measured[2])
    assert model.training
    kinds = ("image_text", "audio_text", "video_text")
    back = [f"text_{kind.removesuffix('_text')}" for kind in kinds]
    assert set(measured[0]) == {
        *(f"val/retrieval_at_1/{kind}" for kind in (*kinds, *back)),
        *(f"val/retrieval_chance/{kind}" for kind in kinds),
        *(f"val/retrieval_pairs/{kind}" for kind in kinds),
    }
    assert (measured[0]["val/retrieval_pairs/image_text"], measured[0]["val/retrieval_chance/image_text"]) == (4, 0.25)
    assert measured[0]["val/retrieval_at_1/video_text"] == 1, "there is one"


def test_without_heldout_pairs_nothing_is_told() -> None:
    words = lay_row([(woven(text(np.random.default_rng(0), 9, True)), 0)], SEQ_LEN, 0, WIDTHS)
    assert heldout_retrieval(OneRank(decoder()), [[Batch([words])]], ALIGN) == {}


def test_aligning_teaches_the_pairs() -> None:
    model = decoder(initializer_range=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(16):
        result = training_step(OneRank(model), model, batches(4), torch.ones(1), STAGE, 1.0, align=ALIGN)
        losses.append(result.alignment["loss/contrastive"])
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.3 * losses[0]
    measured = heldout_retrieval(OneRank(model), [[b] for b in batches(2)], ALIGN)
    assert measured["val/retrieval_at_1/image_text"] == measured["val/retrieval_at_1/text_image"] == 1.0
