"""The states of a run: the table of legal changes, spelled out."""

from __future__ import annotations

import pytest

from dist_ft.run.state import FINAL, TRANSITIONS, RunRecord, check_transition

ALLOWED = {
    "starting": "running resizing recovering stopping stopped failed",
    "running": "resizing recovering stopping completed failed",
    "resizing": "running recovering stopping completed failed",
    "recovering": "running resizing stopping failed",
    "stopping": "stopped completed failed",
    "stopped": "starting",
    "completed": "starting",
    "failed": "starting",
}
PAIRS = [(old, new) for old in ALLOWED for new in ALLOWED if old != new]


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_the_table(old: str, new: str) -> None:
    if new in ALLOWED[old].split():
        check_transition(old, new)
        record = RunRecord("run", state=old)
        record.move(new)
        assert record.state == new
        return
    with pytest.raises(ValueError, match=rf"{old}.*{new}"):
        check_transition(old, new)


@pytest.mark.parametrize("state", sorted(ALLOWED))
def test_staying_is_no_change(state: str) -> None:
    record = RunRecord("run", state=state)
    record.move(state)
    assert record.state == state


def test_an_illegal_change_leaves_the_record_as_it_was() -> None:
    record = RunRecord("run", state="completed")
    with pytest.raises(ValueError, match="from completed to running"):
        record.move("running")
    assert record.state == "completed"


def test_final_states_are_those_that_only_a_new_start_leaves() -> None:
    assert {state for state, following in TRANSITIONS.items() if following == {"starting"}} == FINAL


@pytest.mark.parametrize("state", sorted(set(ALLOWED) - FINAL))
def test_every_working_state_can_fail_and_reach_an_end(state: str) -> None:
    seen, pending = set(), [state]
    while pending:
        current = pending.pop()
        if current not in seen | FINAL:
            pending += TRANSITIONS[current]
        seen.add(current)
    assert "failed" in TRANSITIONS[state]
    assert seen >= FINAL
