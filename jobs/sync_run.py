"""An offline run to Weights & Biases: `omniloom sync first`."""

from omniloom.compose import run_job
from omniloom.settings import SyncSettings


def main(settings: SyncSettings) -> None:
    settings.check()
    from omniloom.track.report import find_run
    from omniloom.track.wandb_tracker import push

    folder = find_run(settings.run or "", settings.runs_dir)
    print(f"pushed: {push(folder)}")


if __name__ == "__main__":
    run_job("sync_run", SyncSettings, main)
