"""Attach to a Ray cluster, or start one on this machine that ends with the command."""

import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import ray
from ray._private import ray_constants

from omniloom.cluster.config import ClusterConfig
from omniloom.errors import ClusterError


@contextmanager
def ray_session(config: ClusterConfig) -> Iterator[None]:
    """Be connected to Ray while the body runs; inside another session, that one serves.

    A cluster started here listens on loopback only and asks for a token that only this user's processes can read.
    """
    if ray.is_initialized():
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        with _attached(address):
            yield
        return
    # Without a token file of our own Ray would keep one in the home directory.
    os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(Path(_token_folder().name) / "token"))
    # A cluster of one machine: Ray then binds every port to loopback. Its public parameter for the address refuses
    # loopback, and this switch, meant for laptops, is all it has.
    ray_constants.ENABLE_RAY_CLUSTER = False
    # Workers inherit: a model's large tensors come from the heap that is kept, not from fresh pages each time.
    for threshold in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        os.environ.setdefault(threshold, str(1 << 32))
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # at Ray's 2 s a short run mostly waits
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, config.workers * config.cpus_per_worker),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()
        ray_constants.ENABLE_RAY_CLUSTER = True


def job_id() -> str:
    """Ray's id of the job this process runs."""
    return str(ray.get_runtime_context().get_job_id())


@contextmanager
def _attached(address: str) -> Iterator[None]:
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address}: {error}\nset cluster.address or RAY_ADDRESS, or unset both to use "
            "this machine"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@cache
def _token_folder() -> "tempfile.TemporaryDirectory[str]":
    """A folder with a fresh token, for the clusters of this process; it goes when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="omniloom-")
    path = Path(folder.name) / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return folder
