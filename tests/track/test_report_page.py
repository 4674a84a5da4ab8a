"""The page of a run in a real browser: its charts are drawn, its media play, and it asks the network for nothing."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_report import HOSTILE, add_result, build_run, build_whole_run, metric, sample

from omniloom.track.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(build_whole_run(tmp_path_factory.mktemp("runs") / "one"))


def browse(page: Path, home: Path, *flags: str) -> str:
    """Open a page without a network and a home; what the browser prints. No process of it is left."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser to open the page in: none of {', '.join(BROWSERS)} is on the PATH")
    home.mkdir(parents=True, exist_ok=True)
    words = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={home}/profile", "--no-first-run",
        "--hide-scrollbars", "--autoplay-policy=no-user-gesture-required", "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=15000", "--enable-logging=stderr", *flags,
        page.as_uri(),
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home), "XDG_CACHE_HOME": str(home)}
    process = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        printed, log = process.communicate(timeout=TIMEOUT_S)
    finally:
        # Its own session: the helpers that it started go with it, and nothing else does.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, log
    told = [line for line in log.splitlines() if "CONSOLE" in line]
    assert not told, told  # a script's error, or something that the security policy stopped
    return printed


def attribute(dom: str, name: str) -> list[str]:
    return re.findall(rf'\b{name}="([^"]*)"', dom)


def test_the_charts_are_drawn_and_the_media_loaded(page: Path, tmp_path: Path) -> None:
    dom = browse(page, tmp_path / "home", "--dump-dom", "--window-size=1400,3000")
    assert 'data-ready="true"' in dom
    charts = attribute(dom, "data-chart")
    assert attribute(dom, "data-charts") == [str(len(charts))]
    assert len(re.findall(r'<svg class="main-svg"', dom)) >= len(charts) == 18
    assert len(re.findall(r'class="trace scatter', dom)) >= 12  # a line is a line, not only an empty chart
    heatmaps = re.findall(r'<g class="hm">.*?</g>', dom, re.DOTALL)
    assert len(heatmaps) == 2  # the experts' load, the needle's grid
    assert all(len(attribute(heatmap, "xlink:href")[0]) > 1000 or "data:image/png" in heatmap for heatmap in heatmaps)
    assert ">85%<" in dom  # a cell of the grid
    assert attribute(dom, "data-media-ready") == ["true"] * 18
    assert "cannot show" not in dom.split("<script")[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_not_blank_in_either_colour_scheme(scheme: str, page: Path, tmp_path: Path) -> None:
    artifacts = Path(os.environ.get("OMNILOOM_ARTIFACTS", tmp_path))
    artifacts.mkdir(parents=True, exist_ok=True)
    picture = artifacts / f"report-{scheme}.png"
    picture.unlink(missing_ok=True)
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    browse(page, tmp_path / "home", f"--screenshot={picture}", "--window-size=1400,2400", *dark)
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.size == (1400, 2400)
        pixels = np.asarray(image.convert("RGB"), dtype=np.int16)
    background = pixels[600:, :10].reshape(-1, 3)  # the margin
    assert (background.mean() < 60) == (scheme == "dark")
    for top in (0, 600, 1200, 1800):  # everywhere there is something
        part = pixels[top : top + 600]
        assert 0.01 < (np.abs(part - background[0]).max(axis=-1) > 30).mean() < 0.95
    blue_lines = (pixels[..., 2] - pixels[..., 0] > 60).sum()
    assert blue_lines > 3000


def test_hostile_text_runs_nothing_and_a_broken_picture_is_said(tmp_path: Path) -> None:
    run = build_run(tmp_path / "one", name=HOSTILE[:-1])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    prompt = [{"text": HOSTILE}, {"image": f"{tmp_path}/broken.png"}]
    add_result(run, "a", 5, {"acc": metric(0.5)}, [sample(0, False, prompt, given=HOSTILE)])
    # An alert would stop the page before it is ready, and an injected script would reach the console.
    dom = browse(write_report(run), tmp_path / "home", "--dump-dom")
    assert 'data-ready="true"' in dom
    assert attribute(dom, "data-media-ready") == ["false"]
    assert "This browser cannot show broken.png." in dom
