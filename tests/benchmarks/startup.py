"""How long `omniloom --help` takes next to an empty Python, in one run; target: under half a second."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

OMNILOOM = str(Path(sys.executable).parent / "omniloom")
RUNS = 15


def median_s(command: list[str]) -> float:
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    bare, ours = median_s([sys.executable, "-c", "pass"]), median_s([OMNILOOM, "--help"])
    verb = median_s([OMNILOOM, "train", "--help"])
    print(
        f"empty python {bare:.3f} s; omniloom --help {ours:.3f} s ({ours / bare:.1f} times); train --help {verb:.3f} s"
    )
