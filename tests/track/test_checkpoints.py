"""Where checkpoints lie, which of them count, which are removed; on this machine and in a store."""

import hashlib
import json
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.errors import CheckpointError, ConfigError
from omniloom.track.checkpoints import (
    COMPLETE,
    KEEP,
    Checkpoints,
    Damage,
    Folder,
    find_damage,
    find_wrong_size,
    inventory,
    removable,
    step_of,
)


@pytest.fixture(params=["path", "file://", "memory://"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    places = {"path": tmp_path / "a", "file://": f"file://{tmp_path}/a", "memory://": f"memory://{uuid.uuid4()}/a"}
    return Folder.of(places[request.param])


def complete(folder: Folder, **files: bytes) -> None:
    entries = {name: folder.write(name, content) for name, content in files.items()}
    folder.write(COMPLETE, json.dumps(entries).encode())


def test_a_folder_is_the_same_here_and_in_a_store(folder: Folder) -> None:
    assert folder.sizes() == {}
    assert folder.names() == []
    entry = (folder / "b").write("c", b"four")
    assert entry == {"bytes": 4, "sha256": hashlib.sha256(b"four").hexdigest()}
    folder.write("d", b"")
    assert folder.sizes() == {"b/c": 4, "d": 0}
    assert folder.names() == ["b", "d"]
    assert folder.read("b/c") == b"four"
    assert folder.sha256("b/c") == (4, entry["sha256"])
    assert folder.exists("d")
    folder.remove("d")
    folder.remove("d")
    assert not folder.exists("d")
    folder.remove()
    assert folder.sizes() == {}


def test_what_is_not_as_COMPLETE_says_is_found_with_both_figures(folder: Folder) -> None:
    complete(folder, a=b"1234", b=b"567")
    assert find_damage(folder) is None
    folder.write("b", b"568")
    assert find_wrong_size(folder) is None
    damage = find_damage(folder)
    assert damage is not None
    assert (damage.file, damage.bytes, damage.expected_bytes) == ("b", 3, 3)
    assert damage.sha256 == hashlib.sha256(b"568").hexdigest()
    assert damage.expected_sha256 == hashlib.sha256(b"567").hexdigest()
    assert str(damage.sha256) in str(damage)
    folder.write("a", b"12")
    assert find_wrong_size(folder) == Damage("a", 2, 4, None, hashlib.sha256(b"1234").hexdigest())
    assert str(find_damage(folder)) == "a has 2 bytes and COMPLETE says 4"
    folder.remove("a")
    assert find_damage(folder) == Damage("a", None, 4, None, hashlib.sha256(b"1234").hexdigest())


def test_each_of_several_readers_hashes_its_share(folder: Folder) -> None:
    complete(folder, a=b"1", b=b"22", c=b"333")
    folder.write("b", b"23")
    found = [find_damage(folder, share, 3) for share in range(3)]
    assert [damage.file for damage in found if damage] == ["b"]


@pytest.mark.parametrize("content", [b"", b'{"a": {"bytes": 1', b"[]", b'{"a": 3}', b'{"a": {"bytes": 1}}'])
def test_a_torn_COMPLETE_completes_nothing(folder: Folder, content: bytes) -> None:
    folder.write("a", b"1")
    folder.write(COMPLETE, content)
    with pytest.raises(CheckpointError, match="is not complete"):
        inventory(folder)
    assert find_damage(folder) == Damage(COMPLETE, len(content), None, None, None)
    assert "COMPLETE is torn or missing" in str(find_damage(folder))


def test_only_what_is_complete_counts(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.complete() == []
    for step in (5, 100):
        complete(checkpoints.at(step), a=b"1")
    checkpoints.at(200).write("a", b"1")
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert checkpoints.steps() == [5, 100, 200]
    assert checkpoints.complete() == [5, 100]
    assert [step_of(name) for name in ("step_00000005", "step_", "step_x", "notes")] == [5, None, None, None]


def test_a_folder_elsewhere_is_linked_and_a_store_is_named(tmp_path: Path) -> None:
    near, far = tmp_path / "runs" / "near", tmp_path / "runs" / "far"
    checkpoints = Checkpoints.create(near, str(tmp_path / "elsewhere"))
    complete(checkpoints.at(5), a=b"1")
    assert (tmp_path / "elsewhere" / "near" / "step_00000005" / COMPLETE).is_file()
    assert (near / "checkpoints" / "step_00000005" / COMPLETE).is_file()
    assert Checkpoints(near).complete() == Checkpoints.create(near, str(tmp_path / "elsewhere")).complete() == [5]
    with pytest.raises(ConfigError, match="has a near of another run"):
        Checkpoints.create(tmp_path / "others" / "near", str(tmp_path / "elsewhere"))

    stored = Checkpoints.create(far, f"memory://{uuid.uuid4()}")
    complete(stored.at(5), a=b"1")
    complete(stored.at(5), **{"model/config.json": b"{}", "engine": b"large"})
    assert not (far / "checkpoints").exists()
    again = Checkpoints(far)
    assert again.complete() == [5]
    model = again.fetch_model(5)
    assert sorted(path.name for path in model.rglob("*") if path.is_file()) == [COMPLETE, "config.json"]
    with pytest.raises(ConfigError, match="names no folder or store"):
        Checkpoints.create(tmp_path / "runs" / "third", "nowhere://a")


def test_the_best_is_the_oldest_with_the_best_value_measured_by_then(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20, 30, 40):
        complete(checkpoints.at(step), a=b"1")
    assert checkpoints.best("val/loss", "min") is None
    lines = [(5, 3.0), (12, 1.0), (25, 2.0), (30, float("nan")), (35, 4.0)]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "val/loss": value}) + "\n" for step, value in lines)
    )
    assert checkpoints.best("val/loss", "min") == 20
    assert checkpoints.best("val/loss", "max") == 40
    assert checkpoints.best("val/los", "min") is None


STEPS = st.lists(st.integers(1, 60), unique=True, max_size=12).map(sorted)


@settings(deadline=None)
@given(STEPS, st.data(), st.integers(1, 4) | st.none(), st.sampled_from([None, 5, 10]))
def test_what_goes_is_old_unnamed_and_not_of_the_rule(
    steps: list[int], data: st.DataObject, keep_last: int | None, keep_every: int | None
) -> None:
    complete = [step for step in steps if data.draw(st.booleans())]
    kept = [step for step in steps if data.draw(st.booleans())]
    gone = list(removable(steps, complete, kept, keep_last, keep_every))
    if not complete:
        assert gone == []
        return
    stay = set(steps) - set(gone)
    assert {step for step in steps if step >= complete[-1]} <= stay, (
        "the newest complete one, and what is being written"
    )
    assert set(kept) <= stay
    assert set(complete[-keep_last:] if keep_last else complete) <= stay
    if keep_every:
        assert {step for step in complete if step % keep_every == 0} <= stay
    for step in stay - set(kept):
        assert step >= complete[-1] or step in complete, "what an interrupted save left goes"
    if keep_last and not keep_every:
        assert len(stay & set(complete)) <= keep_last + len(kept)


def test_a_named_checkpoint_is_marked(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    complete(checkpoints.at(5), a=b"1")
    checkpoints.keep(5)
    assert checkpoints.at(5).exists(KEEP)
    assert find_damage(checkpoints.at(5)) is None
