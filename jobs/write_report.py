"""The page of a run or a sweep, runs/<run>/report.html: `omniloom report first`."""

from omniloom.compose import run_job
from omniloom.errors import ConfigError
from omniloom.settings import ReportSettings


def main(settings: ReportSettings) -> None:
    settings.check()
    from omniloom.track.report import find_run, write_report
    from omniloom.track.report.sweep import write_sweep_report

    folder = find_run(settings.run or "", settings.runs_dir)
    try:
        print(write_report(folder) if (folder / "run.json").is_file() else write_sweep_report(folder))
    except OSError as error:
        raise ConfigError(f"the page of {folder} cannot be written: {error}") from error


if __name__ == "__main__":
    run_job("write_report", ReportSettings, main)
