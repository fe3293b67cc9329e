"""Evaluation changes nothing; every way to the weights gives the same bits; packing is only a layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from dist_ft.checkpoint.consolidate import consolidate
from dist_ft.config import Config
from dist_ft.config.training_sections import EvalConfig
from dist_ft.data.stream.loader import collate
from dist_ft.data.stream.token_shards import Row
from dist_ft.model.base import load_model
from dist_ft.objectives.module import ObjectiveModule
from dist_ft.objectives.objective import Rows
from dist_ft.objectives.sft import SFT
from dist_ft.slots import IGNORE
from dist_ft.storage.store import LocalStore
from tests.helpers.attempts import Attempt, differing, train
from tests.helpers.configs import tiny_config
from tests.helpers.ranks import RankServer

# stage, world size: the first is run without evaluation too.
EVAL_SHAPES = [(2, 2), (0, 1), (3, 3)]


def eval_config(tmp_path: Path, name: str, stage: int, size: int, **changes: Any) -> Config:
    config = tiny_config(
        tmp_path,
        run__name=name,
        method__kind="lora",
        method__lora_dropout=0.1,
        zero__stage=stage,
        cluster__num_workers=size,
        train__max_steps=4,
        **changes,
    )
    return config.model_copy(update={"eval": EvalConfig(every_steps=1)})


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, ranks: RankServer) -> dict[tuple[int, int], Attempt]:
    """A run with an evaluation a step at each shape."""
    tmp_path = tmp_path_factory.mktemp("eval")
    return {shape: train(ranks, eval_config(tmp_path, f"e{i}", *shape)) for i, shape in enumerate(EVAL_SHAPES)}


def test_evaluation_changes_no_bit_of_a_run(
    evaluated: dict[tuple[int, int], Attempt], tmp_path: Path, ranks: RankServer
) -> None:
    with_eval = evaluated[EVAL_SHAPES[0]]
    assert [row["step"] for row in with_eval.evals] == [0, 1, 2, 3, 4]
    without = train(ranks, eval_config(tmp_path, "without", *EVAL_SHAPES[0], data__eval=None))
    assert without.evals == []
    assert without.losses == with_eval.losses
    assert without.digests == with_eval.digests
    assert differing(without.state(), with_eval.state()) == []


def test_held_out_loss_is_equal_at_every_world_size(evaluated: dict[tuple[int, int], Attempt]) -> None:
    wanted = {row["step"]: row["eval_loss"] for row in evaluated[0, 1].evals}
    for shape in EVAL_SHAPES:
        assert {row["step"]: row["eval_loss"] for row in evaluated[shape].evals} == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "stage"), [*(("float32", stage) for stage in range(4)), *(("bfloat16", stage) for stage in (1, 2, 3))]
)
def test_consolidated_gathered_and_deepspeeds_own_weights_are_the_same_bits(
    dtype: str, stage: int, tmp_path: Path, ranks: RankServer
) -> None:
    config = tiny_config(tmp_path, model__dtype=dtype, zero__stage=stage, data__eval=None, train__max_steps=3)
    run = train(ranks, config, body="train_and_gather", to=str(tmp_path))
    manifest = run.manifests[3]
    consolidate(LocalStore(run.run_dir), manifest, tmp_path, stem="consolidated", dtype="float32")
    masters = load_file(tmp_path / "consolidated.safetensors")
    assert {name: values.tobytes() for name, values in run.weights().items()} == _bytes(masters)
    gathered = load_file(tmp_path / "gathered.safetensors")
    if dtype == "float32":
        assert _bytes(gathered) == _bytes(masters)
    else:
        rounded = {name: _rounded(values) for name, values in masters.items()}
        assert _bytes(gathered) == _bytes(rounded)
    if stage > 0:
        assert _bytes(load_file(tmp_path / "masters.safetensors")) == _bytes(masters)
    if stage > 0 and dtype == "float32":
        assert _bytes(load_file(tmp_path / "native.safetensors")) == _bytes(masters)


def _bytes(tensors: dict[str, Any]) -> dict[str, bytes]:
    return {name: values.tobytes() for name, values in tensors.items()}


def _rounded(values: Any) -> Any:
    return torch.from_numpy(values).to(torch.bfloat16).float().numpy()


def sample(rng: np.random.Generator, length: int) -> tuple[Any, Any]:
    """Returns random token ids [T] and which are trained; the first never is, as the renderer has it."""
    trained = rng.random(length) < 0.5
    trained[-1], trained[0] = True, False
    return rng.integers(0, 250, length).astype(np.int32), trained


def join(samples: list[tuple[Any, Any]]) -> Row:
    """Packs samples into one row, as `data/shards/pack.py` does."""
    lengths = [len(ids) for ids, _ in samples]
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.int32)
    return Row(np.concatenate([ids for ids, _ in samples]), np.concatenate([trained for _, trained in samples]), starts)


def loss_and_gradients(config: Config, rows: list[Row], num_rows: int) -> tuple[float, dict[str, torch.Tensor]]:
    model = load_model(config).train()
    micro = collate(rows, list(range(len(rows))), num_rows)
    sums = ObjectiveModule(model)(Rows.of(micro, torch.device("cpu")), SFT.loss)
    sums[0].backward()
    return float(sums[0].detach()), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "bins",
    [[[9, 17, 5]], [[30, 2, 11, 8], [16, 24]], [[12, 12], [40], [3, 3, 3, 3]]],
    ids=["one row", "two rows, one shorter", "three rows, one not packed"],
)
def test_packed_loss_and_gradients_equal_unpacked_ones(bins: list[list[int]], attention: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, model__attention=attention)
    rng = np.random.default_rng(7)
    packed = [[sample(rng, length) for length in lengths] for lengths in bins]
    alone = [one for row in packed for one in row]
    # One row more than needed: padding weighs nothing in either layout.
    loss, gradients = loss_and_gradients(config, [join(row) for row in packed], len(packed) + 1)
    wanted, wanted_gradients = loss_and_gradients(config, [join([one]) for one in alone], len(alone) + 1)
    assert loss == pytest.approx(wanted, rel=1e-6)
    for name, gradient in wanted_gradients.items():
        assert (gradients[name] - gradient).norm() / gradient.norm() < 1e-5, name


def test_packed_samples_would_differ_if_they_saw_one_another(tmp_path: Path) -> None:
    """Guards the test above: the same row without its restarts gives another loss."""
    config = tiny_config(tmp_path)
    rng = np.random.default_rng(7)
    ids, trained, starts, _ = join([sample(rng, length) for length in (9, 17, 5)])
    apart, _ = loss_and_gradients(config, [Row(ids, trained, starts)], 1)
    together, _ = loss_and_gradients(config, [Row(ids, trained, starts[:1])], 1)
    assert abs(apart - together) / apart > 1e-4
    targets = collate([Row(ids, trained, starts)], [0], 1).targets
    # The last token of a sample predicts nothing of the next one.
    assert all(targets[0, start - 1] == IGNORE for start in starts[1:])
