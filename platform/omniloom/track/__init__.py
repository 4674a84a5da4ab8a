"""What a run did, on disk and on W&B.

The story, in call order: `run_directory.open_run` starts, resumes or refuses a run; `tracker.Tracker` writes each
step's metrics and every event (`jsonl`), and mirrors them to W&B (`wandb_tracker`); `progress.follow` shows them while
they come; `verdict.verdict` says at the end what was learned.
"""
