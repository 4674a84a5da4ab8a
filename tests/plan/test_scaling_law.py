"""The scaling law: published constants found again in made points, the best use of a budget, a sweep's folder read."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.optimize import minimize, minimize_scalar
from test_params import preset

from omniloom.cli import run_verb
from omniloom.errors import ConfigError
from omniloom.plan.params import count_parameters
from omniloom.plan.scaling_law import Counted, Law, RunPoint, fit_law, fit_laws, objective
from omniloom.plan.scaling_plot import write_plot
from omniloom.plan.scaling_report import Scaling
from omniloom.track.sweep import SweepRecord, Trial, write_sweep
from omniloom.track.trials import read_trials

PUBLISHED = Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28, huber=0.0)
NUMBERS = ("E", "A", "B", "alpha", "beta")
DELTA = 1e-3
WIDTHS, STEPS = (16, 24, 32, 64), (60, 120, 240, 480)


def points_of(law: Law, noise: float, seed: int, counted: Counted = "active", experts: int = 1) -> list[RunPoint]:
    """Runs of 20 M to 20 B parameters on 300 M to 1 T tokens; a second one of each, whose total parameters are more."""
    generator = np.random.default_rng(seed)
    points = []
    for params in np.geomspace(2e7, 2e10, 6):
        for times in {1, experts}:
            for tokens in np.geomspace(3e8, 1e12, 6):
                active, total = round(params), round(params * times)
                loss = law.loss(active if counted == "active" else total, tokens) * math.exp(generator.normal(0, noise))
                points.append(RunPoint(f"{len(points):03d}", active, total, round(tokens), loss))
    return points


def literal_objective(law: Law, points: list[RunPoint]) -> float:
    """Equation 3 as it is written, one run at a time."""
    total = 0.0
    for point in points:
        terms = (law.A / point.params_active**law.alpha, law.B / point.tokens**law.beta, law.E)
        residual = abs(math.log(sum(math.exp(math.log(term)) for term in terms)) - math.log(point.loss))
        total += residual**2 / 2 if residual <= DELTA else DELTA * (residual - DELTA / 2)
    return total


@pytest.mark.parametrize("seed", range(4))
def test_published_constants_lie_within_their_intervals(seed: int) -> None:
    fit = fit_law(points_of(PUBLISHED, 0.01, seed), "active", resamples=100, seed=seed)
    for name in NUMBERS:
        interval = fit.number(name)
        assert interval.low <= getattr(PUBLISHED, name) <= interval.high, name
        assert interval.low < interval.value < interval.high, name
    assert 0.8 < fit.number("alpha").high / fit.number("alpha").low < 1.5  # an interval that says something


def test_without_noise_the_constants_come_out_exactly() -> None:
    law = fit_law(points_of(PUBLISHED, 0.0, 0), "active", resamples=0, seed=0).law
    assert [getattr(law, name) for name in NUMBERS] == pytest.approx(
        [getattr(PUBLISHED, name) for name in NUMBERS], 1e-3
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_is_the_least_that_another_method_finds(seed: int) -> None:
    points = points_of(PUBLISHED, 0.02, seed)
    fit = fit_law(points, "active", resamples=0, seed=0)
    assert fit.law.huber == pytest.approx(literal_objective(fit.law, points), rel=1e-6)

    def by(theta: np.ndarray) -> float:
        e, log_a, log_b, alpha, beta = theta
        return literal_objective(Law(e, math.exp(log_a), math.exp(log_b), alpha, beta, 0), points) / DELTA

    start = [PUBLISHED.E, math.log(PUBLISHED.A), math.log(PUBLISHED.B), PUBLISHED.alpha, PUBLISHED.beta]
    options = {"maxiter": 20_000, "maxfev": 20_000, "xatol": 1e-10, "fatol": 1e-14}
    found = minimize(by, start, method="Nelder-Mead", options=options)
    assert fit.law.huber <= found.fun * DELTA * (1 + 1e-6)


def test_the_objective_and_its_gradient_are_those_of_the_equation() -> None:
    points = points_of(PUBLISHED, 0.002, 0)  # residuals on both sides of δ
    logs = np.log([[point.params_active, point.tokens, point.loss] for point in points]).T
    generator = np.random.default_rng(0)
    for _ in range(5):
        law = replace(
            PUBLISHED, alpha=PUBLISHED.alpha + generator.normal(0, 1e-4), E=PUBLISHED.E + generator.normal(0, 1e-3)
        )
        theta = np.array([math.log(law.E), math.log(law.A), math.log(law.B), law.alpha, law.beta])
        assert objective(theta, *logs)[0] * DELTA == pytest.approx(literal_objective(law, points), rel=1e-9)
        for axis, slope in enumerate(objective(theta, *logs)[1]):
            step = np.zeros(5)
            step[axis] = 1e-7
            rise = objective(theta + step, *logs)[0] - objective(theta - step, *logs)[0]
            assert rise / 2e-7 == pytest.approx(slope, rel=1e-3, abs=1e-3)


def test_another_unit_of_loss_changes_nothing_else() -> None:
    """Bits instead of nats: E, A and B are so many times as large, the exponents the same."""
    points = points_of(PUBLISHED, 0.01, 0)
    in_bits = [replace(point, loss=point.loss / math.log(2)) for point in points]
    nats, bits = (fit_law(given, "active", resamples=0, seed=0).law for given in (points, in_bits))
    assert (bits.alpha, bits.beta) == pytest.approx((nats.alpha, nats.beta), rel=1e-4)
    assert bits.E * math.log(2) == pytest.approx(nats.E, rel=1e-4)


def test_intervals_are_a_function_of_the_seed() -> None:
    points = points_of(PUBLISHED, 0.01, 0)
    one, same, other = (fit_law(points, "active", resamples=20, seed=seed).number("E") for seed in (3, 3, 4))
    assert one == same
    assert (one.value, one.low != other.low) == (other.value, True)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.1, 3), st.floats(10, 1e4), st.floats(10, 1e4), st.floats(0.1, 0.9), st.floats(0.1, 0.9),
    st.floats(15, 26),
)  # fmt: skip
def test_the_best_use_is_where_a_search_finds_it(
    e: float, a: float, b: float, alpha: float, beta: float, log10_flops: float
) -> None:
    law, flops = Law(e, a, b, alpha, beta, 0), 10**log10_flops
    best = law.optimum(flops)
    assert 6 * best.params * best.tokens == pytest.approx(flops, rel=1e-9)
    searched = minimize_scalar(
        lambda log_n: law.loss(math.exp(log_n), flops / 6 / math.exp(log_n)) - law.E,
        bounds=(math.log(best.params) - 12, math.log(best.params) + 12),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert math.log(best.params) == pytest.approx(searched.x, abs=1e-4)
    assert best.loss - law.E == pytest.approx(searched.fun, rel=1e-9)


def test_the_papers_budget_has_about_the_papers_best_use() -> None:
    """Figure 4 of the paper: for 5.76e23 FLOP some 40 billion parameters; to what its rounded constants allow."""
    best = PUBLISHED.optimum(5.76e23)
    assert 3e10 < best.params < 5e10
    assert best.tokens_per_parameter == pytest.approx(best.tokens / best.params)


@pytest.mark.parametrize("counted", ["active", "total"])
def test_what_the_loss_follows_explains_it_better(counted: Counted) -> None:
    fits = fit_laws(points_of(PUBLISHED, 0.01, 0, counted, experts=8), resamples=20, seed=0)
    by_counted = {fit.counted: fit for fit in fits}
    assert [fit.counted for fit in fits] == ["active", "total"]
    other = by_counted["total" if counted == "active" else "active"]
    assert by_counted[counted].law.huber < 0.5 * other.law.huber
    assert by_counted[counted].rms_log_residual < 0.012 < other.rms_log_residual


def test_dense_runs_have_one_fit() -> None:
    assert len(fit_laws(points_of(PUBLISHED, 0.01, 0), resamples=0, seed=0)) == 1


def test_total_parameters_that_tell_no_law_are_left_alone() -> None:
    """Of the same experts more or fewer are chosen."""
    points = [replace(point, params_total=2 * 10**10) for point in points_of(PUBLISHED, 0.01, 0)]
    assert [fit.counted for fit in fit_laws(points, resamples=5, seed=0)] == ["active"]


def grid(sizes: list[int], lengths: list[int]) -> list[RunPoint]:
    made = [(n, d) for n in sizes for d in lengths]
    return [RunPoint(f"{i:03d}", n, n, d, PUBLISHED.loss(n, d)) for i, (n, d) in enumerate(made)]


SIZES, LENGTHS = [10**6, 3 * 10**6, 10**7], [10**8, 10**9, 10**10]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (grid(SIZES, LENGTHS)[:5], "told from at least 6 runs: here are 5; N and D must each take several values"),
        (grid([10**6] * 3, LENGTHS), "at least 3 values: of N here are 1 (1,000,000); sweep model=choice"),
        (grid(SIZES, LENGTHS[:2]), "at least 3 values: of D here are 2 (100,000,000, 1,000,000,000); sweep"),
        ([p for n in range(1, 9) for p in grid([n * 10**6], [n * 20 * 10**6])], "N and D go together in these runs"),
        ([replace(grid(SIZES, LENGTHS)[0], loss=math.nan), *grid(SIZES, LENGTHS)], "000: loss=nan must be a number"),
        ([replace(grid(SIZES, LENGTHS)[0], loss=-1.0), *grid(SIZES, LENGTHS)], "000: loss=-1 must be a number above 0"),
        ([replace(grid(SIZES, LENGTHS)[0], tokens=0), *grid(SIZES, LENGTHS)], "000: D=0 must be a number above 0"),
        ([replace(grid(SIZES, LENGTHS)[0], params_active=0), *grid(SIZES, LENGTHS)], "000: N=0 must be a number"),
    ],
)  # fmt: skip
def test_points_that_tell_no_law_are_refused(points: list[RunPoint], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        fit_law(points, "active", resamples=0, seed=0)
    assert message in str(refused.value)


def test_a_loss_that_does_not_fall_has_no_best_use() -> None:
    for name, changed in (("N", {"alpha": 0.0}), ("D", {"beta": 0.0}), ("N", {"A": 0.0})):
        with pytest.raises(ConfigError, match=f"the loss does not fall with {name}"):
            replace(PUBLISHED, **changed).optimum(1e20)


def test_runs_that_are_worse_the_larger_say_that_no_budget_has_a_best_use(tmp_path: Path) -> None:
    points = [replace(point, loss=point.loss + 0.02 * math.log(point.params_active)) for point in grid(SIZES, LENGTHS)]
    points = [replace(point, loss=point.loss - PUBLISHED.A / point.params_active**PUBLISHED.alpha) for point in points]
    scaling = Scaling("worse", "val/loss", fit_laws(points, resamples=20, seed=0), {}, 1e18)
    assert "best use of C = 1e+18 FLOP = 6·N·D, N active: none; in these runs the loss does not" in scaling.as_table()
    told = scaling.as_dict()
    assert told["best_use"] is None
    assert "does not fall with N" in told["no_best_use"]
    write_plot(scaling, tmp_path / "worse.png")
    assert (tmp_path / "worse.png").stat().st_size > 10_000


# A sweep's folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_made_sweep(tmp_path / "runs" / "dense", [0])
    return tmp_path / "runs"


def write_made_sweep(folder: Path, experts: list[int], widths: tuple[int, ...] = WIDTHS) -> list[Trial]:
    """Runs whose losses follow a law of their active parameters, to a hundredth."""
    law, generator = Law(1.7, 60.0, 900.0, 0.4, 0.5, 0), np.random.default_rng(0)
    trials: list[Trial] = []
    for width in widths:
        for number in experts:
            model = replace(preset(f"scaling_{width}"), n_routed_experts=number)
            for steps in STEPS:
                name, tokens = f"{len(trials):03d}", steps * 2_048
                loss = law.loss(count_parameters(model).params_active, tokens) * math.exp(generator.normal(0, 0.01))
                write_run(
                    folder / name, asdict(model), [{"step": steps, "tokens": tokens, "val/loss": loss, "lr": 0.1}]
                )
                trials.append(Trial(name, name, {}, "finished", steps, [loss]))
    record_sweep(folder, trials)
    return trials


def write_run(folder: Path, model: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model, "train": {"steps": 3}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def record_sweep(folder: Path, trials: list[Trial]) -> None:
    write_sweep(folder, SweepRecord(folder.name, "train", [], {}, {}, [("val/loss", "min")], trials=trials))


def plan_scaling(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    run_verb("plan", ["scaling", *words])
    return capsys.readouterr().out


def test_trials_that_do_not_count_are_named_with_the_reason(runs: Path) -> None:
    trials = write_made_sweep(runs / "mixed", [0])
    trials[0].status, trials[0].cause = "failed", "no memory"
    trials[1].status, trials[1].step = "pruned", 40
    trials[2].status, trials[2].step = "waiting", 0
    record_sweep(runs / "mixed", trials)
    (runs / "mixed" / "003" / "metrics.jsonl").write_text('{"step": 9, "tokens": 5}\n')
    (runs / "mixed" / "004" / "metrics.jsonl").write_text('{"step": 9, "tokens": 5, "val/loss": NaN}\n')
    (runs / "mixed" / "005" / "metrics.jsonl").write_text("torn\n")
    (runs / "mixed" / "006" / "metrics.jsonl").write_text("")
    (runs / "mixed" / "007" / "config.yaml").unlink()
    found = read_trials("mixed", str(runs), "val/loss")
    assert [ended.trial for ended in found.ended] == [f"{number:03d}" for number in range(8, 16)]
    reasons = ["failed at step 60: no memory", "pruned at step 40", "waiting", "its last step did not measure val/loss"]
    assert [found.left_out[name] for name in ("000", "001", "002", "003")] == reasons
    assert found.left_out["004"] == "val/loss is nan"
    for name, said in (("005", "is damaged"), ("006", "holds no step"), ("007", "cannot be read")):
        assert said in found.left_out[name]


def test_json_has_the_laws_the_points_and_the_best_use(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_made_sweep(runs / "moe", [4, 16])
    told = json.loads(plan_scaling(capsys, "moe", "budget=1e15", "resamples=20", "--json"))
    assert told.keys() == {
        "sweep", "metric", "points", "left_out", "fits", "better", "budget_flops", "best_use", "no_best_use",
    }  # fmt: skip
    assert (told["sweep"], told["metric"], told["better"], told["left_out"]) == ("moe", "val/loss", "active", {})
    assert told["fits"].keys() == {"active", "total"}
    for fit in told["fits"].values():
        assert {*NUMBERS, "huber", "rms_log_residual"} <= fit.keys()
        assert fit["alpha"].keys() == {"value", "low", "high"}
    first = preset(f"scaling_{WIDTHS[0]}")
    counted = count_parameters(replace(first, n_routed_experts=4))
    point = told["points"][0]
    assert (point["params_active"], point["params_total"]) == (counted.params_active, counted.params_total)
    assert point["tokens"] == STEPS[0] * 2_048
    law, best = told["fits"]["active"], told["best_use"]
    again = Law(*(law[name]["value"] for name in NUMBERS), 0)
    assert point["predicted_active"] == pytest.approx(again.loss(point["params_active"], point["tokens"]))
    assert best["params"]["value"] == pytest.approx(again.optimum(1e15).params)
    assert 6 * best["params"]["value"] * best["tokens"]["value"] == pytest.approx(1e15)
    largest = max(point["params_active"] for point in told["points"]), STEPS[-1] * 2_048
    values = best["params"]["value"] / largest[0], best["tokens"]["value"] / largest[1]
    assert best["beyond"] == pytest.approx(
        {"flops": 1e15 / (6 * math.prod(largest)), "params": values[0], "tokens": values[1]}
    )
    assert best["params"]["low"] <= best["params"]["value"] <= best["params"]["high"]


def test_the_table_says_what_was_left_out_and_how_far_it_reaches(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = write_made_sweep(runs / "failed", [0])
    trials[3].status, trials[3].cause = "failed", "no memory"
    record_sweep(runs / "failed", trials)
    told = plan_scaling(capsys, "sweep_run=failed", "budget=1e18", "resamples=20")
    assert "val/loss of 15 runs of sweep failed" in told
    assert "left out: 1\n  003  failed at step 480: no memory" in told
    assert "beyond what was measured: C is " in told
    assert "\n003 " not in told
    assert "intervals of 95%, from 20 draws" in told


def test_the_picture_is_a_png(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_scaling(capsys, "dense", "budget=1e14", "plot=law.png", "resamples=20")
    with Image.open(tmp_path / "law.png") as picture:
        assert (picture.format, picture.width > 1_500, picture.height > 500) == ("PNG", True, True)
        colours = picture.convert("RGB").getcolors(maxcolors=1 << 20)
        assert len(colours) > 100, "an empty picture"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name one sweep: omniloom plan scaling SWEEP [runs_dir=runs]; here are dense, narrow, short"),
        (["dnese"], "sweep dnese is unknown in runs_dir=runs; did you mean 'dense'?"),
        (["single"], "sweep single is a run in runs_dir=runs; valid: dense, narrow, short"),
        (["narrow"], "at least 3 values: of N here are 1 (14,928); sweep model=choice"),
        (["short"], "told from at least 6 runs: here are 4"),
        (["dense", "metric=val/los"], "no trial of dense measured metric=val/los at its end; did you mean 'val/loss'?"),
        (["dense", "budget=0"], "budget=0 must be a number of FLOPs above 0"),
        (["dense", "budget=nan"], "budget=nan must be a number of FLOPs above 0"),
        (["dense", "resamples=3"], "resamples=3 must be at least 20"),
        (["dense", "plot=law.jpg"], "plot=law.jpg must end in .png"),
        (["dense", "plot=no/law.png"], "plot=no/law.png: there is no folder no"),
        (["dense", "bugdet=1e18"], "unknown key bugdet; did you mean 'budget'?"),
    ],
)
def test_wrong_input_is_one_message(
    words: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_made_sweep(runs / "short", [0], WIDTHS[:1])
    write_made_sweep(runs / "narrow", [0], WIDTHS[:1] * 2)
    (runs / "single").mkdir()
    (runs / "single" / "run.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        plan_scaling(capsys, *words)
    assert ended.value.code == 1
    told = capsys.readouterr()
    assert (told.out, message in told.err) == ("", True), told.err


def test_too_many_words_are_refused() -> None:
    with pytest.raises(ConfigError, match="omniloom plan scaling takes SWEEP_RUN and then key=value: more is too many"):
        run_verb("plan", ["scaling", "dense", "more"])


def test_help_gives_the_sweeps_that_make_the_runs() -> None:
    omniloom = str(Path(sys.executable).parent / "omniloom")
    answer = subprocess.run([omniloom, "plan", "scaling", "--help"], capture_output=True, text=True, check=True)
    assert "omniloom sweep train experiment=scaling run=scaling sweep=grid" in answer.stdout
    assert "examples:" in answer.stdout
