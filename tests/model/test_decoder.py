"""The decoder: packing, causality, pictures, gradients, initialisation, and its configuration's rules."""

import math

import pytest
import torch
from tiny_decoders import all_logits, batch_of, document, picture, text, tiny_config, tiny_decoder

from omniloom.errors import ConfigError
from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder, text_fields

PATCH_VALUES = 12


def some_documents():
    return [
        document(text([10, 11, 12, 13, 14])),
        document(picture(2, 3, seed=1), text([20, 21]), picture(1, 2, seed=2), text([22])),
        document(text([30, 31, 32])),
        document(text([23]), picture(3, 1, seed=3), text([24, 25])),
    ]


def mixed_batch():
    a, b, c, d = some_documents()
    return batch_of([[a, b], [c, d]], 24)


@torch.no_grad()
def test_packed_documents_have_the_logits_they_have_alone():
    decoder = tiny_decoder(num_hidden_layers=3)
    a, b, c, d = some_documents()
    packed = all_logits(decoder, batch_of([[a, b], [c, d]], 24))
    laid = [[(a, 0), (b, len(a))], [(c, 0), (d, len(c))]]
    for row, pieces in enumerate(laid):
        for piece, start in pieces:
            alone = all_logits(decoder, batch_of([[piece]], len(piece)))[0]
            assert alone.std() > 0.5
            torch.testing.assert_close(packed[row, start : start + len(piece)], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_later_token_changes_no_earlier_logit():
    decoder = tiny_decoder(num_hidden_layers=3)
    fields = text_fields(torch.arange(10, 22)[None], PATCH_VALUES)
    before = all_logits(decoder, fields)
    for at in (4, 11):
        changed = fields["input_ids"].clone()
        changed[0, at] = 50
        after = all_logits(decoder, fields | {"input_ids": changed})
        torch.testing.assert_close(after[:, :at], before[:, :at], atol=1e-6, rtol=0)
        assert ((after[0, at:] - before[0, at:]).abs().amax(dim=-1) > 1e-3).all()


@torch.no_grad()
def test_a_picture_is_read_where_it_stands_and_in_order():
    decoder = tiny_decoder()
    decoder.embedding.image.scale = 1.0  # as large as the text here
    one, other = picture(2, 2, seed=1), picture(2, 2, seed=2)

    def last(*segments):
        return all_logits(decoder, batch_of([[document(*segments)]], 16))[0, 11]

    base = last(text([20]), one, other, text([21, 22]))
    torch.testing.assert_close(base, last(text([20]), one, other, text([21, 22])), atol=0, rtol=0)
    assert (base - last(text([20]), other, one, text([21, 22]))).abs().max() > 1e-3
    assert (base - last(text([20]), one, one, text([21, 22]))).abs().max() > 1e-3


@pytest.mark.parametrize("axis", [1, 2])
@torch.no_grad()
def test_a_picture_with_its_patches_in_other_rows_or_columns_gives_other_logits(axis):
    decoder = tiny_decoder()
    decoder.embedding.image.scale = 1.0
    fields = batch_of([[document(picture(2, 2, seed=1))]], 6)
    moved = fields["position"].clone()
    moved[0, 1:5, axis] += torch.tensor([0, 3, 1, 2], dtype=moved.dtype)
    difference = all_logits(decoder, fields | {"position": moved}) - all_logits(decoder, fields)
    assert difference[0, 5].abs().max() > 1e-3


def test_every_parameter_gets_a_gradient_and_the_image_encoder_a_zero_one_without_pictures():
    decoder = tiny_decoder()
    all_logits(decoder, text_fields(torch.arange(10, 22)[None], PATCH_VALUES)).square().sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert bool(parameter.grad.any()) != name.startswith("embedding.image."), name


def test_with_nothing_to_predict_every_parameter_still_gets_a_gradient():
    decoder = tiny_decoder()
    fields = mixed_batch()
    output = decoder(**fields, predict_at=torch.zeros_like(fields["document"], dtype=torch.bool))
    assert output.logits.shape == (0, decoder.config.vocab_size)
    output.logits.sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_with_a_picture_its_encoder_learns():
    decoder = tiny_decoder()
    fields = mixed_batch()
    all_logits(decoder, fields)[fields["modality"] == 0].square().sum().backward()
    for name, parameter in decoder.embedding.image.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name
    placeholders = decoder.embedding.tokens.weight.grad[[3, 4, 5]]
    assert not placeholders.any()  # a placeholder's own embedding is written over


@torch.no_grad()
def test_logits_come_in_the_row_major_order_of_predict_at():
    decoder = tiny_decoder()
    fields = mixed_batch()
    predict_at = torch.rand(fields["document"].shape, generator=torch.Generator().manual_seed(1)) > 0.6
    output = decoder(**fields, predict_at=predict_at)
    expected = [
        all_logits(decoder, fields)[row, at] for row in range(2) for at in range(24) if bool(predict_at[row, at])
    ]
    torch.testing.assert_close(output.logits, torch.stack(expected), atol=1e-6, rtol=0)


@torch.no_grad()
def test_output_holds_hidden_states_and_one_router_a_sparse_layer():
    decoder = tiny_decoder(num_hidden_layers=3)
    fields = mixed_batch()
    output = decoder(**fields)
    assert output.logits is None
    assert output.hidden.shape == (2, 24, 32)
    torch.testing.assert_close(decoder.lm_head(output.hidden), all_logits(decoder, fields), atol=1e-6, rtol=0)
    assert len(output.router) == 2
    tokens = int((fields["document"] >= 0).sum())
    for router in output.router:
        assert router.scores_BTE.shape == (2, 24, 6)
        assert int(router.tokens_per_expert_E.sum()) == tokens * 2


@torch.no_grad()
def test_dropout_acts_in_training_only():
    decoder = tiny_decoder(dropout=0.5)
    plain = tiny_decoder(dropout=0.0)
    fields = mixed_batch()
    expected = all_logits(plain, fields)
    torch.testing.assert_close(all_logits(decoder, fields), expected, atol=0, rtol=0)
    torch.testing.assert_close(all_logits(plain.train(), fields), expected, atol=0, rtol=0)
    decoder.train()
    first, second = all_logits(decoder, fields), all_logits(decoder, fields)
    assert (first - second).abs().max() > 0.1


@torch.no_grad()
def test_matrices_start_at_the_initializer_range_and_residual_outputs_smaller():
    layers, std = 4, 0.03
    decoder = Decoder(
        tiny_config(
            vocab_size=400, hidden_size=64, num_hidden_layers=layers, initializer_range=std, intermediate_size=64
        )
    )
    residual = []
    for name, parameter in decoder.named_parameters():
        if parameter.dim() == 1:
            assert bool((parameter == 1).all()), name
            continue
        writes = any(part in name for part in ("o_proj", "down_proj", "down_EFD"))
        residual += [name] if writes else []
        expected = std / math.sqrt(2 * layers) if writes else std
        assert float(parameter.std()) == pytest.approx(expected, rel=5 / math.sqrt(parameter.numel())), name
        assert abs(float(parameter.mean())) < 5 * expected / math.sqrt(parameter.numel()), name
    # attention, and the dense or shared feed-forward, of each layer; the experts of the sparse ones
    assert len(residual) == layers * 2 + (layers - 1)
    assert not any(layer.mlp.router.bias_E.any() for layer in decoder.layers[1:])


@torch.no_grad()
def test_pictures_start_as_large_as_text():
    decoder = Decoder(tiny_config(hidden_size=64))
    fields = mixed_batch()
    embedded = decoder.embedding(fields["input_ids"], fields["modality"], fields["position"], fields["image"])
    is_image = fields["modality"] == 1
    assert 0.5 < float(embedded[is_image].std() / embedded[~is_image].std()) < 2


def test_a_tied_head_is_the_embedding():
    tied, untied = Decoder(tiny_config(tie_word_embeddings=True)), Decoder(tiny_config())
    assert tied.lm_head.weight is tied.embedding.tokens.weight
    assert untied.lm_head.weight is not untied.embedding.tokens.weight


def test_first_k_dense_replace_says_which_layers_are_dense():
    for dense in (0, 1, 2):
        decoder = tiny_decoder(first_k_dense_replace=dense)
        assert ["router" in dict(layer.mlp.named_children()) for layer in decoder.layers] == [
            i >= dense for i in range(2)
        ]
        assert all_logits(decoder, mixed_batch()).isfinite().all()


def test_the_default_configuration_passes_its_own_check():
    ModelConfig().check()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 0}, ["model.hidden_size=0", "at least 1"]),
        ({"q_lora_rank": -2}, ["model.q_lora_rank=-2", "at least 1"]),
        ({"num_experts_per_tok": 7}, ["model.num_experts_per_tok=7", "model.n_routed_experts=6"]),
        ({"qk_rope_head_dim": 5}, ["model.qk_rope_head_dim=5", "even"]),
        ({"hidden_size": 34}, ["model.hidden_size=34", "multiple of 8"]),
        ({"first_k_dense_replace": 3}, ["model.first_k_dense_replace=3", "model.num_hidden_layers=2", "0"]),
        ({"first_k_dense_replace": -1}, ["model.first_k_dense_replace=-1", "model.num_hidden_layers=2", "0"]),
        ({"dropout": 1.0}, ["model.dropout=1.0", "[0, 1)"]),
    ],
)
def test_sizes_that_cannot_hold_are_refused_with_key_and_figures(changes, said):
    with pytest.raises(ConfigError) as caught:
        Decoder(tiny_config(**changes))
    for part in said:
        assert part in str(caught.value)
