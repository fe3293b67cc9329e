"""The arithmetic of workers per node, which planning, launchers, doctor and the elastic policy share."""

from __future__ import annotations

import pytest

from dist_ft.machine import worker_resources, workers_on


@pytest.mark.parametrize(
    ("asked", "has_gpu", "expected"),
    [
        (None, True, {"GPU": 1.0, "CPU": 1.0}),
        (None, False, {"CPU": 1.0}),
        ({}, True, {"GPU": 1.0, "CPU": 1.0}),
        ({"CPU": 4.0}, True, {"CPU": 4.0}),  # workers on the CPUs of machines with GPUs
        ({"GPU": 0.5}, False, {"GPU": 0.5}),
    ],
)
def test_a_worker_needs_what_is_asked_or_one_device(
    asked: dict[str, float] | None, has_gpu: bool, expected: dict[str, float]
) -> None:
    assert worker_resources(asked, has_gpu=has_gpu) == expected


@pytest.mark.parametrize(
    ("node", "worker", "count"),
    [
        ({"CPU": 4.0}, {"CPU": 1.0}, 4),
        ({"CPU": 7.0}, {"CPU": 2.0}, 3),
        ({"CPU": 2.0, "GPU": 8.0}, {"GPU": 1.0, "CPU": 1.0}, 2),  # the scarcest decides
        ({"CPU": 64.0, "GPU": 8.0}, {"GPU": 1.0, "CPU": 1.0}, 8),
        ({"CPU": 64.0}, {"GPU": 1.0, "CPU": 1.0}, 0),
        ({"GPU": 1.0}, {"GPU": 0.5}, 2),
        ({"CPU": 1.9999999}, {"CPU": 1.0}, 2),  # what Ray leaves after giving and taking back
        ({"CPU": 1.99}, {"CPU": 1.0}, 1),
        ({}, {"CPU": 1.0}, 0),
        ({"CPU": 4.0}, {"CPU": 0.0}, None),
        ({"CPU": 4.0}, {}, None),
        ({"CPU": 4.0}, {"CPU": 2.0, "TPU": 0.0}, 2),
    ],
)
def test_a_node_holds_whole_workers(node: dict[str, float], worker: dict[str, float], count: int | None) -> None:
    assert workers_on(node, worker) == count
