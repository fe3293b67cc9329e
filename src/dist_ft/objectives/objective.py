"""Defines the protocol of objectives: everything that training needs to know about a loss.

The trainer, the evaluation and the data preparation use an objective only through `Objective`. All numbers that they
add up are *sums over slots*, and the divisor of a step comes from the shard index before the step's first pass. So the
shape of the group (world size, micro batch, ZeRO stage) cannot change a weight.

DPO and KTO were drafted against this protocol before it was merged (docs/decisions.md). They taught:

- A pass is filled up with rows whose slot is -1. Such a row must add 0 to every sum: it has no target and no sample.
- No number may come from other rows of the micro batch, which is an accident of the shape. What a loss needs from
  other records is put into the slot when data is prepared (`adds_mismatched`). What it needs from the whole step is
  `step_sum`, which runs over all rows of the step before the first backward pass.
- A record may have several samples (`rows_per_slot`): rows of one slot, or neighbours in a packed row. A loss sees
  them alike, as samples with neighbouring numbers (`sample_sums`), and padding has none.
- A weight is known from the index alone and additive: trained tokens for SFT, samples for a loss per pair.
- Metrics are sums, too, with the same divisor or with another of the sums; a mean over a micro batch would depend on
  its size.
- A frozen model (a reference, a teacher) stays out of the ranks: a `Scorer` says what a task (`jobs/score.py`) writes
  beside the tokens, and the loss finds it in `Rows.numbers`.

Shapes: B rows, T tokens, N trained tokens of the micro batch, S samples, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dist_ft.data.shards.columns import Column
from dist_ft.data.stream.loader import MicroBatch, RankLayout
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
        samples_BT: Sample of each place, counted over the micro batch; -1 for padding.
        num_samples: Samples of the micro batch.
        numbers: Columns of numbers; see `column`.
        step_mean: Sum of `Objective.step_sum` over the step (in an evaluation, over the split) by its weight.
    """

    input_ids_BT: torch.Tensor
    targets_BT: torch.Tensor
    position_ids_BT: torch.Tensor | None
    slots_B: torch.Tensor
    samples_BT: torch.Tensor
    num_samples: int = 0
    numbers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    step_mean: float = 0.0

    @classmethod
    def of(cls, micro: MicroBatch, device: torch.device, step_mean: float = 0.0) -> Rows:
        """Copy the loader's arrays to the device."""
        steps = micro.position_ids[:, 1:] - micro.position_ids[:, :-1]
        arrays = [micro.input_ids, micro.targets, micro.position_ids, micro.slots, micro.samples]
        ids, targets, positions, slots, samples = (torch.from_numpy(a).to(device, non_blocking=True) for a in arrays)
        numbers = {name: torch.from_numpy(a).to(device, non_blocking=True) for name, a in micro.numbers.items()}
        packed = positions if (steps != 1).any() else None
        return cls(ids, targets, packed, slots, samples, micro.num_samples, numbers, step_mean)

    @property
    def is_trained_BT(self) -> torch.Tensor:
        """Whether the prediction at a place counts."""
        return self.targets_BT != IGNORE

    @property
    def places_BT(self) -> torch.Tensor:
        """Index of each place in its sample."""
        if self.position_ids_BT is not None:
            return self.position_ids_BT
        return torch.arange(self.input_ids_BT.shape[1], device=self.slots_B.device).expand_as(self.input_ids_BT)

    def column(self, column: Column) -> torch.Tensor:
        """Return the entries of a column: of the samples [S, ...], or of the trained tokens [N, ...].

        They stand in the order of `Outputs`; padding alone has none.
        """
        if column.name in self.numbers:
            return self.numbers[column.name]
        assert self.num_samples == 0, f"the shards have no column {column.name}"
        return torch.from_numpy(column.empty()).to(self.slots_B.device)

    def sample_sums(self, values_N: torch.Tensor) -> torch.Tensor:
        """Add up numbers of trained tokens by sample [S]."""
        samples_N = self.samples_BT[self.is_trained_BT]
        return values_N.new_zeros(self.num_samples).index_add(0, samples_N, values_N)


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
class Scorer:
    """What a frozen model writes beside the tokens, before they are trained on.

    Attributes:
        columns: What is written.
        score: Returns the entries of each column over the rows of a pass: [S, ...] or [N, ...], on any device.
        model: Path of the model, or of an adapter of the run's; None is the model of the run's first step.
        setting: Key of the config that names the model, for messages.
        key: Everything besides model and dtype that changes a number, such as a temperature.
        revision: Branch, tag or commit of a model on a hub.
        is_of_run: Whether an adapter belongs to the run's base model, as a reference's does. Otherwise, to the model
            that it names itself.
        num_likeliest: Tokens of the vocabulary that are written down at each place, of which there must be so many.
    """

    columns: tuple[Column, ...]
    score: Callable[[Outputs, Rows], tuple[torch.Tensor, ...]]
    model: str | None
    setting: str
    key: str = ""
    revision: str | None = None
    is_of_run: bool = True
    num_likeliest: int = 0


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
        divided_by: Metric → the metric by whose sum it is divided instead, such as the rows with a label.
        differences: Further metric → the two metrics whose difference it is.
        eval_metrics: Numbers that only evaluations measure, each with its function [1]; divided like the loss.
        step_sum: Returns a sum that the loss needs from the whole step [1]. It costs a forward pass without gradient
            over the rows of the step. The group's sum, divided like the loss, is `Rows.step_mean`.
        rows_per_slot: Samples of a record, if not any number: 2 for a pair. They are neighbours in this order in every
            pass, as rows of one slot or packed into one row, and used together or not at all.
        sample_names: What the samples of a record are called where they are shown; empty for one kind.
        columns: Names of the numbers that `render` gives each sample (`Sample.numbers`).
        adds_mismatched: Whether each sample is followed by its prompt with the answer of the sample before in the
            token shard; then `render` returns one sample for a record, and `rows_per_slot` is 2. `step_sum` sees the
            mismatched samples alone, `loss` the others.
        scorer: What a frozen model says about the samples, if the loss needs it.
        render_key: Everything of the objective that changes the tokens of a record; part of the keys of token shards.
        has_perplexity: Whether the exponential of the mean loss is a perplexity.
    """

    kind: str
    render: Callable[[Sequence[Record], Renderer], list[list[Sample] | DataError]]
    weight: Callable[[SlotTotals], int]
    loss: Sums
    metrics: tuple[str, ...] = ()
    divided_by: Mapping[str, str] = field(default_factory=dict)
    differences: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    eval_metrics: Mapping[str, Sums] = field(default_factory=dict)
    step_sum: Sums | None = None
    rows_per_slot: int = 1
    sample_names: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    adds_mismatched: bool = False
    scorer: Scorer | None = None
    render_key: str = ""
    has_perplexity: bool = False

    def layout(self, rank: int, world_size: int, micro_batch_size: int, is_packed: bool) -> RankLayout:
        """Return the part of a batch that a rank computes."""
        rows = 1 if is_packed or self.adds_mismatched else self.rows_per_slot
        return RankLayout(rank, world_size, micro_batch_size, rows, self.adds_mismatched)

    def means(self, names: Sequence[str], sums: Sequence[float], divisor: float) -> dict[str, float | None]:
        """Return the numbers that sums stand for.

        Args:
            names: `metrics`, or `eval_names`.
            sums: The sum of each.
            divisor: `weight` of all that was added up.

        Returns:
            The mean of each; None where nothing was counted.
        """
        by_name = dict(zip(names, sums, strict=True))
        found: dict[str, float | None] = {}
        for name, total in by_name.items():
            over = by_name[self.divided_by[name]] if name in self.divided_by else divisor
            found[name] = total / over if over else None
        for name, (one, other) in self.differences.items():
            left, right = found[one], found[other]
            found[name] = None if left is None or right is None else left - right
        return found

    def eval_sums(self, outputs: Outputs, rows: Rows) -> torch.Tensor:
        """Return the sums of an evaluation, named by `eval_names`, in float64."""
        extra = [measure(outputs, rows).reshape(1) for measure in self.eval_metrics.values()]
        return torch.cat([sums.double() for sums in (self.loss(outputs, rows), *extra)])

    def eval_names(self) -> list[str]:
        """Return the names of `eval_sums`."""
        return ["eval_loss", *self.metrics, *self.eval_metrics]
