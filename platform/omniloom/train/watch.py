"""What a rank tells whoever watches over it: that it gets on, and how far the way to its first step lies behind."""

from typing import Protocol


class Watcher(Protocol):
    """Somebody who wants to know; `run_on_ranks` has one in every rank."""

    def alive(self) -> None:
        """A step, a validation or a checkpoint has been done."""

    def busy(self) -> None:
        """Something long gets on that is no step, and no other rank waits for."""

    def reached(self, what: str) -> None:
        """A part of the way to the first step lies behind."""


_watchers: list[Watcher] = []


def hear(watcher: Watcher) -> None:
    """Tell this one from now on."""
    _watchers[:] = [watcher]


def alive() -> None:
    """A step, a validation or a checkpoint has been done."""
    for watcher in _watchers:
        watcher.alive()


def busy() -> None:
    """Something long gets on that is no step, and no other rank waits for."""
    for watcher in _watchers:
        watcher.busy()


def reached(what: str) -> None:
    """`model` is built, or the `checkpoint` loaded."""
    for watcher in _watchers:
        watcher.reached(what)
