"""Which backend joins ranks, from the devices that they have."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from dist_ft.zero.devices import choose_backend


@pytest.mark.parametrize(
    ("devices", "backend"),
    [
        (["a", "b", "c"], "nccl"),
        (["a"], "nccl"),
        (["a", "b", "a"], "gloo"),  # NCCL refuses two ranks on one device
        ([None, None], "gloo"),
    ],
)
def test_all_ranks_choose_the_backend_that_can_join_their_devices(devices: list[str | None], backend: str) -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(len(devices)) as pool:
        chosen = pool.map(lambda rank: choose_backend(store, rank, len(devices), devices[rank]), range(len(devices)))
        assert list(chosen) == [backend] * len(devices)
