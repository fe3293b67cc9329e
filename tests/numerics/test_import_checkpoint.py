"""Checkpoints of stock DeepSpeed and of the Hugging Face Trainer become runs that go on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from dist_ft.checkpoint.lineage import committed
from dist_ft.config import Config
from dist_ft.errors import CheckpointError, UsageError
from dist_ft.jobs import import_checkpoint
from dist_ft.run.place import open_run
from dist_ft.run.status import read_record
from dist_ft.storage.store import LocalStore
from tests.helpers.attempts import prepare, read_state, run_path, train
from tests.helpers.configs import tiny_config
from tests.helpers.ranks import RankServer

STEP = 3
COMMON: dict[str, Any] = {
    "data__eval": None, "schedule__kind": "constant", "schedule__warmup_ratio": 0.0, "train__max_steps": 6,
    "method__lora_dropout": 0.0,
}  # fmt: skip
CASES = {
    "full, ZeRO 1, 2 ranks → ZeRO 3, 1 rank": ("full", 1, 2, {"zero__stage": 3, "cluster__num_workers": 1}),
    "full, ZeRO 3, 2 ranks → ZeRO 0, 1 rank": ("full", 3, 2, {"zero__stage": 0, "cluster__num_workers": 1}),
    "lora, ZeRO 2, 1 rank → ZeRO 2, 2 ranks": ("lora", 2, 1, {"zero__stage": 2}),
}
BODIES = "tests.helpers.stock_deepspeed"


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_deepspeed_goes_on_with_equal_losses(case: str, ranks: RankServer, tmp_path: Path) -> None:
    method, stage, world_size, changes = CASES[case]
    config = tiny_config(tmp_path, **COMMON, method__kind=method, **changes)
    prepared = prepare(ranks, config)
    source = tmp_path / "deepspeed"
    arguments = {
        "config": config.model_dump(mode="json"), "prepared": prepared, "directory": str(source), "stage": stage,
        "save_at": STEP, "num_steps": 6,
    }  # fmt: skip
    losses, *_ = ranks.run(world_size, f"{BODIES}:train_and_save", arguments)
    found = import_checkpoint.run(config, prepared, str(source))
    assert (found["run_dir"], found["step"]) == (str(run_path(config)), STEP)
    assert f"{world_size} rank(s)" in found["notes"][0]
    assert f"sequence {STEP * 8}, in epoch 0" in found["notes"][1]
    (manifest,) = committed(LocalStore(run_path(config)))
    run = train(ranks, config, prepared=prepared, start=manifest)
    assert run.losses == pytest.approx(dict(zip((4, 5, 6), losses[STEP:], strict=True)), rel=1e-5)
    record = read_record(open_run(run_path(config)))
    assert (record.state, record.step, record.max_steps) == ("stopped", STEP, 6)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_checkpoint_of_the_trainer_is_taken_over_bit_for_bit(method: str, ranks: RankServer, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **COMMON, method__kind=method)
    prepared = prepare(ranks, config)
    directory = tmp_path / "trainer"
    directory.mkdir()
    arguments = {"config": config.model_dump(mode="json"), "directory": str(directory), "num_steps": STEP}
    ranks.run(1, f"{BODIES}:train_with_trainer", arguments, in_group=False)
    found = import_checkpoint.run(config, prepared, str(directory / f"checkpoint-{STEP}"))
    assert found["step"] == STEP
    (manifest,) = committed(LocalStore(run_path(config)))
    state, kept = read_state(run_path(config), manifest), load_file(directory / "state.safetensors")
    assert {f"{name}|{kind}" for name, kind in state} == kept.keys()
    for (name, kind), values in state.items():
        assert np.array_equal(values, kept[f"{name}|{kind}"]), (name, kind)
    assert train(ranks, config, prepared=prepared, start=manifest).outcome == "completed"


@pytest.fixture
def imported(ranks: RankServer, tmp_path: Path) -> tuple[Config, dict[str, Any], Path]:
    """A config, its data, and a checkpoint of stock DeepSpeed."""
    config = tiny_config(tmp_path, **COMMON)
    prepared = prepare(ranks, config)
    arguments = {
        "config": config.model_dump(mode="json"), "prepared": prepared, "directory": str(tmp_path / "deepspeed"),
        "stage": 2, "save_at": 1, "num_steps": 1,
    }  # fmt: skip
    ranks.run(1, f"{BODIES}:train_and_save", arguments)
    return config, prepared, tmp_path / "deepspeed"


class _Call:
    """Calls a function when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("owned",)


def test_what_cannot_be_taken_over_is_refused_and_leaves_nothing(
    imported: tuple[Config, dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, prepared, source = imported
    monkeypatch.chdir(tmp_path)

    def refused(error: type[Exception], message: str, **changes: Any) -> None:
        other = tiny_config(tmp_path, **{**COMMON, **changes})
        with pytest.raises(error, match=message):
            import_checkpoint.run(other, prepared, str(source))
        assert not run_path(config).exists()

    refused(
        UsageError,
        "used 8 sequences in 1 steps, and train.global_batch_size=16; set it to 8",
        train__global_batch_size=16,
    )
    refused(CheckpointError, r"trains model\.embed_tokens\.weight, and the config does not", method__kind="lora")
    refused(UsageError, "only the state of AdamW", optimizer__kind="lion")
    (path,) = source.glob("*/*_optim_states.pt")
    whole = torch.load(path, weights_only=False)
    torch.save({**whole, "extra": _Call()}, path)
    refused(CheckpointError, r"optim_states\.pt asks for posix\.mkdir, and only tensors")
    assert not (tmp_path / "owned").exists()
    moments = whole["optimizer_state_dict"]["base_optimizer_state"]["state"]
    del moments[0]["exp_avg_sq"]
    torch.save(whole, path)
    refused(CheckpointError, r"holds exp_avg, step of a parameter, and AdamW has exp_avg, exp_avg_sq")
    path.unlink()
    refused(UsageError, "is no checkpoint that can be taken over")
