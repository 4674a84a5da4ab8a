"""The rooms' arrows and fences, read from the imports themselves."""

import ast
import platform
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "platform" / "omniloom"
REPOSITORY = PACKAGE.parents[1]

# A room may import the rooms named here and no other; `errors` is everybody's.
ARROWS = {
    "modality": set(),
    "objective": set(),
    "model": set(),
    "plan": set(),
    "track": set(),
    "cluster": set(),
    "data": {"modality"},
    "generate": {"model", "modality"},
    "train": {"model", "data", "objective", "plan", "track"},
    "evaluation": {"model", "generate", "modality"},
    "posttrain": {"train", "generate", "objective"},
    "serve": {"generate"},
}
# Every default stands in a room's config.py, and settings composes them.
LAST_ROW = {"settings", "planning", "compose", "overrides", "cli", "__init__", "__main__"}
FENCES = {
    "hydra": {"compose.py", "overrides.py", "cli.py"},
    "ray": {"cluster/", "serve/", "data/", "posttrain/", "evaluation/"},
    "deepspeed": {"train/engine.py", "train/fragments.py", "train/parallel.py"},
    "wandb": {"track/wandb_tracker.py"},
    "lm_eval": {"evaluation/"},
}
HEAVY = {"torch", "ray", "deepspeed", "wandb", "lm_eval", "transformers", "pyarrow", "hydra"}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_the_rooms_named(path: Path) -> None:
    name = str(path.relative_to(PACKAGE))
    room = name.split("/")[0].removesuffix(".py")
    if room in LAST_ROW:
        return
    used = {n.split(".")[1] for n in imports(path) if n.startswith("omniloom.")} - {room, "errors"}
    allowed = ARROWS.get(room, set())
    assert used <= allowed, f"{name} imports {used - allowed}"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_library_stays_behind_its_fence(path: Path) -> None:
    name = str(path.relative_to(PACKAGE))
    used = {n.split(".")[0] for n in imports(path)}
    for library, places in FENCES.items():
        assert library not in used or name.startswith(tuple(places)), f"{name} imports {library}"


def test_every_room_has_its_row() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert rooms <= ARROWS.keys()


@pytest.mark.parametrize("module", ["omniloom.cli", "omniloom.errors", "omniloom"])
def test_the_command_line_starts_without_the_heavy_libraries(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & {HEAVY!r}))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == ""


@pytest.mark.parametrize("config", sorted(PACKAGE.glob("*/config.py")), ids=lambda p: p.parent.name)
def test_a_config_imports_nothing_heavy(config: Path) -> None:
    module = f"omniloom.{config.parent.name}.config"
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & {HEAVY!r}))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == ""


def test_platform_is_the_standard_librarys_under_pytest() -> None:
    assert platform.python_version() == sys.version.split()[0]
    assert not (PACKAGE.parent / "__init__.py").exists()


def test_platform_is_the_standard_librarys_in_the_repository_root() -> None:
    code = "import platform, uuid; print(platform.python_version())"
    answer = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == sys.version.split()[0]


def test_no_job_hides_a_package_that_others_import() -> None:
    taken = {"evaluate", "tokenize", "ray", "wandb", "profile", "platform", "datasets"}
    assert not taken & {path.stem for path in (REPOSITORY / "jobs").glob("*.py")}
