"""What the doctor finds, and that it does find it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from omniloom import doctor
from omniloom.doctor import deepspeed_ops, machine, versions, wandb_mode


def states(findings) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


def distribution(folder: Path, name: str, version: str, *requires: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = [
        f"Name: {name}",
        f"Version: {version}",
        "Metadata-Version: 2.1",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def test_versions_that_do_not_fit_are_named_with_who_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "house", "1.0", "roof>=2", "wall", "door; extra == 'garden'", "cellar")
    distribution(tmp_path, "roof", "1.5")
    distribution(tmp_path, "wall", "3.0", "brick")
    distribution(tmp_path, "brick", "1.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {finding.name: finding for finding in versions("house")}
    assert states(found.values()) == {"roof": "fail", "wall": "ok", "cellar": "fail"}
    assert found["roof"].what == "1.5, but house needs roof>=2"
    assert found["cellar"].remedy == "pip install 'cellar'"


def test_two_requirements_that_disagree_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "house", "1.0", "roof", "wall")
    distribution(tmp_path, "roof", "1.5")
    distribution(tmp_path, "wall", "3.0", "roof<1")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {finding.name: finding for finding in versions("house")}
    assert found["roof"].what == "1.5, but wall needs roof<1"


def test_what_is_installed_here_fits_together() -> None:
    assert set(states(versions()).values()) == {"ok"}


def test_a_folder_that_cannot_hold_runs_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert states(machine(tmp_path / "not" / "yet"))["disk for runs"] in ("ok", "warn")
    monkeypatch.setattr(doctor, "DISK_FAIL_GIB", 10**9)
    assert states(machine(tmp_path))["disk for runs"] == "fail"
    monkeypatch.setattr(os, "access", lambda *_: False)
    finding = next(finding for finding in machine(tmp_path) if finding.name == "disk for runs")
    assert finding.what == f"{tmp_path} cannot be written"


def test_online_tracking_without_a_key_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode("offline").state == "ok"
    assert wandb_mode("online").remedy == "wandb login, or track=wandb_offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password k")
    assert wandb_mode("online").state == "ok"
    monkeypatch.setenv("WANDB_MODE", "online")
    (tmp_path / "netrc").unlink()
    assert wandb_mode("offline").state == "fail"


def test_deepspeeds_extensions_are_listed() -> None:
    finding = deepspeed_ops()
    assert finding.state in ("ok", "warn")
    assert "cpu_adam" in finding.what


@pytest.mark.parametrize(
    ("words", "status", "name"),
    [([], 0, "torch"), (["cluster.address=127.0.0.1:1"], 1, "ray"), (["track=wandb_online"], 1, "wandb")],
)
def test_the_exit_status_tells(words: list[str], status: int, name: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("WANDB_MODE", "WANDB_API_KEY", "RAY_ADDRESS")}
    environment |= {"XDG_STATE_HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    command = [sys.executable, "-m", "omniloom", "doctor", "--json", *words]
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert answer.returncode == status, answer.stdout + answer.stderr
    told = json.loads(answer.stdout)
    found = {finding["name"]: finding for finding in told["findings"]}
    assert told["ok"] == (status == 0)
    assert found[name]["state"] == ("ok" if status == 0 else "fail")
    assert status == 0 or found[name]["remedy"]
