"""The command line to a job's settings, through Hydra: `run_job` for one value a key, `run_sweep` for several.

Whatever goes wrong on the way is one message: the rule, both numbers, the nearest valid name, the key to change.
"""

import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, IntegerNode, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from omniloom.cli import HYDRA_FLAGS
from omniloom.cluster.config import Choice, Space
from omniloom.errors import ConfigError, Interrupted, OmniloomError, did_you_mean
from omniloom.model.config import ModelConfig
from omniloom.overrides import literal, plain, quoted, split_sweeps
from omniloom.settings import SWEEPABLE, SweepSettings

Settings = TypeVar("Settings")
FREE_MAPPINGS = (  # whose keys are the user's own
    "task_args",
    "data.weights",
    "data.loss_weights",
    "shares",
    "cluster.env",
    "cluster.device.peak_flops_per_s",
    "cluster.device.matmul_flops_per_s",
    "cluster.device.attention_flops_per_s",
)
FREE_TEXT = ("prompt", "system")  # keys whose values are taken verbatim
FLAGS = {"--json": "json=true", "-f": "follow=true", "--follow": "follow=true"}


def resource_folder(name: str) -> Path:
    """Where conf/, evals/ or jobs/ lies: inside the installed package, else beside its checkout."""
    package = Path(__file__).resolve().parent
    for candidate in (package / name, package.parents[1] / name):
        if candidate.is_dir():
            return candidate
    raise ConfigError(f"the installation lacks its {name}/ folder, looked in {package} and {package.parents[1]}")


def preset(name: str) -> ModelConfig:
    """The model that `model=<name>` names, as conf/model/ has it."""
    folder = resource_folder("conf") / "model"
    if not (folder / f"{name}.yaml").is_file():
        raise ConfigError(
            f"unknown model={name}; {did_you_mean(name, sorted(path.stem for path in folder.glob('*.yaml')))}"
        )
    config = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(folder / f"{name}.yaml"))
    )
    assert isinstance(config, ModelConfig)
    return config


def run_job(job: str, schema: type[Settings], function: Callable[[Settings], None], extends: str | None = None) -> None:
    """Compose conf/<job>.yaml with the command line's overrides and call `function` on the settings.

    Where conf/<job>.yaml `extends` another root, `schema` takes the place of that root's own. Hydra's own flags (--cfg
    job, --help, -m, shell completion) keep their meaning; --debug adds tracebacks, --json is json=true, -f follow=true.
    Ends the process with a nonzero status, after one message, where the work was not done.
    """
    debug = "--debug" in sys.argv
    free = [key for key in flat_keys(OmegaConf.structured(schema)) if key in FREE_MAPPINGS]
    mappings = tuple(f"{key}{end}" for key in free for end in ".=")
    whole_numbers = {key for key, node in _flat_nodes(OmegaConf.structured(schema)) if isinstance(node, IntegerNode)}
    free_text = set(FREE_TEXT) & set(flat_keys(OmegaConf.structured(schema)))
    sys.argv = [_as_override(word, mappings, whole_numbers, free_text) for word in sys.argv if word != "--debug"]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise to us: the one message is ours to write
    ConfigStore.instance().store(name=f"{extends or job}_schema", node=schema)

    def call(config: DictConfig) -> None:
        settings = OmegaConf.to_object(config)
        assert isinstance(settings, schema)
        with _one_message(schema, debug):  # here already: Hydra would announce it first
            function(settings)

    with _one_message(schema, debug):
        _refuse_added_keys(schema, mappings)
        _put_in_what_like_says()
        signal.signal(signal.SIGTERM, _interrupt)
        GlobalHydra.instance().clear()  # one process may run several jobs
        hydra.main(version_base="1.3", config_path=str(resource_folder("conf")), config_name=job)(call)()


@dataclass
class Sweep:
    """A sweep as it was asked for: one verb, the words its trials share, what they differ in."""

    settings: SweepSettings
    verb: str
    words: list[str]
    space: Space
    trial: Any  # the verb's settings with the first of each key's values


def run_sweep(words: list[str], function: Callable[[Sweep], None]) -> None:
    """Compose VERB key=value… with several values and call `function` on it, as `run_job` does for one value.

    `run`, `runs_dir` and `sweep.…` are the sweep's own, everything else its trials'. Every value is composed and
    checked, with the first of the other keys', before any trial costs something; whether all go together, trials show.
    """
    if not words or words[0] in ("--help", "-h"):
        sys.argv = ["omniloom sweep", "--help"]
        run_job("sweep_runs", SweepSettings, lambda settings: None)
        return
    verb, overrides = words[0], words[1:]
    if verb not in SWEEPABLE:
        raise ConfigError(f"{verb} cannot be swept; {did_you_mean(verb, SWEEPABLE)}")
    pairs = list(zip(["", *overrides], overrides, strict=False))
    flags = [word for before, word in pairs if word.startswith("-") or before in HYDRA_FLAGS]
    given = [word for before, word in pairs if not word.startswith("-") and before not in HYDRA_FLAGS]
    own = [word for word in given if word.lstrip("+~").split("=")[0].split(".")[0] in ("sweep", "run", "runs_dir")]
    fixed, space = split_sweeps([word for word in given if word not in own])
    asked: list[SweepSettings] = []
    sys.argv = [f"omniloom sweep {verb}", *own, *flags]
    run_job("sweep_runs", SweepSettings, asked.append)
    if not asked:  # --cfg or --help was all
        return
    job, schema = SWEEPABLE[verb]
    first = {key: str(v.values[0] if isinstance(v, Choice) else v.low) for key, v in space.items()}

    def compose(values: dict[str, str], then: Callable[[Any], None]) -> None:
        runs_dir = [word for word in own if word.startswith("runs_dir=")]
        sys.argv = [
            f"omniloom sweep {verb}",
            *flags,
            *fixed,
            *runs_dir,
            *(f"{key}={value}" for key, value in values.items()),
        ]
        run_job(job, schema, then)

    for key, values in space.items():
        for value in values.values if isinstance(values, Choice) else (str(values.low), str(values.high)):
            compose(first | {key: value}, lambda trial: trial.check())
    compose(first, lambda trial: function(Sweep(asked[0], verb, fixed, space, trial)))


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _put_in_what_like_says() -> None:
    """Put that run's whole configuration before the first override, but for groups that the command names itself."""
    given = {key: plain(value) for key, value in (word.split("=", 1) for word in sys.argv if "=" in word)}
    if "like" not in given:
        return
    if "experiment" in given:
        raise ConfigError(
            f"like={given['like']} and experiment={given['experiment']} are both whole runs: drop one of them"
        )
    from omniloom.track.run_directory import flat, locate, read_config

    place = locate(given["like"], given.get("runs_dir", "runs"), "like")
    if place.run_folder is None:
        raise ConfigError(f"like={given['like']} is no run")
    groups = {path.name for path in resource_folder("conf").iterdir() if path.is_dir()}
    taken = {"run", "like", "runs_dir", *(groups & given.keys())}
    kept = {key: value for key, value in read_config(place.run_folder).items() if key not in taken}
    named = tuple(f"{group.replace('/', '.')}." for group in given if "/" in group)  # a group inside a group
    saved = {key: value for key, value in flat(kept).items() if not key.startswith(named)}
    words = [f"{'++' if _is_free(key) else ''}{key}={literal(value)}" for key, value in saved.items()]
    first = next(index for index, word in enumerate(sys.argv) if "=" in word)
    sys.argv[first:first] = words  # together: Hydra's parser takes one stretch of overrides


def _is_free(key: str) -> bool:
    return key.startswith(tuple(f"{mapping}." for mapping in FREE_MAPPINGS))


@contextmanager
def _one_message(schema: type, debug: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interrupt:
        why = f" ({interrupt})" if str(interrupt) else ""
        print(f"interrupted{why}: repeat the command to go on", file=sys.stderr)
        if isinstance(interrupt, Interrupted):
            sys.exit(os.EX_TEMPFAIL)
        name = str(interrupt).split(",")[0]
        sys.exit(128 + getattr(signal, name if name.startswith("SIG") else "SIGINT"))  # as a shell says it
    except (OmniloomError, HydraException, OmegaConfBaseException) as error:
        if debug:
            traceback.print_exc()
        message = str(error) if isinstance(error, OmniloomError) else explain(error, schema)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" for {error.filename}" if error.filename else ""
        print(f"error: no room is left on the disk{where} ({error.strerror}): free some, then repeat", file=sys.stderr)
        sys.exit(1)


def _as_override(word: str, mappings: tuple[str, ...], whole_numbers: set[str], free_text: set[str]) -> str:
    """--json is json=true and so on; 1e12 is a whole number where one is asked for; a key inside a free mapping needs
    no + of Hydra's, nor free text its quotes."""
    if word in FLAGS:
        return FLAGS[word]
    key, equals, value = word.partition("=")
    if equals and key in free_text:
        return f"{key}={quoted(value)}"
    if key in whole_numbers and re.fullmatch(r"\d+(\.\d+)?[eE]\+?\d{1,3}", value) and Decimal(value) % 1 == 0:
        return f"{key}={Decimal(value):.0f}"
    return f"++{word}" if word.startswith(mappings) else word


def _refuse_added_keys(schema: type, mappings: tuple[str, ...]) -> None:
    """Hydra's +key=value adds keys that nobody reads: as wrong as a mistyped one."""
    for word in sys.argv[1:]:
        added = word.lstrip("+")
        if word.startswith("+") and not added.startswith(("hydra", *mappings)):
            key = added.split("=")[0]
            if key in flat_keys(OmegaConf.structured(schema)) or (resource_folder("conf") / key).is_dir():
                raise ConfigError(f"{word} needs no +: {added}")
            raise ConfigError(f"unknown key {key}; {_nearest_key(key, schema)}")


def explain(error: Exception, schema: type) -> str:
    """One message for what Hydra refused: the key, the rule, the nearest valid name."""
    if isinstance(error, MissingConfigException) and error.options:
        name = (error.missing_cfg_file or "").rsplit("/", 1)
        group = name[0] if len(name) == 2 else ""
        return f"unknown {group}={name[-1]}; {did_you_mean(name[-1], error.options)}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = str(cause)
    overridden = _quoted(r"Could not override '(.+?)'", str(error)) or ""
    key = getattr(cause, "full_key", None) or overridden
    unknown = _quoted(r"Key '(.+?)' is not in struct", text) or _quoted(r"Key '(.+?)' not in '", text)
    if unknown and not overridden.startswith(key):  # inside a value that is a list or a mapping
        return f"{overridden}: unknown key {unknown}"
    if unknown:
        return f"unknown key {key}; {_nearest_key(key, schema)}"
    inside = [name for name in flat_keys(OmegaConf.structured(schema)) if name.startswith(f"{key}.")]
    if inside:
        return f"{key} is a section: {_instead_of_section(key, str(error).partition('=')[2], inside)}"
    first_line = text.splitlines()[0] if text else type(error).__name__
    if isinstance(error, ConfigCompositionException) or key:
        return f"{key}: {first_line}" if key and key not in first_line else first_line
    return first_line


def _instead_of_section(key: str, value: str, inside: list[str]) -> str:
    """What sets a section: one of its files where conf/ has any, else its keys."""
    group = key.replace(".", "/")
    files = [path.stem for path in (resource_folder("conf") / group).glob("*.yaml")]
    if not files:
        return f"set its keys, {inside[0]}=…"
    if value in (*files, "null"):
        return f"type {group}={value}"
    return f"type {group}=<name>; {did_you_mean(value, files)}"


def _nearest_key(key: str, schema: type) -> str:
    """The nearest whole key, or the nearest section where only sections come near; those with files by their group."""
    valid = flat_keys(OmegaConf.structured(schema))
    sections = {whole.rsplit(".", ends)[0] for whole in valid for ends in range(1, whole.count(".") + 1)}
    conf = resource_folder("conf")
    groups = [group for section in sections if (conf / (group := section.replace(".", "/"))).is_dir()]
    return did_you_mean(key, [*valid, *sections, *groups])


def _quoted(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match.group(1) if match else None


def flat_keys(config: DictConfig) -> list[str]:
    """Every settable key of a configuration, dotted."""
    return [key for key, _ in _flat_nodes(config)]


def _flat_nodes(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in map(str, config):
        node = config._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none() and len(node):
            yield from _flat_nodes(node, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", node
