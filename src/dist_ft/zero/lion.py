"""Lion: the sign of an interpolated momentum (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms").

Element-wise, so a flat partition is trained as the whole parameter would be. DeepSpeed's own Lion is compiled with g++
on first use; this one is plain torch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class Lion(torch.optim.Optimizer):
    """Lion with decoupled weight decay.

    Args:
        params: Parameter groups, each with `lr` and `weight_decay`.
        betas: Weight of the momentum in the update, and the momentum's decay rate.
    """

    def __init__(self, params: torch.optim.optimizer.ParamsT, betas: tuple[float, float]) -> None:
        super().__init__(params, {"betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Apply one update to every parameter that has a gradient."""
        assert closure is None, "DeepSpeed passes none"
        for group in self.param_groups:
            share, decay = group["betas"]
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(parameter))
                state["step"] += 1
                momentum = state["exp_avg"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(momentum.lerp(gradient, 1 - share).sign_(), alpha=-group["lr"])
                momentum.lerp_(gradient, 1 - decay)
