"""The optimizer's groups: which parameter gets which learning rate and decay."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dist_ft.config.training_sections import AdamWConfig, GroupConfig, OptimizerConfig
from dist_ft.zero.engine import parameter_groups

SHAPES = {
    "embed_tokens.weight": (6, 4),
    "layers.0.q_proj.weight": (4, 4),
    "layers.0.q_proj.bias": (4,),
    "layers.0.norm.weight": (4,),
    "layers.1.q_proj.weight": (4, 4),
    "layers.1.q_proj.bias": (4,),
    "layers.1.norm.weight": (4,),
    "layers.1.experts.weight": (2, 4, 4),
    "scale": (),
}
MATRICES = {name for name, shape in SHAPES.items() if len(shape) > 1}
PATTERNS = ["weight$", "bias", r"layers\.0\.", r"layers\.1\.", "norm", "q_proj", "embed", "^scale$", "no_such", "."]

Settings = tuple[float, float]


def _parameters(names: list[str] | None = None) -> dict[nn.Parameter, str]:
    return {nn.Parameter(torch.ones(SHAPES[name])): name for name in (names or list(SHAPES))}


def _config(*groups: dict[str, Any], lr: float = 1e-3, weight_decay: float = 0.1) -> OptimizerConfig:
    return AdamWConfig.model_validate({"lr": lr, "weight_decay": weight_decay, "groups": list(groups)})


def _settings(config: OptimizerConfig, parameters: dict[nn.Parameter, str] | None = None) -> dict[str, Settings]:
    """Name → (lr, weight decay); fails when a parameter is in two groups or in none."""
    names = parameters or _parameters()
    found: dict[str, Settings] = {}
    for group in parameter_groups(names, config):
        for parameter in group["params"]:
            assert names[parameter] not in found
            found[names[parameter]] = (group["lr"], group["weight_decay"])
    assert set(found) == set(names.values())
    return found


def test_by_default_matrices_are_decayed_and_vectors_are_not() -> None:
    found = _settings(_config())
    assert found == {name: (1e-3, 0.1 if name in MATRICES else 0.0) for name in SHAPES}


def test_without_decay_there_is_one_group() -> None:
    (group,) = parameter_groups(_parameters(), _config(weight_decay=0.0))
    assert len(group["params"]) == len(SHAPES)


def test_a_cut_parameter_is_judged_by_its_whole_shape() -> None:
    """At stage 3 what a rank holds of a matrix is empty or flat."""
    parameters: dict[nn.Parameter, str] = {}
    for name, shape in SHAPES.items():
        parameter: Any = nn.Parameter(torch.empty(0))
        parameter.ds_shape = torch.Size(shape)
        parameters[parameter] = name
    assert _settings(_config(), parameters) == _settings(_config())


@pytest.mark.parametrize(
    ("group", "matrix", "vector"),
    [
        ({}, (1e-3, 0.1), (1e-3, 0.0)),
        ({"lr": 5e-5}, (5e-5, 0.1), (5e-5, 0.0)),
        ({"weight_decay": 0.3}, (1e-3, 0.3), (1e-3, 0.3)),  # said of all that matches, norms and biases too
        ({"weight_decay": 0.0}, (1e-3, 0.0), (1e-3, 0.0)),
        ({"lr": 0, "weight_decay": 0.3}, (0.0, 0.3), (0.0, 0.3)),
    ],
)
def test_a_group_says_what_it_says_and_keeps_the_rest(
    group: dict[str, float], matrix: Settings, vector: Settings
) -> None:
    found = _settings(_config({"pattern": r"layers\.0\.", **group}))
    default = _settings(_config())
    for name in SHAPES:
        expected = matrix if name in MATRICES else vector
        assert found[name] == (expected if name.startswith("layers.0.") else default[name])


def test_a_pattern_is_searched_anywhere_in_the_name() -> None:
    found = _settings(_config({"pattern": "proj", "lr": 1.0}))
    assert {name for name, (lr, _) in found.items() if lr == 1.0} == {name for name in SHAPES if "proj" in name}
    anchored = _settings(_config({"pattern": "^q_proj", "lr": 1.0}))
    assert anchored == _settings(_config())


def test_the_first_pattern_that_matches_decides_alone() -> None:
    """A later one does not fill in what the first leaves out."""
    narrow, wide = {"pattern": "norm", "lr": 1.0}, {"pattern": r"layers\.", "lr": 2.0, "weight_decay": 0.5}
    found = _settings(_config(narrow, wide))
    assert found["layers.0.norm.weight"] == (1.0, 0.0)
    assert found["layers.0.q_proj.bias"] == (2.0, 0.5)
    assert found["embed_tokens.weight"] == (1e-3, 0.1)
    turned = _settings(_config(wide, narrow))
    assert turned["layers.0.norm.weight"] == (2.0, 0.5)


def test_equal_settings_share_a_group() -> None:
    config = _config({"pattern": r"layers\.0\.", "lr": 2.0}, {"pattern": r"layers\.1\.", "lr": 2.0})
    pairs = [(group["lr"], group["weight_decay"]) for group in parameter_groups(_parameters(), config)]
    assert len(pairs) == len(set(pairs)) == 4  # two rates, decayed or not


def test_the_order_is_that_of_the_parameters() -> None:
    """Slices of the flat optimizer state are cut by it."""
    names = list(SHAPES)
    for group in parameter_groups(parameters := _parameters(), _config({"pattern": "q_proj", "lr": 2.0})):
        positions = [names.index(parameters[parameter]) for parameter in group["params"]]
        assert positions == sorted(positions)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_peak_of_each_group_survives_its_schedule(scale: float) -> None:
    """What `apply_step` makes of the groups: every rate times the schedule's scale, from the peak each time."""
    groups = parameter_groups(_parameters(), _config({"pattern": "norm", "lr": 0.5}, {"pattern": "bias", "lr": 0}))
    optimizer = torch.optim.AdamW(groups, lr=7.0)
    assert {group["initial_lr"] for group in optimizer.param_groups} == {1e-3, 0.5, 0.0}
    for group in optimizer.param_groups:
        assert group["initial_lr"] == group["lr"]
        group["lr"] = group["initial_lr"] * scale
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3 * scale, 0.5 * scale, 0.0}


def test_a_rate_of_zero_leaves_the_parameters_as_they_were() -> None:
    parameters = _parameters()
    optimizer = torch.optim.AdamW(
        parameter_groups(parameters, _config({"pattern": r"layers\.0\.", "lr": 0, "weight_decay": 0.5})), fused=True
    )
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter, name in parameters.items():
        assert torch.equal(parameter.detach(), torch.ones(SHAPES[name])) == name.startswith("layers.0.")


def test_decay_alone_moves_what_is_decayed() -> None:
    """With gradients of zero AdamW's update is the decay: 1 → 1 - lr · decay."""
    parameters = _parameters()
    config = _config({"pattern": "norm", "weight_decay": 0.5}, {"pattern": "embed", "weight_decay": 0}, lr=0.5)
    optimizer = torch.optim.AdamW(parameter_groups(parameters, config))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, name in parameters.items():
        decay = 0.5 if "norm" in name else 0.1 if name in MATRICES and "embed" not in name else 0.0
        torch.testing.assert_close(parameter.detach(), torch.full(SHAPES[name], 1 - 0.5 * decay))


OPTIONAL = st.none() | st.sampled_from([0.0, 1e-4, 0.1, 1.0])
GROUPS = st.lists(
    st.fixed_dictionaries({"pattern": st.sampled_from(PATTERNS), "lr": OPTIONAL, "weight_decay": OPTIONAL}), max_size=4
)


@given(
    names=st.permutations(list(SHAPES)).flatmap(lambda names: st.integers(1, len(names)).map(lambda n: names[:n])),
    groups=GROUPS,
    weight_decay=st.sampled_from([0.0, 0.1]),
)
@settings(deadline=None)
def test_each_parameter_is_in_one_group_with_its_own_settings(
    names: list[str], groups: list[dict[str, Any]], weight_decay: float
) -> None:
    config = _config(*groups, weight_decay=weight_decay)
    parameters = _parameters(names)
    made = parameter_groups(parameters, config)
    pairs = [(group["lr"], group["weight_decay"]) for group in made]
    assert len(pairs) == len(set(pairs))
    assert all(group["params"] and group["initial_lr"] == group["lr"] for group in made)
    assert sum(len(group["params"]) for group in made) == len(names)
    for name, found in _settings(config, parameters).items():
        lr, decay = 1e-3, weight_decay if name in MATRICES else 0.0
        for group in groups:
            if re.search(group["pattern"], name):
                lr = lr if group["lr"] is None else group["lr"]
                decay = decay if group["weight_decay"] is None else group["weight_decay"]
                break
        assert found == (lr, decay)


def test_lora_plus_gives_matrices_b_a_larger_rate_unless_a_group_says_another() -> None:
    halves = [f"{layer}.lora_{half}.default.weight" for layer in "xy" for half in "AB"]
    names = {nn.Parameter(torch.zeros(2, 2)): name for name in halves}
    config = AdamWConfig(lr=1e-3, lora_plus_ratio=16.0, groups=[GroupConfig(pattern=r"^y\.lora_B", lr=0.5)])
    rates = {names[p]: group["lr"] for group in parameter_groups(names, config) for p in group["params"]}
    assert {name[:8]: rate for name, rate in rates.items()} == {
        "x.lora_A": 1e-3, "x.lora_B": 16e-3, "y.lora_A": 1e-3, "y.lora_B": 0.5,
    }  # fmt: skip
