"""Where a run is tracked. Imports nothing heavy."""

from dataclasses import dataclass, field

from omniloom.errors import refuse_unless_one_of


@dataclass
class TrackConfig:
    """Weights & Biases: offline by default; `WANDB_MODE` in the environment goes before `wandb`."""

    wandb: str = "offline"  # or online, disabled
    entity: str | None = None
    project: str = "omniloom"
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str | None = None

    def check(self) -> None:
        """Raise ConfigError for an unknown mode."""
        refuse_unless_one_of("track.wandb", self.wandb, ("offline", "online", "disabled"))
