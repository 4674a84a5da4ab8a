"""The weights that a run begins with, where `init` names another model's: a stage after another."""

from pathlib import Path

from omniloom.data.corpus import TOKENIZER, Corpus
from omniloom.data.index import file_sha256
from omniloom.errors import ConfigError, DataError
from omniloom.model.decoder import Decoder
from omniloom.model.load import config_of, load_model, model_folder, shapes_of
from omniloom.track.run_directory import locate
from omniloom.train import checkpoint
from omniloom.train.config import TrainingRun


def initial_folder(run: TrainingRun, corpus: Corpus) -> Path:
    """The model folder that `init` stands for now.

    Raises ConfigError where its weights are of other names or shapes than the run's, and DataError where its vocabulary
    is not the corpus's.
    """
    assert run.init is not None
    folder = model_folder(locate(run.init, run.runs_dir).path)
    theirs, ours = shapes_of(config_of(folder)), shapes_of(run.model)
    if other := sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)):
        there, here = (shapes.get(other[0], "none") for shapes in (theirs, ours))
        raise ConfigError(
            f"init={run.init} holds another model: {other[0]} is {there} there and {here} here (tensors that differ: "
            f"{len(other)}): give the model=… that it was trained with"
        )
    vocabulary = folder / TOKENIZER
    is_ours = (folder / "modality.json").is_file()
    if is_ours and file_sha256(vocabulary) != corpus.index.files[TOKENIZER].sha256:
        raise DataError(
            f"init={run.init} has another vocabulary than {corpus.folder}: tokenize with tokenizer.path={vocabulary}"
        )
    return folder


def begin_with(model: Decoder, run: TrainingRun) -> None:
    """Fill `model` with the weights of the folder that `init` names, unless the run goes on from its own checkpoint."""
    if run.init is not None and checkpoint.newest_state(run.folder) is None:
        model.load_state_dict(load_model(Path(run.init)).decoder.state_dict())
