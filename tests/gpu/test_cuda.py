"""The numerics on one CUDA device. Skipped without; not yet run on any (see README)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dist_ft.orchestrate.workers.processes import ForkServer
from tests.helpers.configs import tiny_config
from tests.helpers.group import run_group

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def gpu_starter() -> Iterator[str]:
    server = ForkServer(on_gpu=True)
    yield server.socket_path
    server.close()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_resume_on_cuda_is_bitwise(stage: int, tmp_path: Path, gpu_starter: str) -> None:
    changes = {"model__dtype": "bfloat16", "zero__stage": stage, "cluster__num_workers": 1}
    whole = run_group(tiny_config(tmp_path, run__name="whole", **changes), gpu_starter, on_gpu=True)

    def stop_after_two(coordinator, envelope) -> None:
        if envelope["kind"] == "step_done" and envelope["body"]["row"]["step"] == 2:
            coordinator.request_stop("test")

    config = tiny_config(tmp_path, run__name="parts", **changes)
    run_group(config, gpu_starter, on_message=stop_after_two, on_gpu=True)
    resumed = run_group(config, gpu_starter, on_gpu=True)
    assert resumed.outcome == "completed"
    assert resumed.losses == whole.losses


def test_cuda_agrees_with_the_cpu(tmp_path: Path, gpu_starter: str, starter: str) -> None:
    changes = {"cluster__num_workers": 1}
    cpu = run_group(tiny_config(tmp_path, run__name="cpu", **changes), starter)
    gpu = run_group(tiny_config(tmp_path, run__name="gpu", **changes), gpu_starter, on_gpu=True)
    assert gpu.losses == pytest.approx(cpu.losses, rel=1e-4)
