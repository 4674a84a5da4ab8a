"""The bands that finished runs leave."""

from omniloom.plan.accuracy import PlannedRun, Prediction, learn

HERE = ("local", "cpu")


def run(name: str, predicted: float, measured: float | None, cluster: str = "local") -> PlannedRun:
    found = None if measured is None else Prediction(measured * 1e9, 2 * measured, None)
    return PlannedRun(name, (cluster, "cpu"), Prediction(predicted * 1e9, 4.0, 100.0), found)


def test_a_band_is_measured_over_predicted_of_one_cluster() -> None:
    runs = [run("a", 1.0, 1.1), run("b", 2.0, 1.8), run("c", 1.0, 1.3), run("d", 1.0, None), run("e", 1.0, 9.0, "h100")]
    bands = learn(runs, HERE)
    assert bands.keys() == {"memory_bytes", "step_s"}  # no run has measured tokens_per_s
    memory = bands["memory_bytes"]
    assert (memory.runs, memory.lowest, memory.median, memory.highest) == (3, 0.9, 1.1, 1.3)
    assert str(memory) == "1.10 × predicted (0.90 to 1.30, 3 runs)"


def test_another_device_of_the_same_cluster_teaches_nothing() -> None:
    assert learn([run("a", 1.0, 1.1)], ("local", "h100_sxm")) == {}


def test_a_small_models_memory_is_mostly_libraries_and_teaches_nothing() -> None:
    assert learn([run("a", 0.01, 0.2)], HERE).keys() == {"step_s"}


def test_no_run_leaves_no_band() -> None:
    assert learn([], HERE) == {}
    assert learn([run("a", 1.0, None)], HERE) == {}
