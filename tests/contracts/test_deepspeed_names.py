"""The private DeepSpeed names that `zero/` relies on: an upgrade that moves one fails here first.

Read from source and signatures, and tried on plain tensors; no engine is built. That the values mean what we
think is shown in `tests/numerics/`.
"""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from deepspeed.runtime import constants
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import link_hp_params

from dist_ft.config import Config
from dist_ft.zero.ds_config import build_ds_config
from dist_ft.zero.partitions import _stage12

SLICES = "src/dist_ft/zero/partitions.py"
ENGINE = "src/dist_ft/zero/engine.py"
DS_CONFIG = "src/dist_ft/zero/ds_config.py"
BUILD = "src/dist_ft/train/build.py"


@cache
def _source(of: Any) -> str:
    """The source of a module, class or function; decorated functions show their decorator's only."""
    return inspect.getsource(of)


def _needed(what: str, by: str) -> str:
    return f"DeepSpeed {deepspeed.__version__} has no {what} any more; {by} depends on it"


ATTRIBUTES = [
    # Stages 1 and 2: _stage12.
    (DeepSpeedZeroOptimizer, "bit16_groups", SLICES),
    (DeepSpeedZeroOptimizer, "single_partition_of_fp32_groups", SLICES),
    (DeepSpeedZeroOptimizer, "optimizer", SLICES),
    # bfloat16 with float32 accumulation at stage 1: _stage12.
    (BF16_Optimizer, "bf16_groups", SLICES),
    (BF16_Optimizer, "fp32_groups_flat_partition", SLICES),
    (BF16_Optimizer, "optimizer", SLICES),
    # Stage 3: _stage3 and _refresh_weights.
    (DeepSpeedZeroOptimizer_Stage3, "fp16_groups", SLICES),
    (DeepSpeedZeroOptimizer_Stage3, "fp16_partitioned_groups", SLICES),
    (DeepSpeedZeroOptimizer_Stage3, "fp16_partitioned_groups_flat", SLICES),
    (DeepSpeedZeroOptimizer_Stage3, "fp32_partitioned_groups_flat", SLICES),
    (DeepSpeedZeroOptimizer_Stage3, "persistent_parameters", SLICES),
    (DeepSpeedZeroOptimizer_Stage3, "unflatten", SLICES),
    (DeepSpeedZeroOptimizer_Stage3, "optimizer", SLICES),
    (DeepSpeedEngine, "optimizer", f"{SLICES} and {ENGINE}"),
]


@pytest.mark.parametrize(("cls", "name", "by"), ATTRIBUTES)
def test_an_attribute_is_still_set(cls: type, name: str, by: str) -> None:
    source = "".join(_source(base) for base in cls.__mro__ if base.__module__.startswith("deepspeed"))
    assert re.search(rf"self\.{name}\s*(:[^=\n]+)?=[^=]", source), _needed(f"{cls.__name__}.{name}", by)


def test_the_two_kinds_of_stage_1_are_told_apart() -> None:
    # _stage12 asks for single_partition_of_fp32_groups to tell them apart.
    assert "single_partition_of_fp32_groups" not in _source(BF16_Optimizer), (
        f"BF16_Optimizer has single_partition_of_fp32_groups now; {SLICES} takes it for the other optimizer"
    )


METHODS = [
    (DeepSpeedZeroOptimizer, "update_lp_params", ["self"], SLICES),
    (BF16_Optimizer, "update_lp_params", ["self"], SLICES),
    (DeepSpeedEngine, "zero_optimization_stage", ["self"], f"{SLICES} and {ENGINE}"),
    (DeepSpeedEngine, "get_global_grad_norm", ["self"], ENGINE),
    (DeepSpeedEngine, "step", ["self"], ENGINE),
]


@pytest.mark.parametrize(("cls", "name", "parameters", "by"), METHODS)
def test_a_method_is_called_as_before(cls: type, name: str, parameters: list[str], by: str) -> None:
    method = getattr(cls, name, None)
    assert method is not None, _needed(f"{cls.__name__}.{name}", by)
    found = inspect.signature(method).parameters.values()
    required = [p.name for p in found if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    assert required == parameters, _needed(f"{cls.__name__}.{name}({', '.join(parameters)})", by)


@pytest.mark.parametrize(
    ("function", "names", "by"),
    [
        (deepspeed.initialize, ["model", "optimizer", "config", "dist_init_required"], ENGINE),
        (deepspeed.init_distributed, ["dist_backend", "auto_mpi_discovery", "verbose"], ENGINE),
    ],
)
def test_a_function_takes_the_arguments_we_give(function: Any, names: list[str], by: str) -> None:
    for name in names:
        assert name in inspect.signature(function).parameters, _needed(f"{function.__qualname__}({name}=)", by)


def test_the_loss_can_be_scaled_by_us() -> None:
    # `backward` is decorated, so its signature is not to be had.
    assert re.search(r"def backward\(self, loss, .*scale_wrt_gas=True", _source(DeepSpeedEngine)), _needed(
        "backward(loss, scale_wrt_gas=)", "src/dist_ft/train/loop.py"
    )


def test_the_shared_memory_op_can_be_switched_off() -> None:
    comm = importlib.import_module("deepspeed.comm.torch")
    assert ShareMemCommBuilder.NAME == "deepspeed_shm_comm", _needed("op deepspeed_shm_comm", ENGINE)
    source = _source(comm.build_shm_op)
    assert "__compatible_ops__.get(builder.NAME" in source, _needed("look at ops.__compatible_ops__", ENGINE)
    before = dict(deepspeed.ops.__compatible_ops__)
    try:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False, _needed("dict that stays", ENGINE)
        if get_accelerator().device_name() == "cpu":
            assert comm.build_shm_op() is None, _needed("switch for the shared memory op", ENGINE)
    finally:
        deepspeed.ops.__compatible_ops__.clear()
        deepspeed.ops.__compatible_ops__.update(before)


@pytest.mark.parametrize(
    ("cls", "flats", "groups"),
    [
        (DeepSpeedZeroOptimizer, "single_partition_of_fp32_groups", "bit16_groups"),
        (BF16_Optimizer, "fp32_groups_flat_partition", "bf16_groups"),
    ],
)
def test_partitions_are_linked_to_parameters_when_the_optimizer_is_made(cls: type, flats: str, groups: str) -> None:
    assert "self._link_all_hp_params()" in _source(cls), _needed("link at construction", SLICES)
    link = _source(cls._link_all_hp_params)  # type: ignore[attr-defined]
    assert flats in link, _needed(f"link from {flats}", SLICES)
    assert groups in link, _needed(f"link to {groups}", SLICES)


def test_a_mapping_says_which_elements_of_a_parameter_lie_where_in_a_partition() -> None:
    """Three parameters of 5, 7 and 4 elements flattened and cut into two partitions of 8."""
    parameters = [torch.nn.Parameter(torch.arange(n, dtype=torch.float32)) for n in (5, 7, 4)]
    whole = torch.cat([p.detach() for p in parameters])
    names = dict(zip(parameters, "abc", strict=True))
    found: dict[int, list[tuple[str, int, int, int]]] = {}
    for rank in range(2):
        flat = whole[8 * rank : 8 * rank + 8].clone()
        link_hp_params(
            lp_param_list=parameters,
            flat_hp_partition=flat,
            gradient_dict={},
            offload_gradient_dict=None,
            use_offload=False,
            param_group_index=0,
            partition_start=8 * rank,
            partition_size=8,
            dp_group=None,
        )
        optimizer = SimpleNamespace(bit16_groups=[parameters], single_partition_of_fp32_groups=[flat])
        fragments = list(_stage12(optimizer, names))
        found[rank] = [(f.param, f.start, f.master.numel(), f.offset) for f in fragments]
        for fragment in fragments:
            # An element's value is its index in its parameter.
            count = fragment.master.numel()
            expected = torch.arange(fragment.start, fragment.start + count, dtype=torch.float32)
            assert torch.equal(fragment.master, expected), _needed("mapping as it was", SLICES)
            fragment.master[0] = -1.0
            assert flat[fragment.offset] == -1.0, "the fragment is a copy; loading would change nothing"
    assert found == {0: [("a", 0, 5, 0), ("b", 0, 3, 5)], 1: [("b", 3, 4, 0), ("c", 0, 4, 4)]}, _needed(
        "_hp_mapping with lp_fragment_address and get_hp_fragment_address()", SLICES
    )


def test_stage_3_gives_partitioned_parameters_their_names_and_methods() -> None:
    source = _source(partition_parameters)
    for name in ("ds_tensor", "ds_numel", "partition", "all_gather"):
        assert f"param.{name} = " in source, _needed(f"param.{name}", SLICES)
    assert "param.ds_tensor.ds_numel = partition_size" in source, _needed("ds_tensor.ds_numel", SLICES)
    assert re.search(r"start = partition_size \* self\._partition_rank\(param\)", source), _needed(
        "partition that starts at rank * ds_tensor.ds_numel", SLICES
    )


@pytest.mark.parametrize("name", ["partition", "all_gather"])
def test_stage_3_parameters_take_a_list(name: str) -> None:
    source = _source(partition_parameters)
    assert re.search(rf"def {name}\(param_list=None", source), _needed(f"param.{name}(param_list)", SLICES)


def test_stage_3_flattens_a_group_in_the_order_of_its_parameters() -> None:
    source = _source(DeepSpeedZeroOptimizer_Stage3)
    assert "self.fp16_partitioned_groups.append([param.ds_tensor for param in sub_group])" in source, _needed(
        "fp16_partitioned_groups in the order of fp16_groups", SLICES
    )


def _config(stage: int, dtype: str, offload: bool = False) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "r"},
            "model": {"name": "tiny-random", "dtype": dtype},
            "data": {"train": [{"source": "embedded:orders/train"}]},
            "zero": {"stage": stage, "offload": offload},
        }
    )


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_key_of_our_config_is_one_of_deepspeeds(stage: int, dtype: str, offload: bool, on_gpu: bool) -> None:
    ds_config = build_ds_config(
        _config(stage, dtype, offload),
        world_size=2,
        micro_batch_size=3,
        num_params=10_000_000,
        num_trained=1_000_000,
        on_gpu=on_gpu,
    )
    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {field.alias for field in fields.values() if field.alias}
    unknown = set(ds_config["zero_optimization"]) - known
    assert not unknown, _needed(f"zero_optimization.{sorted(unknown)}", DS_CONFIG)
    DeepSpeedZeroConfig(**ds_config["zero_optimization"])
    plain = {value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str)}
    unknown = set(ds_config) - plain - {"zero_optimization", "bf16"}
    assert not unknown, _needed(f"config key {sorted(unknown)}", DS_CONFIG)
    assert set(ds_config.get("data_types", {})) <= {constants.GRAD_ACCUM_DTYPE}, _needed("data_types", DS_CONFIG)


def test_bfloat16_with_float32_accumulation_at_stage_1_is_the_bf16_optimizer() -> None:
    source = _source(DeepSpeedEngine)
    rule = re.search(
        r"model_dtype == torch\.bfloat16 and grad_accum_dtype == torch\.float32 and "
        r"self\.zero_optimization_stage\(\s*\) == 1",
        source,
    )
    assert rule, _needed("rule that picks BF16_Optimizer", f"{SLICES} and Config.zero_stage")


def test_a_parameter_can_be_cut_while_it_is_empty() -> None:
    sharding = "src/dist_ft/zero/sharding.py"
    for name in ("config_dict_or_path", "module"):
        assert name in inspect.signature(partition_parameters.Init.__init__).parameters, _needed(name, sharding)
    cut = inspect.signature(partition_parameters.Init._convert_to_deepspeed_param)
    assert list(cut.parameters) == ["self", "param"], _needed("Init._convert_to_deepspeed_param(param)", sharding)
    source = _source(partition_parameters)
    for name in ("param.ds_shape = ", "self.local_device = "):
        assert name in source, _needed(name, sharding)
    # A model that is cut already keeps its parts; what is added to it, such as an adapter, is cut later.
    offload = importlib.import_module("deepspeed.runtime.zero.parameter_offload")
    assert "if not is_zero_param(p)" in _source(offload.DeepSpeedZeRoOffload._convert_to_zero_parameters), _needed(
        "rule that leaves cut parameters alone", sharding
    )
