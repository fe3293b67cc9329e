"""Tests of `averaged_weights` without a process group. `tests/numerics` compares runs that use it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_ft.zero import partitions
from dist_ft.zero.partitions import averaged_weights

SHARE = 0.9


@pytest.fixture
def refreshed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Masters at each refresh of the weights, which is collective."""
    found: list[torch.Tensor] = []
    monkeypatch.setattr(partitions, "_flats", lambda engine: list(engine.inner.state))
    monkeypatch.setattr(
        partitions, "_refresh_weights", lambda engine: found.extend(flat.clone() for flat in engine.inner.state)
    )
    return found


def engine_with(masters: torch.Tensor, fast: torch.Tensor) -> Any:
    return SimpleNamespace(
        optimizer=SimpleNamespace(average_share=SHARE), inner=SimpleNamespace(state={masters: {"z": fast}})
    )


def test_the_average_is_computed_with_and_the_masters_come_back_bit_for_bit(refreshed: list[torch.Tensor]) -> None:
    average, fast = torch.tensor([1.0, -0.3]), torch.tensor([0.1, 0.7])
    masters = SHARE * average + (1 - SHARE) * fast
    before = masters.clone()
    with averaged_weights(engine_with(masters, fast)):
        torch.testing.assert_close(masters, average)
    assert torch.equal(masters, before)
    torch.testing.assert_close(refreshed, [average, before])


def test_an_error_inside_reaches_the_rank_without_another_collective(refreshed: list[torch.Tensor]) -> None:
    with (
        pytest.raises(RuntimeError, match="on this rank only"),
        averaged_weights(engine_with(torch.ones(2), torch.zeros(2))),
    ):
        raise RuntimeError("on this rank only")
    assert len(refreshed) == 1  # before the block; a second one would wait for the other ranks
