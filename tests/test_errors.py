"""The nearest valid name."""

import pytest

from omniloom.errors import did_you_mean

DEVICES = ["a100_40gb", "a100_80gb", "h100_pcie", "h100_sxm", "h800", "v100_32gb"]


@pytest.mark.parametrize(
    ("name", "valid", "near"),
    [
        ("v100", DEVICES, "v100_32gb"),  # the beginning of a name
        ("V100", DEVICES, "v100_32gb"),
        ("h101", DEVICES, "h100_sxm"),
        ("a100-80", DEVICES, "a100_80gb"),
        ("device", ["cluster/device", "decode"], "cluster/device"),  # the last part of one
        ("modle", ["modality", "model"], "model"),  # a whole name before a beginning
        ("stesp", ["save_every", "steps"], "steps"),
    ],
)
def test_the_nearest_name_is_told(name: str, valid: list[str], near: str) -> None:
    assert did_you_mean(name, valid) == f"did you mean '{near}'?"


def test_where_none_is_near_all_are_told() -> None:
    assert did_you_mean("xyz", ["steps", "lr"]) == "valid: lr, steps"
    assert did_you_mean("xyz", []) == "there is none"
