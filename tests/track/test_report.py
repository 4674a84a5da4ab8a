"""The page of a run, from its files: at any state, with anything missing, with hostile text in it."""

import base64
import json
import math
import os
import random
import re
import subprocess
import sys
import tracemalloc
import wave
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import yaml
from PIL import Image

from omniloom.errors import ConfigError
from omniloom.track import report
from omniloom.track.report import find_run, write_report
from omniloom.track.report import samples as report_samples
from omniloom.track.report import text as report_text
from omniloom.track.report.metrics import BUCKETS, LOAD_BINS, Curve, read_metrics

OMNILOOM = str(Path(sys.executable).parent / "omniloom")
CONFIG = {
    "run": "one",
    "data": {"seq_len": 64},
    "train": {"steps": 120, "tokens": None, "global_batch_size": 8},
    "track": {"api_key": "s3cr3t-value", "entity": "https://me:pa55@example.org/x"},
    "tokenizer": {"path": "a/tokenizer.json", "image_token": 7, "tokens": 12_000},
}


def write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def build_run(folder: Path, steps: int = 120, status: str = "finished", **record: Any) -> Path:
    """A run's folder with metrics of every kind and no evaluation."""
    folder.mkdir(parents=True)
    run = {
        "id": "a1b2c3d4",
        "name": folder.name,
        "status": status,
        "host": "node-7",
        "git_revision": "0123abc",
    } | record
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    noise = random.Random(3)
    lines = []
    for step in range(1, steps + 1):
        loss = 2 + 5 * math.exp(-step / 30) + noise.gauss(0, 0.1)
        load = [
            max(0, round(64 + 40 * math.exp(-step / 50) * math.sin(expert) + noise.gauss(0, 6))) for expert in range(4)
        ]
        line: dict[str, Any] = {
            "step": step, "loss/next_token": loss, "loss/balance": 1 + 0.1 / step, "loss/mtp": loss * 1.1,
            "loss/contrastive": 2 * loss,
            "lr": 3e-4 * min(1, step / 20), "grad_norm": 0.7 + noise.random(), "tokens": 512 * step,
            "tokens_per_s": 9000 + noise.gauss(0, 300), "step_s": 0.05, "data_wait_s": 0.002,
            "forward_s": 0.01, "backward_s": 0.021, "optimizer_s": 0.005, "communication_s": 0.003, "mfu": 0.41,
            "skipped_steps": 0 if step < 70 else 2, "tokens/text": 400 * step, "tokens/image": 112 * step,
            "memory_peak_bytes": 640_000_000 + 1000 * step, "batch_hash": "ab", "eta_s": 0.05 * (240 - step),
        }  # fmt: skip
        for layer in (1, 2):
            line[f"router/{layer}/load_max_over_mean"] = max(load) / (sum(load) / 4)
            line[f"router/{layer}/dead_experts"] = load.count(0)
            line |= {f"router/{layer}/load_entropy": 1 - 0.01 * layer, f"router/{layer}/score_entropy": 0.99}
            line |= {f"router/{layer}/bias_min": -0.001 * step, f"router/{layer}/bias_max": 0.0005 * step * layer}
            line[f"router/{layer}/tokens_per_expert"] = load
        if step % 20 == 0:
            line |= {"val/loss": loss + 0.1, "val/loss/words": loss, "val/loss/sounds": loss + 0.4}
            line |= {"val/forgetting/words": 0.01} if step > 60 else {}
            line |= {"val/retrieval_at_1/image_text": 0.5, "val/retrieval_at_1/text_image": 0.25}
        lines.append(line)
    write_lines(folder / "metrics.jsonl", lines)
    events = [
        {"time": 1_795_000_000.0, "event": "start", "step": 0, "ranks": 2, "host": "node-7"},
        {"time": 1_795_000_050.0, "event": "failed", "reason": "RuntimeError: a rank died"},
        {"time": 1_795_000_100.0, "event": "start", "step": 60, "ranks": 2, "host": "node-7"},
        {"time": 1_795_000_101.0, "event": "skipped_documents", "count": 1250, "reason": "over 64 tokens"},
        {"time": 1_795_000_192.0, "event": "finished", "reason": None},
    ]
    write_lines(folder / "events.jsonl", events)
    return folder


def metric(value: float, stderr: float | None = 0.02, chance: float | None = None, **control: float) -> dict[str, Any]:
    return {"value": value, "stderr": stderr, "chance": chance, "control": control}


def add_result(
    run: Path, task: str, step: int, metrics: dict[str, Any], samples: list[dict[str, Any]] | None = None
) -> None:
    folder = run / "evals" / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{task}.json").write_text(json.dumps({"task": task, "step": step, "n": 240, "metrics": metrics}))
    if samples is not None:
        write_lines(folder / f"{task}.samples.jsonl", samples)


def make_media(folder: Path) -> dict[str, str]:
    """A real picture, sound and video, small."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)).save(folder / "picture.png")
    with wave.open(str(folder / "tone.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        tone = 9000 * np.sin(np.arange(8000) * 2 * np.pi * 440 / 8000)
        sound.writeframes(tone.astype("<i2").tobytes())
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(10):
            frame = np.full((48, 64, 3), 40, dtype=np.uint8)
            frame[10:30, 4 * i : 4 * i + 20] = (220, 120, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return {"image": f"{folder}/picture.png", "audio": f"{folder}/tone.wav", "video": f"{folder}/clip.mp4"}


def sample(doc_id: int, right: bool | None, prompt: list[dict[str, str]], **more: Any) -> dict[str, Any]:
    given = None if right is None else "yes" if right else "no"
    base = {
        "doc_id": doc_id,
        "prompt": prompt,
        "choices": ["yes", "no"],
        "answer": "yes",
        "given": given,
        "right": right,
    }
    return base | more


def build_whole_run(folder: Path) -> Path:
    """A finished run with everything a page can show."""
    run = build_run(folder)
    media = make_media(folder.parent / "media")
    prompt = [{key: path} for key, path in media.items()] + [{"text": "Are all three the same digit?"}]
    add_result(run, "digits", 60, {"acc": metric(0.4, chance=0.5)})
    samples = [sample(i, i % 3 != 0, prompt) for i in range(12)]
    add_result(run, "digits", 120, {"acc": metric(0.91, chance=0.5, removed=0.5, shuffled=0.48)}, samples)
    add_result(run, "perplexity", 120, {"bits_per_byte": metric(2.05, None, unigram=3.09)})
    cells = {
        f"acc/{n}/{depth}": metric(0.9 - n / 5000 + depth / 10) for n in (256, 512, 1024) for depth in (0.0, 0.5, 1.0)
    }
    found = [sample(i, i % 2 == 0, [{"text": "hay " * 4000}], choices=[], length=512, depth=0.25) for i in range(4)]
    add_result(run, "needle", 120, {"acc": metric(0.8)} | cells, found)
    return run


class Page(HTMLParser):
    """A page's elements and its text outside scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.figures, self._inside = "", "", ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self.text += " "
        if tag in ("script", "style"):
            self._inside = "figures" if dict(attributes).get("id") == "figures" else tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = ""

    def handle_data(self, text: str) -> None:
        if self._inside == "figures":
            self.figures += text
        elif not self._inside:
            self.text += text

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def charts(self) -> dict[str, Any]:
        return json.loads(self.figures)


def page_of(run: Path) -> Page:
    return Page(write_report(run))


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(build_whole_run(tmp_path_factory.mktemp("runs") / "one"))


def test_the_head_says_who_the_run_is_and_what_it_learned(whole_page: Page) -> None:
    text = " ".join(whole_page.text.split())
    for said in (
        "one finished", "host node-7", "ranks 2", "git revision 0123abc", "parent run none", "restarts 1",
        "120 of 120", "61.4k", "3 m 12 s", "steps alone 6.0 s",
        "digits: 91.0% ± 2.0% right (above chance 50.0%", "perplexity: 2.05 bits a byte (under a unigram's 3.09)",
    ):  # fmt: skip
        assert said in text, said


def test_every_kind_of_metric_has_its_chart(whole_page: Page) -> None:
    assert set(whole_page.charts) == {
        "loss", "val-sources", "forgetting", "retrieval", "loss/contrastive", "loss/mtp", "loss/balance",
        "lr", "grad_norm", "tokens_per_s", "step_s", "memory", "mfu", "load", "load-max", "load-entropy", "needle-0",
        "history-acc",
    }  # fmt: skip
    places = [attributes["data-chart"] for _, attributes in whole_page.elements if "data-chart" in attributes]
    assert sorted(places) == sorted(whole_page.charts)
    assert [trace["name"] for trace in whole_page.charts["loss"]["data"]] == ["training", "training", "validation"]
    assert whole_page.charts["loss"]["data"][2]["x"] == [20, 40, 60, 80, 100, 120]
    assert {trace["name"] for trace in whole_page.charts["val-sources"]["data"]} == {"words", "sounds"}
    assert {trace["name"] for trace in whole_page.charts["retrieval"]["data"]} == {"image_text", "text_image"}
    assert [shape["x0"] for shape in whole_page.charts["loss"]["layout"]["shapes"]] == [60]  # the restart


def test_a_steps_parts_lie_one_upon_the_other_and_routers_are_summed_up(whole_page: Page) -> None:
    traces = whole_page.charts["step_s"]["data"]
    assert [trace["name"] for trace in traces if "stackgroup" in trace] == [
        "waiting for data", "forward", "backward", "optimizer", "communication",
    ]  # fmt: skip
    text = " ".join(whole_page.text.split())
    for said in (
        "waiting for data 4.0%, forward 20.0%, backward 42.0%, optimizer 10.0%, communication 6.0%.",
        "MFU 41.0%", "Skipped steps 2", "The widest range of a layer's bias is 0.24.",
    ):  # fmt: skip
        assert said in text, said
    lowest, mean = whole_page.charts["load-entropy"]["data"]
    assert (lowest["y"][-1], mean["y"][-1]) == (0.98, 0.985)


def test_the_figures_are_plotlys(whole_page: Page) -> None:
    import plotly.graph_objects as go

    for figure in whole_page.charts.values():
        plain = json.loads(re.sub(r"var\(--[a-z0-9-]+\)", "#123456", json.dumps(figure)))
        known = go.Figure(plain)  # raises for a property that it does not have
        assert [trace.type for trace in known.data] == [trace["type"] for trace in figure["data"]]


def test_the_experts_load_is_over_its_layers_mean(whole_page: Page) -> None:
    (trace,) = whole_page.charts["load"]["data"]
    assert trace["y"][:5] == [f"layer 1, expert {i}" for i in range(4)] + ["layer 2"]
    assert len(trace["x"]) == 121  # edges of one bin a step
    columns = np.array(trace["z"][:4])
    np.testing.assert_allclose(columns.mean(axis=0), 1, atol=0.01)
    assert trace["zmid"] == 1


def test_a_needle_grid_is_a_heatmap_and_does_not_flood_the_table(whole_page: Page) -> None:
    (trace,) = whole_page.charts["needle-0"]["data"]
    assert trace["x"] == ["0%", "50%", "100%"]
    assert trace["y"] == ["256", "512", "1,024"]
    assert trace["z"][1][2] == pytest.approx(0.9 - 512 / 5000 + 0.1, abs=1e-4)
    assert trace["text"][0][0] == "85%"
    assert "Mean 83.1%; worst cell 69.5%, at 1,024 tokens and depth 0%." in whole_page.text
    assert "acc/512" not in whole_page.text


def test_the_table_holds_values_errors_chance_and_controls(whole_page: Page) -> None:
    text = " ".join(whole_page.text.split())
    assert "digits acc 91.0% ± 2.0% 50.0% removed 50.0% · shuffled 48.0% 240 120" in text
    assert "bits_per_byte 2.05 – unigram 3.09 240 120" in text
    assert "40.0%" not in text  # the older step's


def test_media_are_inside_the_page(whole_page: Page) -> None:
    assert len(whole_page.all("img")) == len(whole_page.all("audio")) == len(whole_page.all("video")) == 6
    video = whole_page.all("video")[0]
    assert {"controls", "loop", "muted", "autoplay", "playsinline"} <= video.keys()
    for tag, start in (("img", "data:image/png"), ("audio", "data:audio/wav"), ("video", "data:video/mp4")):
        source = whole_page.all(tag)[0]["src"] or ""
        assert source.startswith(f"{start};base64,")
        assert len(base64.b64decode(source.split(",")[1])) > 50


def test_samples_mix_right_and_wrong_and_cut_long_texts(whole_page: Page) -> None:
    marks = [attributes["class"] for tag, attributes in whole_page.elements if tag == "article"]
    assert marks.count("card sample right") == 3 + 2
    assert marks.count("card sample wrong") == 3 + 2
    assert "6 of 12 shown, right and wrong mixed; 8 are right" in whole_page.text
    assert "15,320 characters" in whole_page.text
    assert whole_page.text.count("hay ") < 4 * 400
    assert "depth 25%" in whole_page.text


def test_events_are_counted_and_told(whole_page: Page) -> None:
    text = " ".join(whole_page.text.split())
    assert "skipped_documents 1 1,250 over 64 tokens" in text
    assert "step 60, ranks 2, host node-7" in text


def test_nothing_is_fetched(whole_page: Page) -> None:
    for _, attributes in whole_page.elements:
        for name in ("src", "href", "srcset", "poster", "data", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert not whole_page.all("link")
    (policy,) = [m["content"] or "" for m in whole_page.all("meta") if m.get("http-equiv")]
    assert policy.startswith("default-src 'none'; script-src 'nonce-")
    assert "http" not in policy
    assert "@import" not in whole_page.source.split("</style>")[0]


def test_secrets_are_not_shown_and_numbers_of_tokens_are(whole_page: Page) -> None:
    assert "s3cr3t" not in whole_page.source
    assert "pa55" not in whole_page.source
    for shown in (report_text.REDACTED, "https://…@example.org/x", "a/tokenizer.json", "12000"):
        assert shown in whole_page.text


def test_text_under_a_secret_name_is_redacted_however_deep() -> None:
    settings = {
        "api_keys": ["a", "b"],
        "auth": [{"hf_token": "c"}],
        "secrets": {"x": {"y": "d", "n": 3}},
        "password": None,
    }
    assert report_text.flat_redacted(settings) == [
        ("api_keys", "(redacted)"),
        ("auth[0].hf_token", "(redacted)"),
        ("secrets.x.y", "(redacted)"),
        ("secrets.x.n", "3"),
        ("password", ""),
    ]


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7 * 7 }}\ud800"


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    plain = HOSTILE[:-1]  # half a surrogate pair is refused in run.json
    record = {"name": plain, "exit_reason": plain, "host": plain, "git_revision": plain}
    run = build_run(tmp_path / "one", status="failed", **record)
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"notes": plain, plain: 1}))
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(
            json.dumps({"step": 121, f"val/loss/{HOSTILE}": 1.0, f"router/{HOSTILE}/tokens_per_expert": [1, 2]}) + "\n"
        )
    with (run / "events.jsonl").open("a") as stream:
        stream.write(json.dumps({"time": "soon", "event": HOSTILE, "reason": HOSTILE, HOSTILE: HOSTILE}) + "\n")
    cell = {"acc": metric(0.5, **{HOSTILE: 0.1}), HOSTILE: metric(0.2), "acc/8/0.5": metric(0.5)}
    add_result(run, "needle", 5, cell)
    result = json.loads((run / "evals/step_00000005/needle.json").read_text()) | {"task": HOSTILE[:9].replace("/", "")}
    (run / "evals/step_00000005/needle.json").write_text(json.dumps(result))
    hostile = sample(
        0, False, [{"text": HOSTILE}, {"image": HOSTILE}], choices=[HOSTILE], answer=HOSTILE, given=HOSTILE
    )
    task = result["task"]
    write_lines(
        run / f"evals/step_00000005/{task}.samples.jsonl", [hostile, {"prompt": HOSTILE}, {"prompt": [3, None]}]
    )
    page = page_of(run)
    clean = page_of(build_whole_run(tmp_path / "two"))
    assert len(page.all("script")) == len(clean.all("script"))
    assert not page.all("img")
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "<script>alert(1)" in page.text  # as text
    assert "49" not in page.text.split("Configuration")[0]  # no template runs twice
    assert len({script.get("nonce") for script in page.all("script")} - {None}) == 1
    names = [trace["name"] for trace in page.charts["val-sources"]["data"]]
    assert not any("<" in name for name in names)  # Plotly reads tags in a label
    assert page.charts["load"]["data"][0]["y"]


def test_a_nonce_is_not_used_twice(tmp_path: Path) -> None:
    run = build_run(tmp_path / "one", steps=3)
    first, second = (page_of(run).all("script")[0]["nonce"] for _ in range(2))
    assert first != second


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"id": "a", "name": "new", "status": "running"}))
    page = page_of(folder)
    for said in ("No step is written yet", "No evaluation yet", "Nothing has happened yet", "config.yaml is not there"):
        assert said in page.text
    assert len(page.source) < 100_000  # without a chart there is no Plotly


@pytest.mark.parametrize("status", ["running", "failed", "interrupted", "finished"])
def test_a_run_at_any_state_says_so(status: str, tmp_path: Path) -> None:
    run = build_run(
        tmp_path / "one", steps=30, status=status, exit_reason="OSError: disk full" if status == "failed" else None
    )
    page = page_of(run)
    assert f'class="badge {status}"' in page.source
    assert ("OSError: disk full" in page.text) == (status == "failed")
    assert ("of 120, 10 s to go" in page.text) == (status == "running")
    assert "30 of 120" in " ".join(page.text.split())


def test_torn_and_damaged_lines_and_files_are_passed_over(tmp_path: Path) -> None:
    run = build_run(tmp_path / "one", steps=30)
    for name in ("metrics.jsonl", "events.jsonl"):
        with (run / name).open("a") as stream:
            stream.write('not json\n[1]\n{"step": "x"}\n{"step": 31, "loss/next')
    add_result(
        run,
        "whole",
        5,
        {"acc": metric(0.5), "odd": {"value": None}, "odder": metric(math.nan, None)},
        [sample(0, True, [])],
    )
    with (run / "evals/step_00000005/whole.samples.jsonl").open("a") as stream:
        stream.write('{"doc_id": 1, "pro')
    (run / "evals/step_00000005/torn.json").write_text('{"task": "to')
    (run / "evals/step_00000005/other.json").write_text("[1, 2]")
    page = page_of(run)
    assert "30 of 120" in " ".join(page.text.split())
    assert "1 of 1 shown" in page.text
    assert "evals/step_00000005/other.json, evals/step_00000005/torn.json" in page.text
    assert "nan" in page.text


def test_a_loss_that_is_not_finite_is_told_and_its_chart_drawn(tmp_path: Path) -> None:
    run = build_run(tmp_path / "one", steps=30)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps({"step": step, "loss/next_token": math.nan}) + "\n" for step in (31, 32))
    page = page_of(run)
    assert "The training loss was not finite, first at step 31, last at step 32." in page.text
    assert "NaN" not in page.figures


def test_a_medium_that_cannot_be_shown_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    media = make_media(tmp_path / "media")
    secret = tmp_path / "id_rsa"
    secret.write_text("PRIVATE 81f2c")
    (tmp_path / "media/big.png").write_bytes(os.urandom(report_samples.LIMIT_BYTES + 1))
    (tmp_path / "media/folder.png").mkdir()
    prompt = [
        {"image": f"{tmp_path}/gone.png"}, {"image": str(secret)}, {"image": f"{tmp_path}/media/big.png"},
        {"audio": media["image"]}, {"image": f"{tmp_path}/media/folder.png"}, {"image": "zero\0byte.png"},
    ]  # fmt: skip
    run = build_run(tmp_path / "runs/one", steps=3)
    add_result(run, "a", 3, {"acc": metric(0.5)}, [sample(0, True, prompt)])
    page = page_of(run)
    assert not page.all("img")
    assert not page.all("audio")
    for said in (
        "no such file any more",
        "no ending is none of png",
        "4.0 MiB, the limit of a file",
        ".png is none of wav",
    ):
        assert said in page.text
    assert "PRIVATE 81f2c" not in page.source
    assert base64.b64encode(b"PRIVATE 81f2c").decode() not in page.source

    monkeypatch.setattr(report, "Budget", lambda: report_samples.Budget(Path(media["image"]).stat().st_size))
    add_result(run, "a", 3, {"acc": metric(0.5)}, [sample(0, True, [{"image": media["image"]}] * 2)])
    page = page_of(run)
    assert len(page.all("img")) == 1
    assert "already holds its limit of 40.0 MiB of media" in page.text


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build_run(tmp_path / "one", steps=3)
    (run / "report.html").write_text("the old one")

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(report, "router_charts", fails)
        with pytest.raises(RuntimeError):
            write_report(run)
    assert (run / "report.html").read_text() == "the old one"
    assert write_report(run) == run / "report.html"
    assert "the old one" not in (run / "report.html").read_text()
    assert sorted(path.name for path in run.iterdir()) == [
        "config.yaml",
        "events.jsonl",
        "metrics.jsonl",
        "report.html",
        "run.json",
    ]


def test_a_curve_keeps_its_spikes_and_its_mean_at_any_length() -> None:
    curve, few = Curve(), Curve()
    for step in range(1, 100_001):
        curve.add(step, 1000.0 if step == 54_321 else -7.0 if step == 70_000 else 1.0)
    for step in range(1, 6):
        few.add(step, float(step))
    steps, values = curve.points()
    assert len(steps) <= 2 * BUCKETS
    assert steps == sorted(steps)
    assert (54_321, 1000.0) in zip(steps, values, strict=True)
    assert (70_000, -7.0) in zip(steps, values, strict=True)
    assert curve.count == 100_000
    assert curve.mean == pytest.approx((99_998 + 1000 - 7) / 100_000)
    assert few.points() == ([1, 2, 3, 4, 5], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert few.smoothed()[1] == pytest.approx([1, 2, 3, 4, 4.5])


def test_a_long_run_is_read_in_little_memory_into_a_small_page(tmp_path: Path) -> None:
    run = build_run(tmp_path / "one", steps=200)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    with (run / "metrics.jsonl").open("w") as stream:
        for step in range(1, 8_001):
            stream.write(json.dumps(json.loads(lines[step % 200]) | {"step": step}) + "\n")
    tracemalloc.start()
    metrics = read_metrics(run / "metrics.jsonl")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (run / "metrics.jsonl").stat().st_size > 4_000_000
    assert peak_bytes < 7_000_000
    assert LOAD_BINS / 2 <= len(metrics.load.bins) <= LOAD_BINS
    assert sum(bin_.lines for bin_ in metrics.load.bins) == 8_000
    page = page_of(run)
    assert len(page.figures) < 1_000_000
    assert all(len(trace["x"]) <= 2000 for figure in page.charts.values() for trace in figure["data"])


def test_of_too_many_experts_the_most_uneven_layers_are_shown(tmp_path: Path) -> None:
    run = build_run(tmp_path / "one", steps=1)
    even, uneven = [10] * 256, [20] + [10] * 255
    line = {"step": 2} | {
        f"router/{layer}/tokens_per_expert": uneven if layer in (3, 11) else even for layer in range(1, 20)
    }
    write_lines(run / "metrics.jsonl", [line])
    page = page_of(run)
    (trace,) = page.charts["load"]["data"]
    assert len(trace["z"]) == 2 * 256 + 1
    assert trace["y"][0] == "layer 3, expert 0"
    assert "Of 19 layers the 2 most uneven at the end are shown." in page.text


def test_figures_read_as_a_dashboards() -> None:
    assert [report_text.count(n) for n in (7, 950, 9_999, 12_345, 1_415_678, 3.2e9)] == [
        "7",
        "950",
        "9,999",
        "12.3k",
        "1.4 M",
        "3.2 B",
    ]
    times = (0.0034, 0.21, 4.25, 59, 192, 7500, 273_600)
    assert [report_text.duration(s) for s in times] == [
        "3 ms",
        "0.21 s",
        "4.2 s",
        "59 s",
        "3 m 12 s",
        "2 h 5 m",
        "3 d 4 h",
    ]
    assert [report_text.size(n) for n in (820, 12_800, 809_635_840)] == ["820 B", "12.5 KiB", "772.1 MiB"]
    assert [report_text.figure(v) for v in (22822.07, 3.0906, 0.0003, 0.0)] == ["22,822", "3.091", "0.0003", "0"]
    assert report_text.count(math.nan) == report_text.duration(None) == "–"


def test_a_run_is_found_by_name_or_path(tmp_path: Path) -> None:
    run = build_run(tmp_path / "runs" / "first", steps=1)
    assert find_run("first", f"{tmp_path}/runs") == run
    assert find_run(str(run), "elsewhere") == run
    with pytest.raises(ConfigError, match=r"frist is neither a run in .* did you mean 'first'?"):
        find_run("frist", f"{tmp_path}/runs")


def omniloom(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([OMNILOOM, "report", *words], cwd=folder, capture_output=True, text=True, timeout=60)


def test_the_verb_writes_the_page_and_prints_its_path(tmp_path: Path) -> None:
    run = build_run(tmp_path / "runs" / "lr=0.1", steps=3)
    for words in (["run=lr\\=0.1"], [str(run)], [str(run), "runs_dir=elsewhere"]):
        (run / "report.html").unlink(missing_ok=True)
        answer = omniloom(tmp_path, *words)
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout == f"{run}/report.html\n"
        assert (run / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["frist"], "error: frist is neither a run in runs_dir=runs nor a run's folder; did you mean 'first'?"),
        (["first", "runs_dir=none"], "first is neither a run in runs_dir=none nor a run's folder; there is none"),
        ([], "name one run: omniloom report RUN [runs_dir=runs]; here are damaged, first"),
        (["first", "run_dir=x"], "unknown key run_dir; did you mean 'runs_dir'?"),
        (["damaged"], "run.json is damaged"),
    ],
)
def test_a_wrong_run_is_one_message_and_a_nonzero_status(words: list[str], message: str, tmp_path: Path) -> None:
    build_run(tmp_path / "runs" / "first", steps=1)
    (build_run(tmp_path / "runs" / "damaged", steps=1) / "run.json").write_text("{")
    answer = omniloom(tmp_path, *words)
    assert answer.returncode == 1
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""


def test_the_verbs_help_has_examples(tmp_path: Path) -> None:
    answer = omniloom(tmp_path, "--help")
    assert answer.returncode == 0
    assert "examples:" in answer.stdout
