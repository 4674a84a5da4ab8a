"""Each file in conf/ composes; each experiment runs tiny."""

import json
from pathlib import Path

import hydra
import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conftest import REPOSITORY, train_smoke
from omniloom import settings
from omniloom.cli import run_verb
from omniloom.compose import explain, run_job
from omniloom.data.samples.demo import WEIGHTS

CONF = REPOSITORY / "conf"
ROOTS = {
    "tokenize_corpus": settings.TokenizeSettings,
    "pretrain": settings.TrainSettings,
    "plan_run": settings.PlanSettings,
    "plan_scaling": settings.ScalingSettings,
    "run_evals": settings.EvaluateSettings,
    "generate_text": settings.GenerateSettings,
    "chat": settings.ChatSettings,
    "export_model": settings.ExportSettings,
    "import_model": settings.ImportSettings,
    "sweep_runs": settings.SweepSettings,
    "show": settings.ShowSettings,
    "write_report": settings.ReportSettings,
    "client": settings.ClientSettings,
    "local_cluster": settings.LocalClusterSettings,
    "sync_run": settings.SyncSettings,
    "doctor": settings.DoctorSettings,
}
EXTENDED = {"plan_run": "pretrain"}  # the root that conf/<root>.yaml begins with
OPTIONS = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.glob("*/**/*.yaml"))
CLUSTERS = [option.name for option in OPTIONS if str(option.parent) == "cluster"]
DEVICES = [option.name for option in OPTIONS if str(option.parent) == "cluster/device"]
WITH_CLUSTER = [root for root, schema in ROOTS.items() if "cluster" in schema.__dataclass_fields__]
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cluster", ["local", "h100_2x8"])
def test_a_device_goes_into_any_cluster(cluster: str, device: str) -> None:
    """It takes the place of the cluster's own whole: nothing of that one is left."""
    composed = compose("plan_run", [f"cluster={cluster}", f"cluster/device={device}"]).cluster
    composed.check_hardware()
    found = composed.device
    assert (found.name, composed.name) == (device, cluster)
    assert found.peak_flops_per_s.keys() >= {"fp32", "fp16"}
    assert None not in (found.memory_bytes, found.memory_bytes_per_s, found.watts)
    for precision, reached in found.matmul_flops_per_s.items():
        assert 0.4 < reached / found.peak_flops_per_s[precision] < 1


@pytest.mark.parametrize("root", WITH_CLUSTER)
def test_every_root_that_has_a_cluster_takes_a_device(root: str) -> None:
    assert compose(root, ["cluster/device=h200"]).cluster.device.name == "h200"
    assert compose(root, ["cluster=a100_1x8"]).cluster.device.name == "a100_80gb"


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_cluster_has_a_rank_for_each_of_its_devices(cluster: str) -> None:
    composed = compose("pretrain", [f"cluster={cluster}", "cluster.address=head:6379"]).cluster
    composed.check()
    if composed.devices_per_node is not None:
        assert composed.name == cluster
        assert cluster.endswith(f"_{composed.nodes}x{composed.devices_per_node}")
        assert composed.workers == composed.nodes * composed.devices_per_node
        assert (composed.network_bytes_per_s is None) == (composed.nodes == 1)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("cluster/device=h10o_sxm", "unknown cluster/device=h10o_sxm; did you mean 'h100_sxm'?"),
        ("cluster=h100_2x9", "unknown cluster=h100_2x9; did you mean 'h100_2x8'?"),
        ("cluster.device=h200", "cluster.device is a section: type cluster/device=h200"),
        ("cluster.device=null", "cluster.device is a section: type cluster/device=null"),
        (
            "cluster.device=h10_sxm",
            "cluster.device is a section: type cluster/device=<name>; did you mean 'h100_sxm'?",
        ),
        ("device=h200", "unknown key device; did you mean 'cluster/device'?"),
        ("cluster/devices=h200", "unknown key cluster/devices; did you mean 'cluster/device'?"),
        ("modality.audio=5", "modality.audio is a section: set its keys, modality.audio.sample_rate=…"),
    ],
)
def test_what_is_typed_for_a_device_or_a_section_is_answered_with_what_to_type(word: str, message: str) -> None:
    with pytest.raises((HydraException, OmegaConfBaseException)) as refused:
        compose("plan_run", [word])
    assert explain(refused.value, settings.PlanSettings) == message


@pytest.mark.parametrize("word", ["+cluster/device=h200", "+train.steps=3"])
def test_a_plus_that_adds_nothing_is_refused(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["omniloom plan", word])
    with pytest.raises(SystemExit):
        run_job("plan_run", settings.PlanSettings, lambda plan: None, extends="pretrain")
    assert capsys.readouterr().err == f"error: {word} needs no +: {word[1:]}\n"


@pytest.mark.parametrize(("named", "flops"), [([], 989e12), (["cluster/device=l40s"], 362e12)], ids=["kept", "named"])
def test_like_keeps_a_runs_device_unless_one_is_named(
    named: list[str], flops: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    first = OmegaConf.structured(compose("pretrain", ["cluster=h100_2x8", "train.steps=7"]))
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(first))
    (folder / "run.json").write_text('{"id": "a", "name": "first", "status": "finished"}')
    monkeypatch.setattr("sys.argv", ["omniloom plan", "like=first", *named, f"runs_dir={tmp_path}/runs"])
    found: list[settings.PlanSettings] = []
    run_job("plan_run", settings.PlanSettings, found.append, extends="pretrain")
    assert (found[0].cluster.device.peak_flops_per_s["bf16"], found[0].train.steps) == (flops, 7)
    assert found[0].cluster.name == "h100_2x8"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_is_sound(experiment: str) -> None:
    """Its rows fit the model, its phases name sources of its own data, its encoders read what the data set cuts."""
    composed = compose("pretrain", [f"experiment={experiment}"])
    composed.check()
    model, media = composed.model, composed.modality
    if experiment == "scaling":  # text alone, and the loss that of the next token
        assert (model.widths, model.num_nextn_predict_layers) == ((1, 1, 1), 0)
    else:
        assert (model.widths, model.num_nextn_predict_layers) == (media.widths, 1)
    assert model.audio_frames_per_token == media.audio.frames_per_token
    assert model.vocab_size >= composed.tokenizer.vocab_size
    assert model.max_position_embeddings >= composed.data.seq_len
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
    from omniloom.data.manifest import read_manifest
    from omniloom.data.units import list_units

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
