"""Each file in conf/ composes; each experiment runs tiny."""

import json
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from conftest import REPOSITORY
from omniloom import settings
from omniloom.cli import run_verb

CONF = REPOSITORY / "conf"
ROOTS = {
    "tokenize_corpus": settings.TokenizeSettings,
    "pretrain": settings.TrainSettings,
    "run_evals": settings.EvaluateSettings,
}
OPTIONS = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.glob("*/*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def compose(root: str, overrides: list[str]) -> object:
    ConfigStore.instance().store(name=f"{root}_schema", node=ROOTS[root])
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
    composed = compose("pretrain", [f"{option.parent}={option.name}"])
    assert isinstance(composed, settings.TrainSettings)
    composed.model.check()


@pytest.mark.parametrize("option", [o for o in OPTIONS if str(o.parent) == "data"], ids=str)
def test_a_data_set_composes_for_tokenize(option: Path) -> None:
    composed = compose("tokenize_corpus", [f"data={option.name}"])
    assert isinstance(composed, settings.TokenizeSettings)
    composed.check()


@pytest.mark.parametrize("preset", [o.name for o in OPTIONS if str(o.parent) == "model"])
def test_a_model_preset_builds_on_the_meta_device(preset: str) -> None:
    from omniloom.model.decoder import Decoder

    composed = compose("pretrain", [f"model={preset}"])
    assert isinstance(composed, settings.TrainSettings)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Decoder(composed.model).parameters()) > 0


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_runs_tiny(experiment: str, ray_cluster: None, workspace: Path) -> None:
    places = [f"corpus={workspace}/corpora/{experiment}", f"runs_dir={workspace}/runs"]
    small = ["train.steps=2", "schedule.warmup_steps=1", "train.val_rows=4"]
    run_verb("train", [f"experiment={experiment}", f"run=tiny_{experiment}", *places, *small])
    folder = workspace / "runs" / f"tiny_{experiment}"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
