"""Our decoders, in child processes as the tokenize job has them, against plain loops of Pillow and PyAV.

Each does the same work: decode, resize or resample, patches or log-mel frames. Counted are pictures, seconds of sound,
and frames of video as their files hold them, of which one a second is kept. Sides take turns in one run, medians of
three: `python tests/benchmarks/decoding.py [image audio video]`. Memory is the most that a process has held: ours a
child's, the loop's its own.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
from PIL import Image

from omniloom.data.config import DecodeConfig
from omniloom.data.decode import Decoders
from omniloom.modality.audio import _filters
from omniloom.modality.config import ModalityConfig
from omniloom.modality.files import Media

REAL = Path(os.environ.get("OMNILOOM_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
REPEATS = 3
FILES = {"image": ("image/photos/*", 15), "audio": ("audio/speech/*", 15), "video": ("video/clips/*", 1)}
SIZE, PATCH = 224, 14


def patches_of(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    across = SIZE // PATCH
    return pixels.reshape(across, PATCH, across, PATCH, 3).swapaxes(1, 2).reshape(across**2, -1)


def plain_image(file: str) -> np.ndarray:
    with Image.open(file) as picture:
        return patches_of(picture.convert("RGB"))


def plain_audio(file: str) -> np.ndarray:
    resampler = av.AudioResampler(format="flt", layout="mono", rate=16_000)
    with av.open(file) as container:
        parts = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
    parts += resampler.resample(None)
    samples = np.pad(np.concatenate([part.to_ndarray()[0] for part in parts]), 200, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(samples, 400)[:-1:160] * np.hanning(401)[:-1]
    power = np.abs(np.fft.rfft(windows)) ** 2
    return np.log10(np.maximum(power @ _filters(16_000, 400, 80), 1e-10)).astype(np.float16)


def plain_video(file: str) -> np.ndarray:
    kept, due = [], 0.0
    with av.open(file) as container:
        for frame in container.decode(video=0):
            if frame.time is not None and frame.time >= due:
                kept.append(patches_of(frame.to_image()))
                due += 1.0
    return np.concatenate(kept)


PLAIN: dict[str, Callable[[str], np.ndarray]] = {"image": plain_image, "audio": plain_audio, "video": plain_video}


def run_plain(kind: str, files: list[str], answer: Any) -> None:
    """The loop, in a fresh process: seconds and peak memory."""
    PLAIN[kind](files[0])  # imports and filters
    begun = time.perf_counter()
    for file in files:
        PLAIN[kind](file)
    answer.put((time.perf_counter() - begun, peak_mb("self")))


def run_ours(kind: str, files: list[str], workers: int, spool: Path) -> tuple[float, float]:
    with Decoders(ModalityConfig(), DecodeConfig(), spool, workers) as decoders:
        warm = [decoders.submit(kind, Media(files[0], Path(files[0]))) for _ in range(4 * workers)]
        for future in warm:
            future.result()
        begun = time.perf_counter()
        for future in [decoders.submit(kind, Media(file, Path(file))) for file in files]:
            future.result()
        seconds = time.perf_counter() - begun
        children = [child.pid for child in psutil.Process().children() if "serve(" in " ".join(child.cmdline())]
        return seconds, max(map(peak_mb, children))


def peak_mb(process: int | str) -> float:
    return int(Path(f"/proc/{process}/status").read_text().split("VmHWM:")[1].split()[0]) / 1_024


def amount(kind: str, file: Path) -> float:
    """What a file counts for."""
    if kind == "image":
        return 1.0
    with av.open(str(file)) as container:
        if kind == "video":
            return float(sum(1 for _ in container.decode(video=0)))
        return float(sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0)))


def main() -> None:
    context = get_context("spawn")
    units = {"image": "images/s", "audio": "seconds of sound/s", "video": "video frames/s"}
    for kind in sys.argv[1:] or FILES:
        pattern, times = FILES[kind]
        found = [file for file in sorted(REAL.glob(pattern)) if file.is_file()]
        total = times * sum(amount(kind, file) for file in found)
        files = [str(file) for file in found] * times
        took: dict[str, list[tuple[float, float]]] = {"plain loop": [], "1 worker": [], "2 workers": []}
        with tempfile.TemporaryDirectory(prefix="omniloom-bench-") as spool:
            for _ in range(REPEATS):
                answer = context.Queue()
                process = context.Process(target=run_plain, args=(kind, files, answer))
                process.start()
                took["plain loop"].append(answer.get())
                process.join()
                for workers, name in ((1, "1 worker"), (2, "2 workers")):
                    took[name].append(run_ours(kind, files, workers, Path(spool)))
        speeds = {name: total / statistics.median(seconds for seconds, _ in each) for name, each in took.items()}
        print(f"{units[kind]}: {len(files)} files; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        for name, each in took.items():
            print(
                f"  {name:10} {speeds[name]:9,.1f}  {speeds[name] / speeds['plain loop']:5.2f} × plain, "
                f"{speeds[name] / speeds['1 worker']:5.2f} × one worker;  peak {max(peak for _, peak in each):5,.0f} MB"
                f"  (each {[f'{total / seconds:,.0f}' for seconds, _ in each]})",
                flush=True,
            )


if __name__ == "__main__":
    main()
