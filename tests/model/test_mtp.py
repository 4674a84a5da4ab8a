"""Multi-token prediction against DeepSeek-V3's equations 21 to 25 written out, and what it may look at."""

import math

import pytest
import torch
from test_mla import literal_attention, rms_norm
from test_moe import doubled, literal_mixture
from torch import Tensor

from omniloom.model.decoder import Decoder, Output, text_fields
from omniloom.model.mtp import Junction, tokens_ahead
from omniloom.objective.next_token import next_token_nll, shifted_targets
from tiny_decoders import batch_of, document, enliven, film, picture, sound, text, tiny_config, tiny_decoder

DOCUMENTS = [[0, 0, 0, 0, 0, 1, 1, 1, 2, 2, -1, -1], [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 2]]


def packed_text(decoder: Decoder) -> dict[str, Tensor]:
    """Two rows of text in several documents; no id stands twice."""
    ids = torch.arange(10, 34, dtype=torch.int32).view(2, 12)
    return text_fields(ids, decoder.config) | {"document": torch.tensor(DOCUMENTS, dtype=torch.int32)}


def ask_all(decoder: Decoder, fields: dict[str, Tensor], modules: int) -> Output:
    everywhere = torch.ones_like(fields["document"], dtype=torch.bool)
    return decoder(**fields, predict_at=everywhere, predict_ahead_at=[everywhere] * modules)


def literal_modules(decoder: Decoder, hidden: Tensor, ids: list[int], document: list[int]) -> list[list[Tensor | None]]:
    """Each module's logits at each position of one row, float64; None where the token read ahead does not exist."""
    config, eps, out = decoder.config, decoder.config.norm_eps, []
    embedding = decoder.embed_tokens.weight.double()
    for depth, module in enumerate(decoder.mtp, start=1):
        weight = doubled(module)
        joined = []
        for i in range(len(ids)):
            exists = i + depth < len(ids) and document[i + depth] == document[i]
            ahead = embedding[ids[i + depth]] if exists else torch.zeros(config.hidden_size, dtype=torch.float64)
            normed = [rms_norm(ahead, weight["junction.enorm.weight"], eps)]
            normed.append(rms_norm(hidden[i], weight["junction.hnorm.weight"], eps))
            joined.append(weight["junction.eh_proj.weight"] @ torch.cat(normed))  # Eq. 21
        # Eq. 22: one layer
        normed = torch.stack([rms_norm(h, weight["layer.input_layernorm.weight"], eps) for h in joined])
        attended = torch.stack(joined) + literal_attention(module.layer.self_attn, config, normed, document)
        normed = torch.stack([rms_norm(h, weight["layer.post_attention_layernorm.weight"], eps) for h in attended])
        mixture = {name.removeprefix("layer.mlp."): t for name, t in weight.items() if name.startswith("layer.mlp.")}
        hidden = attended + literal_mixture(mixture, config, normed)[0]
        hidden = torch.stack([rms_norm(h, weight["norm.weight"], eps) for h in hidden])
        logits = hidden @ decoder.lm_head.weight.double().T  # Eq. 23, the head is the decoder's own
        exists = [i + depth < len(ids) and document[i + depth] == document[i] for i in range(len(ids))]
        out.append([line if there else None for line, there in zip(logits, exists, strict=True)])
    return out


@torch.no_grad()
def test_the_junction_equals_equation_21():
    config = tiny_config()
    junction = Junction(config)
    enliven(junction)
    hidden, ahead = torch.randn(2, 2, 5, 32, generator=torch.Generator().manual_seed(1))
    out, weight = junction(hidden, ahead), doubled(junction)
    for b in range(2):
        for t in range(5):
            left = rms_norm(ahead[b, t].double(), weight["enorm.weight"], config.norm_eps)
            right = rms_norm(hidden[b, t].double(), weight["hnorm.weight"], config.norm_eps)
            expected = weight["eh_proj.weight"] @ torch.cat([left, right])
            torch.testing.assert_close(out[b, t].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ahead", [1, 2, 3, 11, 12, 20])
def test_tokens_ahead_equal_a_loop(ahead):
    embedded = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(1))
    out = tokens_ahead(embedded, torch.tensor(DOCUMENTS), ahead)
    assert out.shape == embedded.shape
    for b, row in enumerate(DOCUMENTS):
        for t in range(12):
            exists = t + ahead < 12 and row[t + ahead] == row[t]
            assert out[b, t].tolist() == (embedded[b, t + ahead].tolist() if exists else [0.0] * 3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("modules", [1, 2])
@torch.no_grad()
def test_modules_and_their_loss_equal_a_literal_loop(modules, tied):
    decoder = tiny_decoder(num_nextn_predict_layers=modules, tie_word_embeddings=tied)
    fields = packed_text(decoder)
    output = ask_all(decoder, fields, modules)
    ids, document = fields["input_ids"].tolist(), fields["document"]
    rows = [literal_modules(decoder, output.hidden[row].double(), ids[row], DOCUMENTS[row]) for row in range(2)]
    assert len(output.mtp) == modules
    for depth, logits in enumerate(output.mtp, start=1):
        predict_at, targets = shifted_targets(fields["input_ids"], document, (document >= 0).byte(), depth + 1)
        nll, seen = [], logits.unflatten(0, (2, 12))
        for row in range(2):
            for t, expected in enumerate(rows[row][depth - 1]):
                if expected is None or DOCUMENTS[row][t] < 0:
                    continue
                assert expected.std() > 0.5
                torch.testing.assert_close(seen[row, t].double(), expected, atol=5e-4, rtol=1e-4)
                if t + depth + 1 < 12 and DOCUMENTS[row][t + depth + 1] == DOCUMENTS[row][t]:  # Eq. 24
                    nll.append(float(expected.logsumexp(0) - expected[ids[row][t + depth + 1]]))
        assert len(nll) == len(targets) > 5
        ours = next_token_nll(seen[predict_at], targets)
        torch.testing.assert_close(ours.double(), torch.tensor(nll, dtype=torch.float64), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"embedding_conv_tokens": 3, "attention_log_scale_tokens": 4}])
def test_logits_at_t_learn_from_the_tokens_up_to_t_plus_depth_of_their_document_and_from_no_other(options):
    decoder = tiny_decoder(num_nextn_predict_layers=2, **options)
    fields = packed_text(decoder)
    output = ask_all(decoder, fields, 2)
    table = decoder.embed_tokens.weight
    for depth, logits in enumerate((output.logits, *output.mtp)):
        for row, t in [(0, 0), (0, 2), (0, 4), (0, 6), (0, 8), (1, 5), (1, 8), (1, 9)]:
            (gradient,) = torch.autograd.grad(
                logits.unflatten(0, (2, 12))[row, t].square().sum(), table, retain_graph=True
            )
            read = [int(i) - 10 for i in gradient.abs().amax(dim=1).nonzero()]
            same = [s for s in range(12) if DOCUMENTS[row][s] == DOCUMENTS[row][t] and s <= t + depth]
            assert read == [12 * row + s for s in same], (depth, row, t)


@torch.no_grad()
def test_only_the_modules_asked_for_run_and_their_routers_come_last():
    decoder = tiny_decoder(num_nextn_predict_layers=2)
    batch = batch_of([[document(text([10, 11]), picture(1, 2, 1), sound(5, 2), film(2, 1, 1, 3), text([12]))]], 16)
    full = ask_all(decoder, batch, 2)
    for modules in range(3):
        output = ask_all(decoder, batch, modules)
        assert [len(output.mtp), len(output.router)] == [modules, 1 + modules]
        torch.testing.assert_close(output.logits, full.logits, atol=0, rtol=0)
        for ours, theirs in zip(output.mtp, full.mtp[:modules], strict=True):
            torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    without = tiny_decoder()
    missing = without.load_state_dict(decoder.state_dict(), strict=False)
    assert not missing.missing_keys
    torch.testing.assert_close(ask_all(without, batch, 0).logits, full.logits, atol=0, rtol=0)


@torch.no_grad()
def test_module_logits_come_only_where_they_are_asked():
    decoder = tiny_decoder(num_nextn_predict_layers=2)
    fields = packed_text(decoder)
    full = ask_all(decoder, fields, 2)
    masks = [torch.rand(2, 12, generator=torch.Generator().manual_seed(depth)) > 0.5 for depth in (1, 2)]
    output = decoder(**fields, predict_ahead_at=masks)
    assert output.logits is None
    for logits, mask, all_of_them in zip(output.mtp, masks, full.mtp, strict=True):
        torch.testing.assert_close(logits, all_of_them.unflatten(0, (2, 12))[mask], atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_new_module_starts_as_small_as_the_layers():
    decoder = Decoder(tiny_config(hidden_size=64, num_nextn_predict_layers=1, initializer_range=0.03))
    (module,) = decoder.mtp
    assert float(module.junction.eh_proj.weight.std()) == pytest.approx(0.03, rel=0.1)
    assert float(module.layer.self_attn.o_proj.weight.std()) == pytest.approx(0.03 / math.sqrt(4), rel=0.2)
    assert bool((module.norm.weight == 1).all())
