"""Media are decoded in a child process: native code that crashes, hangs or grows without end costs one document.

The story, in call order: `Decoders.submit` hands a medium to a thread, the thread to its `_Child`; there `serve` runs
`decode_media` within the limits of `DecodeConfig`; what comes back is segments, or a DataError that says what happened.

Why no pool of a library: one that shares a pipe between its children (pebble) waits for ever once a child is killed
in the middle of an answer, and gives up when one dies between tasks; one that breaks as a whole (concurrent.futures)
blames every file that waits. Here each child has a pipe of its own and one file at a time.
"""

import atexit
import ctypes
import errno
import os
import pickle
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import SimpleQueue
from tempfile import NamedTemporaryFile
from typing import Any, Self

import av
import psutil

from omniloom.data.config import DecodeConfig
from omniloom.data.storage import size_bytes
from omniloom.errors import ClusterError, DataError
from omniloom.modality.config import ModalityConfig
from omniloom.modality.files import Media
from omniloom.modality.media import decode_media, segments_of
from omniloom.modality.sequence import Segment

DecodeFunction = Callable[[str, Media, ModalityConfig, Path], Any]

# A child is one core's work; and each thread of its own, each arena of malloc reserves address space, which is limited.
CHILD_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
PIPED_BYTES = 16 << 20  # larger content goes by a file: it would count against the memory for decoding, twice
READY = "ready"
DONE, REJECTED, OUT_OF_MEMORY, OUT_OF_DISK = "done", "rejected", "out of memory", "out of disk"
PR_SET_PDEATHSIG = 1
PATIENCE_SECONDS = 5  # that a process whose pipe broke may take to end


class Decoders:
    """Children that decode media, each one file at a time.

    A result stays in memory (a film: on disk, in a file without a name) until its Future is dropped: the caller bounds
    how far it looks ahead. Files in `spool` live no longer than the decoding of their medium; only who is killed in the
    middle of one leaves them behind (decode-*).
    """

    def __init__(
        self,
        config: ModalityConfig,
        limits: DecodeConfig,
        spool: Path,
        workers: int = 1,
        decode: DecodeFunction = decode_media,
    ) -> None:
        self.settings = (config, limits, spool)
        self.config, self._limits = config, limits
        self._spool = spool
        self._children = [_Child(config, limits, decode) for _ in range(workers)]
        self._idle: SimpleQueue[_Child] = SimpleQueue()
        for child in self._children:
            self._idle.put(child)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def submit(self, kind: str, media: Media) -> "Future[list[Segment]]":
        """Queue one medium; the Future gives its segments, or raises DataError saying why it cannot be used."""
        return self._threads.submit(self._decode, kind, media)

    def close(self) -> None:
        """End the children, whatever they do; what is not decoded yet is cancelled."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for child in self._children:
            child.stop()
        self._threads.shutdown()
        for child in self._children:
            child.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decode(self, kind: str, media: Media) -> list[Segment]:
        seconds = self._limits.seconds + self._limits.seconds_per_megabyte * size_bytes(media) / 1e6
        child = self._idle.get()
        try:
            with (
                NamedTemporaryFile(prefix="decode-", dir=self._spool) as given,
                NamedTemporaryFile(prefix="decode-", dir=self._spool) as film,
            ):
                if isinstance(media.content, bytes) and len(media.content) > PIPED_BYTES:
                    given.write(media.content)
                    given.flush()
                    media = Media(media.name, Path(given.name))
                # Mapped before its name goes.
                return segments_of(child.decode(kind, media, Path(film.name), seconds), self.config)
        finally:
            self._idle.put(child)


_shared: Decoders | None = None


def shared_decoders(config: ModalityConfig, limits: DecodeConfig, spool: Path) -> Decoders:
    """This process's own: the child outlives a shard where the next one asks for the same, and ends with the process.

    For one thread; who may be interrupted while a file is decoded uses `Decoders` as a context manager.
    """
    global _shared
    if _shared is None or _shared.settings != (config, limits, spool):
        close_shared()
        _shared = Decoders(config, limits, spool)
    return _shared


@atexit.register
def close_shared() -> None:
    """End the shared child, if there is one."""
    global _shared
    if _shared is not None:
        _shared.close()
        _shared = None


class _Failed(Exception):
    """The child could not finish a file; says how, without anything that differs from run to run."""


class _Child:
    """One process and its pipe, started when first needed and after each death."""

    def __init__(self, config: ModalityConfig, limits: DecodeConfig, decode: DecodeFunction) -> None:
        self._settings = (config, limits.memory_bytes, decode)
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection
        self._is_stopped = False

    def decode(self, kind: str, media: Media, spooled: Path, seconds: float) -> Any:
        """What the function answers; raises DataError, the same for the same file whatever was decoded before it."""
        while True:
            is_fresh = self._start()
            try:
                return self._ask((kind, media, spooled), seconds)
            except _Failed as failure:
                self.end()
                # What earlier files left behind, a damaged or a crowded heap, is not its fault: once more, alone.
                if is_fresh:
                    raise DataError(str(failure)) from None

    def stop(self) -> None:
        """Kill the process and let none follow; a thread that waits for it gets a DataError."""
        self._is_stopped = True
        if (process := self._process) is not None:
            process.kill()

    def end(self) -> None:
        """Kill the process, if there is one; the next file starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._pipe.close()
            self._process = None

    def _start(self) -> bool:
        """True where the process is a new one."""
        if self._process is not None and self._process.poll() is None:
            return False
        self.end()
        ours, theirs = Pipe()
        # Not by multiprocessing: its spawn imports the parent's main module, which in a worker of Ray is Ray.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import serve; serve({theirs.fileno()})"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env=os.environ | CHILD_ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        theirs.close()
        self._pipe = ours
        try:
            if self._is_stopped:
                raise DataError("decoding was stopped")
            self._pipe.send(self._settings)
            assert self._pipe.recv() == READY
        except (EOFError, OSError):
            raise ClusterError(
                f"the process that decodes media did not start ({self._last_words()}): its errors are in the log"
            ) from None
        return True

    def _ask(self, task: tuple[str, Media, Path], seconds: float) -> Any:
        limits = self._limits
        try:
            self._pipe.send(task)
            if not self._pipe.poll(seconds):
                self.end()
                raise DataError(
                    f"decoding took over {seconds:g} s (decode.seconds={limits.seconds}, "
                    f"decode.seconds_per_megabyte={limits.seconds_per_megabyte})"
                )
            reply = self._pipe.recv_bytes()
        except (EOFError, OSError):
            raise _Failed(f"decoder crashed ({self._last_words()})") from None
        try:
            outcome, answer = pickle.loads(reply)
        except Exception:
            raise _Failed("decoder crashed (its answer makes no sense)") from None
        if outcome == OUT_OF_MEMORY:
            raise _Failed(f"decoder needed over decode.memory_bytes={limits.memory_bytes}")
        if outcome == OUT_OF_DISK:
            raise ClusterError(f"no space left under {task[2].parent} for decoded media: free some")
        if outcome == REJECTED:
            raise DataError(answer)
        return answer

    def _last_words(self) -> str:
        """How a process ended whose pipe is broken."""
        assert self._process is not None
        try:
            status = self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            return "pipe closed"
        return f"exit status {status}" if status >= 0 else signal.Signals(-status).name


def serve(descriptor: int) -> None:
    """The child's life: the settings, then media one by one, until the parent closes the pipe."""
    _die_with_parent()
    av.logging.set_level(None)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe = Connection(descriptor)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        config, memory_bytes, decode = pipe.recv()
        pipe.send(READY)
        at_first = _address_space_bytes()
        # Each file has the same room, whatever those before it left behind; if that is as much, another child goes on.
        while (held := _address_space_bytes()) < at_first + memory_bytes:
            _limit_address_space(held + memory_bytes)
            kind, media, spooled = pipe.recv()
            pipe.send_bytes(_reply(decode, kind, media, config, spooled))


def _reply(decode: DecodeFunction, kind: str, media: Media, config: ModalityConfig, spooled: Path) -> bytes:
    try:
        return pickle.dumps((DONE, decode(kind, media, config, spooled)), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        # Readers turn whatever their library raised into a DataError.
        if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
            return pickle.dumps((OUT_OF_MEMORY, None))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return pickle.dumps((OUT_OF_DISK, None))
        if isinstance(error, DataError):
            return pickle.dumps((REJECTED, str(error)))
        traceback.print_exc()  # a mistake in the program, not in the file; the reason is kept free of addresses
        return pickle.dumps((REJECTED, f"the decoder failed: {type(error).__name__}"))


def _die_with_parent() -> None:
    # Also in the middle of a file that hangs; between two the end of the pipe says it.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _address_space_bytes() -> int:
    return psutil.Process().memory_info().vms


def _limit_address_space(limit_bytes: int) -> None:
    if sys.platform == "linux":  # elsewhere it has no limit
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
