"""The decoder: packing, causality, media, gradients, initialisation, and its configuration's rules."""

import math

import pytest
import torch
from torch import Tensor

from omniloom.errors import ConfigError
from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder, attention_mass, text_fields
from tiny_decoders import all_logits, batch_of, document, film, picture, sound, text, tiny_config, tiny_decoder

ENCODERS = {1: "media.image.", 2: "media.audio.", 3: "media.video."}
OPTIONS = {"embedding_conv_tokens": 3, "attention_log_scale_tokens": 4, "num_nextn_predict_layers": 2}
GROUPED = {"attention": "grouped", "num_attention_heads": 4, "num_key_value_heads": 2}
SPARSE = {"attention_pattern": "sparse", "window_tokens": 5, "global_stride": 2, "max_global_tokens": 3}
DENSE = {"n_routed_experts": 0, "activation": "gelu", "mlp_bias": True, "attention_bias": True, "norm": "layer"}
GROUPS = {"n_group": 3, "topk_group": 2, "n_shared_experts": 0}
BOTH_WAYS = {"media_bidirectional": True}
YARN = {"yarn_factor": 4.0, "yarn_original_tokens": 16}
KINDS = {
    "latent": {},
    "options": OPTIONS,
    "latent sparse both ways": SPARSE | BOTH_WAYS | OPTIONS,
    "latent linear": {"attention_pattern": "linear"},
    "latent in groups, both ways": GROUPS | BOTH_WAYS,
    "multi-head, learned": GROUPED | DENSE | {"num_key_value_heads": None, "position": "learned"},
    "multi-query, sinusoidal, post": GROUPED
    | DENSE
    | {"num_key_value_heads": 1, "position": "sinusoidal", "norm_position": "post", "activation": "relu"},
    "grouped, softmax": GROUPED | {"scoring_func": "softmax", "router_bias": True, "rope_interleave": False},
    "grouped sparse both ways": GROUPED | SPARSE | BOTH_WAYS | {"partial_rotary_factor": 0.5, "head_dim": 12},
    "grouped linear": GROUPED | OPTIONS | {"attention_pattern": "linear", "norm_position": "post"},
}
WITHOUT_IMAGE = {"image_patch_pixels": None}
WITHOUT_AUDIO = {"audio_mels": None}
WITHOUT_VIDEO = {"video_patch_pixels": None}


def some_documents():
    return [
        document(text([10, 11, 12, 13]), sound(9, seed=5), film(2, 1, 2, seed=6)),
        document(picture(2, 3, seed=1), text([20, 21]), picture(1, 2, seed=2), sound(1, seed=7), sound(4, seed=8)),
        document(film(2, 2, 1, seed=9), text([30, 31, 32]), sound(11, seed=10)),
        document(text([23]), picture(3, 1, seed=3), film(1, 1, 1, seed=11), text([24, 25])),
    ]


def mixed_batch():
    a, b, c, d = some_documents()
    return batch_of([[a, b], [c, d]], 30)


def everything(decoder: Decoder, fields: dict[str, Tensor]) -> list[Tensor]:
    """Logits of every position, (B, T, V): the next token's, then each prediction module's."""
    everywhere = torch.ones_like(fields["document"], dtype=torch.bool)
    output = decoder(**fields, predict_at=everywhere, predict_ahead_at=[everywhere] * len(decoder.mtp))
    return [logits.unflatten(0, everywhere.shape) for logits in (output.logits, *output.mtp)]


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_packed_documents_have_the_logits_they_have_alone(options):
    decoder = tiny_decoder(num_hidden_layers=3, **options)
    a, b, c, d = some_documents()
    packed = everything(decoder, batch_of([[a, b], [c, d]], 30))
    laid = [[(a, 0), (b, len(a))], [(c, 0), (d, len(c))]]
    for row, pieces in enumerate(laid):
        for piece, start in pieces:
            alone = everything(decoder, batch_of([[piece]], len(piece)))
            assert len(packed) == len(alone) == 1 + options.get("num_nextn_predict_layers", 0)
            for together, single in zip(packed, alone, strict=True):
                assert single.std() > 0.5
                torch.testing.assert_close(together[row, start : start + len(piece)], single[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_a_later_token_changes_no_earlier_logit(options):
    decoder = tiny_decoder(num_hidden_layers=3, **options)
    fields = text_fields(torch.arange(10, 22)[None], decoder.config)
    before = everything(decoder, fields)
    for at in (4, 11):
        changed = fields["input_ids"].clone()
        changed[0, at] = 50
        after = everything(decoder, fields | {"input_ids": changed})
        for ahead, (old, new) in enumerate(zip(before, after, strict=True)):
            # A module's logits at t may use the tokens up to t + ahead, and do.
            torch.testing.assert_close(new[:, : at - ahead], old[:, : at - ahead], atol=1e-5, rtol=0)
            if options.get("attention_pattern") == "sparse":  # far tokens need not see it
                assert ((new[0, at - ahead : at + 4] - old[0, at - ahead : at + 4]).abs().amax(dim=-1) > 1e-3).all()
                continue
            assert ((new[0, at - ahead :] - old[0, at - ahead :]).abs().amax(dim=-1) > 1e-3).all(), ahead


@pytest.mark.parametrize("options", [OPTIONS, OPTIONS | BOTH_WAYS], ids=["one way", "both ways"])
@pytest.mark.parametrize("name", ["image", "video", "audio"])
@torch.no_grad()
def test_a_changed_medium_changes_its_own_document_from_its_own_token_on(name, options):
    decoder = tiny_decoder(num_hidden_layers=3, **options)
    for encoder in (decoder.media.image, decoder.media.audio, decoder.media.video):
        encoder.scale = 1.0
    fields = mixed_batch()
    before = everything(decoder, fields)
    changed = fields[name].clone()
    changed[0] = changed[0] + 3 if name == "audio" else 255 - changed[0]
    after = everything(decoder, fields | {name: changed})
    modality = {"image": 1, "audio": 2, "video": 3}[name]
    row, at = (fields["modality"] == modality).nonzero()[0].tolist()
    inside = (fields["document"][row] == fields["document"][row, at]).nonzero().flatten()
    for ahead, (old, new) in enumerate(zip(before, after, strict=True)):
        moved = (new - old).abs().amax(dim=-1)
        first, last = max(at - ahead, int(inside[0])), int(inside[-1])
        assert moved[row, first : last + 1 - ahead].min() > 2e-4
        moved[row, first : last + 1] = 0.0
        assert moved.max() < 1e-5


@torch.no_grad()
def test_a_picture_is_read_where_it_stands_and_in_order():
    decoder = tiny_decoder()
    decoder.media.image.scale = 1.0  # as large as the text here
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
    decoder.media.image.scale = 1.0
    fields = batch_of([[document(picture(2, 2, seed=1))]], 6)
    moved = fields["position"].clone()
    moved[0, 1:5, axis] += torch.tensor([0, 3, 1, 2], dtype=moved.dtype)
    difference = all_logits(decoder, fields | {"position": moved}) - all_logits(decoder, fields)
    assert difference[0, 5].abs().max() > 1e-3


@pytest.mark.parametrize("options", [OPTIONS, *KINDS.values()], ids=["all", *KINDS])
@pytest.mark.parametrize("present", [(), (1,), (2,), (3,), (1, 2), (1, 2, 3)])
def test_every_parameter_gets_a_gradient_and_an_encoder_without_its_medium_a_zero_one(present, options):
    decoder = tiny_decoder(**options)
    media = {1: picture(2, 2, seed=1), 2: sound(7, seed=2), 3: film(2, 1, 2, seed=3)}
    batch = batch_of([[document(*(media[kind] for kind in present), text([10, 11, 12, 13, 14]))]], 20)
    is_text = batch["modality"] == 0
    sum(logits[is_text].square().sum() for logits in everything(decoder, batch)).backward()
    absent = tuple(name for kind, name in ENCODERS.items() if kind not in present)
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert bool(parameter.grad.any()) != name.startswith(absent or "none"), name
    placeholders = decoder.embed_tokens.weight.grad[[3, 4, 5]]
    assert not placeholders.any()  # a placeholder's own embedding is written over


def test_with_nothing_to_predict_every_parameter_still_gets_a_gradient():
    decoder = tiny_decoder(**OPTIONS)
    fields = mixed_batch()
    nowhere = torch.zeros_like(fields["document"], dtype=torch.bool)
    output = decoder(**fields, predict_at=nowhere, predict_ahead_at=[nowhere, nowhere])
    assert [logits.shape for logits in (output.logits, *output.mtp)] == [(0, decoder.config.vocab_size)] * 3
    sum(logits.sum() for logits in (output.logits, *output.mtp)).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize(
    "off", [WITHOUT_IMAGE, WITHOUT_AUDIO, WITHOUT_VIDEO, WITHOUT_IMAGE | WITHOUT_AUDIO | WITHOUT_VIDEO]
)
@torch.no_grad()
def test_a_model_without_an_encoder_has_none_of_its_weights_and_runs_on_the_rest(off):
    decoder = tiny_decoder(**off)
    names = {"image_patch_pixels": "image", "audio_mels": "audio", "video_patch_pixels": "video"}
    missing = [names[key] for key in off]
    assert not [key for key in decoder.state_dict() if key.startswith(tuple(f"media.{name}." for name in missing))]
    assert [name for name in ("image", "audio", "video") if getattr(decoder.media, name) is None] == sorted(
        missing, key=["image", "audio", "video"].index
    )
    ids = torch.arange(10, 22)[None]
    fields = text_fields(ids, decoder.config)
    assert {fields[name].shape[1] for name in missing} == {1}
    assert all_logits(decoder, fields).isfinite().all()
    kept = {"image": picture(2, 2, seed=1), "audio": sound(7, seed=2), "video": film(2, 1, 2, seed=3)}
    media = [segment for name, segment in kept.items() if name not in missing]
    assert all_logits(decoder, batch_of([[document(text([10]), *media)]], 20)).isfinite().all()


@torch.no_grad()
def test_logits_come_in_the_row_major_order_of_predict_at():
    decoder = tiny_decoder()
    fields = mixed_batch()
    predict_at = torch.rand(fields["document"].shape, generator=torch.Generator().manual_seed(1)) > 0.6
    output = decoder(**fields, predict_at=predict_at)
    expected = [
        all_logits(decoder, fields)[row, at] for row in range(2) for at in range(30) if bool(predict_at[row, at])
    ]
    torch.testing.assert_close(output.logits, torch.stack(expected), atol=1e-6, rtol=0)


@torch.no_grad()
def test_output_holds_hidden_states_and_one_router_a_sparse_layer():
    decoder = tiny_decoder(num_hidden_layers=3)
    fields = mixed_batch()
    output = decoder(**fields)
    assert output.logits is None
    assert output.hidden.shape == (2, 30, 32)
    torch.testing.assert_close(decoder.lm_head(output.hidden), all_logits(decoder, fields), atol=1e-6, rtol=0)
    assert len(output.router) == 2
    tokens = int((fields["document"] >= 0).sum())
    for router in output.router:
        assert router.scores_BTE.shape == (2, 30, 6)
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
def test_media_start_a_few_times_as_large_as_text():
    decoder, fields = Decoder(tiny_config(hidden_size=64)), mixed_batch()
    embedded = decoder.media(
        decoder.embed_tokens(fields["input_ids"]),
        *(fields[name] for name in ("modality", "position", "image", "audio", "audio_frames", "video")),
    )
    for modality in ENCODERS:
        is_medium = fields["modality"] == modality
        assert 2 < float(embedded[is_medium].std() / embedded[fields["modality"] == 0].std()) < 10, modality


def test_a_tied_head_is_the_embedding():
    tied, untied = Decoder(tiny_config(tie_word_embeddings=True)), Decoder(tiny_config())
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert untied.lm_head.weight is not untied.embed_tokens.weight


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
        ({"n_group": 4}, ["model.n_routed_experts=6", "model.n_group=4", "multiple"]),
        ({"n_group": 6, "topk_group": 2}, ["model.n_routed_experts=6", "model.n_group=6", "two best"]),
        ({"n_group": 3, "topk_group": 4}, ["model.topk_group=4", "model.n_group=3"]),
        ({"n_group": 3, "num_experts_per_tok": 3}, ["model.topk_group=1", "model.num_experts_per_tok=3", "2 experts"]),
        (GROUPED | {"num_attention_heads": 5}, ["model.hidden_size=32", "model.num_attention_heads=5", "head_dim"]),
        (GROUPED | {"num_key_value_heads": 3}, ["model.num_attention_heads=4", "model.num_key_value_heads=3"]),
        (GROUPED | {"partial_rotary_factor": 1.5}, ["model.partial_rotary_factor=1.5", "(0, 1]"]),
        (GROUPED | {"partial_rotary_factor": 0.4}, ["model.head_dim=8", "model.partial_rotary_factor=0.4", "even"]),
        ({"yarn_factor": 4.0}, ["model.yarn_factor=4.0", "model.yarn_original_tokens=None"]),
        ({"yarn_factor": 0.5, "yarn_original_tokens": 64}, ["model.yarn_factor=0.5", "at least 1"]),
        (
            {"yarn_factor": 4.0, "yarn_original_tokens": 8},
            ["model.max_position_embeddings=64", "model.yarn_factor=4.0", "model.yarn_original_tokens=8", "32"],
        ),
        ({"norm_eps": -1.0}, ["model.norm_eps=-1.0", "above 0"]),
        ({"norm_eps": math.nan}, ["model.norm_eps=nan", "above 0"]),
        ({"rope_theta": math.inf}, ["model.rope_theta=inf", "above 0"]),
        ({"initializer_range": 0.0}, ["model.initializer_range=0.0", "above 0"]),
        ({"rope_theta": 1.0} | YARN, ["model.rope_theta=1.0", "over 1"]),
        (YARN | {"yarn_beta_fast": 1.0}, ["model.yarn_beta_fast=1.0", "model.yarn_beta_slow=1.0"]),
        (YARN | {"yarn_beta_slow": -1.0}, ["model.yarn_beta_slow=-1.0", "above 0"]),
        (GROUPED | YARN | {"position": "learned"}, ["model.yarn_factor=4.0", "model.position=rope", "learned"]),
        ({"head_dim": 8}, ["model.head_dim=8", "model.attention=grouped"]),
        ({"num_key_value_heads": 1}, ["model.num_key_value_heads=1", "model.attention=grouped"]),
        (GROUPED | {"yarn_mscale_all_dim": 1.0}, ["model.yarn_mscale_all_dim=1.0", "model.attention=grouped"]),
        ({"position": "learned"}, ["model.position=learned", "rope"]),
        ({"attention_bias": True}, ["model.attention_bias"]),
        ({"attention_pattern": "linear", "media_bidirectional": True}, ["model.media_bidirectional"]),
        ({"attention": "latnt"}, ["model.attention=latnt", "latent"]),
        ({"activation": "gelu"}, ["model.activation=gelu", "model.n_routed_experts=0"]),
        ({"window_tokens": 0}, ["model.window_tokens=0", "at least 1"]),
        ({"qk_rope_head_dim": 5}, ["model.qk_rope_head_dim=5", "even"]),
        ({"hidden_size": 34}, ["model.hidden_size=34", "multiple of 8"]),
        ({"first_k_dense_replace": 3}, ["model.first_k_dense_replace=3", "model.num_hidden_layers=2", "0"]),
        ({"first_k_dense_replace": -1}, ["model.first_k_dense_replace=-1", "at least 0"]),
        ({"dropout": 1.0}, ["model.dropout=1.0", "[0, 1)"]),
        ({"num_nextn_predict_layers": -1}, ["model.num_nextn_predict_layers=-1", "at least 0"]),
        ({"audio_frames_per_token": 1}, ["model.audio_frames_per_token=1", "2, 4, 8"]),
        ({"audio_frames_per_token": 6}, ["model.audio_frames_per_token=6", "2, 4, 8"]),
        ({"audio_mels": 0}, ["model.audio_mels=0", "at least 1"]),
        ({"video_patch_pixels": 0}, ["model.video_patch_pixels=0", "at least 1"]),
        ({"embedding_conv_tokens": 0}, ["model.embedding_conv_tokens=0", "at least 1"]),
        ({"attention_log_scale_tokens": 1}, ["model.attention_log_scale_tokens=1", "at least 2"]),
    ],
)
def test_sizes_that_cannot_hold_are_refused_with_key_and_figures(changes, said):
    with pytest.raises(ConfigError) as caught:
        Decoder(tiny_config(**changes))
    for part in said:
        assert part in str(caught.value)


def test_a_document_longer_than_the_context_is_refused_with_both_numbers():
    decoder = tiny_decoder(max_position_embeddings=8)
    assert all_logits(decoder, text_fields(torch.arange(10, 18)[None], decoder.config)).shape[1] == 8
    with pytest.raises(ConfigError, match=r"9 tokens.*model\.max_position_embeddings=8"):
        all_logits(decoder, text_fields(torch.arange(10, 19)[None], decoder.config))


@torch.no_grad()
def test_padding_does_not_count_as_context():
    decoder = tiny_decoder(attention="grouped", position="learned", max_position_embeddings=8)
    fields = text_fields(torch.arange(10, 40)[None], decoder.config)
    fields["document"] = torch.tensor([[0] * 8 + [-1] * 22])
    alone = text_fields(torch.arange(10, 18)[None], decoder.config)
    torch.testing.assert_close(all_logits(decoder, fields)[:, :8], all_logits(decoder, alone), atol=1e-5, rtol=0)


@torch.no_grad()
def test_more_tokens_ahead_than_there_are_modules_are_refused():
    decoder = tiny_decoder(num_nextn_predict_layers=1)
    fields = text_fields(torch.arange(10, 18)[None], decoder.config)
    nowhere = torch.zeros_like(fields["document"], dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"2 more tokens .* model\.num_nextn_predict_layers=1"):
        decoder(**fields, predict_ahead_at=[nowhere, nowhere])


@pytest.mark.parametrize("pattern", [{}, SPARSE], ids=["full", "sparse"])
@torch.no_grad()
def test_both_ways_shows_no_text_to_what_predicts_it(pattern):
    """Each token of text after a picture in turn: nothing that predicts it, or comes before that, may move."""
    decoder = tiny_decoder(media_bidirectional=True, num_nextn_predict_layers=2, **pattern)
    fields = batch_of(
        [[document(text([9, 10]), picture(2, 2, seed=1), text([11, 12]), film(2, 1, 2, seed=2), text([13]))]], 15
    )
    before = everything(decoder, fields)
    for at in (fields["modality"][0] == 0).nonzero().flatten().tolist():
        changed = fields["input_ids"].clone()
        changed[0, at] = 50
        after = everything(decoder, fields | {"input_ids": changed})
        for ahead, (old, new) in enumerate(zip(before, after, strict=True)):
            moved = (new - old).abs().amax(dim=-1)[0]
            assert not (moved[: max(at - ahead, 0)] > 1e-5).any(), (at, ahead)


@pytest.mark.parametrize("pattern", [{}, SPARSE], ids=["full", "sparse"])
@torch.no_grad()
def test_only_both_ways_an_earlier_patch_sees_a_later_one_of_its_own_frame_and_of_no_other(pattern):
    """Position, position it may see or not: two pictures side by side, then a video of two frames."""
    piece = document(picture(1, 2, seed=1), picture(1, 2, seed=2), film(2, 1, 2, seed=3), text([10]))
    fields = batch_of([[piece]], len(piece))
    at = {"image": fields["modality"][0].eq(1).nonzero()[0], "video": fields["modality"][0].eq(3).nonzero()[0]}

    def moved(both_ways: bool, medium: str, changed: int, looked_at: int) -> float:
        decoder = tiny_decoder(media_bidirectional=both_ways, **pattern)
        getattr(decoder.media, medium).scale = 1.0
        other = fields[medium].clone()
        other[changed] = 255 - other[changed]
        place = int(at[medium]) + looked_at
        return float(
            (all_logits(decoder, fields | {medium: other}) - all_logits(decoder, fields))[0, place].abs().max()
        )

    for medium in ("image", "video"):
        assert moved(True, medium, changed=1, looked_at=0) > 1e-3
        assert moved(False, medium, changed=1, looked_at=0) < 1e-6
        assert moved(True, medium, changed=2, looked_at=1) < 1e-6  # the next picture, the next frame
        assert moved(True, medium, changed=1, looked_at=2) > 1e-3


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_the_attention_mass_of_each_modality_sums_to_one_and_absent_ones_have_none(options):
    decoder = tiny_decoder(**options)
    fields = mixed_batch()
    mass = attention_mass(decoder, fields)
    assert mass.shape == (2, 4, 4)
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 4), atol=1e-5, rtol=0)
    assert (mass >= 0).all()
    only_text = attention_mass(decoder, text_fields(torch.arange(10, 22)[None], decoder.config))
    expected = torch.zeros(4, 4)
    expected[0, 0] = 1.0
    torch.testing.assert_close(only_text, expected.expand(2, 4, 4), atol=1e-5, rtol=0)
    assert not decoder.layers[0].self_attn._forward_pre_hooks
