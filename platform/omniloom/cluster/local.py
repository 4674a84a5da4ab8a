"""A Ray cluster on this machine that outlives the command: head and worker nodes by pid, loopback, with a token.

Imports no ray: what it knows of the cluster stands in one file, and Ray reads its token when it is imported.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import platformdirs
import psutil
import requests
from pydantic import TypeAdapter, ValidationError

from omniloom.cluster.config import ClusterConfig, LocalClusterConfig
from omniloom.errors import ClusterError, ConfigError

START_S, STOP_S = 120.0, 15.0
UP = "up"
# Of every process of a cluster on this machine, for its workers inherit it.
WORKER_ENVIRONMENT = {
    # Ray's own processes allocate by jemalloc, and now its workers too: memory that tensors have freed serves the next
    # step's, where fresh pages would cost more than what is computed on them. One arena, for what the backward pass's
    # thread frees is of use to the forward pass's, and one of those of 32 MiB and more, in which small ones leave no
    # holes. plan.memory counts on it.
    "RAY_LD_PRELOAD_ON_WORKERS": "1",
    "MALLOC_CONF": f"dirty_decay_ms:-1,muzzy_decay_ms:-1,narenas:1,oversize_threshold:{32 << 20}",
    # oneDNN builds a program for each shape of a half-precision product, and experts' products have a new one each.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16384",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # at Ray's 2 s a short run mostly waits
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "2",  # of ranks that failed, which are ended next, stuck or not
}


@dataclass
class LocalCluster:
    """What `omniloom cluster up` started, held by one process; its start tells that one from a later one of its pid."""

    address: str
    dashboard: str
    token_path: str
    scratch: str  # Ray's own files
    nodes: int
    pid: int
    created: float

    def is_up(self) -> bool:
        """Whether the process that holds the nodes still runs."""
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.created and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def _state_file() -> Path:
    return platformdirs.user_state_path("omniloom") / "cluster.json"


def read_local() -> LocalCluster | None:
    """The cluster that was started and not ended yet, alive or not."""
    try:
        return TypeAdapter(LocalCluster).validate_json(_state_file().read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ClusterError(f"{_state_file()} is damaged ({error.errors()[0]['msg']}): remove it") from error


def _write(cluster: LocalCluster) -> None:
    _state_file().parent.mkdir(parents=True, exist_ok=True)
    partial = _state_file().with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(cluster), indent=1))
    partial.replace(_state_file())


def write_token(folder: Path) -> Path:
    """A fresh token in a file that only this user's processes can read."""
    path = folder / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return path


def find_address(config: ClusterConfig, or_up: bool = False) -> str | None:
    """The address that a configuration or RAY_ADDRESS names; with `or_up`, else the cluster that was started here.

    The token's file is put where Ray, imported later, looks for it.
    """
    address = config.address or os.environ.get("RAY_ADDRESS") or (UP if or_up else None)
    token_path = config.token_path
    if address == UP:
        cluster = read_local()
        if cluster is None:
            raise ClusterError(
                "no cluster: set cluster.address or RAY_ADDRESS, or start one with `omniloom cluster up`"
            )
        if not cluster.is_up():
            raise ClusterError("the cluster that was started here has died: `omniloom cluster up` starts another")
        address, token_path = cluster.dashboard if or_up else cluster.address, cluster.token_path
    if token_path:
        if not Path(token_path).is_file():
            raise ClusterError(f"no token at cluster.token_path={token_path}")
        os.environ["RAY_AUTH_TOKEN_PATH"] = token_path
        os.environ.pop("RAY_AUTH_TOKEN", None)
    return address


def is_guarded(dashboard: str) -> bool:
    """Whether a dashboard refuses a caller without a token."""
    try:
        return requests.get(f"{dashboard}/api/version", timeout=5).status_code in (401, 403)
    except requests.RequestException as error:
        raise ClusterError(f"{dashboard} does not answer: {error}") from error


def refuse_unreachable(address: str) -> None:
    """Raise where nothing listens at an address; Ray itself would try for minutes."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        port = parts.port
    except ValueError:
        port = None
    if not parts.hostname or port is None:
        raise ConfigError(f"cluster.address={address} must be host:port, or http://host:port of the dashboard, or up")
    try:
        socket.create_connection((parts.hostname, port), timeout=10).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error}): set cluster.address or RAY_ADDRESS to a head that runs; "
            "`omniloom cluster up` starts one here"
        ) from error


def start_local(config: LocalClusterConfig) -> LocalCluster:
    """Start head and nodes and wait until all have joined; raises ClusterError, with nothing left behind."""
    old = read_local()
    if old is not None and old.is_up():
        raise ClusterError(
            f"a cluster is up at {old.address} (pid {old.pid}): use it with cluster.address=up, or end it with "
            "`omniloom cluster down`"
        )
    if old is not None:
        stop_local(old)  # what a crash left
    scratch = Path(tempfile.mkdtemp(prefix="omniloom-"))  # short: Ray's sockets lie in it
    token = write_token(scratch)
    wanted = {
        "nodes": config.nodes,
        "cpus": config.cpus_per_node or max(1, (os.cpu_count() or 1) // config.nodes),
        "gpus": config.gpus_per_node,
        "port": _free_port("port", config.port),
        "dashboard_port": _free_port("dashboard_port", config.dashboard_port),
        "agent_port": _free_port("agent_port", 0),
        "scratch": str(scratch),
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        # Jobs begin with `python`: this one, whichever the shell would find.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's only switch that keeps every port on loopback
        **WORKER_ENVIRONMENT,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with _log(scratch).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "omniloom.cluster.nodes", json.dumps(wanted)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C in this terminal is not meant for it; and its session tells its processes
        )
    cluster = LocalCluster(
        address=f"127.0.0.1:{wanted['port']}",
        dashboard=f"http://127.0.0.1:{wanted['dashboard_port']}",
        token_path=str(token),
        scratch=str(scratch),
        nodes=config.nodes,
        pid=process.pid,
        created=psutil.Process(process.pid).create_time(),
    )
    try:
        _write(cluster)
        _wait_for_nodes(cluster)
    except BaseException:
        stop_local(cluster)
        raise
    return cluster


def _log(scratch: Path) -> Path:
    return scratch / "nodes.log"


def _wait_for_nodes(cluster: LocalCluster) -> None:
    deadline = time.monotonic() + START_S
    alive = 0
    while cluster.is_up() and time.monotonic() < deadline:
        alive = _alive_nodes(cluster)
        if alive >= cluster.nodes:
            return
        time.sleep(0.25)
    what = f"{alive} of {cluster.nodes} nodes came up in {START_S:.0f} s" if cluster.is_up() else "the cluster ended"
    log = _log(Path(cluster.scratch)).read_text(errors="replace").strip().splitlines()
    raise ClusterError(f"{what}; its last words:\n" + "\n".join(log[-8:]))


def _alive_nodes(cluster: LocalCluster) -> int:
    headers = {"Authorization": f"Bearer {Path(cluster.token_path).read_text()}"}
    try:
        answer = requests.get(f"{cluster.dashboard}/nodes?view=summary", headers=headers, timeout=5)
        nodes = answer.json()["data"]["summary"]
    except (requests.RequestException, ValueError, KeyError):
        return 0
    return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)


def stop_local(cluster: LocalCluster) -> int:
    """End every process of the cluster, its workers too, and remove its files; returns how many there were."""
    found = _processes(cluster)
    if cluster.is_up():
        psutil.Process(cluster.pid).terminate()
    _, alive = psutil.wait_procs(found, timeout=STOP_S)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=STOP_S)
    shutil.rmtree(cluster.scratch, ignore_errors=True)
    _state_file().unlink(missing_ok=True)
    return len(found)


def _processes(cluster: LocalCluster) -> list[psutil.Process]:
    """What runs in the holder's session, whoever their parents are by now, and their children, jobs among them."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == cluster.pid:
                found |= {one.pid: one for one in [process, *process.children(recursive=True)]}
        except (ProcessLookupError, PermissionError, psutil.Error):
            continue
    return list(found.values())


def _free_port(key: str, asked: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", asked))
        except OSError as error:
            owners = [c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == asked and c.pid]
            by = f" by pid {owners[0]} ({psutil.Process(owners[0]).name()})" if owners else ""
            raise ClusterError(f"{key}={asked} is taken{by}: name another, or 0 for any free one") from error
        return int(probe.getsockname()[1])
