"""The memory formulas against numbers worked out by hand and by the papers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dist_ft.memory import (
    STAGES,
    BatchShape,
    ModelShape,
    activations_bytes,
    estimate,
    gradients_bytes,
    optimizer_bytes,
    weights_bytes,
)

FULL = ModelShape(
    num_params=800, num_trained=800, num_layers=2, hidden_size=8, num_heads=2, vocab_size=10, dtype_bytes=2
)
LORA = replace(FULL, num_trained=80)
BATCH = BatchShape(num_sequences=3, num_tokens=16, num_trained_tokens=5)


@pytest.mark.parametrize(
    ("model", "stage", "expected"),
    [
        (FULL, 0, (1600, 3200, 6400)),  # float32's row of the table: moments alone
        (FULL, 1, (1600, 3200, 2400)),
        (FULL, 2, (1600, 800, 2400)),
        (FULL, 3, (400 + 200, 800, 2400)),  # a quarter of its own, an eighth gathered
        (LORA, 2, (1600, 80, 240)),
        (LORA, 3, (600, 80, 240)),  # the frozen base is sharded here only
    ],
)
def test_state_of_four_workers(model: ModelShape, stage: int, expected: tuple[int, int, int]) -> None:
    found = (
        weights_bytes(model, stage, 4),
        gradients_bytes(model, stage, 4),
        optimizer_bytes(model, stage, 4),
    )
    assert found == expected


def test_zero_paper_example() -> None:
    """Figure 1 of the paper: 7.5e9 parameters on 64 workers, with 16-bit gradients there and float32 here."""
    model = replace(FULL, num_params=7_500_000_000, num_trained=7_500_000_000)
    state = [weights_bytes(model, s, 64) + optimizer_bytes(model, s, 64) for s in (1, 2)]
    assert state == [pytest.approx(16.4e9, rel=0.01)] * 2  # the paper's 31.4 GB less 15 GB of gradients
    sharded = weights_bytes(model, 3, 64) + gradients_bytes(model, 3, 64) + optimizer_bytes(model, 3, 64)
    # 1.9 GB in the paper, plus 2 bytes more a gradient, plus the gathered eighth.
    assert sharded == pytest.approx(1.9e9 + 2 * 7.5e9 / 64 + 7.5e9 / 8 * 2, rel=0.02)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_worker_gains_nothing(stage: int) -> None:
    assert weights_bytes(FULL, stage, 1) == 1600
    assert gradients_bytes(FULL, stage, 1) == 3200
    assert optimizer_bytes(FULL, stage, 1) == 9600


def test_activations_follow_the_paper() -> None:
    tokens, logits = 3 * 16, 3 * 5 * 10 * (8 + 2)
    layer = 34 * tokens * 8
    assert activations_bytes(FULL, BATCH) == 2 * layer + logits
    eager = replace(BATCH, has_eager_attention=True)
    assert activations_bytes(FULL, eager) == 2 * (layer + 2 * 16 * tokens * 6) + logits
    recomputed = replace(BATCH, gradient_checkpointing=True)
    assert activations_bytes(FULL, recomputed) == layer + 2 * tokens * 8 * 2 + logits


def test_float32_doubles_the_layers_and_needs_no_second_copy_of_the_logits() -> None:
    single = replace(FULL, dtype_bytes=4)
    assert activations_bytes(single, BATCH) == 2 * 68 * 3 * 16 * 8 + 3 * 5 * 10 * 8


def test_checkpointing_pays_off_with_depth() -> None:
    deep = replace(FULL, num_layers=32)
    recomputed = replace(BATCH, gradient_checkpointing=True)
    assert activations_bytes(deep, recomputed) < activations_bytes(deep, BATCH) / 8


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_total_is_the_sum_of_what_is_on_the_device(stage: int, world_size: int) -> None:
    memory = estimate(FULL, BATCH, stage=stage, world_size=world_size)
    parts = memory.weights_bytes + memory.gradients_bytes + memory.optimizer_bytes + memory.activations_bytes
    assert (memory.total_bytes, memory.host_bytes) == (parts, 0)


def test_offload_moves_optimizer_and_at_stage_3_weights_to_the_host() -> None:
    offloaded = [estimate(FULL, BATCH, stage=stage, world_size=4, offload=True) for stage in (2, 3)]
    kept = [estimate(FULL, BATCH, stage=stage, world_size=4) for stage in (2, 3)]
    assert [memory.host_bytes for memory in offloaded] == [2400, 2400 + 400]
    assert [k.total_bytes - o.total_bytes for k, o in zip(kept, offloaded, strict=True)] == [2400, 2800]


def test_more_workers_and_higher_stages_never_need_more() -> None:
    totals = [
        [estimate(FULL, BATCH, stage=stage, world_size=size).total_bytes for stage in (1, 2, 3)]
        for size in (1, 2, 4, 8)
    ]
    for row in totals:
        assert row == sorted(row, reverse=True)
    for column in zip(*totals, strict=True):
        assert list(column) == sorted(column, reverse=True)
