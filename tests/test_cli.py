"""The command line as a process: exit statuses and the one message."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY
from omniloom.cli import VERBS

OMNILOOM = str(Path(sys.executable).parent / "omniloom")


def omniloom(*words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [OMNILOOM, *words], cwd=folder, capture_output=True, text=True, timeout=240, env={**os.environ, **environment}
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown verb trian; did you mean 'train'?"),
        (["train", "trian.steps=4"], "unknown key trian; did you mean 'train'?"),
        (["train", "model.hiden_size=3"], "unknown key model.hiden_size; did you mean 'model.hidden_size'?"),
        (["train", "+modle=3"], "unknown key modle; did you mean 'model'?"),
        (["train", "model=tinny"], "unknown model=tinny; did you mean 'tiny'?"),
        (["train", "experiment=smok"], "unknown experiment=smok; did you mean 'smoke'?"),
        (["train", "train.steps=many"], "train.steps: Value 'many'"),
        (["train", "corpus=here"], "exactly one of train.steps=None and train.tokens=None"),
        (["train", "train.steps=200"], "nothing to train on: set corpus="),
        (["train", "train.steps=200", "corpus=nowhere"], "no corpus at"),
        (
            ["train", "train.steps=200", "train.precision=fp4"],
            "train.precision=fp4 is none of fp32, bf16_autocast, bf16, fp16, fp8",
        ),
        (
            ["train", "train.steps=200", "train.global_batch_size=10", "cluster.workers=3"],
            "train.global_batch_size=10 must be a multiple of train.micro_batch_size=8 × cluster.workers=3 = 24",
        ),
        (
            ["train", "train.steps=200", "model.num_experts_per_tok=9"],
            "model.num_experts_per_tok=9 is over model.n_routed_experts=8",
        ),
        (["tokenize", "corpus=c"], "exactly one of manifest=None and samples=None"),
        (["tokenize", "corpus=c", "samples=demp"], "unknown samples=demp; did you mean 'demo'?"),
        (["tokenize", "corpus=c", "manifest=nothing.yaml"], "no manifest at nothing.yaml"),
        (
            ["train", "train.steps=200", "optimizer.kind=muon"],
            "set train.gradient_clipping=0 (it is 1.0), or parallel.zero_stage=0",
        ),
        (["train", "train.steps=200", "optimizer.kind=moun"], "optimizer.kind=moun is none of adamw, sgd, muon"),
        (
            ["train", "train.steps=200", "data.phases=[{from_sample:9,weights:{}},{from_sample:3,weights:{}}]"],
            "phases begin one after the other: data.phases from_sample=3 must be over 9",
        ),
        (["train", "train.steps=200", "data.phases=[{from:9,weights:{}}]"], "data.phases: unknown key from"),
        (
            ["train", "train.steps=200", "data.phases=[{from_sample:9,weights:{a:-1}}]"],
            "must be a number of at least 0",
        ),
        (["tokenize", "corpus=c", "samples=demo", "modality.video.size_pixels=30"], "modality.video.size_pixels=30"),
        (["tokenize", "corpus=c", "samples=demo", "modality.audio.frames_per_token=3"], "must be 2, 4, 8"),
        (["evaluate", "suite=dmeo"], "unknown suite=dmeo; did you mean 'demo'?"),
        (["evaluate"], "no model to evaluate: set init="),
        (["evaluate", "init=nowhere"], "init=nowhere is neither a run in runs nor a folder"),
        (["sweep", "trian", "seed=choice(1,2)"], "trian cannot be swept; did you mean 'train'?"),
        (["sweep", "train", "experiment=smoke"], "nothing is swept: give a key several values"),
        (["sweep", "train", "experiment=smoke", "sede=choice(1,2)"], "unknown key sede; did you mean 'seed'?"),
        (["sweep", "train", "experiment=smoke", "seed=range(3,3)"], "seed=range(3,3) is an empty range"),
        (["sweep", "train", "experiment=smoke", "seed=1,2", "sweep=hasa"], "unknown sweep=hasa; did you mean 'asha'?"),
        (["sweep", "train", "experiment=smoke", "seed=1,2", "sweep.trails=3"], "did you mean 'sweep.trials'?"),
        (
            ["sweep", "train", "experiment=smoke", "optimizer.lr=interval(0.1,1)", "sweep=grid"],
            "a grid has no end over optimizer.lr=interval(0.1,1)",
        ),
        (
            ["sweep", "train", "experiment=smoke", "model.num_experts_per_tok=choice(1,900)"],
            "model.num_experts_per_tok=900 is over model.n_routed_experts=",
        ),
        (
            ["sweep", "train", "experiment=smoke", "seed=1,2", "sweep=pbt", "train.save_every=15"],
            "train.val_every=10 must be a multiple of train.save_every=15",
        ),
        (["submit", "evaluate", "init=a", "task_args.perplexity.api_key=abc"], "looks like a secret"),
        (["evaluate", "init=a", "tasks=[perplexity]", "task_args.perplexty.files=b"], "did you mean 'perplexity'?"),
    ],
)
def test_wrong_input_is_one_message_and_a_nonzero_status(words: list[str], message: str, tmp_path: Path) -> None:
    answer = omniloom(*words, folder=tmp_path)
    assert answer.returncode in (1, 2)
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""
    assert not (tmp_path / "outputs").exists()


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """The first event of the run goes to a device that is always full."""
    (tmp_path / "runs" / "full").mkdir(parents=True)
    (tmp_path / "runs" / "full" / "events.jsonl").symlink_to("/dev/full")
    answer = omniloom("train", "experiment=smoke", "run=full", folder=tmp_path)
    assert answer.returncode == 1
    assert "No space left on device" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_debug_adds_the_traceback(tmp_path: Path) -> None:
    answer = omniloom("train", "--debug", "train.steps=200", folder=tmp_path)
    assert answer.returncode == 1
    assert "Traceback" in answer.stderr


def test_help_names_the_verbs_with_examples(tmp_path: Path) -> None:
    answer = omniloom("--help", folder=tmp_path)
    assert answer.returncode == 0
    for verb in VERBS:
        assert f"\n  {verb} " in answer.stdout or f"{verb} ID" in answer.stdout
    assert "examples:" in answer.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_a_verbs_help_has_examples(verb: str, tmp_path: Path) -> None:
    answer = omniloom(verb, "--help", folder=tmp_path)
    assert answer.returncode == 0
    assert "examples:" in answer.stdout


def test_hydra_prints_the_configuration(tmp_path: Path) -> None:
    answer = omniloom("train", "--cfg", "job", "experiment=smoke", folder=tmp_path)
    assert answer.returncode == 0
    assert "hidden_size: 32" in answer.stdout


@pytest.mark.parametrize("word", ["data.weights={words: 0.5}", "data.weights.words=0.5"])
def test_a_free_mapping_is_set_whole_or_by_key(word: str, tmp_path: Path) -> None:
    answer = omniloom("train", "--cfg", "job", "experiment=smoke", word, folder=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "  weights:\n    words: 0.5\n" in answer.stdout


def test_like_takes_a_runs_configuration_before_the_overrides(tmp_path: Path) -> None:
    """Everything but its name and folder; a group that is named comes whole from conf/."""
    import yaml

    words = ["experiment=smoke", "optimizer.lr=0.5", "track.notes='a, b: {c}'", "data.weights={words: 0.5}"]
    composed = omniloom("train", "--cfg", "job", *words, folder=tmp_path).stdout
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "config.yaml").write_text(composed)
    (tmp_path / "runs" / "first" / "run.json").write_text('{"id": "a", "name": "first", "status": "finished"}')

    answer = omniloom("train", "--cfg", "job", "like=first", "run=second", "seed=3", folder=tmp_path)
    assert answer.returncode == 0, answer.stderr
    first, second = yaml.safe_load(composed), yaml.safe_load(answer.stdout)
    changed = {key for key in first if first[key] != second[key]}
    assert changed == {"like", "run", "seed"}
    assert second["track"]["notes"] == "a, b: {c}"

    other = omniloom("train", "--cfg", "job", "like=first", "model=tiny", folder=tmp_path)
    assert yaml.safe_load(other.stdout)["model"]["hidden_size"] == 128
    assert yaml.safe_load(other.stdout)["optimizer"]["lr"] == 0.5
    both = omniloom("train", "like=first", "experiment=demo", folder=tmp_path)
    assert "like=first and experiment=demo are both whole runs" in both.stderr
    nobody = omniloom("train", "like=frist", folder=tmp_path)
    assert "did you mean 'first'?" in nobody.stderr
    assert {both.returncode, nobody.returncode} == {1}


def test_a_job_run_by_path_is_its_verb(tmp_path: Path) -> None:
    script = REPOSITORY / "jobs" / "pretrain.py"
    words = [sys.executable, str(script), "--cfg", "job", "experiment=smoke"]
    by_path = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert by_path.stdout == omniloom("train", "--cfg", "job", "experiment=smoke", folder=tmp_path).stdout


def test_a_bad_corpus_leaves_nothing_that_a_repeat_trips_over(tmp_path: Path) -> None:
    """An unreadable picture fails the job with its name; mended, the same command goes through."""
    from PIL import Image

    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not a picture")
    document = {"segments": [{"image": "broken.png"}, {"text": "seven"}]}
    (tmp_path / "documents.jsonl").write_text(json.dumps(document) + "\n")
    (tmp_path / "manifest.yaml").write_text("sources: {a: {format: interleaved, train: [documents.jsonl]}}")
    words = ("tokenize", "manifest=manifest.yaml", "corpus=corpus", "tokenizer.vocab_size=300")
    failed = omniloom(*words, folder=tmp_path)
    assert failed.returncode == 1
    assert "1 of 1 documents cannot be used" in failed.stderr
    assert "documents.jsonl@0" in failed.stderr
    assert not (tmp_path / "corpus" / "index.json").exists()

    Image.new("RGB", (20, 20), "red").save(tmp_path / "broken.png")
    (tmp_path / "documents.jsonl").touch()
    mended = omniloom(*words, folder=tmp_path)
    assert mended.returncode == 0, mended.stderr
    assert (tmp_path / "corpus" / "index.json").is_file()


def test_bad_media_within_the_limit_are_named_and_over_it_fail_the_job(tmp_path: Path) -> None:
    """A silent clip, a missing video: 2 of 4 documents; the limit is the user's."""
    import numpy as np

    from omniloom.data.samples.files import write_mp4, write_wav

    write_wav(tmp_path / "silent.wav", np.zeros(3_200), 16_000)
    write_mp4(tmp_path / "film.mp4", np.zeros((4, 16, 16, 3), np.uint8), 4)
    media = [{"audio": "silent.wav"}, {"video": "film.mp4"}, {"video": "nowhere.mp4"}, {"text": "plain"}]
    lines = [json.dumps({"segments": [medium, {"text": " seven"}]}) + "\n" for medium in media]
    (tmp_path / "documents.jsonl").write_text("".join(lines))
    (tmp_path / "manifest.yaml").write_text("sources: {a: {format: interleaved, train: [documents.jsonl]}}")
    words = ("tokenize", "manifest=manifest.yaml", "corpus=corpus", "tokenizer.vocab_size=300")
    sizes = ("modality.video.size_pixels=16", "modality.video.patch_pixels=8")
    failed = omniloom(*words, *sizes, "max_reject_share=0.49", folder=tmp_path)
    assert failed.returncode == 1
    assert "2 of 4 documents cannot be used, 50.00%, over max_reject_share=49.00%" in failed.stderr
    assert "documents.jsonl@0: silent clip" in failed.stderr
    assert f"documents.jsonl@{len(lines[0] + lines[1])}: cannot read" in failed.stderr
    assert not (tmp_path / "corpus" / "index.json").exists()
    passed = omniloom(*words, *sizes, "max_reject_share=0.5", folder=tmp_path)
    assert passed.returncode == 0, passed.stderr
    assert "2 skipped" in passed.stdout
    assert "documents.jsonl@0: silent clip" in passed.stdout
    deaf = omniloom("train", "corpus=corpus", "train.steps=200", "model.video_patch_pixels=null", folder=tmp_path)
    assert deaf.returncode == 1
    assert "tokens of video and the model has no encoder for it: set model.video_patch_pixels=8" in deaf.stderr


def test_a_run_as_a_user_has_it_leaves_the_home_alone_and_keeps_secrets(tmp_path: Path) -> None:
    """Train, repeat, change and evaluate in own processes, with an empty home and a secret in the environment."""
    home, secret = tmp_path / "home", "s3cr3t" * 7
    home.mkdir()
    environment = {"HOME": str(home), "WANDB_API_KEY": secret[:40]}
    train = ("train", "experiment=smoke", "run=one")
    first = omniloom(*train, folder=tmp_path, **environment)
    assert first.returncode == 0, first.stderr
    again = omniloom(*train, folder=tmp_path, **environment)
    assert again.returncode == 0
    assert "is finished" in again.stdout
    changed = omniloom(*train, "optimizer.lr=0.5", folder=tmp_path, **environment)
    assert changed.returncode == 1
    assert "optimizer.lr: 0.0003 → 0.5" in changed.stderr
    scored = omniloom(
        "evaluate",
        "init=one",
        "--json",
        "tasks=[perplexity,omniloom_pictures,omniloom_speech]",
        "task_args.perplexity.files=[corpora/smoke/files/words/heldout/*.txt]",
        "task_args.omniloom_pictures.files=corpora/smoke/files/colours/questions.jsonl",
        "task_args.omniloom_speech.files=corpora/smoke/files/tones/questions.jsonl",
        folder=tmp_path,
        **environment,
    )
    assert scored.returncode == 0, scored.stderr
    results = json.loads(scored.stdout)
    assert results["perplexity"]["metrics"]["bits_per_byte"]["control"].keys() == {"unigram"}
    for task, choices in (("omniloom_pictures", 3), ("omniloom_speech", 2)):
        assert results[task]["metrics"]["acc"]["control"].keys() == {"removed", "shuffled"}
        assert results[task]["metrics"]["acc"]["chance"] == pytest.approx(1 / choices)
    assert list(home.iterdir()) == []
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert not [path for path in written if secret[:40].encode() in path.read_bytes()]
