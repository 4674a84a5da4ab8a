"""Each file in conf/ composes; each experiment runs tiny."""

import json
from pathlib import Path

import hydra
import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from conftest import REPOSITORY, train_smoke
from omniloom import settings
from omniloom.cli import run_verb
from omniloom.data.samples.demo import WEIGHTS

CONF = REPOSITORY / "conf"
ROOTS = {
    "tokenize_corpus": settings.TokenizeSettings,
    "pretrain": settings.TrainSettings,
    "plan_run": settings.PlanSettings,
    "run_evals": settings.EvaluateSettings,
    "export_model": settings.ExportSettings,
    "import_model": settings.ImportSettings,
    "sweep_runs": settings.SweepSettings,
    "write_report": settings.ReportSettings,
    "client": settings.ClientSettings,
    "local_cluster": settings.LocalClusterSettings,
    "sync_run": settings.SyncSettings,
    "doctor": settings.DoctorSettings,
}
EXTENDED = {"plan_run": "pretrain"}  # the root that conf/<root>.yaml begins with
OPTIONS = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.glob("*/*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def compose(root: str, overrides: list[str]) -> object:
    ConfigStore.instance().store(name=f"{EXTENDED.get(root, root)}_schema", node=ROOTS[root])
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_object(hydra.compose(root, overrides))


def test_every_root_is_known() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == ROOTS.keys()


@pytest.mark.parametrize("root", ROOTS)
def test_a_root_composes_to_its_dataclass(root: str) -> None:
    assert isinstance(compose(root, []), ROOTS[root])


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_a_group_option_composes(option: Path) -> None:
    root = {"suite": "run_evals", "sweep": "sweep_runs"}.get(str(option.parent), "pretrain")
    composed = compose(root, [f"{option.parent}={option.name}"])
    assert isinstance(composed, ROOTS[root])
    if root == "pretrain":
        composed.model.check()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_is_sound(experiment: str) -> None:
    """Its rows fit the model, its phases name sources of its own data, its encoders read what the data set cuts."""
    composed = compose("pretrain", [f"experiment={experiment}"])
    composed.check()
    model, media = composed.model, composed.modality
    assert model.widths == media.widths
    assert model.audio_frames_per_token == media.audio.frames_per_token
    assert model.vocab_size >= composed.tokenizer.vocab_size
    assert (model.num_nextn_predict_layers, model.max_position_embeddings >= composed.data.seq_len) == (1, True)
    starts = [phase.from_sample for phase in composed.data.phases]
    assert all(start < composed.steps * composed.train.global_batch_size for start in starts), "a phase never begins"


def test_the_demos_weights_and_phases_name_its_own_sources() -> None:
    """Mistyped, they would be found only once the ranks run."""
    composed = compose("pretrain", ["experiment=demo"])
    named = {name for phase in composed.data.phases for name in phase.weights} | composed.data.weights.keys()
    assert named
    assert named <= WEIGHTS.keys()


@pytest.mark.parametrize("suite", [o.name for o in OPTIONS if str(o.parent) == "suite"])
def test_a_suite_is_sound_and_gives_every_task_its_files(suite: str) -> None:
    composed = compose("run_evals", [f"suite={suite}", "init=somewhere"])
    composed.check()
    ours = {path.stem for path in (REPOSITORY / "evals").glob("*/*.yaml")}
    assert set(composed.tasks) <= ours
    assert len(set(composed.tasks)) == len(composed.tasks)
    for task in composed.tasks:
        assert composed.task_args[task]["files"], task


def test_the_demos_suite_reads_files_held_out_by_the_demos_samples(demo_files: Path) -> None:
    """Every file or glob is there, and none of them is a training file of the manifest."""
    from omniloom.data.source import list_units, read_manifest

    units = list_units(read_manifest(demo_files / "manifest.yaml"), demo_files)
    trained = {file for unit in units if unit.split == "train" for file in unit.files}
    composed = compose("run_evals", ["suite=demo"])
    for task, arguments in composed.task_args.items():
        patterns = [arguments["files"]] if isinstance(arguments["files"], str) else arguments["files"]
        for pattern in patterns:
            assert pattern.startswith("corpora/demo/files/")
            found = sorted(demo_files.glob(pattern.removeprefix("corpora/demo/files/")))
            assert found, (task, pattern)
            assert not trained & {str(path.resolve()) for path in found}, task


@pytest.mark.parametrize("option", [o for o in OPTIONS if str(o.parent) == "data"], ids=str)
def test_a_data_set_composes_for_tokenize(option: Path) -> None:
    composed = compose("tokenize_corpus", [f"data={option.name}"])
    assert isinstance(composed, settings.TokenizeSettings)
    composed.check()


SLOW = [pytest.param(name, marks=pytest.mark.slow) if name == "demo" else name for name in EXPERIMENTS]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("experiment", SLOW)
def test_an_experiment_runs_tiny(
    experiment: str, ray_cluster: None, workspace: Path, request: pytest.FixtureRequest
) -> None:
    if experiment == "demo":
        request.getfixturevalue("demo_files")
    places = [f"corpus={workspace}/corpora/{experiment}", f"runs_dir={workspace}/runs"]
    small = ["train.steps=2", "schedule.warmup_steps=1", "train.val_rows=4"]
    run_verb("train", [f"experiment={experiment}", f"run=tiny_{experiment}", *places, *small])
    folder = workspace / "runs" / f"tiny_{experiment}"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    skipped = [event for event in map(json.loads, (folder / "events.jsonl").open()) if "skipped" in event["event"]]
    assert skipped == [], "documents of the sample data do not fit a row"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("preset", [o.name for o in OPTIONS if o.parts[0] == "model" and o.name.startswith("tiny_")])
def test_a_tiny_preset_trains_on_the_smoke_corpus(preset: str, ray_cluster: None, workspace: Path) -> None:
    """The corpus holds all four modalities: each preset gets the encoders for them."""
    reads = ["model.image_patch_pixels=8", "model.video_patch_pixels=8", "model.audio_mels=16"]
    folder = train_smoke(workspace, preset, f"model={preset}", *reads, "train.steps=4")
    losses = [json.loads(line)["loss/next_token"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
