"""LoRA through PEFT: names, initialisation, errors."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dist_ft.config import Config
from dist_ft.errors import ConfigError, ModelError
from dist_ft.jobs.prepare import make_fingerprint
from dist_ft.model.adapter import adapter_hash, attach_adapter, export_names, load_adapter, save_adapter_config
from dist_ft.model.embedded import materialise

MODULES: list[Any] = ["all-linear", ["q_proj", "v_proj"], ["down_proj"]]


def _config(seed: int = 0, **method: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "r", "seed": seed},
            "model": {"name": "tiny-random", "dtype": "float32"},
            "method": {"kind": "lora", "r": 4, **method},
            "data": {"train": [{"source": "embedded:orders/train"}]},
        }
    )


def _base(dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(materialise("tiny-random"), dtype=dtype)


def _trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def _adapter(directory: Path, seed: int = 0) -> Any:
    """An adapter on disk whose matrices are all different from fresh ones."""
    model = attach_adapter(_base(), _config(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("modules", MODULES)
def test_exported_names_are_those_that_peft_writes(tmp_path: Path, modules: Any) -> None:
    model = attach_adapter(_base(), _config(target_modules=modules))
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    names = export_names(model)
    assert set(names.values()) == set(written)
    assert set(names) == set(_trained(model))
    for name, key in names.items():
        assert torch.equal(model.get_parameter(name), written[key])


def test_a_full_model_is_exported_under_its_own_names() -> None:
    model = _base()
    assert export_names(model) == {name: name for name, _ in model.named_parameters()}


def test_names_are_the_same_without_memory_for_weights() -> None:
    config = _base().config
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert export_names(attach_adapter(empty, _config())) == export_names(attach_adapter(_base(), _config()))


def test_only_the_matrices_are_trained_and_the_base_is_untouched() -> None:
    before = {name: p.detach().clone() for name, p in _base().named_parameters()}
    model = attach_adapter(_base(), _config())
    assert all("lora_" in name for name in _trained(model))
    for name, parameter in model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")])


def test_all_linear_leaves_the_output_layer_alone() -> None:
    names = export_names(attach_adapter(_base(), _config()))
    assert not [name for name in names if "lm_head" in name]
    assert len(names) == 2 * 7 * 2  # A and B of 7 layers in 2 blocks


def test_the_matrices_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = _trained(attach_adapter(_base(), _config(seed=5)))
    torch.manual_seed(2)
    torch.rand(7)
    two = _trained(attach_adapter(_base(), _config(seed=5)))
    other = _trained(attach_adapter(_base(), _config(seed=6)))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("modules", ["all-linear", ["no_such_layer"]])
def test_the_global_generator_is_left_as_it_was(modules: Any) -> None:
    model = _base()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    if modules == "all-linear":
        attach_adapter(model, _config())
    else:
        with pytest.raises(ConfigError):
            attach_adapter(model, _config(target_modules=modules))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_fresh_adapter_changes_nothing() -> None:
    ids = torch.arange(20)[None]
    model = attach_adapter(_base(), _config()).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, _base().eval()(input_ids=ids).logits)


def test_the_matrices_have_the_dtype_of_the_base() -> None:
    model = attach_adapter(_base(torch.bfloat16), _config())
    assert {tensor.dtype for tensor in _trained(model).values()} == {torch.bfloat16}


@pytest.mark.parametrize("modules", [["no_such_layer"], ["norm"]])
def test_modules_that_cannot_be_adapted_are_a_config_error(modules: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"method\.target_modules=.*tiny-random"):
        attach_adapter(_base(), _config(target_modules=modules))


def test_one_wrong_name_among_right_ones_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="v_prj"):
        attach_adapter(_base(), _config(target_modules=["q_proj", "v_prj"]))


def test_training_goes_on_from_an_adapter_on_disk(tmp_path: Path) -> None:
    stored = _trained(_adapter(tmp_path, seed=1))
    found = _trained(attach_adapter(_base(), _config(seed=2, init_from=str(tmp_path))))
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)


def test_an_adapter_without_weights_is_a_config_error(tmp_path: Path) -> None:
    _adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"method\.init_from"):
        attach_adapter(_base(), _config(init_from=str(tmp_path)))


def test_an_adapter_with_broken_weights_is_refused(tmp_path: Path) -> None:
    _adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not tensors" * 50)
    with pytest.raises(ModelError, match=r"method\.init_from=.*is no safetensors file"):
        attach_adapter(_base(), _config(init_from=str(tmp_path)))


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key if "layers.1" not in key else None,
        lambda key: key.replace("lora_A.weight", "lora_A.mine.weight"),
        lambda key: f"base_model.model.{key}",
    ],
    ids=["a layer is missing", "the adapter's own name", "a prefix twice"],
)
def test_an_adapter_whose_tensors_are_not_peft_s_is_refused(tmp_path: Path, rename: Any) -> None:
    """PEFT starts them at random, with a warning (its issues 1579, 2566, 2699, 2885)."""
    _adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({new: t for key, t in load_file(file).items() if (new := rename(key))}, file, {"format": "pt"})
    with (
        warnings.catch_warnings(),
        pytest.raises(ConfigError, match=r"method\.init_from=.* lacks .* tensors are missing"),
    ):
        warnings.simplefilter("ignore")
        attach_adapter(_base(), _config(init_from=str(tmp_path)))


def test_an_adapter_of_another_rank_than_the_config_is_a_config_error(tmp_path: Path) -> None:
    _adapter(tmp_path)
    with pytest.raises(ConfigError, match=r"method\.r=8"):
        attach_adapter(_base(), _config(r=8, init_from=str(tmp_path)))


def test_an_exported_adapter_computes_what_the_trained_one_did(tmp_path: Path) -> None:
    model = _adapter(tmp_path).eval()
    save_adapter_config(model, _config(), tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        loaded = load_adapter(_base(), tmp_path).eval()
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not _trained(loaded)


@pytest.mark.parametrize(
    ("key", "value"),
    [("init_lora_weights", "pissa"), ("bias", "all"), ("trainable_token_indices", [1]), ("lora_bias", True)],
)
def test_an_adapter_that_does_more_than_lora_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    _adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ConfigError, match=rf"init_from=.* has {key}=.*not supported"):
        attach_adapter(_base(), _config(init_from=str(tmp_path)))


def test_the_hash_of_an_adapter_is_of_what_it_holds(tmp_path: Path) -> None:
    _adapter(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = adapter_hash(str(tmp_path / "a"))
    assert adapter_hash(str(tmp_path / "b")) == before
    weights = tmp_path / "b" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert adapter_hash(str(tmp_path / "b")) != before


def test_another_adapter_at_the_same_path_has_another_fingerprint(tmp_path: Path) -> None:
    _adapter(tmp_path / "a", seed=1)
    config = _config(init_from=str(tmp_path / "a"))
    before = make_fingerprint(config, [])
    shutil.rmtree(tmp_path / "a")
    _adapter(tmp_path / "a", seed=2)
    (difference,) = before.differences(make_fingerprint(config, []))
    assert difference.startswith("method: ")


def test_layers_that_are_not_there_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"layers_to_transform=\[2\].*are 0 to 1"):
        attach_adapter(_base(), _config(layers_to_transform=[2], target_modules=["q_proj"]))


def test_only_the_layers_that_are_named_are_adapted() -> None:
    names = export_names(attach_adapter(_base(), _config(layers_to_transform=[1], target_modules=["q_proj"])))
    assert len(names) == 2
    assert all("layers.1." in name for name in names)


def test_a_pattern_must_match_whole_names() -> None:
    names = export_names(attach_adapter(_base(), _config(target_modules=r".*layers\.0\.self_attn\.q_proj")))
    assert len(names) == 2
    with pytest.raises(ConfigError, match=r"method\.target_modules=q_proj does not fit"):
        attach_adapter(_base(), _config(target_modules="q_proj"))
