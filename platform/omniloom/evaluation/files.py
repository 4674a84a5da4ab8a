"""The text files that a task of evals/ is told to read."""

from collections.abc import Iterator
from glob import glob
from pathlib import Path

from omniloom.errors import ConfigError, DataError


def read_files(task: str, holds: str, files: str | list[str] | None) -> Iterator[tuple[str, str]]:
    """Path and text of every file that `files`, paths or globs, names; `holds` says in errors what they hold.

    Raises ConfigError where none is named, DataError where a pattern matches none or a file is not UTF-8 text.
    """
    if not files:
        raise ConfigError(f"task {task} has no {holds}: set task_args.{task}.files=[…]")
    for pattern in [files] if isinstance(files, str) else files:
        paths = sorted(glob(pattern, recursive=True))
        if not paths:
            raise DataError(f"task {task}: no file matches {pattern}")
        for path in paths:
            try:
                yield path, Path(path).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"task {task} cannot read {path}: {error}") from error
