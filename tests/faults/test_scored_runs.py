"""Runs whose objective is scored by a frozen model, disturbed in training and in scoring: equal to the undisturbed run.

Part of `make faults`. A killed scorer's claim is abandoned after half a minute, so these tests take their time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_ft.checkpoint.lineage import committed
from dist_ft.storage.store import LocalStore
from tests.helpers.attempts import read_state, relative_l2, weights_of
from tests.helpers.cluster import AddedNode, LoopbackCluster, command_line, descendants
from tests.helpers.runs import Run
from tests.helpers.teacher import make_teacher

pytestmark = pytest.mark.faults

SETTINGS = ("train.max_steps=60", "optimizer.lr=1e-3", "checkpoint.every_steps=4", "failure.backoff_s=0.1")
PAIRS = "data.train=[{source: embedded:orders-pairs/train, max_rows: 120}]"
OBJECTIVES = {
    "dpo": ("objective={kind: dpo, sft_weight: 0.2}", PAIRS),
    "kto": ("objective={kind: kto}", "data.train=[{source: LABELLED}]"),
    "distill": (
        "objective={kind: distill, teacher: TEACHER, top_k: 16, temperature: 2.0}",
        "data.train=[{source: embedded:orders/train, max_rows: 120}]",
    ),
}


class Scored:
    """One objective: its settings, its undisturbed run, and where token shards and scores of a run lie."""

    def __init__(self, name: str, folder: Path) -> None:
        places = {"TEACHER": str(folder / "teacher"), "LABELLED": str(folder / "labelled.jsonl")}
        self.folder, self.settings = folder, [*SETTINGS, *OBJECTIVES[name]]
        for word, place in places.items():
            self.settings = [setting.replace(word, place) for setting in self.settings]
        self.whole: Run | None = None

    def start(self, cli: str, folder: Path, address: str, name: str, *more: str) -> Run:
        """Starts a run with a cache of its own."""
        size = () if any(setting.startswith("cluster.num_workers") for setting in more) else ("cluster.num_workers=2",)
        return Run(cli, folder, address, name, *self.settings, f"data.cache_dir={cache_of(folder)}", *size, *more)


def cache_of(folder: Path) -> Path:
    return folder / "cache"


@pytest.fixture(scope="module", params=OBJECTIVES)
def scored(
    request: pytest.FixtureRequest, cli: str, tmp_path_factory: pytest.TempPathFactory, ray_address: str
) -> Scored:
    folder = tmp_path_factory.mktemp(request.param)
    make_teacher(folder / "teacher")
    rows = [{"prompt": f"say {i}", "completion": f" {i % 7} times", "label": i % 3 > 0} for i in range(120)]
    (folder / "labelled.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = Scored(request.param, folder)
    found.whole = found.start(cli, folder, ray_address, "whole")
    code, result, err = found.whole.finish()
    assert (code, result["attempts"]) == (0, 1), err
    return found


def assert_equal(run: Run, scored: Scored, bitwise: bool = True) -> None:
    assert scored.whole is not None
    rows, whole = run.rows(), scored.whole.rows()
    assert {step: row["digest"] for step, row in rows.items()} == {step: row["digest"] for step, row in whole.items()}
    assert {s: r["loss"] for s, r in rows.items()} == pytest.approx({s: r["loss"] for s, r in whole.items()}, rel=1e-5)
    if bitwise:
        assert run.state() == scored.whole.state()
        return
    ends = [read_state(r.dir.path, committed(LocalStore(r.dir.path))[-1]) for r in (run, scored.whole)]
    assert relative_l2(*map(weights_of, ends)) < 1e-5


def scoring(run: Run, folder: Path) -> list[int]:
    """Waits until a task scores; returns the children of the fork server, of which it is one."""
    while True:
        assert run.process.poll() is None, run.process.communicate()
        tokens = {path.name.split(".")[0] for path in cache_of(folder).glob("*.index.npy")}
        # Whole names only: a claim that is being renewed has a temporary file beside it.
        claimed = {path.name for path in cache_of(folder).glob("claims/*") if path.name.isalnum()} - tokens
        servers = [pid for pid in descendants(run.process.pid) if b"workers.forkserver" in command_line(pid)]
        if tokens and claimed and len(servers) > 1:
            return servers[1:]


def test_a_rank_is_killed(scored: Scored, cli: str, tmp_path: Path, ray_address: str) -> None:
    run = scored.start(cli, tmp_path, ray_address, "killed")
    record = run.wait_for(lambda record: record["step"] >= 6)
    os.kill(record["workers"][1]["pid"], signal.SIGKILL)
    code, result, err = run.finish()
    assert (code, result["attempts"]) == (0, 2), err
    assert_equal(run, scored)


def test_a_task_that_scores_is_killed(scored: Scored, cli: str, tmp_path: Path, ray_address: str) -> None:
    run = scored.start(cli, tmp_path, ray_address, "unscored")
    for pid in scoring(run, tmp_path):
        os.kill(pid, signal.SIGKILL)
    code, result, err = run.finish()
    assert (code, result["state"]) == (0, "completed"), err
    assert_equal(run, scored)


def test_the_driver_is_killed_while_data_is_scored(scored: Scored, cli: str, tmp_path: Path, ray_address: str) -> None:
    run = scored.start(cli, tmp_path, ray_address, "left")
    scoring(run, tmp_path)
    run.process.kill()
    run.process.communicate()
    again = scored.start(cli, tmp_path, ray_address, "left")
    code, result, err = again.finish()
    assert (code, result["attempts"]) == (0, 1), err
    assert_equal(again, scored)


def test_scores_are_damaged_and_made_again_as_the_error_says(
    scored: Scored, cli: str, tmp_path: Path, ray_address: str
) -> None:
    shutil.copytree(cache_of(scored.folder), cache_of(tmp_path))
    tokens = {path.name.split(".")[0] for path in cache_of(tmp_path).glob("*.index.npy")}
    (scores,) = (path for path in cache_of(tmp_path).glob("*.arrow") if path.stem not in tokens)
    damaged = bytearray(scores.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    scores.write_bytes(damaged)
    code, result, err = scored.start(cli, tmp_path, ray_address, "damaged").finish()
    assert code != 0
    assert f"{scores.name} is damaged" in err
    assert "and resume: the shard is prepared anew" in err
    for path in cache_of(tmp_path).glob(f"{scores.stem}.*"):
        path.unlink()
    mended = scored.start(cli, tmp_path, ray_address, "damaged", "--resume")
    code, result, err = mended.finish()
    assert (code, result["state"]) == (0, "completed"), err
    assert_equal(mended, scored)


@pytest.mark.parametrize("leave", ["power_off", "drain"])
def test_a_node_leaves(
    leave: str, scored: Scored, cli: str, tmp_path: Path, two_nodes: tuple[LoopbackCluster, AddedNode]
) -> None:
    cluster, node = two_nodes
    run = scored.start(cli, tmp_path, cluster.address, "shrunk", "cluster.num_workers=[1,2]")
    run.wait_for(lambda record: record["step"] >= 6)
    act: dict[str, Callable[[Any], Any]] = {"power_off": cluster.power_off, "drain": cluster.drain}
    act[leave](node)
    code, result, err = run.finish()
    assert (code, result["state"]) == (0, "completed"), err
    assert {row["world_size"] for row in run.rows().values()} == {1, 2}
    assert_equal(run, scored, bitwise=False)
