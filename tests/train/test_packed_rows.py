"""Rows of a real corpus, packed and cut: no attention, position or label crosses a document."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from omniloom.data.corpus import Documents
from omniloom.data.loader import Batch, Rows
from omniloom.data.plan import Phase, Schedule, Stream
from omniloom.data.samples import write_samples
from omniloom.modality.sequence import Document, lay_row
from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder
from omniloom.objective.next_token import next_token_nll, shifted_targets

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from handmade import TINY, build, save_lines

SEQ_LEN = 48
DEPTHS = 2


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Documents, list, Rows]:
    """Words, pictures, clips and videos, and documents of all of them that are longer than a row."""
    folder = tmp_path_factory.mktemp("packed")
    manifest = write_samples("smoke", folder / "files")
    media = [{"image": "../colours/red.png"}, {"audio": "../tones/low.wav"}, {"video": "../fades/lighter.mp4"}]
    long = [
        part for number in range(4) for part in (*media, {"text": f"turn {number} of some", "loss": number % 2 > 0})
    ]
    (folder / "files" / "long").mkdir()
    save_lines(folder / "files" / "long" / "all.jsonl", long, long[3:])
    with manifest.open("a") as text:
        text.write("  long: {format: interleaved, train: [long/all.jsonl], weight: 2.0}\n")
    documents = Documents([build(manifest, folder / "corpus")], "train")
    schedule = Schedule((Phase(0, (1.0, 1.0, 1.0, 1.0, 2.0), SEQ_LEN),), 0, "segment")
    plan = [row for block in Stream(documents, schedule).blocks(256) for row in block]
    return documents, plan, Rows(documents, plan, schedule)


@pytest.fixture(scope="module")
def decoder(packed: tuple[Documents, list, Rows]) -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=packed[0].corpora[0].index.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        max_position_embeddings=SEQ_LEN,
        num_attention_heads=2,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        media_bidirectional=True,
        embedding_conv_tokens=3,
        intermediate_size=48,
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        num_nextn_predict_layers=DEPTHS - 1,
        image_patch_pixels=TINY.image.patch_pixels,
        video_patch_pixels=TINY.video.patch_pixels,
        audio_mels=TINY.audio.mels,
        audio_frames_per_token=TINY.audio.frames_per_token,
    )
    decoder = Decoder(config)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return decoder.eval()


def logits_of(decoder: Decoder, batch: Batch) -> list[Tensor]:
    everywhere = torch.ones_like(batch.fields["document"], dtype=torch.bool)
    output = decoder(**batch.model_inputs(), predict_at=everywhere, predict_ahead_at=[everywhere] * (DEPTHS - 1))
    return [logits.unflatten(0, everywhere.shape) for logits in (output.logits, *output.mtp)]


def targets_of(batch: Batch, ahead: int) -> tuple[Tensor, Tensor]:
    return shifted_targets(batch.fields["input_ids"], batch.fields["document"], batch.fields["loss_mask"], ahead)


def alone(documents: Documents, document: Document, source: int) -> Batch:
    """One piece in a row of its own length, or of two where it has one token: nothing beside it."""
    row = lay_row([(document, source)], max(len(document), 2), documents.tokenizer.eos_id, documents.modality.widths)
    return Batch([row])


@torch.no_grad()
def test_logits_and_labels_of_a_packed_piece_are_those_it_has_alone(
    packed: tuple[Documents, list, Rows], decoder: Decoder
) -> None:
    documents, plan, rows = packed
    # Rows of several pieces first, and those that hold a part of a long document.
    several = [i for i, row in enumerate(plan) if len(row) > 2][:8]
    cut = [i for i, row in enumerate(plan) if any(documents.source(p.document) == 4 for p in row)][:8]
    assert len(several) == len(cut) == 8
    kinds = set()
    for index in {*several, *cut}:
        batch = Batch([rows[index]])
        together = logits_of(decoder, batch)
        labels = [targets_of(batch, 1 + depth) for depth in range(DEPTHS)]
        nll = [torch.zeros(2, dtype=torch.float64) for _ in range(DEPTHS)]
        at = 0
        for piece in plan[index]:
            document = documents.document(piece.document).window(piece.start, piece.stop)
            kinds |= set(document.modality.tolist())
            single = alone(documents, document, documents.source(piece.document))
            for depth, logits in enumerate(logits_of(decoder, single)):
                here = slice(at, at + len(document))
                torch.testing.assert_close(together[depth][:, here], logits[:, : len(document)], atol=2e-5, rtol=2e-5)
                predict_at, ids = targets_of(single, 1 + depth)
                nll[depth] += torch.tensor(
                    [next_token_nll(logits[predict_at], ids).double().sum(), predict_at.sum()], dtype=torch.float64
                )
            at += len(document)
        for depth, (predict_at, ids) in enumerate(labels):
            assert int(predict_at.sum()) == int(nll[depth][1])
            found = next_token_nll(together[depth][predict_at], ids).double().sum()
            torch.testing.assert_close(found, nll[depth][0], atol=1e-3, rtol=1e-5)
    assert kinds == {0, 1, 2, 3}
