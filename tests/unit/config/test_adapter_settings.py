"""Going on from an adapter: its settings, contradictions, and adapters that cannot be gone on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_ft.config import Config, config_from_dict, dump_set_keys, load_config, with_adapter_settings
from dist_ft.errors import ConfigError

STORED = {
    "peft_type": "LORA", "base_model_name_or_path": "tiny-random", "r": 4, "lora_alpha": 12, "lora_dropout": 0.2,
    "target_modules": ["v_proj", "q_proj"], "modules_to_save": None, "use_rslora": True, "layers_to_transform": 1,
}  # fmt: skip


def write_adapter(directory: Path, **changes: Any) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({**STORED, **changes}))
    (directory / "adapter_model.safetensors").write_bytes(b"")
    return directory


def load(tmp_path: Path, adapter: Path, *overrides: str) -> Config:
    path = tmp_path / "run.yaml"
    path.write_text("model: {name: tiny-random}\ndata: {train: [{source: a.jsonl}]}\n")
    return with_adapter_settings(load_config(path, [f"method.init_from={adapter}", *overrides]))


def problem(tmp_path: Path, adapter: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, adapter, *overrides)
    return str(caught.value)


def test_what_is_left_out_is_the_adapters(tmp_path: Path) -> None:
    method = load(tmp_path, write_adapter(tmp_path / "a")).method
    assert (method.r, method.lora_alpha, method.lora_dropout, method.use_rslora) == (4, 12.0, 0.2, True)
    assert (method.target_modules, method.modules_to_save) == (["q_proj", "v_proj"], [])
    assert (method.layers_to_transform, method.use_dora) == ([1], False)


def test_a_config_that_is_shipped_leaves_to_the_adapter_what_the_user_did(tmp_path: Path) -> None:
    adapter, path, shipped = write_adapter(tmp_path / "a"), tmp_path / "run.yaml", tmp_path / "shipped.yaml"
    path.write_text("model: {name: tiny-random}\ndata: {train: [{source: a.jsonl}]}\n")
    shipped.write_text(dump_set_keys(load_config(path, [f"method.init_from={adapter}", "optimizer.lr=3e-5"])))
    config = with_adapter_settings(load_config(shipped))
    assert (config.method.r, config.method.lora_alpha, config.optimizer.lr) == (4, 12.0, 3e-5)
    assert config.run.name == "run"


def test_what_the_adapter_leaves_out_is_pefts_default(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    method = load(tmp_path, adapter).method
    assert (method.r, method.lora_alpha, method.use_rslora) == (8, 8.0, False)
    assert method.target_modules == "all-linear", "which stands for the adapter's own"


def test_the_settings_survive_the_way_to_another_process(tmp_path: Path) -> None:
    config = load(tmp_path, write_adapter(tmp_path / "a"))
    assert config_from_dict(config.model_dump(mode="json")) == config
    assert with_adapter_settings(config_from_dict(config.model_dump(mode="json"))) == config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.r=8", ["method.r=8", "r=4", "set method.r=4"]),
        ("method.lora_alpha=4", ["method.lora_alpha=4", "lora_alpha=12.0"]),
        ("method.use_rslora=false", ["method.use_rslora=False", "set method.use_rslora=true"]),
        ("method.use_dora=true", ["method.use_dora=True", "use_dora=False"]),
        ("method.target_modules=[q_proj]", ["q_proj", 'set method.target_modules=["q_proj", "v_proj"]']),
        ("method.target_modules=all-linear", ["method.target_modules=all-linear"]),
        ("method.modules_to_save=[lm_head]", ["lm_head", "set method.modules_to_save=[]"]),
        ("method.layers_to_transform=[0]", ["layers_to_transform=[0]", "[1]"]),
    ],
)
def test_a_contradiction_names_both_values(tmp_path: Path, override: str, said: list[str]) -> None:
    text = problem(tmp_path, write_adapter(tmp_path / "a"), override)
    assert all(word in text for word in [*said, str(tmp_path / "a"), "leave it out"]), text


def test_every_contradiction_is_told_at_once(tmp_path: Path) -> None:
    lines = problem(tmp_path, write_adapter(tmp_path / "a"), "method.r=8", "method.use_dora=true").splitlines()
    assert [line.split("=")[0] for line in lines] == ["method.r", "method.use_dora"]


@pytest.mark.parametrize(
    "override",
    ["method.r=4", "method.lora_alpha=12", "method.target_modules=[v_proj, q_proj]", "method.lora_dropout=0.5"],
)
def test_what_agrees_or_is_free_is_taken_as_it_is(tmp_path: Path, override: str) -> None:
    key, value = override.removeprefix("method.").split("=")
    found = getattr(load(tmp_path, write_adapter(tmp_path / "a"), override).method, key)
    assert str(found).replace("'", "").removesuffix(".0") == value


@pytest.mark.parametrize("kind", ["IA3", "PROMPT_TUNING", "ADALORA"])
def test_only_lora_can_be_gone_on_from(tmp_path: Path, kind: str) -> None:
    assert f"peft_type={kind}" in problem(tmp_path, write_adapter(tmp_path / "a", peft_type=kind))


@pytest.mark.parametrize("text", ["", "[]", "{}", "\xff", '{"peft_type": "LORA", "lora_alpha": "x"}'])
def test_what_is_no_adapters_config_is_named(tmp_path: Path, text: str) -> None:
    adapter = write_adapter(tmp_path / "a")
    (adapter / "adapter_config.json").write_text(text, encoding="latin-1")
    assert str(adapter / "adapter_config.json") in problem(tmp_path, adapter)


def test_weights_in_a_pickle_are_refused(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "adapter_model.safetensors is missing" in problem(tmp_path, adapter)


@pytest.mark.parametrize(
    ("mine", "theirs", "is_fine"),
    [
        ("tiny-random", "smollm2-135m-instruct", False),
        ("org/one", "org/two", False),
        ("Org/One", "org/one", True),
        ("org/one", "/models/one", True),
        ("/models/one", "org/one", True),
        ("org/one", None, True),
    ],
)
def test_another_base_model_is_refused_where_names_can_tell(
    tmp_path: Path, mine: str, theirs: str | None, is_fine: bool
) -> None:
    adapter = write_adapter(tmp_path / "a", base_model_name_or_path=theirs)
    if is_fine:
        assert load(tmp_path, adapter, f"model.name={mine}").method.r == 4
    else:
        text = problem(tmp_path, adapter, f"model.name={mine}")
        assert f"model.name={mine}" in text
        assert f"trained on {theirs}" in text


def test_a_config_without_an_adapter_stays_as_it_is() -> None:
    config = Config.model_validate(
        {"run": {"name": "r"}, "model": {"name": "m"}, "data": {"train": [{"source": "a.jsonl"}]}}
    )
    assert with_adapter_settings(config) is config
