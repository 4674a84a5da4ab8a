"""Jobs on a Ray cluster: submit, list, follow, stop. What a job does goes on without the client."""

import asyncio
import logging
import os
import shlex
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omniloom.cluster.config import ClusterConfig
from omniloom.cluster.local import find_address, refuse_unreachable
from omniloom.errors import ClusterError, ConfigError, did_you_mean

# What a working directory holds beside code: environments, results, history.
EXCLUDES = [".git", ".venv", "venv", "runs", "corpora", "outputs", "wandb", "__pycache__", ".*_cache", ".hypothesis"]
STOP_WAIT_S = 600  # for the checkpoint of a job that is asked to stop; Ray would wait 3
MOST_BYTES = 100 << 20
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass
class Job:
    """A submitted job: Ray's own record and what was said of it at submission."""

    id: str
    status: str
    verb: str
    run: str | None
    submitted: float  # seconds since 1970
    ended: float | None
    message: str | None
    metadata: dict[str, str]

    @property
    def seconds(self) -> float:
        """How long it has run, or ran."""
        return (self.ended or time.time()) - self.submitted

    @property
    def reason(self) -> str:
        """What Ray says of its status, without the log that it repeats."""
        return (self.message or "").split(", last available logs")[0].strip()

    def say_how_it_ended(self) -> None:
        """Print it, and end the process with a nonzero status unless the job succeeded."""
        print(f"{self.id}: {self.status}; {self.reason}", file=sys.stderr)
        if self.status != "SUCCEEDED":
            sys.exit(1)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self) | {"seconds": self.seconds}


@dataclass
class Submission:
    """`omniloom VERB overrides…`, the folder it is called in, and what is told of it besides."""

    verb: str
    overrides: list[str]
    run: str | None
    working_dir: Path
    metadata: dict[str, str]


class JobClient:
    """A connection to a cluster's job server; every failure is a ClusterError that says what to do."""

    def __init__(self, config: ClusterConfig) -> None:
        address = find_address(config, or_up=True)
        assert address is not None
        refuse_unreachable(address)
        os.environ["RAY_ADDRESS"] = address  # before cluster.address in Ray's own order
        token_path = os.environ.get("RAY_AUTH_TOKEN_PATH")
        if token_path or os.environ.get("RAY_AUTH_TOKEN"):
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when ray is imported
        import ray
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        for talkative in ("dashboard_sdk", "job.sdk"):
            logging.getLogger(f"ray.dashboard.modules.{talkative}").setLevel(logging.ERROR)
        self.address = address
        try:
            self._client = JobSubmissionClient(address)
        except AuthenticationError as error:
            held = f"the token of {token_path} is not its own" if token_path else "this client has none"
            raise ClusterError(
                f"the cluster at {address} asks for a token and {held}: set cluster.token_path=<file> or "
                "RAY_AUTH_TOKEN_PATH to the one its nodes were started with"
            ) from error
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise ClusterError(f"no job server answers at {address}: {error}; is the address the head's?") from error
        server = self._client._server_ray_version
        if server != ray.__version__:
            raise ClusterError(
                f"the cluster at {address} runs Ray {server}, this client {ray.__version__}: install ray=={server} "
                f"here or ray=={ray.__version__} there"
            )

    @property
    def dashboard(self) -> str:
        """The http address that answers, whichever of the head's was named."""
        return str(self._client.get_address())

    def submit(self, submission: Submission, env: dict[str, str]) -> str:
        """Submit a verb with its working directory, `env` in every process of the job; returns the job's id."""
        folder, verb, run = submission.working_dir, submission.verb, submission.run
        _refuse_too_large(folder)
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **env}
        if (folder / "platform" / "omniloom").is_dir():  # a checkout: its code, not the cluster's
            environment["PYTHONPATH"] = "platform"
        return self._ask(
            self._client.submit_job,
            entrypoint=shlex.join(["python", "-m", "omniloom", verb, *submission.overrides]),
            submission_id="-".join([verb, *([Path(run).name] if run else []), uuid.uuid4().hex[:6]]),
            runtime_env={"working_dir": str(folder), "excludes": EXCLUDES, "env_vars": environment},
            metadata={"verb": verb, "run": run or "", **submission.metadata},
        )

    def jobs(self) -> list[Job]:
        """Every job submitted to the cluster, oldest first."""
        listed = (_job(details) for details in self._ask(self._client.list_jobs) if details.submission_id)
        return sorted(listed, key=lambda job: job.submitted)

    def job(self, identity: str) -> Job:
        """One job; raises ConfigError, with the nearest id, where there is none."""
        jobs = {job.id: job for job in self.jobs()}
        if identity not in jobs:
            raise ConfigError(f"no job {identity} on {self.address}; {did_you_mean(identity, jobs)}")
        return jobs[identity]

    def logs(self, identity: str) -> str:
        """All that the job has printed so far."""
        return self._ask(self._client.get_job_logs, identity)

    def follow(self, identity: str, show: Callable[[str], None]) -> Job:
        """Show what the job prints until it has ended."""

        shown = 0  # characters: a stream that broke off begins again from the first

        async def tail() -> None:
            nonlocal shown
            at = 0
            async for text in self._client.tail_job_logs(identity):
                if new := text[max(0, shown - at) :]:
                    show(new)
                at += len(text)
                shown = max(shown, at)

        while True:
            try:
                asyncio.run(tail())
            except (OSError, RuntimeError) as error:
                raise ClusterError(
                    f"the connection to {self.address} broke ({error}); the job goes on without it: omniloom logs "
                    f"{identity} -f"
                ) from error
            job = self.job(identity)
            if job.status in ENDED:
                return job

    def stop(self, identity: str) -> bool:
        """Ask a job to stop, which saves a checkpoint first; false where it had ended already."""
        return self._ask(self._client.stop_job, identity)

    def _ask(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        try:
            return call(*arguments, **named)
        except (RuntimeError, OSError) as error:
            raise ClusterError(f"the cluster at {self.address} refused: {error}") from error


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    return Job(
        id=details.submission_id,
        status=str(getattr(details.status, "value", details.status)),
        verb=metadata.get("verb", "?"),
        run=metadata.get("run") or None,
        submitted=(details.start_time or 0) / 1_000,
        ended=details.end_time / 1_000 if details.end_time else None,
        message=details.message,
        metadata=metadata,
    )


def _refuse_too_large(folder: Path) -> None:
    """Ray refuses too, after packing it all and without naming what weighs."""
    sizes: dict[str, int] = {}
    for entry in folder.iterdir():
        if not any(entry.match(pattern) for pattern in EXCLUDES):
            files = [entry] if entry.is_file() else [f for f in entry.rglob("*") if f.is_file()]
            sizes[entry.name] = sum(f.lstat().st_size for f in files)
    if sum(sizes.values()) > MOST_BYTES:
        heavy = max(sizes, key=lambda name: sizes[name])
        raise ConfigError(
            f"the working directory {folder} holds {sum(sizes.values()) >> 20} MiB, at most {MOST_BYTES >> 20} are "
            f"sent: {heavy} alone has {sizes[heavy] >> 20}; submit from a folder that holds the code alone"
        )
