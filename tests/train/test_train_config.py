"""The rules between the keys of a training run."""

from dataclasses import replace

import pytest

from omniloom.data.config import PhaseConfig
from omniloom.data.index import Index, SourceRecord, SplitRecord
from omniloom.errors import ConfigError
from omniloom.modality.config import AudioConfig, ImageConfig, ModalityConfig, VideoConfig
from omniloom.train.config import TrainingRun
from omniloom.train.groups import OffloadConfig, TrainConfig


def sound_run() -> TrainingRun:
    run = TrainingRun(run="first")
    run.train = TrainConfig(steps=200, global_batch_size=24, micro_batch_size=3)
    return run


def changed(**changes) -> TrainingRun:
    """The sound run with section__key=value."""
    run = sound_run()
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        setattr(getattr(run, section) if section else run, name, value)
    return run


def test_a_sound_run_passes():
    sound_run().check_run(ranks=1)
    sound_run().check_run(ranks=8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run": "../other"}, ["run='../other'", "plain name"]),
        ({"run": ""}, ["run=''", "plain name"]),
        ({"run": ".hidden"}, ["run='.hidden'", "plain name"]),
        ({"train__tokens": 1000}, ["train.steps=200", "train.tokens=1000", "exactly one"]),
        ({"train__steps": None}, ["train.steps=None", "train.tokens=None", "exactly one"]),
        ({"train__steps": 0}, ["train.steps=0", "at least 1"]),
        ({"train__steps": None, "train__tokens": -5}, ["train.tokens=-5", "at least 1"]),
        ({"train__global_batch_size": 0}, ["train.global_batch_size=0", "at least 1"]),
        ({"train__micro_batch_size": 0}, ["train.micro_batch_size=0", "at least 1"]),
        ({"train__val_every": 0}, ["train.val_every=0", "at least 1"]),
        ({"train__val_rows": 0}, ["train.val_rows=0", "at least 1"]),
        ({"train__save_every": 0}, ["train.save_every=0", "at least 1"]),
        (
            {"train__global_batch_size": 27},
            ["train.global_batch_size=27", "train.micro_batch_size=3", "cluster.workers=2", "6"],
        ),
        ({"data__seq_len": 5000}, ["data.seq_len=5000", "model.max_position_embeddings=4096"]),
        ({"data__seq_len": 1}, ["data.seq_len=1", "at least 2"]),
        ({"data__loader_workers": -1}, ["data.loader_workers=-1"]),
        ({"data__weights": {"topics": -0.5}}, ["data.weights.topics=-0.5", "at least 0"]),
        ({"data__loss_weights": {"topics": float("nan")}}, ["data.loss_weights.topics=nan", "at least 0"]),
        ({"parallel__zero_stage": 4}, ["parallel.zero_stage=4", "0, 1, 2 or 3"]),
        ({"schedule__warmup_steps": 200}, ["schedule.warmup_steps=200", "train.steps=200"]),
        ({"schedule__warmup_steps": -1}, ["schedule.warmup_steps=-1", "negative"]),
        ({"schedule__cycles": 0}, ["schedule.cycles=0", "at least 1"]),
        ({"schedule__cycles": 101}, ["schedule.cycles=101", "the 100 steps after warm-up"]),
        (
            {"schedule__cycles": 9, "schedule__cycle_length_multiplier": 3.0},
            ["schedule.cycles=9", "schedule.cycle_length_multiplier=3.0", "without a step in the 100"],
        ),
        (
            {"schedule__cycles": 2, "schedule__kind": "polynomial"},
            ["schedule.cycles=2", "schedule.kind=cosine", "it is polynomial", "set schedule.cycles=1"],
        ),
        ({"schedule__power": 2.0}, ["schedule.power=2.0", "schedule.kind=polynomial", "it is cosine"]),
        ({"schedule__power": 0.0, "schedule__kind": "polynomial"}, ["schedule.power=0.0", "above 0"]),
        (
            {"schedule__kind": "warmup_stable_decay", "schedule__decay_share": 0.6},
            ["schedule.warmup_steps=100", "120 steps by schedule.decay_share=0.6", "train.steps=200"],
        ),
        ({"optimizer__momentum": 1.0}, ["optimizer.momentum=1.0", "under 1"]),
        ({"optimizer__weight_decay": -0.1}, ["optimizer.weight_decay=-0.1", "at least 0"]),
        ({"optimizer__l2": 0.2}, ["optimizer.weight_decay=0 (it is 0.1)", "optimizer.l2=0 (it is 0.2)"]),
        ({"optimizer__kind": "sgd"}, ["optimizer.kind=sgd", "optimizer.weight_decay=0 (it is 0.1)", "optimizer.l2"]),
        (
            {
                "optimizer__kind": "muon",
                "optimizer__l2": 0.1,
                "optimizer__weight_decay": 0.0,
                "parallel__zero_stage": 0,
            },
            ["optimizer.kind=muon", "optimizer.l2=0 (it is 0.1)", "optimizer.weight_decay"],
        ),
        ({"parallel__offload_optimizer": OffloadConfig("gpu")}, ["parallel.offload_optimizer.device=gpu", "cpu, nvme"]),
        (
            {"parallel__offload_optimizer": OffloadConfig("cpu"), "parallel__zero_stage": 0},
            ["parallel.offload_optimizer.device=cpu", "parallel.zero_stage=1 or more (it is 0)", "device=none"],
        ),
        (
            {"parallel__offload_parameters": OffloadConfig("cpu"), "parallel__zero_stage": 2},
            ["parallel.offload_parameters.device=cpu", "parallel.zero_stage=3 or more (it is 2)", "device=none"],
        ),
        (
            {"parallel__offload_optimizer": OffloadConfig("nvme", "/disk"), "parallel__zero_stage": 2},
            ["parallel.offload_optimizer.device=nvme", "parallel.zero_stage=3 (it is 2)", "device=cpu"],
        ),
        (
            {"parallel__offload_parameters": OffloadConfig("nvme"), "parallel__zero_stage": 3},
            ["parallel.offload_parameters.device=nvme", "parallel.offload_parameters.nvme_path=null"],
        ),
        (
            {"parallel__offload_optimizer": OffloadConfig("cpu", "/disk")},
            ["parallel.offload_optimizer.device=cpu", "parallel.offload_optimizer.nvme_path=/disk"],
        ),
        (
            {"parallel__offload_optimizer": OffloadConfig("cpu", buffer_count=0)},
            ["parallel.offload_optimizer.buffer_count=0", "at least 1"],
        ),
        ({"debug__profile_steps": [190, 210]}, ["debug.profile_steps=[190, 210]", "the run's 200"]),
        ({"schedule__kind": "cosin"}, ["schedule.kind=cosin", "did you mean 'cosine'"]),
        ({"optimizer__lr": 0.0}, ["optimizer.lr=0.0", "above 0"]),
        ({"optimizer__lr": float("nan")}, ["optimizer.lr=nan", "above 0"]),
        ({"optimizer__lr": float("inf")}, ["optimizer.lr=inf", "above 0"]),
        ({"optimizer__muon_lr": 0.0}, ["optimizer.muon_lr=0.0", "above 0"]),
        ({"optimizer__kind": "moun"}, ["optimizer.kind=moun", "did you mean 'muon'"]),
        ({"optimizer__kind": "muon"}, ["train.gradient_clipping=0", "it is 1.0", "parallel.zero_stage=0"]),
        (
            {"optimizer__kind": "muon", "parallel__zero_stage": 2, "train__gradient_clipping": 0.5},
            ["train.gradient_clipping=0", "it is 0.5", "parallel.zero_stage=0"],
        ),
        (
            {"optimizer__kind": "muon", "parallel__zero_stage": 3, "train__gradient_clipping": 1.0},
            ["train.gradient_clipping=0", "it is 1.0", "parallel.zero_stage=0"],
        ),
        ({"model__num_nextn_predict_layers": -1}, ["model.num_nextn_predict_layers=-1"]),
        ({"model__audio_frames_per_token": 3}, ["model.audio_frames_per_token=3", "2, 4, 8"]),
        ({"data__phases": [PhaseConfig(8, {}), PhaseConfig(8, {})]}, ["data.phases", "from_sample=8 must be over 8"]),
        ({"checkpoint__keep_last": 0}, ["checkpoint.keep_last=0", "at least 1, or null"]),
        ({"checkpoint__keep_every": 750}, ["checkpoint.keep_every=750", "train.save_every=500"]),
        ({"checkpoint__keep_best_mode": "mni"}, ["checkpoint.keep_best_mode=mni", "did you mean 'min'"]),
        ({"train__precision": "bf61"}, ["train.precision=bf61", "did you mean 'bf16'"]),
        ({"track__wandb": "ofline"}, ["track.wandb=ofline", "did you mean 'offline'"]),
        ({"train__next_token_loss_weight": -1.0}, ["train.next_token_loss_weight=-1.0", "at least 0"]),
        ({"train__mtp_loss_weight": float("nan")}, ["train.mtp_loss_weight=nan", "at least 0"]),
        ({"train__balance_loss_weight": float("inf")}, ["train.balance_loss_weight=inf", "at least 0"]),
        ({"train__next_token_loss_weight": 0.0}, ["train.next_token_loss_weight=0.0", "align.weight=0.0", "both 0"]),
        ({"align__weight": -0.1}, ["align.weight=-0.1", "at least 0"]),
        ({"align__temperature": 0.0}, ["align.temperature=0.0", "above 0"]),
        ({"align__max_pairs": 1}, ["align.max_pairs=1", "at least 2"]),
        ({"align__pairs": ["image_txt"]}, ["align.pairs=image_txt", "did you mean 'image_text'"]),
        ({"align__weight": 1.0, "align__pairs": []}, ["align.weight=1.0", "align.pairs=[image_text"]),
        ({"align__weight": 1.0, "parallel__sequence": 2}, ["align.weight=1.0", "parallel.sequence=1 (it is 2)"]),
        ({"model__num_experts_per_tok": 9}, ["model.num_experts_per_tok=9", "model.n_routed_experts=8"]),
    ],
)
def test_a_contradiction_is_refused_with_its_keys_and_both_figures(changes, said):
    with pytest.raises(ConfigError) as caught:
        changed(**changes).check_run(ranks=2)
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize(("zero_stage", "clipping"), [(0, 1.0), (0, 0.0), (1, 0.0), (2, 0.0), (3, 0.0)])
def test_muon_passes_where_it_learns(zero_stage, clipping):
    changes = {"optimizer__kind": "muon", "parallel__zero_stage": zero_stage, "train__gradient_clipping": clipping}
    changed(**changes).check_run(ranks=2)


def index_of(image=0, audio=0, video=0, modality=None) -> Index:
    """A corpus with so many tokens of each medium, over two shards."""
    tokens = [{"image": image, "audio": audio, "video": video}, {"image": 0, "audio": 0, "video": 0}]
    sources = [
        SourceRecord(f"s{n}", 1.0, 1.0, "text", SplitRecord(1, 0, 1, 100, media)) for n, media in enumerate(tokens)
    ]
    return Index(300, modality or ModalityConfig(), sources, {})


def test_a_stage_of_alignment_alone_passes():
    changed(align__weight=1.0, train__next_token_loss_weight=0.0).check_run(ranks=2)


def test_pairs_that_the_corpus_cannot_have_are_refused():
    run = changed(align__weight=1.0, align__pairs=["audio_text", "image_video"])
    with pytest.raises(ConfigError) as caught:
        run.check_index(index_of(image=4))
    for part in ("align.pairs=[audio_text,image_video]", "holds image, text", "align.weight=0"):
        assert part in str(caught.value)
    run.check_index(index_of(audio=1))
    run.check_index(index_of(image=1, video=1))
    changed(align__weight=0.0).check_index(index_of())


def test_a_model_that_reads_every_medium_of_the_corpus_passes():
    sound_run().check_index(index_of(image=4, audio=5, video=6))
    sound_run().check_index(index_of())


@pytest.mark.parametrize(
    ("medium", "key", "value"),
    [("image", "image_patch_pixels", 14), ("video", "video_patch_pixels", 14), ("audio", "audio_mels", 80)],
)
def test_a_medium_without_an_encoder_is_named_with_its_count_and_key(medium, key, value):
    run = changed(**{f"model__{key}": None})
    with pytest.raises(ConfigError) as caught:
        run.check_index(index_of(**{medium: 12_345}))
    for part in (f"12,345 tokens of {medium}", "no encoder", f"set model.{key}={value}"):
        assert part in str(caught.value)
    others = {name: 5 for name in ("image", "audio", "video") if name != medium}
    run.check_index(index_of(**others))


@pytest.mark.parametrize(
    ("medium", "key", "value", "modality"),
    [
        ("image", "image_patch_pixels", 14, ModalityConfig(image=ImageConfig(224, 16))),
        ("video", "video_patch_pixels", 14, ModalityConfig(video=VideoConfig(224, 16))),
        ("audio", "audio_mels", 80, ModalityConfig(audio=AudioConfig(mels=16))),
        ("audio", "audio_frames_per_token", 4, ModalityConfig(audio=AudioConfig(frames_per_token=16))),
    ],
)
def test_an_encoder_of_another_size_than_the_corpus_is_refused_with_both(medium, key, value, modality):
    with pytest.raises(ConfigError) as caught:
        sound_run().check_index(index_of(**{medium: 9}, modality=modality))
    for part in (f"{medium}: ", f"{key}=16", f"the model reads {value}", f"set model.{key}=16"):
        assert part in str(caught.value)


def test_sizes_of_an_encoder_that_is_not_there_are_nobodys_concern():
    run = changed(model__audio_mels=None)
    run.check_index(index_of(image=4, modality=ModalityConfig(audio=AudioConfig(frames_per_token=16))))


def test_a_larger_vocabulary_than_the_models_is_refused_with_both():
    with pytest.raises(ConfigError, match=r"300 ids, the model embeds 299: set model\.vocab_size=300"):
        changed(model__vocab_size=299).check_index(index_of())


def test_the_three_batch_terms_and_what_follows_from_them():
    run = sound_run()
    run.data.seq_len = 512
    assert run.train.gradient_accumulation_steps(ranks=2) == 4
    assert run.train.gradient_accumulation_steps(ranks=8) == 1
    terms = run.batch_terms(ranks=2)
    for part in (
        "global_batch_size 24",
        "micro_batch_size 3",
        "2 ranks",
        "gradient_accumulation_steps 4",
        "12,288 tokens a step",
        "200 steps",
        "2,457,600 tokens",
    ):
        assert part in terms


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (24 * 512, 1), (24 * 512 + 1, 2), (24 * 512 * 10, 10)])
def test_tokens_give_the_steps_that_see_at_least_as_many(tokens, steps):
    run = sound_run()
    run.data.seq_len = 512
    run.train = replace(run.train, steps=None, tokens=tokens)
    assert run.steps == steps


def test_a_run_given_in_tokens_is_checked_by_its_steps():
    run = sound_run()
    run.train = replace(run.train, steps=None, tokens=24 * run.data.seq_len * 50)
    with pytest.raises(ConfigError, match=r"schedule\.warmup_steps=100.*50"):
        run.check_run(ranks=1)


def test_the_folder_is_the_runs_own(tmp_path):
    run = sound_run()
    run.runs_dir = str(tmp_path / "runs")
    assert run.folder == tmp_path / "runs" / "first"
