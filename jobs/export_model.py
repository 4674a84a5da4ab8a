"""A model of ours as a Hugging Face folder: `omniloom export first exported/first`."""

from pathlib import Path

from omniloom.compose import run_job
from omniloom.settings import ExportSettings


def main(settings: ExportSettings) -> None:
    settings.check()
    from omniloom.modality.text import BOS, EOS
    from omniloom.model.exchange import export_model
    from omniloom.model.load import model_folder
    from omniloom.track.run_directory import locate

    folder = model_folder(locate(settings.init or "", settings.runs_dir).with_model())
    special = {"bos_token": BOS, "eos_token": EOS}
    to = Path(settings.to or "")
    print(export_model(folder, to, special, settings.dtype, settings.max_shard_bytes, settings.force))


if __name__ == "__main__":
    run_job("export_model", ExportSettings, main)
