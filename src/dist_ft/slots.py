"""Lays out the slots of a global batch over micro steps and ranks. Pure arithmetic.

The layout never changes a result: a slot's loss weight, dropout key and sequence depend on (step, slot) alone.
It only decides who computes what, so it may look at the lengths to keep padding and waiting small.

Example: 5 sequences on 2 ranks with micro batch 1 give 3 micro steps; the sixth slot is padding.

    micro step   rank 0   rank 1
        0        slot a   slot b
        1        slot c   slot d
        2        slot e   (padding)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

IGNORE = -100
"""Target at a place whose prediction is not trained."""


@dataclass(frozen=True)
class SlotTotals:
    """Counts of some slots, which the shard index gives before anything is computed.

    Attributes:
        num_slots: Number of slots, padding excluded.
        num_tokens: Number of their tokens.
        num_trained_tokens: Number of tokens whose prediction is trained.
        num_samples: Number of samples, of objectives that count them; else 0.
    """

    num_slots: int
    num_tokens: int
    num_trained_tokens: int
    num_samples: int = 0


def num_micro_steps(num_slots: int, micro_batch_size: int, world_size: int) -> int:
    """Return the number of passes per step that give every slot a place (the gradient accumulation steps)."""
    return -(-num_slots // (micro_batch_size * world_size))


def layout_slots(
    lengths: Sequence[int], micro_batch_size: int, world_size: int, num_slots: int | None = None
) -> list[list[list[int]]]:
    """Deals slots to ranks so that the rows of a micro step have similar lengths.

    Args:
        lengths: Tokens of the sequence in each real slot.
        micro_batch_size: Sequences per rank and pass.
        world_size: Number of ranks.
        num_slots: Slots of the step, at least `len(lengths)`; the rest is padding. Every step of a run has
            the same number, so that DeepSpeed's accumulation boundary stays where it is.

    Returns:
        `[micro step][rank] -> slots`; a list shorter than `micro_batch_size` is filled with padding rows.
    """
    steps = num_micro_steps(num_slots or len(lengths), micro_batch_size, world_size)
    by_length = sorted(range(len(lengths)), key=lambda slot: (-lengths[slot], slot))
    layout: list[list[list[int]]] = []
    for micro in range(steps):
        chunk = by_length[micro * micro_batch_size * world_size : (micro + 1) * micro_batch_size * world_size]
        # Dealt round robin, not in blocks: neighbours in length go to different ranks, so no rank waits.
        layout.append([chunk[rank::world_size] for rank in range(world_size)])
    return layout


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
