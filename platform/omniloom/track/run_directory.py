"""The run directory: new, resumed, finished or refused; and `run.json`, which says which."""

import json
import os
import platform
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from omniloom.errors import ConfigError, did_you_mean
from omniloom.track import jsonl
from omniloom.track.checkpoints import Checkpoints, step_name, step_of

Record = TypeVar("Record")
Status = Literal["running", "finished", "failed", "interrupted"]
# Sections and keys that a repeated command may change: they do not alter what is learned.
MAY_CHANGE = (
    "train.steps",
    "train.tokens",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.compile",
    "train.val_every",
    "train.save_every",
    "train.log_every",
    "guard.max_skipped",
    "health.",
    "checkpoint.keep_",
    "cluster.",
    "track.",
    "parallel.",
    "data.loader_workers",
    "data.plans",
    "decode.",
    "debug.",
    "force",
    "like",
    "fork",
    "runs_dir",
    "corpus",
    "manifest",
    "samples",
)
STOP, SAVE = "stop", "save"  # files in the run directory: why it is to stop; that a checkpoint is wanted now
GIT_DIFF = "git.diff"  # what the checkout's revision lacks
MOST_DIFF_BYTES = 1 << 20
REVISION_OF_A_JOB = "OMNILOOM_GIT_REVISION"  # whose folder travels without its history


@dataclass
class RunRecord:
    """`run.json`: who this run is and how it stands."""

    id: str
    name: str
    status: Status
    exit_reason: str | None = None
    git_revision: str | None = None
    parent_run: str | None = None
    ray_job_id: str | None = None
    wandb_id: str | None = None
    wandb_url: str | None = None
    started: str = ""
    host: str = ""
    pid: int | None = None  # of the command that runs it


def read_record(folder: Path) -> RunRecord:
    """Read `run.json`; raises ConfigError where the folder is no run."""
    return read_as(RunRecord, folder / "run.json", "run")


def read_as(kind: type[Record], path: Path, what: str) -> Record:
    """Read the file that makes a folder a `what`; raises ConfigError where it is missing or damaged."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{path.parent} is no {what}: it has no {path.name}") from error
    except ValidationError as error:
        raise ConfigError(f"{path} is damaged ({error.errors()[0]['msg']}): name another run=") from error


def write_record(folder: Path, record: RunRecord) -> None:
    """Write `run.json`."""
    jsonl.replace_text(folder / "run.json", json.dumps(asdict(record), indent=2) + "\n")


def write_event(folder: Path, kind: str, /, **facts: Any) -> None:
    """Append one event to a run's events.jsonl."""
    jsonl.append(folder / "events.jsonl", {"time": time.time(), "event": kind, **facts})


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Be the only command that runs this run; raises ConfigError, with the other's whereabouts, where one does."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()  # the operating system lets go of it when the process dies
    except Timeout as error:
        who = "another command"
        if (folder / "run.json").is_file():
            record = read_record(folder)
            job = f", job {record.ray_job_id}" if record.ray_job_id else ""
            who = f"another command (host {record.host}, pid {record.pid}{job})"
        raise ConfigError(f"run {folder.name} is being run by {who}: wait, stop it, or name another run=") from error
    try:
        yield
    finally:
        lock.release()


def wait_until_free(folder: Path) -> None:
    """Return when no command runs this run any more."""
    with FileLock(folder / ".lock"):
        pass


def open_run(
    folder: Path, config: Mapping[str, Any], ray_job_id: str | None = None, parent_run: str | None = None
) -> RunRecord:
    """Start a run, or find the one to resume; the caller looks at `status` to see whether it is already finished.

    The caller has claimed it, so that a run that says it is running has lost its command. Raises ConfigError where the
    run's own configuration differs in a key that may not change, with both values.
    """
    if (folder / "run.json").is_file():
        record = read_record(folder)
        _refuse_changes(folder, config)
        old, new = read_config(folder)["train"], config["train"]
        asks_more = any(old.get(key) and (new.get(key) or 0) > old[key] for key in ("steps", "tokens"))
        if record.status == "finished" and not asks_more:
            return record
        if record.status == "running":
            lost = {"host": record.host, "pid": record.pid, "ray_job_id": record.ray_job_id}
            write_event(folder, "command_lost", **lost)
        record.status, record.exit_reason = "running", None
    else:
        folder.mkdir(parents=True, exist_ok=True)
        record = RunRecord(
            id=uuid.uuid4().hex[:8],
            name=folder.name,
            status="running",
            git_revision=git_revision(),
            parent_run=parent_run,
            started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )
        record.wandb_id = record.id
        if diff := _git("diff", "HEAD"):
            (folder / GIT_DIFF).write_text(diff[:MOST_DIFF_BYTES])
    record.host, record.pid, record.ray_job_id = platform.node(), os.getpid(), ray_job_id
    jsonl.replace_text(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
    write_record(folder, record)  # last: a folder without it is no run yet, and a repeat starts afresh
    for asked in (STOP, SAVE):  # by or of another command, whose ranks ask no more: `ask_to_stop` reads the record
        (folder / asked).unlink(missing_ok=True)
    return record


def ask_to_stop(folder: Path, why: str = "asked to stop", command: int | None = None) -> None:
    """Have the ranks of a run save a checkpoint after the step they are in, and end; the first reason counts.

    Ranks speak for the command that placed them, by its pid: when it is killed they are told to end too, and that is
    not meant for the command that takes the run up again.
    """
    if not stop_asked(folder) and command in (None, read_record(folder).pid):
        jsonl.replace_text(folder / STOP, why)


def stop_asked(folder: Path) -> bool:
    """Whether somebody asked."""
    return (folder / STOP).exists()


def why_stopped(folder: Path) -> str:
    """What they said."""
    return (folder / STOP).read_text() if stop_asked(folder) else "asked to stop"


def take_up_stop(folder: Path, why: str) -> bool:
    """Whether what they said begins like this; then the run goes on, as it was to stop for no more."""
    if not why_stopped(folder).startswith(why):
        return False
    (folder / STOP).unlink()
    return True


def ask_to_save(folder: Path) -> None:
    """Have the ranks of a run save a checkpoint after the step they are in, and go on."""
    (folder / SAVE).touch()


def save_asked(folder: Path) -> bool:
    """Whether somebody asked."""
    return (folder / SAVE).exists()


def take_up_save(folder: Path) -> None:
    """What is asked from now on is another one."""
    (folder / SAVE).unlink(missing_ok=True)


def steps_done(folder: Path) -> int:
    """The last step that a run has recorded."""
    last = jsonl.last(folder / "metrics.jsonl")
    return int(last["step"]) if last else 0


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """Write down how the run ended."""

    def tell(status: Status, reason: str | None) -> None:
        record = read_record(folder)
        record.status, record.exit_reason = status, reason
        write_record(folder, record)
        write_event(folder, status, reason=reason)

    with telling_how_it_ends(tell):
        yield


@contextmanager
def telling_how_it_ends(tell: Callable[[Status, str | None], None]) -> Iterator[None]:
    """Tell how the body ended: finished, interrupted by Ctrl-C or a signal, or failed, with the reason."""
    status: Status = "failed"
    reason: str | None = None
    try:
        yield
        status = "finished"
    except KeyboardInterrupt as error:
        status, reason = "interrupted", str(error) or "Ctrl-C"
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        tell(status, reason)


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration that a run was started with."""
    path = folder / "config.yaml"
    try:
        saved = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): name another run=") from error
    if not isinstance(saved, dict):
        raise ConfigError(f"{path} holds no configuration: name another run=")
    return saved


def _refuse_changes(folder: Path, config: Mapping[str, Any]) -> None:
    old, new = flat(read_config(folder)), flat(config)
    changed = [
        f"  {key}: {old.get(key)} → {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if changed:
        raise ConfigError(
            f"run {folder.name} exists with another configuration:\n"
            + "\n".join(changed)
            + "\nname another run=, or take these keys back; what may change: "
            + ", ".join(key.rstrip(".") for key in MAY_CHANGE)
        )


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration's values by dotted key; an empty mapping is a value."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


def git_revision() -> str | None:
    """The checkout that the command, or the one that submitted it, is called in; -dirty where it was changed."""
    return os.environ.get(REVISION_OF_A_JOB) or _git("describe", "--always", "--dirty").strip() or None


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, errors="replace", check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""  # not a checkout, or no git


@dataclass
class Place:
    """Where `init=` points: a folder to load from, and the run it belongs to, if any."""

    path: Path
    run_folder: Path | None

    @staticmethod
    def step_of(model_folder: str) -> int | None:
        """The step of a model folder inside a checkpoint, else None."""
        return step_of(Path(model_folder).parent.name)

    def with_model(self) -> Path:
        """The folder with its model on this machine: a store's is fetched."""
        if self.run_folder is None or (checkpoints := Checkpoints(self.run_folder)).folder.is_local:
            return self.path
        step = step_of(self.path.name)
        complete = checkpoints.complete()
        return checkpoints.fetch_model(complete[-1] if step is None else step) if complete else self.path


def locate(init: str, runs_dir: str, key: str = "init") -> Place:
    """Resolve init=<run[@step, @best, @latest] | checkpoint | model folder>; raises ConfigError saying what there is.

    A checkpoint named by its step is never removed again.
    """
    name, _, at = init.partition("@")
    if not (Path(runs_dir) / name / "run.json").is_file():
        if Path(init).is_dir():
            path = Path(init).absolute()
            owners = [parent for parent in (path, *path.parents) if (parent / "run.json").is_file()]
            return Place(path, owners[0] if owners else None)
        runs = [path.parent.name for path in Path(runs_dir).glob("*/run.json")]
        raise ConfigError(f"{key}={init} is neither a run in {runs_dir} nor a folder; {did_you_mean(name, runs)}")
    folder = (Path(runs_dir) / name).absolute()
    if at in ("", "latest"):
        return Place(folder, folder)
    checkpoints = Checkpoints(folder)
    steps = checkpoints.complete()
    step = _best(checkpoints, folder, f"{key}={init}") if at == "best" else int(at) if at.isdigit() else None
    if step not in steps:
        raise ConfigError(f"{key}={init}: run {name} has no checkpoint {at}; complete are {steps}, best and latest")
    checkpoints.keep(step)
    return Place(folder / "checkpoints" / step_name(step), folder)


def _best(checkpoints: Checkpoints, folder: Path, asked: str) -> int | None:
    """The step that the run's own rule calls the best; raises ConfigError where it has none, or never measured."""
    settings = read_config(folder)
    if "checkpoint" not in settings or settings["checkpoint"]["keep_best"] is None:
        raise ConfigError(f"{asked}: run {folder.name} has checkpoint.keep_best=null: name a step")
    rule = settings["checkpoint"]
    best = checkpoints.best(rule["keep_best"], rule["keep_best_mode"])
    if best is None:
        measured = {key for line in jsonl.read(folder / "metrics.jsonl") for key in line}
        near = did_you_mean(rule["keep_best"], measured)
        raise ConfigError(f"{asked}: no checkpoint has a value of checkpoint.keep_best={rule['keep_best']}; {near}")
    return best
