"""What a whole run takes, from the time of one step: days, device hours, money, energy, disk."""

import math
from dataclasses import asdict, dataclass

from omniloom.plan.config import HardwareConfig, Workload
from omniloom.plan.memory import WEIGHT_BYTES, moment_bytes
from omniloom.plan.params import Sizes, count_parameters

SHARD_BYTES = 18  # of a token: int32 id, int32 (time, row, column), modality, mask; data/shards.py


@dataclass(frozen=True)
class RunCost:
    """A run's totals; None where the cluster's description, or the run's length, does not give it."""

    days: float | None
    gpu_hours: float | None
    cost_usd: float | None
    energy_kwh: float | None
    checkpoint_bytes: float
    checkpoints: int | None  # on disk, at most at a time
    disk_bytes: float | None

    def as_dict(self) -> dict[str, float | None]:
        """For --json."""
        return asdict(self)


def count_cost(workload: Workload, hardware: HardwareConfig, step_s: float | None) -> RunCost:
    """steps × step_s; × ranks in device hours; × price; × watts. Disk: the checkpoints kept, and the corpus's shards
    or, where there is none yet, each token's bytes in them."""
    steps, ranks = workload.steps, workload.ranks
    checkpoints = None if steps is None else math.ceil(steps / workload.save_every)
    if checkpoints is not None and workload.checkpoints_kept is not None:
        checkpoints = min(checkpoints, workload.checkpoints_kept)
    each, disk = checkpoint_bytes(workload), None
    if steps is not None and checkpoints is not None:
        shards = steps * workload.tokens_per_step * shard_bytes_per_token(workload)
        disk = checkpoints * each + (shards if workload.corpus_bytes is None else workload.corpus_bytes)
    days = gpu_hours = cost = energy = None
    if steps is not None and step_s is not None:
        days = steps * step_s / 86_400
        gpu_hours = days * 24 * ranks
        price, watts = hardware.usd_per_device_hour, hardware.device.watts
        cost = None if price is None else gpu_hours * price
        energy = None if watts is None else gpu_hours * watts / 1_000
    return RunCost(days, gpu_hours, cost, energy, each, checkpoints, disk)


def checkpoint_bytes(workload: Workload) -> float:
    """Of one checkpoint: the weights as the model has them, float32 masters, the optimizer's moments."""
    counted = count_parameters(workload.sizes)
    parameters, w = counted.params_total + counted.params_mtp, WEIGHT_BYTES[workload.precision]
    return parameters * (w + 4 + moment_bytes(workload))


def shard_bytes_per_token(workload: Workload) -> float:
    """Of a token in a corpus, the mean over its modalities: patches are bytes, frames of sound float16."""
    media = media_bytes_per_token(workload.sizes)
    return SHARD_BYTES + sum(share * media.get(name, 0) for name, share in workload.share_by_modality.items())


def media_bytes_per_token(sizes: Sizes) -> dict[str, int]:
    """What a token of each medium holds beside its id."""
    return {
        "image": 3 * (sizes.image_patch_pixels or 0) ** 2,
        "video": 3 * (sizes.video_patch_pixels or 0) ** 2,
        "audio": 2 * (sizes.audio_mels or 0) * sizes.audio_frames_per_token,
    }
