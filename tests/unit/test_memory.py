"""The memory formulas against numbers worked out by hand and by the papers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.memory import (
    STAGES,
    BatchShape,
    ModelShape,
    activations_bytes,
    estimate,
    fitting_micro_batch,
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


# The micro batch that fits ---------------------------------------------------------------------------------

SHAPES = st.builds(
    ModelShape,
    num_params=st.integers(1_000, 10**9),
    num_trained=st.integers(1, 1_000),
    num_layers=st.integers(1, 4),
    hidden_size=st.integers(8, 64),
    num_heads=st.sampled_from([1, 2, 4]),
    vocab_size=st.integers(10, 1_000),
    dtype_bytes=st.sampled_from([2, 4]),
).flatmap(
    lambda shape: st.sampled_from([shape, replace(shape, num_trained=shape.num_params)])  # adapter or full
)
BATCHES = st.builds(
    BatchShape,
    num_sequences=st.integers(1, 12),
    num_tokens=st.integers(8, 128),
    num_trained_tokens=st.integers(1, 8),
    gradient_checkpointing=st.booleans(),
    has_eager_attention=st.booleans(),
)
PLACES = st.sampled_from([(stage, offload) for stage in STAGES for offload in (False, True)])
WORLD_SIZES = st.integers(1, 16)
# Of what the state alone takes, and of what is needed for one sequence more, so that every answer comes up.
FRACTIONS = st.tuples(st.floats(0, 2), st.integers(0, 14), st.floats(-0.5, 1.5))


def _limit(
    model: ModelShape, batch: BatchShape, stage: int, offload: bool, world_size: int, share: tuple[float, int, float]
) -> int:
    """A limit that lies near what some number of sequences takes, or anywhere."""
    factor, count, offset = share

    def total(num_sequences: int) -> int:
        some = replace(batch, num_sequences=num_sequences)
        return estimate(model, some, stage=stage, world_size=world_size, offload=offload).total_bytes

    near = total(count) + offset * (total(1) - total(0))
    return max(0, round((near if count else factor * total(12)) / 0.9))


@given(model=SHAPES, batch=BATCHES, place=PLACES, world_size=WORLD_SIZES, share=FRACTIONS)
@settings(deadline=None)
def test_the_micro_batch_is_the_largest_that_fits(
    model: ModelShape, batch: BatchShape, place: tuple[int, bool], world_size: int, share: tuple[float, int, float]
) -> None:
    stage, offload = place
    limit = _limit(model, batch, stage, offload, world_size, share)

    def fits(count: int) -> bool:
        """By the sum of the formulas, a tenth left alone."""
        memory = estimate(
            model, replace(batch, num_sequences=count), stage=stage, world_size=world_size, offload=offload
        )
        return memory.total_bytes <= 0.9 * limit

    count = fitting_micro_batch(model, batch, stage=stage, world_size=world_size, limit_bytes=limit, offload=offload)
    assert 1 <= count <= batch.num_sequences
    assert count == 1 or fits(count)
    assert count == batch.num_sequences or not fits(count + 1)


@given(model=SHAPES, batch=BATCHES, place=PLACES, world_size=WORLD_SIZES, shares=st.tuples(FRACTIONS, FRACTIONS))
@settings(deadline=None)
def test_more_memory_never_gives_a_smaller_micro_batch(
    model: ModelShape,
    batch: BatchShape,
    place: tuple[int, bool],
    world_size: int,
    shares: tuple[tuple[float, int, float], tuple[float, int, float]],
) -> None:
    stage, offload = place
    limits = sorted(_limit(model, batch, stage, offload, world_size, share) for share in shares)
    less, more = (
        fitting_micro_batch(model, batch, stage=stage, world_size=world_size, limit_bytes=limit, offload=offload)
        for limit in limits
    )
    assert less <= more


@given(
    model=SHAPES,
    batch=BATCHES,
    place=PLACES.filter(lambda place: place != (3, True)),
    sizes=st.tuples(WORLD_SIZES, WORLD_SIZES).map(sorted),
    share=FRACTIONS,
)
@settings(deadline=None)
def test_more_workers_never_give_a_smaller_micro_batch(
    model: ModelShape, batch: BatchShape, place: tuple[int, bool], sizes: list[int], share: tuple[float, int, float]
) -> None:
    stage, offload = place
    limit = _limit(model, batch, stage, offload, sizes[0], share)
    few, many = (
        fitting_micro_batch(model, batch, stage=stage, world_size=size, limit_bytes=limit, offload=offload)
        for size in sizes
    )
    assert few == many if stage == 0 else few <= many


def test_offloaded_weights_are_gathered_on_the_device_whatever_the_world_size() -> None:
    on_device = []
    for size in (1, 2, 4, 8):
        memory = estimate(LORA, BATCH, stage=3, world_size=size, offload=True)
        on_device.append(memory.total_bytes - memory.gradients_bytes - memory.activations_bytes)
    assert on_device == [200] * 4  # an eighth of 800 elements of two bytes


def test_a_group_that_shrinks_takes_smaller_passes() -> None:
    """By hand: 800 parameters with Adam at stage 2 are 1600 + 12800 / N bytes; a sequence is 15776."""
    batch = replace(BATCH, num_sequences=4)
    layers, logits = 2 * 34 * 16 * 8, 5 * 10 * (8 + 2)
    sequence = layers + logits
    assert activations_bytes(FULL, replace(BATCH, num_sequences=1)) == sequence
    limit = (1600 + 12800 // 8 + 4 * sequence) / 0.9
    found = [
        fitting_micro_batch(FULL, batch, stage=2, world_size=size, limit_bytes=round(limit) + 1)
        for size in (8, 4, 2, 1)
    ]
    missing = [12800 // size - 1600 for size in (8, 4, 2, 1)]  # what is lacking, against eight workers
    assert found == [4 + -(lacking // sequence + (lacking % sequence > 0)) for lacking in missing] == [4, 3, 3, 2]


@pytest.mark.parametrize("limit", [0, 1, 1000])
def test_one_sequence_is_tried_whatever_the_limit(limit: int) -> None:
    assert fitting_micro_batch(FULL, BATCH, stage=2, world_size=4, limit_bytes=limit) == 1


def test_with_room_the_configured_micro_batch_is_kept() -> None:
    for size in (1, 3, 8):
        assert fitting_micro_batch(FULL, BATCH, stage=2, world_size=size, limit_bytes=10**12) == 3
