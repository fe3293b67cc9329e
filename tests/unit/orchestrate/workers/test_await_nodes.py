"""Waiting for nodes ends when they are there, or with its limit."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dist_ft.orchestrate.workers import await_nodes as module
from dist_ft.orchestrate.workers.await_nodes import await_nodes


def counting(*answers: int | Exception) -> Callable[[], int]:
    left = list(answers)

    def count() -> int:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return count


def test_a_head_that_does_not_answer_yet_and_nodes_that_join_are_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EVERY_S", 0)
    assert await_nodes(counting(RuntimeError("no GCS"), 1, 1, 3), 3, 10) == 3


def test_the_limit_ends_it_with_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EVERY_S", 0)
    assert await_nodes(counting(2), 3, 0.05) == 2
    assert await_nodes(counting(RuntimeError("no GCS")), 1, 0.05) == 0
