"""Schedule-free AdamW (Defazio et al. 2024, "The Road Less Scheduled").

Three sequences of weights: z takes the steps, x is the average of z, and gradients are taken at y = b x + (1 - b) z,
with b the first of `optimizer.betas`. The master weights hold y and the state holds z, so x = y + (1 - 1/b)(z - y).
Element-wise, so a flat partition is trained as the whole parameter would be.

The weight of a step in the average is the square of its share of the peak rate. The reference implementation takes the
rate itself; the average is the same, and does not change with `optimizer.lr` on a resume.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """Schedule-free AdamW with decoupled weight decay at y.

    Args:
        params: Parameter groups, each with `lr`, `initial_lr` and `weight_decay`; `lr_scale` is set before each step.
        betas: Share of the average in y, and the decay rate of the second moment.
        eps: Added to the denominator.
    """

    def __init__(self, params: torch.optim.optimizer.ParamsT, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Apply one update to every parameter that has a gradient."""
        assert closure is None, "DeepSpeed passes none"
        for group in self.param_groups:
            share, decay = group["betas"]
            for y in group["params"]:
                if y.grad is None:
                    continue
                state = self.state[y]
                if not state:
                    state.update(step=0, weight_sum=0.0, z=y.detach().clone(), exp_avg_sq=torch.zeros_like(y))
                state["step"] += 1
                weight = group["lr_scale"] ** 2
                state["weight_sum"] += weight
                part = weight / state["weight_sum"]  # of this step in the average
                z, second = state["z"], state["exp_avg_sq"]
                second.mul_(decay).addcmul_(y.grad, y.grad, value=1 - decay)
                denominator = (second / (1 - decay ** state["step"])).sqrt_().add_(group["eps"])
                update = (y.grad / denominator).add_(y, alpha=group["weight_decay"])
                y.lerp_(z, part)
                y.add_(update, alpha=group["lr"] * (share * (1 - part) - 1))
                z.sub_(update, alpha=group["lr"])


def average_(y: torch.Tensor, z: torch.Tensor, share: float) -> None:
    """Turn the weights of training into their average, in place."""
    y.lerp_(z, 1 - 1 / share)
