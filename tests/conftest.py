"""What all tests share: the real files, one Ray cluster, one trained smoke run."""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

os.environ["WANDB_MODE"] = "offline"
# Libraries that find matplotlib import it, and it keeps a list of fonts in the home directory.
os.environ["MPLCONFIGDIR"] = str(Path(tempfile.gettempdir()) / "omniloom-matplotlib")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 starves ranks beside anything else
os.environ.pop("RAY_ADDRESS", None)  # never somebody else's cluster


@pytest.hookimpl(tryfirst=True)  # before slow ones are chosen or left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What `make soak` runs alone counts as slow there, and is left out anywhere else."""
    soak = [item for item in items if item.get_closest_marker("soak")]
    if "OMNILOOM_SOAK" in os.environ:
        for item in soak:
            item.add_marker(pytest.mark.slow)
        return
    config.hook.pytest_deselected(items=soak)
    items[:] = [item for item in items if item not in soak]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real files; a test that needs it fails, and is not skipped, where it is absent."""
    folder = Path(os.environ.get("OMNILOOM_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "README.md").is_file():
        pytest.fail(f"no real files at {folder}: set OMNILOOM_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray cluster on loopback for the whole session; jobs run in this process use it."""
    from omniloom.cluster.config import ClusterConfig
    from omniloom.cluster.session import ray_session

    with ray_session(ClusterConfig(workers=4)):
        yield


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the session's corpora and runs."""
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="session")
def demo_files(workspace: Path) -> Path:
    """The demo's sample files, voices, videos and all, written once: where its tokenize job looks for them."""
    from omniloom.data.samples import write_samples

    return write_samples("demo", workspace / "corpora" / "demo" / "files").parent


@pytest.fixture(scope="session")
def smoke_run(ray_cluster: None, workspace: Path) -> Path:
    """A finished run of experiment=smoke on one rank."""
    return train_smoke(workspace, "smoke")


def train_smoke(workspace: Path, run: str, *overrides: str) -> Path:
    """Train experiment=smoke in this process and return the run's folder."""
    from omniloom.cli import run_verb

    shared = [f"corpus={workspace}/corpora/smoke", f"runs_dir={workspace}/runs"]
    run_verb("train", ["experiment=smoke", f"run={run}", *shared, *overrides])
    return workspace / "runs" / run


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Somebody with a cluster of two nodes, for the tests of one file in tests/cluster."""
    from two_nodes import with_cluster

    with with_cluster(tmp_path_factory.mktemp("cluster")) as user:
        yield user


@pytest.fixture
def state(user: Any) -> dict[str, Any]:
    """What `omniloom cluster up` wrote down of that cluster."""
    return json.loads((user.folder / "state" / "omniloom" / "cluster.json").read_text())
