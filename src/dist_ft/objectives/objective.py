"""Defines the protocol of objectives: everything that training needs to know about a loss.

The trainer, the evaluation and the data preparation use an objective only through `Objective`. All numbers that they
add up are *sums over slots*, and the divisor of a step comes from the shard index before the step's first pass. So the
shape of the group (world size, micro batch, ZeRO stage) cannot change a weight.

DPO and KTO were drafted against this protocol before it was merged (docs/decisions.md). They taught:

- A pass is filled up with rows whose slot is -1. Such a row must add 0 to every sum. Cross entropy does so by itself,
  because the row has no target; a loss that is not 0 for an empty row must mask it by `Rows.slots_B`.
- No number may come from other rows of the micro batch, which is an accident of the shape. What a loss needs from
  other records is rendered into the slot when data is prepared: `render` sees many records at once. What it needs from
  the whole step is `step_sum`, which runs over all rows of the step before the first backward pass.
- A slot may have several rows (`rows_per_slot`). They share a dropout mask, because it depends on the slot.
- A weight is known from the index alone and additive: trained tokens for SFT, slots for a loss per pair.
- Metrics are sums, too, with the same divisor; a mean over a micro batch would depend on its size.

Shapes: B rows, T tokens, N trained tokens of the micro batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dist_ft.data.stream.loader import MicroBatch
from dist_ft.errors import DataError
from dist_ft.model.chat.render import Renderer
from dist_ft.records import Record, Sample
from dist_ft.slots import IGNORE, SlotTotals


@dataclass(frozen=True)
class Rows:
    """A micro batch on the rank's device.

    Attributes:
        input_ids_BT: Tokens.
        targets_BT: The token that each place must predict, or `IGNORE`.
        position_ids_BT: Positions that restart at each packed sample (transformers then masks samples from one
            another), or None when no row is packed: padding stands at the end, where causal attention keeps it from
            every token that counts, and the kernels are faster.
        slots_B: Slot of each row in the step; -1 for padding.
        step_mean: Sum of `Objective.step_sum` over the step (in an evaluation, over the split) by its weight.
    """

    input_ids_BT: torch.Tensor
    targets_BT: torch.Tensor
    position_ids_BT: torch.Tensor | None
    slots_B: torch.Tensor
    step_mean: float = 0.0

    @classmethod
    def of(cls, micro: MicroBatch, device: torch.device, step_mean: float = 0.0) -> Rows:
        """Copies the loader's arrays to the device."""
        steps = micro.position_ids[:, 1:] - micro.position_ids[:, :-1]
        arrays = [micro.input_ids, micro.targets, micro.position_ids, micro.slots]
        ids, targets, positions, slots = (torch.from_numpy(a).to(device, non_blocking=True) for a in arrays)
        return cls(ids, targets, positions if (steps != 1).any() else None, slots, step_mean)

    @property
    def is_trained_BT(self) -> torch.Tensor:
        """Whether the prediction at a place counts."""
        return self.targets_BT != IGNORE


@dataclass(frozen=True)
class Outputs:
    """The model's predictions of the trained tokens, row after row.

    Attributes:
        logits_NV: In float32.
        targets_N: The right tokens.
    """

    logits_NV: torch.Tensor
    targets_N: torch.Tensor


Sums = Callable[[Outputs, Rows], torch.Tensor]
"""Computes one or more sums over the slots of a pass; padding alone gives zeros, never NaN."""


@dataclass(frozen=True)
class Objective:
    """One training objective.

    Attributes:
        kind: `objective.kind` in the config and in the fingerprint of a checkpoint.
        render: Turns records into samples, many at a time because tokenizers are faster that way. It returns for each
            record its samples, or the error that says why there are none; a record of another type is an error.
        weight: Returns what slots add to the divisor of the loss. It must be additive: the weight of a step is the sum
            of the weights of its slots.
        loss: Returns the loss sum, then a sum for each of `metrics` [1 + len(metrics)].
        metrics: Names of the numbers that every step and evaluation logs beside the loss, divided like the loss.
        eval_metrics: Numbers that only evaluations measure, each with its function [1]; divided like the loss.
        step_sum: Returns a sum that the loss needs from the whole step [1]. It costs a forward pass without gradient
            over all rows of the step. The group's sum, divided like the loss, is `Rows.step_mean`.
        rows_per_slot: Samples that `render` returns for a record, if not any number: 2 for a pair. They are the rows of
            one slot, neighbours in this order in every pass, never packed, and used together or not at all.
        render_key: Everything of the objective that changes the tokens of a record; part of the keys of token shards.
        has_perplexity: Whether the exponential of the mean loss is a perplexity.
    """

    kind: str
    render: Callable[[Sequence[Record], Renderer], list[list[Sample] | DataError]]
    weight: Callable[[SlotTotals], int]
    loss: Sums
    metrics: tuple[str, ...] = ()
    eval_metrics: Mapping[str, Sums] = field(default_factory=dict)
    step_sum: Sums | None = None
    rows_per_slot: int = 1
    render_key: str = ""
    has_perplexity: bool = False

    def eval_sums(self, outputs: Outputs, rows: Rows) -> torch.Tensor:
        """Returns the sums of an evaluation, named by `eval_names`, in float64."""
        extra = [measure(outputs, rows).reshape(1) for measure in self.eval_metrics.values()]
        return torch.cat([sums.double() for sums in (self.loss(outputs, rows), *extra)])

    def eval_names(self) -> list[str]:
        """Returns the names of `eval_sums`."""
        return ["eval_loss", *self.metrics, *self.eval_metrics]
