"""What Tune copies is there whole or not at all, wherever a kill falls."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow.fs
import pytest

from omniloom.cluster.whole_files import whole_files

KILLED_WHILE_WRITING = """
import os, signal, sys
from omniloom.cluster.whole_files import whole_files
stream = whole_files().open_output_stream(sys.argv[1])
stream.write(b"half of it" * 100_000)
stream.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_while_writing(path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(path)], check=False)


@pytest.mark.parametrize("before", [None, b"what stood there"])
def test_a_kill_leaves_what_stood_there(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "state.json"
    if before is not None:
        path.write_bytes(before)
    killed_while_writing(path)
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix == ".partial"] == ["state.json.partial"]
    assert (path.read_bytes() if path.exists() else None) == before


def test_folders_are_copied_as_tune_copies_them(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deeper").mkdir(parents=True)
    contents = {"a.json": b"{}", "deeper/b.pkl": os.urandom(3 << 20), "empty": b""}
    for name, content in contents.items():
        (source / name).write_bytes(content)
    files = pickle.loads(pickle.dumps(whole_files()))  # it travels to the trials' actors
    files.create_dir(str(target))
    killed_while_writing(target / "a.json")  # what was left half written is overwritten
    pyarrow.fs.copy_files(str(source), str(target), destination_filesystem=files)
    found = {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert found == contents


def test_a_full_disk_is_told_and_takes_nothing_away(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(b"what stood there")
    (tmp_path / "state.json.partial").symlink_to("/dev/full")
    stream = whole_files().open_output_stream(str(path))
    with pytest.raises(OSError, match="No space left"):
        stream.write(b"x" * 100_000)
    stream.close()
    assert path.read_bytes() == b"what stood there"
