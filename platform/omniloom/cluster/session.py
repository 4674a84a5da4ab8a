"""Attach to a Ray cluster, or start one on this machine that ends with the command."""

import ctypes
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.exceptions import RayError

from omniloom.cluster.config import ClusterConfig
from omniloom.cluster.local import WORKER_ENVIRONMENT, find_address, refuse_unreachable, write_token
from omniloom.errors import ClusterError

IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # which Ray's job server sets for what it starts
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: not safe between fork and exec


@contextmanager
def ray_session(config: ClusterConfig) -> Iterator[None]:
    """Be connected to Ray while the body runs; inside another session, that one serves.

    A cluster started here listens on loopback only and asks for a token that only this user's processes can read.
    """
    if ray.is_initialized():
        yield
        return
    # A submitted job runs on the cluster it was sent to, by whatever name its sender calls that one.
    address = os.environ["RAY_ADDRESS"] if IN_A_JOB in os.environ else find_address(config)
    if address and address != "local":
        with _attached(address, config.env):
            yield
        return
    # Without a token file of our own Ray would keep one in the home directory.
    os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(Path(_token_folder().name) / "token"))
    # A cluster of one machine: Ray then binds every port to loopback. Its public parameter for the address refuses
    # loopback, and this switch, meant for laptops, is all it has.
    ray_constants.ENABLE_RAY_CLUSTER = False
    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, config.workers * config.cpus_per_worker),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": dict(config.env)},
    )
    try:
        yield
    finally:
        ray.shutdown()
        ray_constants.ENABLE_RAY_CLUSTER = True


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies: the raylet, for what Ray starts.

    Ranks whose node has died would train on, and write, beside those that replaced them, until Ray's own check.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def job_id() -> str:
    """The id that `omniloom submit` gave the job this process runs, else Ray's own."""
    if IN_A_JOB in os.environ:
        return str(json.loads(os.environ[IN_A_JOB])["metadata"]["job_submission_id"])
    return str(ray.get_runtime_context().get_job_id())


@contextmanager
def _attached(address: str, env: dict[str, str]) -> Iterator[None]:
    if "://" in address:
        raise ClusterError(f"cluster.address={address} takes jobs; a command that runs here needs the head's host:port")
    if address != "auto":
        refuse_unreachable(address)
        if urlsplit(f"//{address}").hostname in ("127.0.0.1", "localhost"):
            ray_constants.ENABLE_RAY_CLUSTER = False  # else Ray looks for this machine's other address
    if "RAY_AUTH_TOKEN_PATH" in os.environ and "RAY_AUTH_MODE" not in os.environ:
        # Ray has been imported by now, and has taken down that there is no token.
        os.environ["RAY_AUTH_MODE"] = "token"
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
    # A job's processes have its environment already.
    runtime_env = None if IN_A_JOB in os.environ else {"env_vars": dict(env)}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=runtime_env)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(
            f"no Ray cluster takes this command at {address}: {error}\nset cluster.address or RAY_ADDRESS (and its "
            "token: cluster.token_path), or unset both to use this machine"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@cache
def _token_folder() -> "tempfile.TemporaryDirectory[str]":
    """A folder with a fresh token, for the clusters of this process; it goes when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="omniloom-")
    write_token(Path(folder.name))
    return folder
