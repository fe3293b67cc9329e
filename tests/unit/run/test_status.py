"""Status, stop and the choice of a checkpoint, on run directories made here."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dist_ft.checkpoint.lineage import take_attempt
from dist_ft.config import config_from_dict, dump_yaml
from dist_ft.errors import DistFtError, UsageError
from dist_ft.layout import RunDir
from dist_ft.run.place import open_run
from dist_ft.run.state import FINAL, RunRecord
from dist_ft.run.status import find_checkpoint, read_status, render_status, request_stop
from dist_ft.storage.publish import read_json, write_json
from dist_ft.storage.store import LocalStore
from tests.helpers.manifests import make_manifest

CONFIG = config_from_dict(
    {
        "run": {"name": "demo"},
        "model": {"name": "tiny-random"},
        "data": {"train": [{"source": "embedded:orders/train"}]},
    }
)
KEYS = {
    "run_id", "state", "attempt", "step", "max_steps", "world_size", "workers", "checkpoints", "exports",
    "wandb_id", "sink_ids", "goodput",
}  # fmt: skip


def _write_record(run: Path, **changes: Any) -> None:
    record = RunRecord("demo", state="running", attempt=1, step=17, max_steps=40, world_size=2,
                       sink_ids={"wandb": "abc"}, goodput=0.875)  # fmt: skip
    write_json(RunDir(run).run_json, {**asdict(record), **changes})


def _commit(run: Path, step: int) -> None:
    manifest = make_manifest(step)
    LocalStore(run).create_exclusive(f"{manifest.directory}/manifest.json", manifest.encode())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "demo"
    _write_record(path, workers=[{"rank": 0, "pid": 11, "node_ip": "10.0.0.1"}])
    RunDir(path).config.write_text(dump_yaml(CONFIG), encoding="utf-8")
    take_attempt(LocalStore(path), None)
    return path


def test_status_has_exactly_the_promised_keys(run: Path) -> None:
    _commit(run, 10)
    status = read_status(open_run(run)).to_dict()
    assert set(status) == KEYS
    assert (status["run_id"], status["state"], status["step"], status["max_steps"]) == (
        "demo",
        "running",
        17,
        40,
    )
    assert status["workers"] == [{"rank": 0, "pid": 11, "node_ip": "10.0.0.1"}]
    assert json.loads(json.dumps(status)) == status


def test_status_lists_committed_checkpoints_and_finished_exports(run: Path) -> None:
    _commit(run, 20)
    _commit(run, 10)
    (run / "checkpoints" / "step-00000030-a0001").mkdir()  # staged, not committed
    for name in ("step-00000020", ".step-00000030.x"):
        (run / "exports" / name).mkdir(parents=True)
    (run / "exports" / "final").symlink_to("step-00000020")
    status = read_status(open_run(run)).to_dict()
    assert [c["step"] for c in status["checkpoints"]] == [10, 20]
    assert all((Path(c["path"]) / "manifest.json").is_file() for c in status["checkpoints"])
    assert status["exports"] == [str(run / "exports" / "step-00000020")]


def test_paths_do_not_depend_on_the_working_directory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _commit(run, 10)
    monkeypatch.chdir(run.parent)
    assert read_status(open_run(Path("demo"))) == read_status(open_run(run))


def test_status_of_a_failed_run_shows_why(run: Path) -> None:
    _write_record(run, state="failed", error={"type": "DataError", "message": "row 3 is empty"})
    status = read_status(open_run(run)).to_dict()
    assert status["error"] == {"type": "DataError", "message": "row 3 is empty"}
    assert "row 3 is empty" in render_status(read_status(open_run(run)))


def test_an_error_that_quotes_data_cannot_steer_the_terminal(run: Path) -> None:
    _write_record(run, state="failed", error={"type": "DataError", "message": "\x1b[2J" + "x" * 1_000_000})
    page = render_status(read_status(open_run(run)))
    assert r"DataError: \x1b[2Jxxx" in page
    assert "\x1b" not in page
    assert len(page) < 4000


def test_rendering_names_workers_checkpoints_and_progress(run: Path) -> None:
    _commit(run, 10)
    page = render_status(read_status(open_run(run)))
    for text in (
        "demo: running",
        "17 of 40",
        "88% of the time",
        "rank 0  pid 11  on 10.0.0.1",
        "checkpoints/step-00000010-a0001",
        "abc",
    ):
        assert text in page


def test_rendering_a_run_that_ended_early(run: Path) -> None:
    result = {"final_loss": 1.5, "early_stop": {"metric": "eval_loss", "best_step": 10, "patience": 2}}
    _write_record(run, state="completed", result=result)
    assert "patience 2 for eval_loss" in render_status(read_status(open_run(run)))


def test_rendering_names_each_held_out_set(run: Path) -> None:
    measured = {"eval_loss": 1.25, "orders/eval_loss": 1.5, "orders/perplexity": 4.5, "chat/eval_loss": None}
    _write_record(run, state="completed", result={"eval_loss": 1.25, "comparison": {"tuned": measured}})
    assert "loss         held-out 1.2500, orders 1.5000\n" in render_status(read_status(open_run(run)))


def test_rendering_a_run_that_has_just_started(run: Path) -> None:
    _write_record(run, state="starting", step=0, max_steps=0, world_size=0, sink_ids={})
    assert "0 of 0" in render_status(read_status(open_run(run)))


def _spoil_json(run: Path) -> None:
    RunDir(run).run_json.write_text('{"format_version": 1, "run_i', encoding="utf-8")


def _drop_keys(run: Path) -> None:
    write_json(RunDir(run).run_json, {"run_id": "demo"})


def _later_format(run: Path) -> None:
    RunDir(run).run_json.write_text('{"format_version": 99}', encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_spoil_json, "run.json cannot be read"),
        (_drop_keys, "state, attempt, step"),
        (_later_format, "format_version 1"),
        (lambda run: RunDir(run).run_json.unlink(), "no run.json"),
    ],
)
def test_what_is_not_a_run_is_a_usage_error(run: Path, spoil: Callable[[Path], None], expected: str) -> None:
    spoil(run)
    place = open_run(run)
    for call in (read_status, lambda place: request_stop(place, 0.0), lambda place: find_checkpoint(place, None)):
        with pytest.raises(UsageError, match=expected):
            call(place)


def test_no_directory_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a directory"):
        read_status(open_run(tmp_path / "nowhere"))


class FakeCoordinator(threading.Thread):
    """Waits for the request, then ends the run as told."""

    def __init__(self, run: Path, end: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._request = RunDir(run).stop_request
        self._end = end
        self._gave_up = threading.Event()
        self.request: dict[str, Any] = {}

    def run(self) -> None:
        """Polls as the coordinator's `tick` does."""
        while not self._request.exists() and not self._gave_up.wait(0.01):
            pass
        self.request = read_json(self._request)
        self._end()

    def stop(self) -> None:
        """Ends the wait of a test that failed."""
        self._gave_up.set()


def _stop_with(run: Path, end: Callable[[], None]) -> tuple[str, dict[str, Any]]:
    coordinator = FakeCoordinator(run, end)
    coordinator.start()
    try:
        text = request_stop(open_run(run), 20.0)
    finally:
        coordinator.stop()
        coordinator.join(5)
    return text, coordinator.request


def test_stop_waits_for_the_checkpoint(run: Path) -> None:
    def end() -> None:
        _write_record(run, state="stopping")
        _commit(run, 17)
        _write_record(run, state="stopped")

    text, request = _stop_with(run, end)
    assert text == "stopped at step 17, checkpoint checkpoints/step-00000017-a0001"
    assert {"time", "pid", "user"} <= set(request)
    assert not RunDir(run).stop_request.exists()


def test_stop_of_a_run_that_completes_meanwhile(run: Path) -> None:
    def end() -> None:
        _commit(run, 40)
        _write_record(run, state="completed", step=40)

    assert _stop_with(run, end)[0] == "completed at step 40, checkpoint checkpoints/step-00000040-a0001"


def test_stop_before_the_first_checkpoint(run: Path) -> None:
    assert _stop_with(run, lambda: _write_record(run, state="stopped", step=0))[0] == "stopped at step 0, no checkpoint"


def test_stop_of_a_run_that_fails_is_an_error(run: Path) -> None:
    def end() -> None:
        _write_record(run, state="failed", error={"type": "WorkerCrashError", "message": "rank 1 died"})

    with pytest.raises(DistFtError, match="failed at step 17: rank 1 died"):
        _stop_with(run, end)


def test_no_answer_keeps_the_request_and_says_what_to_do(run: Path) -> None:
    with pytest.raises(DistFtError, match=r"did not answer within 0\.01 s.*request stays.*--resume") as caught:
        request_stop(open_run(run), 0.01)
    assert caught.value.exit_code == 1
    assert RunDir(run).stop_request.exists()


@pytest.mark.parametrize("state", sorted(FINAL))
def test_a_run_that_has_ended_cannot_be_stopped(run: Path, state: str) -> None:
    _write_record(run, state=state)
    with pytest.raises(UsageError, match=f"{state} at step 17"):
        request_stop(open_run(run), 1.0)
    assert not RunDir(run).stop_request.exists()


@pytest.mark.parametrize(("step", "chosen"), [(None, 20), (10, 10), (20, 20)])
def test_find_checkpoint(run: Path, step: int | None, chosen: int) -> None:
    _commit(run, 10)
    _commit(run, 20)
    config, manifest = find_checkpoint(open_run(run), step)
    assert config == CONFIG
    assert manifest == f"checkpoints/step-{chosen:08d}-a0001/manifest.json"


def test_unknown_step_lists_those_there_are(run: Path) -> None:
    _commit(run, 10)
    _commit(run, 20)
    with pytest.raises(UsageError, match="no checkpoint at step 15; choose one of: 10, 20"):
        find_checkpoint(open_run(run), 15)


@pytest.mark.parametrize("step", [None, 10])
def test_no_checkpoint_at_all(run: Path, step: int | None) -> None:
    with pytest.raises(UsageError, match="no committed checkpoint"):
        find_checkpoint(open_run(run), step)
