"""Which parameters are trained: frozen by pattern, or whole beside an adapter; and what the memory formulas count."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dist_ft.config import Config
from dist_ft.errors import ConfigError
from dist_ft.model.adapter import export_names, load_adapter
from dist_ft.model.base import load_model, skeleton
from dist_ft.model.trained import model_shape, select_trained
from tests.helpers.families import make_family

Build = Callable[[Config], Any]
BUILDS: list[Build] = [load_model, skeleton]
on_both = pytest.mark.parametrize("build", BUILDS, ids=["real", "meta"])


def _config(name: Path | str = "tiny-random", groups: list[str] | None = None, **method: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "r"},
            "model": {"name": str(name), "dtype": method.pop("dtype", "float32")},
            "method": {"r": 4, **method},
            "optimizer": {"groups": [{"pattern": pattern, "lr": 0.1} for pattern in groups or []]},
            "data": {"train": [{"source": "embedded:orders/train"}]},
        }
    )


def _full(*freeze: str, name: Path | str = "tiny-random", groups: list[str] | None = None) -> Config:
    return _config(name, groups, kind="full", freeze=list(freeze))


def _select(build: Build, config: Config) -> Any:
    return select_trained(build(config), config)


def _frozen(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def _trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {
        "llama": make_family("llama", root / "llama"),
        "tied": make_family("llama", root / "tied", tie_word_embeddings=True),
        "gpt2": make_family("gpt2", root / "gpt2"),
    }


# method.freeze ---------------------------------------------------------------------------------------------

NORMS = {
    "model.norm.weight",
    *(f"model.layers.{i}.{name}_layernorm.weight" for i in (0, 1) for name in ("input", "post_attention")),
}


@on_both
@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        ([], set()),
        (["embed_tokens"], {"model.embed_tokens.weight"}),
        (["norm"], NORMS),
        (["lm_head", r"^model\.norm"], {"lm_head.weight", "model.norm.weight"}),
        (["norm", "layernorm"], NORMS),  # twice is once
        ([r"layers\.1\.mlp"], {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}),
        (["[qv]_proj"], {f"model.layers.{i}.self_attn.{name}_proj.weight" for i in (0, 1) for name in "qv"}),
        (["(?i)LM_HEAD"], {"lm_head.weight"}),
    ],
)
def test_a_pattern_freezes_the_names_it_is_found_in(build: Build, patterns: list[str], frozen: set[str]) -> None:
    model = _select(build, _full(*patterns))
    assert _frozen(model) == frozen
    assert set(export_names(model)) == {name for name, _ in model.named_parameters()} - frozen


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_set_of_names_can_be_frozen_but_not_all(empty: Any, data: st.DataObject) -> None:
    names = [name for name, _ in empty.named_parameters()]
    chosen = data.draw(st.sets(st.sampled_from(names)) | st.just(set(names)))
    empty.requires_grad_(True)
    config = _full(*(f"^{re.escape(name)}$" for name in chosen))
    if chosen == set(names):
        with pytest.raises(ConfigError, match=r"method\.freeze="):
            select_trained(empty, config)
    else:
        assert _frozen(select_trained(empty, config)) == chosen


@pytest.fixture(scope="module")
def empty() -> Any:
    return skeleton(_full())


def test_freezing_changes_no_weight() -> None:
    before = {name: p.detach().clone() for name, p in load_model(_full()).named_parameters()}
    model = _select(load_model, _full("embed", "norm"))
    assert all(torch.equal(p.detach(), before[name]) for name, p in model.named_parameters())


@on_both
@pytest.mark.parametrize(
    ("family", "name"), [("tied", "model.embed_tokens.weight"), ("gpt2", "transformer.wte.weight")]
)
def test_a_tied_weight_is_frozen_in_both_places(
    build: Build, families: dict[str, Path], family: str, name: str
) -> None:
    model = _select(build, _full(f"^{re.escape(name)}$", name=families[family]))
    assert _frozen(model) == {name}
    assert not model.lm_head.weight.requires_grad
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("patterns", "key"),
    [
        (["no_such"], r"method\.freeze\.0=no_such "),
        (["norm", "embed_tokens", "lm_haed"], r"method\.freeze\.2=lm_haed "),
        (["^norm"], r"method\.freeze\.0=\^norm "),  # names open with `model.`
        (["EMBED"], r"method\.freeze\.0=EMBED "),
    ],
)
def test_a_pattern_that_fits_nothing_is_named_with_its_place(patterns: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match=key + r".*model\.embed_tokens\.weight") as caught:
        _select(skeleton, _full(*patterns))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("patterns", [["."], ["model", "lm_head"], [r"weight$"]])
def test_something_is_left_to_train(patterns: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"method\.freeze=.*matches every parameter"):
        _select(skeleton, _full(*patterns))


# optimizer.groups ------------------------------------------------------------------------------------------


@on_both
@pytest.mark.parametrize(
    "config",
    [
        _full(groups=["embed", "norm", "."]),
        _full("embed", groups=["lm_head"]),
        _config(groups=["lora_A", "lora_B"]),
        _config(groups=["lm_head"], modules_to_save=["lm_head"]),
        _config(groups=[r"layers\.1\."]),
    ],
)
def test_patterns_of_trained_parameters_pass(build: Build, config: Config) -> None:
    assert _trained(_select(build, config))


@on_both
@pytest.mark.parametrize(
    ("config", "key"),
    [
        (_full(groups=["no_such"]), r"optimizer\.groups\.0\.pattern=no_such "),
        (_full(groups=["norm", "lm_haed"]), r"optimizer\.groups\.1\.pattern=lm_haed "),
        (_full("embed", groups=["embed"]), r"optimizer\.groups\.0\.pattern=embed .*layers\.0"),  # frozen
        (_config(groups=["lora_A", "lm_head"]), r"optimizer\.groups\.1\.pattern=lm_head .*lora_A"),  # not adapted
        (_config(groups=["base_layer"]), r"optimizer\.groups\.0\.pattern=base_layer "),
        (_config(groups=["original_module"], modules_to_save=["lm_head"]), r"pattern=original_module "),
        (_config(groups=["mlp"], target_modules=["q_proj"]), r"optimizer\.groups\.0\.pattern=mlp "),
    ],
)
def test_a_group_of_nothing_is_named_with_its_place(build: Build, config: Config, key: str) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        _select(build, config)
    assert "tiny-random" in str(caught.value)


# method.modules_to_save ------------------------------------------------------------------------------------

SAVED = [
    ("llama", ["lm_head"]),
    ("llama", ["embed_tokens"]),
    ("llama", ["embed_tokens", "lm_head"]),
    ("llama", ["model.norm"]),
    ("llama", ["norm"]),  # PEFT takes the end of a name: the norms of the layers, too
    ("llama", ["down_proj"]),  # which is no longer adapted then
    ("llama", ["mlp"]),
    ("tied", ["lm_head"]),
    ("tied", ["embed_tokens"]),
    ("tied", ["embed_tokens", "lm_head"]),
    ("gpt2", ["lm_head"]),
    ("gpt2", ["wte"]),
    ("gpt2", ["ln_f"]),
]
of_all = pytest.mark.parametrize(("family", "modules"), SAVED)


@of_all
def test_every_trained_tensor_is_exported_as_peft_saves_it(
    families: dict[str, Path], tmp_path: Path, family: str, modules: list[str]
) -> None:
    model = _select(load_model, _config(families[family], modules_to_save=modules))
    with torch.no_grad():
        for name in _trained(model):
            model.get_parameter(name).add_(torch.randn(model.get_parameter(name).shape))
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    names = export_names(model)
    assert set(names) == _trained(model)
    assert sorted(names.values()) == sorted(written)
    for name, key in names.items():
        assert torch.equal(model.get_parameter(name), written[key])


@of_all
def test_names_are_the_same_without_memory_for_weights(
    families: dict[str, Path], family: str, modules: list[str]
) -> None:
    config = _config(families[family], modules_to_save=modules)
    real, meta = (_select(build, config) for build in BUILDS)
    assert list(export_names(real).items()) == list(export_names(meta).items())
    assert {n: p.shape for n, p in real.named_parameters()} == {n: p.shape for n, p in meta.named_parameters()}
    assert all(parameter.is_meta for parameter in meta.parameters())


@on_both
@pytest.mark.parametrize(
    ("family", "module", "key"),
    [
        ("llama", "lm_head", "base_model.model.lm_head.weight"),
        ("tied", "lm_head", "base_model.model.lm_head.weight"),
        ("llama", "embed_tokens", "base_model.model.model.embed_tokens.weight"),
        ("gpt2", "wte", "base_model.model.transformer.wte.weight"),
    ],
)
def test_the_module_is_trained_whole_and_the_base_stays_frozen(
    build: Build, families: dict[str, Path], family: str, module: str, key: str
) -> None:
    model = _select(build, _config(families[family], modules_to_save=[module]))
    plain = _select(build, _config(families[family]))
    (own,) = _trained(model) - _trained(plain)
    assert export_names(model)[own] == key
    assert _trained(plain) <= _trained(model)  # the adapter is what it was
    assert all("lora_" in name for name in _trained(plain))
    base = build(_config(families[family])).get_submodule(module if module == "lm_head" else key[17:-7])
    assert model.get_parameter(own).shape == base.weight.shape


def test_the_copy_begins_as_the_base_and_trains_beside_it(families: dict[str, Path]) -> None:
    config = _config(families["tied"], modules_to_save=["lm_head"])
    model = _select(load_model, config)
    before = load_model(config).get_parameter("lm_head.weight").detach()
    (own,) = (name for name in _trained(model) if "lora_" not in name)
    assert torch.equal(model.get_parameter(own).detach(), before)
    model.get_parameter(own).data.add_(1.0)
    # The tie is cut: the embedding is the base's still.
    assert torch.equal(model.get_input_embeddings().weight.detach(), before)


@pytest.mark.parametrize(("family", "modules"), [("llama", ["embed_tokens", "norm"]), ("gpt2", ["ln_f"])])
def test_what_was_saved_computes_what_was_trained(
    families: dict[str, Path], tmp_path: Path, family: str, modules: list[str]
) -> None:
    config = _config(families[family], modules_to_save=modules)
    model = _select(load_model, config).eval()
    with torch.no_grad():
        for name in _trained(model):
            model.get_parameter(name).add_(0.1)
        ids = torch.arange(20)[None]
        model.save_pretrained(tmp_path)
        loaded = load_adapter(load_model(config), tmp_path).eval()
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
        assert not torch.equal(loaded(input_ids=ids).logits, load_model(config).eval()(input_ids=ids).logits)


def test_training_goes_on_from_modules_on_disk(families: dict[str, Path], tmp_path: Path) -> None:
    config = _config(families["llama"], modules_to_save=["lm_head"])
    first = _select(load_model, config)
    with torch.no_grad():
        for name in _trained(first):
            first.get_parameter(name).add_(0.5)
    first.save_pretrained(tmp_path)
    second = _select(load_model, _config(families["llama"], modules_to_save=["lm_head"], init_from=str(tmp_path)))
    assert _trained(second) == _trained(first)
    assert all(torch.equal(second.get_parameter(name), first.get_parameter(name)) for name in _trained(first))


@on_both
@pytest.mark.parametrize("modules", [["lm_haed"], ["lm_head", "no_such"], ["head"], ["weight"], ["model.lm_head"]])
def test_a_module_that_is_not_there_is_refused(build: Build, modules: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"method\.modules_to_save=.*no module of tiny-random") as caught:
        _select(build, _config(modules_to_save=modules))
    assert f"{modules[-1]} is no module" in str(caught.value)


def test_a_module_that_cannot_be_copied_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"method\.modules_to_save"):
        _select(skeleton, _config(modules_to_save=["layers"], target_modules=["lm_head"]))


@pytest.mark.parametrize("modules", [["lm_head"], ["no_such"]])
def test_modules_beside_an_adapter_on_disk_are_trained_or_refused(tmp_path: Path, modules: list[str]) -> None:
    _select(load_model, _config()).save_pretrained(tmp_path)
    config = _config(init_from=str(tmp_path), modules_to_save=modules)
    try:
        model = _select(load_model, config)
    except ConfigError:
        return
    assert any("lora_" not in name for name in _trained(model))


# What the memory formulas count ----------------------------------------------------------------------------

NUM_BASE = 2 * 259 * 64 + 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64) + 64
"""Embedding and output layer; q, k, v, o, the feed-forward layers and two norms of two layers; the last norm."""
NUM_ADAPTER = 2 * 4 * ((64 + 64) + (64 + 32) + (64 + 32) + (64 + 64) + 3 * (64 + 128))
"""Rank 4 on each linear layer of two layers: in + out."""


@on_both
@pytest.mark.parametrize(
    ("config", "num_params", "num_trained"),
    [
        (_full(), NUM_BASE, NUM_BASE),
        (_full("embed_tokens"), NUM_BASE, NUM_BASE - 259 * 64),
        (_full("layers", "norm"), NUM_BASE, 2 * 259 * 64),
        (_config(), NUM_BASE + NUM_ADAPTER, NUM_ADAPTER),
        (_config(target_modules=["q_proj"]), NUM_BASE + 2 * 4 * 128, 2 * 4 * 128),
        # A module trained whole is a second one beside the base's.
        (_config(modules_to_save=["lm_head"]), NUM_BASE + NUM_ADAPTER + 259 * 64, NUM_ADAPTER + 259 * 64),
    ],
)
def test_elements_are_counted(build: Build, config: Config, num_params: int, num_trained: int) -> None:
    shape = model_shape(_select(build, config), config)
    assert (shape.num_params, shape.num_trained) == (num_params, num_trained)
    assert (shape.num_layers, shape.hidden_size, shape.num_heads, shape.vocab_size) == (2, 64, 4, 259)


@on_both
@pytest.mark.parametrize(("family", "vocab"), [("llama", 320), ("tied", 320), ("gpt2", 259)])
def test_the_shape_is_that_of_the_files(build: Build, families: dict[str, Path], family: str, vocab: int) -> None:
    """A tied weight is stored, and counted, once."""
    config = _full(name=families[family])
    shape = model_shape(_select(build, config), config)
    stored = sum(t.numel() for t in load_file(families[family] / "model.safetensors").values())
    assert (shape.num_params, shape.num_trained) == (stored, stored)
    assert (shape.num_layers, shape.hidden_size, shape.num_heads, shape.vocab_size) == (2, 64, 4, vocab)


@pytest.mark.parametrize(("dtype", "num_bytes"), [("float32", 4), ("fp32", 4), ("bfloat16", 2), ("bf16", 2)])
def test_a_weight_takes_what_its_dtype_takes(dtype: str, num_bytes: int) -> None:
    config = _config(dtype=dtype)
    model = _select(skeleton, config)
    assert model_shape(model, config).dtype_bytes == num_bytes
    assert {parameter.element_size() for parameter in model.parameters()} == {num_bytes}
