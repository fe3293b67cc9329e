"""The optimizers on plain tensors: their formulas, and that a flat vector may be cut anywhere."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import nn

from dist_ft.config.training_sections import AdamWConfig, AnyOptimizer, LionConfig, ScheduleFreeAdamWConfig
from dist_ft.slices import KNOWN_KINDS
from dist_ft.zero.optimizers import Optimizer, optimizer_of
from dist_ft.zero.schedule_free import average_

CONFIGS: list[AnyOptimizer] = [
    AdamWConfig(lr=1e-2, weight_decay=0.1),
    LionConfig(lr=1e-2, weight_decay=0.1),
    ScheduleFreeAdamWConfig(lr=1e-2, weight_decay=0.1),
]
NUM_STEPS = 12
WARMUP = 5


def kind_of(config: AnyOptimizer) -> str:
    return config.kind


def scale(step: int) -> float:
    return min(1.0, (step + 1) / WARMUP)


def gradient(weights: torch.Tensor) -> torch.Tensor:
    return 3 * torch.sin(weights)


class Trained:
    """A vector in pieces, each a parameter, trained on a gradient of each element."""

    def __init__(self, config: AnyOptimizer, *pieces: torch.Tensor) -> None:
        self.optimizer: Optimizer = optimizer_of(config)
        self.config = config
        self.pieces = [nn.Parameter(piece.clone()) for piece in pieces]
        decay = config.weight_decay
        self.inner = self.optimizer.build(
            [{"params": self.pieces, "lr": config.lr, "initial_lr": config.lr, "weight_decay": decay}]
        )

    @property
    def weights(self) -> torch.Tensor:
        return torch.cat([piece.detach() for piece in self.pieces])

    def step(self, index: int) -> None:
        for piece in self.pieces:
            piece.grad = gradient(piece.detach())
        for group in self.inner.param_groups:
            group["lr"] = self.config.lr * scale(index)
            group["lr_scale"] = scale(index)
        self.inner.step()

    def state(self, kind: str) -> torch.Tensor:
        return torch.cat([self.inner.state[piece][kind] for piece in self.pieces])


@pytest.mark.parametrize("config", CONFIGS, ids=kind_of)
def test_a_vector_that_is_cut_trains_like_the_whole(config: AnyOptimizer) -> None:
    torch.manual_seed(0)
    start = torch.randn(101)
    whole, cut = Trained(config, start), Trained(config, start[:1], start[1:60], start[60:])
    for index in range(NUM_STEPS):
        whole.step(index)
        cut.step(index)
    # Kernels take eight elements at a time and the rest singly, with other roundings.
    torch.testing.assert_close(cut.weights, whole.weights, rtol=1e-5, atol=1e-6)
    for kind in whole.optimizer.state:
        torch.testing.assert_close(cut.state(kind), whole.state(kind), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=kind_of)
def test_state_that_is_put_back_goes_on_bitwise(config: AnyOptimizer) -> None:
    torch.manual_seed(1)
    whole = Trained(config, torch.randn(33))
    for index in range(4):
        whole.step(index)
    resumed = Trained(config, whole.weights)
    (old,), (new,) = whole.pieces, resumed.pieces
    numbers = {name: float(whole.inner.state[old][name]) for name in whole.optimizer.numbers}
    entry = resumed.optimizer.empty_state(new, 4, numbers, is_fused=True)
    for kind in resumed.optimizer.state:
        tensor = entry[kind]
        assert isinstance(tensor, torch.Tensor)
        tensor.copy_(whole.inner.state[old][kind])
    assert set(entry) == set(whole.inner.state[old])
    resumed.inner.state[new] = entry
    for index in range(4, NUM_STEPS):
        whole.step(index)
        resumed.step(index)
        assert torch.equal(resumed.weights, whole.weights)
    assert int(resumed.inner.state[new]["step"]) == NUM_STEPS


def test_lion_moves_every_element_by_the_rate() -> None:
    config = LionConfig(lr=1e-2, betas=(0.8, 0.9))
    torch.manual_seed(2)
    start = torch.randn(20, dtype=torch.float64)
    found, momentum, weights = Trained(config, start), torch.zeros_like(start), start.clone()
    for index in range(NUM_STEPS):
        slope = gradient(weights)
        weights = weights - 1e-2 * scale(index) * torch.sign(0.8 * momentum + 0.2 * slope)
        momentum = 0.9 * momentum + 0.1 * slope
        found.step(index)
        torch.testing.assert_close(found.weights, weights)
        torch.testing.assert_close(found.state("exp_avg"), momentum)


def test_schedule_free_is_the_three_sequences_of_the_paper() -> None:
    config = ScheduleFreeAdamWConfig(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99))
    torch.manual_seed(3)
    start = torch.randn(20, dtype=torch.float64)
    found, x, z, second, total = Trained(config, start), start.clone(), start.clone(), torch.zeros_like(start), 0.0
    for index in range(NUM_STEPS):
        y = 0.9 * x + 0.1 * z
        torch.testing.assert_close(found.weights, y)
        slope = gradient(y)
        second = 0.99 * second + 0.01 * slope**2
        update = slope / ((second / (1 - 0.99 ** (index + 1))).sqrt() + 1e-8) + 0.1 * y
        z = z - 1e-2 * scale(index) * update
        total += scale(index) ** 2
        x = x + (z - x) * scale(index) ** 2 / total
        found.step(index)
    averaged = found.weights
    average_(averaged, found.state("z"), 0.9)
    torch.testing.assert_close(averaged, x)
    assert (averaged - found.weights).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("config", "state_bytes", "fingerprint"),
    [
        (AdamWConfig(), 8, "adamw"),
        (LionConfig(), 4, "lion"),
        (ScheduleFreeAdamWConfig(betas=(0.95, 0.99)), 8, "schedule_free_adamw of betas[0]=0.95"),
    ],
    ids=str,
)
def test_the_table_says_what_is_kept(config: Any, state_bytes: int, fingerprint: str) -> None:
    optimizer = optimizer_of(config)
    assert optimizer.state_bytes == state_bytes
    assert optimizer.fingerprint == fingerprint
    assert set(optimizer.state) < set(KNOWN_KINDS)


def test_checkpoints_can_hold_the_state_of_every_optimizer() -> None:
    sections = get_args(get_args(AnyOptimizer)[0])
    assert len(sections) >= 3
    for section in sections:
        assert set(optimizer_of(section()).state) <= set(KNOWN_KINDS)
