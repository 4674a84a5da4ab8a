"""Somebody else's model as one of ours: `omniloom import downloads/SmolLM2-135M models/smol`."""

from pathlib import Path

from pydantic import TypeAdapter

from omniloom.compose import run_job
from omniloom.modality.config import ModalityConfig
from omniloom.settings import ImportSettings


def main(settings: ImportSettings) -> None:
    settings.check()
    from omniloom.model.exchange import import_model

    source, to = Path(settings.source or ""), Path(settings.to or "")
    tokenizer = None if settings.tokenizer_path is None else Path(settings.tokenizer_path)
    rules = TypeAdapter(ModalityConfig).dump_json(ModalityConfig(), indent=1)
    print(import_model(source, to, tokenizer, rules, settings.max_shard_bytes, settings.force))


if __name__ == "__main__":
    run_job("import_model", ImportSettings, main)
