"""A cluster of two nodes with authentication, as a user has it: submit, follow, stop, resubmit, end."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from two_nodes import OMNILOOM, User, session_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_it_listens_on_loopback_alone(state: dict[str, Any]) -> None:
    listening = [
        connection.laddr.ip
        for process in psutil.process_iter()
        if session_of(process) == state["pid"]
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5
    assert set(listening) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_a_second_one_is_refused_with_the_firsts_address(user: User, state: dict[str, Any]) -> None:
    answer = user.call("cluster", "up")
    assert answer.returncode == 1
    assert f"a cluster is up at {state['address']} (pid {state['pid']})" in answer.stderr


def test_a_client_without_the_token_is_refused(user: User, state: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0" * 64)
    address = f"cluster.address={state['dashboard']}"
    without = user.call("jobs", address)
    wrong = user.call("jobs", address, f"cluster.token_path={tmp_path}/token")
    right = user.call("jobs", address, f"cluster.token_path={state['token_path']}")
    assert (without.returncode, wrong.returncode, right.returncode) == (1, 1, 0)
    assert "asks for a token and this client has none: set cluster.token_path=" in without.stderr
    assert f"the token of {tmp_path}/token is not its own" in wrong.stderr
    missing = user.call("jobs", "cluster.token_path=nowhere", address)
    assert (missing.returncode, "no token at cluster.token_path=nowhere" in missing.stderr) == (1, True)


def test_a_job_outlives_its_client_and_a_repeat_finds_it_finished(user: User) -> None:
    job = user.submit("outlive", "train.steps=60")
    client = subprocess.Popen([*OMNILOOM, "logs", job, "-f"], cwd=user.folder, env=user.environment)
    user.wait_for_steps("outlive", 5)
    client.send_signal(signal.SIGKILL)
    client.wait()
    followed = user.call("logs", job, "-f")
    assert followed.returncode == 0, followed.stderr
    assert "run outlive is finished" in followed.stdout
    assert f"{job}: SUCCEEDED" in followed.stderr
    assert [line["step"] for line in user.metrics("outlive")] == list(range(1, 61))
    listed = {one["id"]: one for one in user.json("jobs")["jobs"]}
    assert (listed[job]["verb"], listed[job]["run"], listed[job]["status"]) == ("train", "outlive", "SUCCEEDED")
    assert json.loads((user.folder / "runs" / "outlive" / "run.json").read_text())["ray_job_id"] == job

    again = user.submit("outlive", "train.steps=60")
    assert user.wait_for_end(again) == "SUCCEEDED"
    assert "run outlive is finished" in user.call("logs", again).stdout
    assert len(user.metrics("outlive")) == 60


def test_a_stopped_job_has_saved_and_goes_on_when_resubmitted(user: User) -> None:
    job = user.submit("stopped", "train.steps=100000", "train.save_every=100000")
    user.wait_for_steps("stopped", 5)
    second = user.call("train", "experiment=smoke", "run=stopped", "cluster.workers=2", "train.steps=100000")
    assert second.returncode == 1
    assert "run stopped is being run by another command (host " in second.stderr
    assert job in second.stderr
    asked = user.call("stop", job)
    assert (asked.returncode, "is asked to stop" in asked.stdout) == (0, True)
    assert user.wait_for_end(job) == "STOPPED"
    record = json.loads((user.folder / "runs" / "stopped" / "run.json").read_text())
    reached = len(user.metrics("stopped"))
    assert 5 <= reached < 100_000
    assert (record["status"], record["exit_reason"]) == ("interrupted", f"SIGTERM, saved at step {reached}")
    late = user.call("stop", job)
    assert "had ended already: STOPPED" in late.stdout

    again = user.submit("stopped", f"train.steps={reached + 10}")
    assert user.wait_for_end(again) == "SUCCEEDED"
    assert [line["step"] for line in user.metrics("stopped")] == list(range(1, reached + 11))


def test_a_job_that_fails_says_so(user: User) -> None:
    answer = user.call("submit", "train", "train.steps=200", "run=failed", "corpus=nowhere", "-f")
    assert answer.returncode == 1
    assert "no corpus at" in answer.stdout
    assert "FAILED" in answer.stderr
    assert "Traceback" not in answer.stdout + answer.stderr


def test_a_command_attaches_with_the_clusters_token(user: User) -> None:
    answer = user.call("train", "experiment=smoke", "run=attached", "cluster.address=up")
    assert answer.returncode == 0, answer.stderr
    assert len(user.metrics("attached")) == 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status", "train-outlve-0"], "no job train-outlve-0 on "),
        (["logs"], "name a job: omniloom logs ID; `omniloom jobs` lists them"),
        (["stop", "one", "two"], "omniloom stop takes ID and then key=value: two is too many"),
        (["cluster", "sideways"], "action=sideways is none of up, down"),
        (["jobs", "cluster.address=127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1"),
        (["jobs", "cluster.address=head"], "cluster.address=head must be host:port"),
        (["submit", "trian"], "trian cannot be submitted; did you mean 'train'?"),
        (["submit", "train", "train.steps=many"], "train.steps: Value 'many'"),
        (["submit", "train", "train.steps=200"], "nothing to train on: set corpus="),
        (["train", "experiment=smoke", "cluster.address=127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1"),
    ],
)
def test_wrong_words_are_one_message(words: list[str], message: str, user: User) -> None:
    answer = user.call(*words)
    assert answer.returncode in (1, 2)
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""
