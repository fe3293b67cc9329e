"""The table of optimizers: for each, what the rest of the code must know.

A new optimizer is a section in `config/training_sections.py` and a row here. Its update must be element-wise: ZeRO cuts
parameters into flat partitions at any element, and only then is the result the same at every stage and world size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import nn

from dist_ft.config.training_sections import AdamWConfig, AnyOptimizer, LionConfig, ScheduleFreeAdamWConfig
from dist_ft.slices import ADAM_STATE
from dist_ft.zero.lion import Lion
from dist_ft.zero.schedule_free import ScheduleFreeAdamW


class ParamGroup(TypedDict):
    """Parameters of one learning rate and weight decay; `initial_lr` is the peak, as in torch's schedulers."""

    params: list[nn.Parameter]
    lr: float
    initial_lr: float
    weight_decay: float


StateEntry = dict[str, torch.Tensor | float]
"""The state that an optimizer keeps for one tensor."""


@dataclass(frozen=True)
class Optimizer:
    """A row of the table, for a section of the config.

    Attributes:
        state: Kinds of state, each a float32 tensor of the parameter's shape.
        fingerprint: Whose state this is: what must be equal for a resume.
        build: Makes the optimizer from its groups.
        numbers: Names of what it keeps of each tensor besides `step`, equal for all of them.
        average_share: Share of the average in the weights, where held-out numbers and exports use the average.
        is_listed: Whether DeepSpeed lists it as tested with ZeRO.
    """

    state: tuple[str, ...]
    fingerprint: str
    build: Callable[[list[ParamGroup]], torch.optim.Optimizer]
    numbers: tuple[str, ...] = ()
    average_share: float | None = None
    is_listed: bool = False

    @property
    def state_bytes(self) -> int:
        """Bytes of state of a trained element, its float32 master aside."""
        return 4 * len(self.state)

    def empty_state(self, flat: torch.Tensor, step: int, numbers: Mapping[str, float], is_fused: bool) -> StateEntry:
        """Return what the optimizer makes of a tensor in its first step, with the counters of a later one."""
        counters: StateEntry = {"step": step, **{name: numbers[name] for name in self.numbers}}
        if self.is_listed:  # torch's own count in tensors
            counters["step"] = torch.tensor(float(step), device=flat.device if is_fused else "cpu")
        return counters | {kind: torch.zeros_like(flat, dtype=torch.float32) for kind in self.state}


def optimizer_of(config: AnyOptimizer) -> Optimizer:
    """Return the table's row for a section of the config."""
    match config:
        case AdamWConfig():
            return Optimizer(
                state=ADAM_STATE,
                fingerprint="adamw",
                # One pass over a flat partition instead of eight: on CPU too, where it is bound by memory.
                build=lambda groups: torch.optim.AdamW(
                    groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
                ),
                is_listed=True,
            )
        case LionConfig():
            return Optimizer(
                state=("exp_avg",),
                fingerprint="lion",
                build=lambda groups: Lion(groups, config.betas),
            )
        case ScheduleFreeAdamWConfig():
            share = config.betas[0]
            return Optimizer(
                state=("z", "exp_avg_sq"),
                fingerprint=f"schedule_free_adamw of betas[0]={share}",  # with another one, y means other weights
                build=lambda groups: ScheduleFreeAdamW(groups, config.betas, config.eps),
                numbers=("weight_sum",),
                average_share=share,
            )
