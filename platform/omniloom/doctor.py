"""Whether this machine can do what is asked of it: findings, each with its remedy. Starts nothing, changes nothing."""

import json
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from tqdm import tqdm

GIB = 1 << 30
DISK_FAIL_GIB, DISK_WARN_GIB, MEMORY_WARN_GIB, SHM_WARN_GIB = 1, 10, 4, 1
BUSY_CORES = 0.3  # of other programs: more disturbs timings


@dataclass
class Finding:
    """One thing looked at."""

    name: str
    state: Literal["ok", "warn", "fail"]
    what: str
    remedy: str | None = None


def versions(of: str = "omniloom") -> Iterator[Finding]:
    """Every requirement of the package, and what those require of each other."""
    wanted = _requirements(of)
    theirs_of = {other.name: _requirements(other.name) for other in wanted}
    for requirement in wanted:
        try:
            installed = distribution(requirement.name).version
        except PackageNotFoundError:
            yield Finding(requirement.name, "fail", "not installed", f"pip install '{requirement}'")
            continue
        clashes = [] if requirement.specifier.contains(installed, prereleases=True) else [f"{of} needs {requirement}"]
        for other in wanted:
            clashes += [
                f"{other.name} needs {theirs}"
                for theirs in theirs_of[other.name]
                if theirs.name.lower() == requirement.name.lower()
                and not theirs.specifier.contains(installed, prereleases=True)
            ]
        if clashes:
            yield Finding(requirement.name, "fail", f"{installed}, but {'; '.join(clashes)}", "pip install -e .")
        else:
            yield Finding(requirement.name, "ok", installed)


def _requirements(of: str) -> list[Requirement]:
    """What an installed distribution requires here, extras aside."""
    try:
        words = distribution(of).requires or []
    except PackageNotFoundError:
        return []
    requirements = map(Requirement, words)
    return [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]


def machine(runs_dir: Path) -> Iterator[Finding]:
    """Python, memory, shared memory, disk."""
    yield Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")
    memory = psutil.virtual_memory()
    free_gib = memory.available / GIB
    told = f"{free_gib:.1f} of {memory.total / GIB:.1f} GiB are free; {os.cpu_count()} cores"
    if free_gib < MEMORY_WARN_GIB:
        yield Finding("memory", "warn", told, f"end other programs: a run needs some {MEMORY_WARN_GIB} GiB")
    else:
        yield Finding("memory", "ok", told)
    if Path("/dev/shm").is_dir():
        shm_gib = psutil.disk_usage("/dev/shm").free / GIB
        remedy = "give the container more: docker run --shm-size=4g" if shm_gib < SHM_WARN_GIB else None
        state: Literal["ok", "warn"] = "warn" if remedy else "ok"
        yield Finding("shared memory", state, f"{shm_gib:.1f} GiB free, for Ray's objects", remedy)
    existing = next(folder for folder in (runs_dir, *runs_dir.parents) if folder.exists())
    for name, folder in (("disk for runs", existing), ("disk for Ray", Path("/tmp"))):
        free = psutil.disk_usage(str(folder)).free / GIB
        told = f"{free:.1f} GiB free at {folder}"
        if not os.access(folder, os.W_OK):
            yield Finding(name, "fail", f"{folder} cannot be written", "name another folder: runs_dir=…")
        elif free < DISK_FAIL_GIB:
            yield Finding(name, "fail", told, "free some: checkpoints that do not fit are lost")
        elif free < DISK_WARN_GIB:
            yield Finding(name, "warn", told, "free some: a checkpoint takes 12 to 16 bytes a parameter")
        else:
            yield Finding(name, "ok", told)


def accelerator() -> Finding:
    """The GPUs that torch sees, and those that it should."""
    import torch

    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        told = ", ".join(f"{one.name} with {one.total_memory / GIB:.0f} GiB" for one in properties)
        return Finding("accelerator", "ok", f"{told}; CUDA {torch.version.cuda}")
    smi = shutil.which("nvidia-smi")
    if smi and subprocess.run([smi, "-L"], capture_output=True).returncode == 0:
        built = torch.version.cuda or "the CPU alone"
        remedy = "install torch for this driver: pytorch.org/get-started"
        return Finding("accelerator", "fail", f"the driver has a GPU, torch, built for {built}, sees none", remedy)
    return Finding("accelerator", "ok", "none: runs use the CPU, with gloo")


ASK_DEEPSPEED = """
import json, os, sys
out = os.dup(1); os.dup2(2, 1)
from deepspeed.ops.op_builder.all_ops import ALL_OPS
found = {}
for name, builder in ALL_OPS.items():
    found[name] = bool(builder.is_compatible(verbose=False))
os.write(out, json.dumps(found).encode())
"""


def deepspeed_ops() -> Finding:
    """Which of its extensions DeepSpeed can build here; none is needed, the product uses torch's own."""
    try:
        answer = subprocess.run([sys.executable, "-c", ASK_DEEPSPEED], capture_output=True, text=True, timeout=120)
        found: dict[str, bool] = json.loads(answer.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return Finding("deepspeed ops", "fail", "DeepSpeed cannot be imported", "python -m deepspeed.env_report")
    can = [name for name, is_compatible in found.items() if is_compatible]
    told = f"{len(can)} of {len(found)} can be built ({', '.join(can) or 'none'})"
    missing = [tool for tool in ("ninja", "c++") if not shutil.which(tool)]
    if missing:
        return Finding("deepspeed ops", "warn", told, f"to build any, install {' and '.join(missing)}; none is needed")
    return Finding("deepspeed ops", "ok", told)


def wandb_mode(configured: str) -> Finding:
    """Whether metrics leave this machine, and whether they can."""
    mode = os.environ.get("WANDB_MODE", configured)
    if mode != "online":
        return Finding("wandb", "ok", f"{mode}: runs stay here")
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    has_key = "WANDB_API_KEY" in os.environ or (netrc.is_file() and host.split("//")[1] in netrc.read_text())
    if has_key:
        return Finding("wandb", "ok", f"online at {host}, with a key")
    return Finding("wandb", "fail", f"online at {host}, and there is no key", "wandb login, or track=wandb_offline")


def quiet() -> Finding:
    """Whether other programs compute here, which what is measured would suffer from."""
    cores = os.cpu_count() or 1
    busy = psutil.cpu_percent(interval=1.0) / 100 * cores
    told = f"{busy:.1f} of {cores} cores were busy before measuring"
    if busy > BUSY_CORES:
        return Finding("load", "warn", told, "end other programs, then measure again: the planner trusts what it finds")
    return Finding("load", "ok", told)


@contextmanager
def counted(progress: Path) -> Iterator[None]:
    """Show the lines of a file that grows while the body runs: what has just been measured."""
    stop = threading.Event()

    def show() -> None:
        with tqdm(desc="measuring", unit="") as bar:
            while not stop.wait(0.3):
                lines = progress.read_text().splitlines()
                bar.set_postfix_str(lines[-1] if lines else "", refresh=False)
                bar.update(len(lines) - bar.n)

    progress.parent.mkdir(parents=True, exist_ok=True)
    progress.write_text("")
    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        progress.unlink(missing_ok=True)
