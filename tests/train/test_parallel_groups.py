"""Each way to share by ZeRO that conf/parallel/ names takes steps on two ranks, or says what this machine lacks."""

from pathlib import Path
from typing import Any

import hydra
import pytest
from engine_ranks import engine_of, on_ranks, take_step
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from tiny_rows import MEDIA, TINY, row

from conftest import REPOSITORY
from omniloom.errors import ConfigError
from omniloom.settings import TrainSettings
from omniloom.train.config import TrainingRun
from omniloom.train.groups import SHARING, OptimizerConfig, ParallelConfig, TrainConfig

CONF = REPOSITORY / "conf"
OPTIONS = sorted(path.stem for path in (CONF / "parallel").glob("*.yaml"))


def composed(option: str) -> ParallelConfig:
    ConfigStore.instance().store(name="pretrain_schema", node=TrainSettings)
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_object(hydra.compose("pretrain", [f"parallel={option}"])).parallel


def by_zero_alone() -> dict[str, ParallelConfig]:
    """The others have tests of their own."""
    found = {option: composed(option) for option in OPTIONS}
    return {option: held for option, held in found.items() if all(getattr(held, name) == 1 for name in SHARING)}


def step_with_each(found: dict[str, ParallelConfig]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for option, parallel in found.items():
        train = TrainConfig(steps=3, global_batch_size=2, micro_batch_size=1)
        run = TrainingRun(model=TINY, train=train, optimizer=OptimizerConfig(lr=1e-2, eps=1e-4), parallel=parallel)
        run.check_engine()
        try:
            engine, model = engine_of(run)
        except ConfigError as error:
            answer[option] = str(error)
        else:
            rows = [row(MEDIA, 0), row((), 1)]
            answer[option] = [take_step(engine, model, run, rows).next_token for _ in range(3)]
    return answer


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("parallel")
    found = by_zero_alone()
    for name in found.values():
        for part in (name.offload_optimizer, name.offload_parameters):
            part.nvme_path = part.nvme_path and str(folder)
    return on_ranks(2, step_with_each, folder, found)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_steps_or_says_what_the_machine_lacks(option: str, stepped: dict[str, Any]) -> None:
    if option not in stepped:
        assert any(getattr(composed(option), name) > 1 for name in SHARING)
    elif isinstance(stepped[option], str):
        assert "nvme" in option
        for part in ("parallel.offload_optimizer.device=nvme", "async_io", "libaio", "device=cpu"):
            assert part in stepped[option]
    else:
        losses = stepped[option]
        assert losses == pytest.approx(stepped["zero0"], rel=1e-4)
        assert losses[-1] < 0.97 * losses[0]
