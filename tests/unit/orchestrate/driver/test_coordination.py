"""What the handle on the coordinator tells an actor that Ray has started again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from dist_ft.coordinator.failures import Decision
from dist_ft.coordinator.live_status import LiveStatus
from dist_ft.errors import CoordinatorLostError, StorageError
from dist_ft.orchestrate.driver import coordination
from dist_ft.orchestrate.driver.coordination import CoordinatorHandle
from dist_ft.run.events import Committed, CoordinatorRestarted, LedgerEntry
from dist_ft.run.place import open_run
from dist_ft.run.run_inputs import ShardSize
from dist_ft.run.state import RunRecord
from tests.helpers.configs import tiny_config

STATUS = LiveStatus(RunRecord("r"), None, None, [], [], None, (), None, None, is_waiting=True)
LEDGER = [LedgerEntry(0.0, 1, Committed(step)) for step in (2, 4, 6)]
INPUTS: Any = SimpleNamespace(to_dict=dict)


class Actor:
    """Answers calls at once; one that is new knows of no run."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.knows_run = False

    def ask(self, secret: str, call: str, *arguments: Any) -> Any:
        self.told.append((call, *arguments))
        if call == "begin":
            self.knows_run = True
        elif call == "finish":
            raise RayTaskError(
                "ask", "Traceback (most recent call last):\n  …", StorageError("full")
            ).as_instanceof_cause()
        elif call == "decide":
            return Decision(True, "restart 1 of failure.max_restarts=3") if self.knows_run else None
        elif call != "set_starters" and not self.knows_run:
            return CoordinatorLostError("the coordinator knows of no run")
        return replace(STATUS, ledger=LEDGER[arguments[0] :]) if call == "poll" else None

    def restart(self) -> None:
        self.knows_run = False
        self.told.clear()


def get(answer: Any, timeout: float) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> Actor:
    actor = Actor()
    shown = SimpleNamespace(ask=SimpleNamespace(remote=actor.ask))
    made = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda secret: shown))
    monkeypatch.setattr(coordination, "CoordinatorActor", made)
    monkeypatch.setattr(
        coordination.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "0" * 56)
    )  # fmt: skip
    monkeypatch.setattr(coordination.ray, "get", get)
    return actor


@pytest.mark.parametrize("has_stopped", [False, True])
def test_a_restarted_actor_is_told_all_again(actor: Actor, has_stopped: bool, tmp_path: Path) -> None:
    handle = CoordinatorHandle("n")
    handle.set_starters({"a": "/tmp/a.sock"})
    handle.begin(tiny_config(tmp_path), open_run(tmp_path), RunRecord("r"), INPUTS, on_gpu=False)
    sizes = [ShardSize(0, 1, 7), ShardSize(0, 0, 5)]
    for size in sizes:
        handle.add_sizes([size])
    assert handle.poll().ledger == LEDGER
    assert handle.poll().ledger == [], "each entry is asked for once"
    if has_stopped:
        handle.request_stop("SIGINT")
    actor.restart()
    assert handle.poll().ledger == LEDGER, "its ledger is a new one"
    told = [
        ("add_event", CoordinatorRestarted(1)),
        ("set_starters", {"a": "/tmp/a.sock"}),
        ("add_sizes", sizes),
        *([("request_stop", "asked before the coordinator was restarted")] if has_stopped else []),
    ]
    assert [call for call in actor.told if call[0] not in ("begin", "poll")] == told
    assert [call[0] for call in actor.told].index("begin") < [call[0] for call in actor.told].index("add_event")


def test_an_actor_that_is_restarted_just_before_it_decides_is_told_and_asked_again(
    actor: Actor, tmp_path: Path
) -> None:
    handle = CoordinatorHandle("n")
    handle.begin(tiny_config(tmp_path), open_run(tmp_path), RunRecord("r"), INPUTS, on_gpu=False)
    actor.restart()
    assert handle.decide("the worker group ended")
    assert [call[0] for call in actor.told if call[0] in ("begin", "decide")] == ["decide", "begin", "decide"]
    assert handle.poll().ledger == LEDGER, "no entry is lost by it"


def test_an_error_of_the_coordinator_is_its_own_line_and_not_the_traceback_of_ray(actor: Actor, tmp_path: Path) -> None:
    handle = CoordinatorHandle("n")
    handle.begin(tiny_config(tmp_path), open_run(tmp_path), RunRecord("r"), INPUTS, on_gpu=False)
    with pytest.raises(StorageError) as raised:
        handle.finish("completed", {}, None)
    assert raised.value.to_dict() == {"type": "StorageError", "message": "full"}


def test_an_actor_that_is_lost_before_the_run_has_begun_ends_the_driver(actor: Actor) -> None:
    handle = CoordinatorHandle("n")
    with pytest.raises(CoordinatorLostError, match="knows of no run"):
        handle.poll()
