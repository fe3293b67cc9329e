"""Calls of the coordinator carry the secret of their run; others are refused and change nothing."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from dist_ft.coordinator.calls import CALLS, CoordinatorCalls
from dist_ft.errors import CoordinatorLostError, NotAllowedError
from dist_ft.messages import CoordinatorAddress, Envelope, RankDone, RankStarted
from dist_ft.run.events import FirstStep
from dist_ft.run.state import RunRecord
from dist_ft.storage.publish import read_json
from tests.helpers.simulated_run import INPUTS, RUN_ID, run_config

SECRET = "5ec7e7" * 8


@pytest.fixture
def calls(tmp_path: Path) -> CoordinatorCalls:
    """The calls of a run whose first attempt is at work."""
    calls = CoordinatorCalls(SECRET)
    record = RunRecord(RUN_ID, max_steps=60)
    calls.ask(SECRET, "begin", run_config(), str(tmp_path / "run"), str(tmp_path / "run"), record, INPUTS, False)
    while calls.ask(SECRET, "open_attempt", 1) is None:
        pass
    calls.ask(SECRET, "handle", Envelope(RUN_ID, 1, 0, RankStarted(7, "10.0.0.1")).to_dict())
    return calls


def _contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


ASKED: dict[str, tuple[Any, ...]] = {
    "handle": (Envelope(RUN_ID, 1, 0, RankDone("completed", 60)).to_dict(),),
    "request_stop": ("a neighbour on the cluster",),
    "open_attempt": (2,),
    "finish": ("failed", {}),
    "add_event": (FirstStep({}),),
    "set_starters": ({"node": "/tmp/elsewhere.sock"},),
    "add_sizes": ([],),
    "attempt_spec": (1,),
    "poll": (0,),
}


@pytest.mark.parametrize("secret", ["", "5ec7e7", SECRET + "0", SECRET.upper(), "\u00fc"])
@pytest.mark.parametrize("call", sorted(ASKED))
def test_a_call_without_the_secret_is_refused_and_changes_nothing(
    tmp_path: Path, calls: CoordinatorCalls, call: str, secret: str
) -> None:
    before, status = _contents(tmp_path), calls.ask(SECRET, "poll", 0)
    with pytest.raises(NotAllowedError, match="run secret is missing or wrong"):
        calls.ask(secret, call, *ASKED[call])
    assert _contents(tmp_path) == before
    assert calls.ask(SECRET, "poll", 0) == status
    assert calls.ask(SECRET, "starter", "node") is None


def test_the_same_call_with_the_secret_is_taken(tmp_path: Path, calls: CoordinatorCalls) -> None:
    calls.ask(SECRET, "request_stop", "SIGTERM")
    assert read_json(tmp_path / "run" / "run.json")["state"] == "stopping"


@pytest.mark.parametrize("call", ["ask", "_known", "__init__", "begin_again"])
def test_only_calls_are_made(calls: CoordinatorCalls, call: str) -> None:
    with pytest.raises(NotAllowedError, match="knows no call"):
        calls.ask(SECRET, call)


def test_a_coordinator_that_knows_of_no_run_says_so_only_to_its_own() -> None:
    calls = CoordinatorCalls(SECRET)
    with pytest.raises(NotAllowedError):
        calls.ask("", "poll", 0)
    with pytest.raises(CoordinatorLostError):
        calls.ask(SECRET, "poll", 0)
    assert {"begin", "poll", "handle", "decide"} <= CALLS


def test_the_refusal_survives_ray_and_holds_no_secret(calls: CoordinatorCalls) -> None:
    with pytest.raises(NotAllowedError) as caught:
        calls.ask("guess", "poll", 0)
    assert type(pickle.loads(pickle.dumps(caught.value))) is NotAllowedError
    assert SECRET not in str(caught.value)
    assert "guess" not in str(caught.value)


def test_an_address_shows_no_secret_and_no_file_of_the_run_holds_it(tmp_path: Path, calls: CoordinatorCalls) -> None:
    address = CoordinatorAddress("coordinator-1", "full", SECRET)
    assert SECRET not in repr(address)
    assert SECRET not in repr({"coordinator": address})
    calls.ask(SECRET, "finish", "failed", {}, {"type": "DistFtError", "message": "x"})
    files = _contents(tmp_path)
    assert any(name.endswith("run.json") for name in files)
    assert not [name for name, data in files.items() if SECRET.encode() in data]
