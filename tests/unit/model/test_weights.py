"""The base model's files read by range, against what transformers loads from them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dist_ft.config import Config
from dist_ft.model.base import load_model, skeleton
from dist_ft.model.weights import WeightFiles
from tests.helpers.families import make_family

FAMILIES = ("llama", "tied", "gpt2", "bare", "sharded")
WEIGHTS = "model.safetensors"


def _config(directory: Path) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "r"},
            "model": {"name": str(directory), "dtype": "float32"},
            "data": {"train": [{"source": "embedded:orders/train"}]},
        }
    )


@dataclass
class Stored:
    """A model directory, how its files are read, and every tensor as transformers loads it."""

    directory: Path
    skeleton: Any
    weights: WeightFiles
    loaded: dict[str, torch.Tensor]


def _open(directory: Path) -> Stored:
    empty = skeleton(_config(directory))
    loaded = {name: t.detach() for name, t in load_model(_config(directory)).state_dict().items()}
    return Stored(directory, empty, WeightFiles(directory, empty), loaded)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:
    """Llama with an output layer of its own and without; GPT-2 whole, as its backbone alone, and in many files."""
    root = tmp_path_factory.mktemp("models")
    make_family("llama", root / "llama")
    make_family("llama", root / "tied", tie_word_embeddings=True)
    make_family("gpt2", root / "gpt2")
    model = AutoModelForCausalLM.from_pretrained(root / "gpt2")
    model.transformer.save_pretrained(root / "bare")
    model.save_pretrained(root / "sharded", max_shard_size="20KB")
    return {family: _open(root / family) for family in FAMILIES}


@pytest.fixture
def copy(stored: dict[str, Stored], tmp_path: Path) -> Callable[[str], Path]:
    return lambda family: Path(shutil.copytree(stored[family].directory, tmp_path / family))


def _edit(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})


def test_the_models_are_the_cases_they_stand_for(stored: dict[str, Stored]) -> None:
    assert "lm_head.weight" in load_file(stored["llama"].directory / WEIGHTS)
    assert "lm_head.weight" not in load_file(stored["tied"].directory / WEIGHTS)
    assert "transformer.wte.weight" in load_file(stored["gpt2"].directory / WEIGHTS)
    assert "wte.weight" in load_file(stored["bare"].directory / WEIGHTS)
    assert len(list(stored["sharded"].directory.glob("*.safetensors"))) > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_found_and_equals_what_is_loaded(stored: dict[str, Stored], family: str) -> None:
    """Under each of its names, when tied."""
    found = stored[family]
    assert found.weights.has_all
    assert set(found.loaded) == set(found.skeleton.state_dict())
    for name, tensor in found.loaded.items():
        read = found.weights.read(name, 0, tensor.numel())
        assert read.shape == (tensor.numel(),)
        assert torch.equal(read, tensor.flatten())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", ["first", "last", "row", "across", "one short"])
def test_ranges_at_the_edges_of_every_tensor(stored: dict[str, Stored], family: str, place: str) -> None:
    for name, tensor in stored[family].loaded.items():
        numel, row = tensor.numel(), tensor.numel() // tensor.shape[0]
        start, count = {
            "first": (0, 1),
            "last": (numel - 1, 1),
            "row": (row, row),
            "across": (row - 1, min(2, numel - row + 1)),
            "one short": (1, numel - 2),
        }[place]
        assert torch.equal(stored[family].weights.read(name, start, count), tensor.flatten()[start : start + count])


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_range_is_the_slice_of_the_flattened_parameter(stored: dict[str, Stored], data: st.DataObject) -> None:
    found = stored[data.draw(st.sampled_from(FAMILIES))]
    name = data.draw(st.sampled_from(sorted(found.loaded)))
    flat = found.loaded[name].flatten()
    start = data.draw(st.integers(0, len(flat) - 1))
    count = data.draw(st.integers(1, len(flat) - start))
    read = found.weights.read(name, start, count)
    assert read.shape == (count,)
    assert torch.equal(read, flat[start : start + count])


@given(world_size=st.integers(1, 9), family=st.sampled_from(FAMILIES))
@settings(max_examples=30, deadline=None)
def test_the_partitions_of_all_ranks_make_the_parameter(
    stored: dict[str, Stored], world_size: int, family: str
) -> None:
    """As stage 3 cuts it: equal parts, the last of them shorter or empty."""
    found = stored[family]
    for name, tensor in found.loaded.items():
        part = -(-tensor.numel() // world_size)
        ranges = [(start, min(part, tensor.numel() - start)) for start in range(0, tensor.numel(), part)]
        assert torch.equal(torch.cat([found.weights.read(name, *each) for each in ranges]), tensor.flatten())


def test_tied_names_read_the_same(stored: dict[str, Stored]) -> None:
    for family, names in (
        ("tied", ("lm_head.weight", "model.embed_tokens.weight")),
        ("bare", ("lm_head.weight", "transformer.wte.weight")),
    ):
        one, two = (stored[family].weights.read(name, 5, 300) for name in names)
        assert torch.equal(one, two)


def test_a_tied_tensor_may_be_stored_under_either_name(copy: Callable[[str], Path], stored: dict[str, Stored]) -> None:
    directory = copy("tied")
    _edit(directory, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    found = WeightFiles(directory, stored["tied"].skeleton)
    expected = stored["tied"].loaded["model.embed_tokens.weight"].flatten()
    assert found.has_all
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(found.read(name, 0, len(expected)), expected)


def test_the_dtype_is_that_of_the_file(copy: Callable[[str], Path], stored: dict[str, Stored]) -> None:
    directory = copy("llama")
    _edit(directory, lambda t: t.update({key: tensor.bfloat16() for key, tensor in t.items()}))
    found = WeightFiles(directory, stored["llama"].skeleton)
    for name, tensor in stored["llama"].loaded.items():
        read = found.read(name, 3, 20)
        assert read.dtype == torch.bfloat16
        assert torch.equal(read, tensor.flatten()[3:23].bfloat16())


@pytest.mark.parametrize("family", ["llama", "tied", "gpt2", "bare"])
def test_each_tensor_is_needed(copy: Callable[[str], Path], stored: dict[str, Stored], family: str) -> None:
    directory = copy(family)
    tensors = load_file(directory / WEIGHTS)
    for key in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != key}
        save_file(rest, directory / WEIGHTS, {"format": "pt"})
        assert not WeightFiles(directory, stored[family].skeleton).has_all


def test_each_file_is_needed(copy: Callable[[str], Path], stored: dict[str, Stored]) -> None:
    directory = copy("sharded")
    assert WeightFiles(directory, stored["sharded"].skeleton).has_all
    for file in sorted(directory.glob("*.safetensors")):
        aside = file.rename(file.with_suffix(".aside"))
        assert not WeightFiles(directory, stored["sharded"].skeleton).has_all
        aside.rename(file)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "change",
    [lambda t: t[:-1].clone(), lambda t: t.flatten(), lambda t: t[None], lambda t: torch.cat([t, t])],
    ids=["short", "flat", "deep", "long"],
)
def test_each_tensor_must_have_its_shape(
    copy: Callable[[str], Path], stored: dict[str, Stored], family: str, change: Callable[[Any], Any]
) -> None:
    directory = copy(family)
    tensors = load_file(directory / WEIGHTS)
    for key, tensor in tensors.items():
        other = change(tensor)
        if other.shape == tensor.shape:  # a vector is flat
            continue
        save_file({**tensors, key: other}, directory / WEIGHTS, {"format": "pt"})
        assert not WeightFiles(directory, stored[family].skeleton).has_all


def test_a_transposed_matrix_is_not_the_matrix(copy: Callable[[str], Path], stored: dict[str, Stored]) -> None:
    """GPT-2 keeps its matrices the other way round than linear layers do."""
    directory = copy("gpt2")
    key = "transformer.h.0.attn.c_attn.weight"
    _edit(directory, lambda t: t.update({key: t[key].T.contiguous()}))
    assert not WeightFiles(directory, stored["gpt2"].skeleton).has_all


def test_renamed_weights_are_left_to_transformers(copy: Callable[[str], Path], stored: dict[str, Stored]) -> None:
    directory = copy("llama")
    _edit(directory, lambda t: t.update({f"old.{key}": t.pop(key) for key in list(t)}))
    assert not WeightFiles(directory, stored["llama"].skeleton).has_all


def test_tensors_of_no_parameter_do_no_harm(copy: Callable[[str], Path], stored: dict[str, Stored]) -> None:
    """Old checkpoints bring constants along, such as `rotary_emb.inv_freq`."""
    directory = copy("llama")
    _edit(directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    found = WeightFiles(directory, stored["llama"].skeleton)
    assert found.has_all
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(found.read(name, 0, 99), stored["llama"].loaded[name].flatten()[:99])


def test_a_directory_without_weights_has_none(tmp_path: Path, stored: dict[str, Stored]) -> None:
    assert not WeightFiles(tmp_path, stored["llama"].skeleton).has_all


def _reads_what_is_loaded(directory: Path) -> bool:
    found = _open(directory)
    return all(torch.equal(found.weights.read(name, 0, t.numel()), t.flatten()) for name, t in found.loaded.items())


@pytest.mark.parametrize("extra", ["consolidated.safetensors", "model-00001-of-00002.safetensors"])
def test_a_file_that_transformers_does_not_read_does_no_harm_when_it_sorts_first(
    copy: Callable[[str], Path], extra: str
) -> None:
    directory = copy("llama")
    save_file({key: t + 1 for key, t in load_file(directory / WEIGHTS).items()}, directory / extra, {"format": "pt"})
    assert _reads_what_is_loaded(directory)


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("llama", "original.safetensors"),
        ("sharded", "model-00099-of-00099.safetensors"),
        ("sharded", "old.safetensors"),
    ],
)
def test_a_file_that_transformers_does_not_read_does_no_harm(
    copy: Callable[[str], Path], stored: dict[str, Stored], family: str, extra: str
) -> None:
    directory = copy(family)
    key = sorted(stored[family].loaded)[-1]
    save_file({key: stored[family].loaded[key] + 1}, directory / extra, {"format": "pt"})
    assert _reads_what_is_loaded(directory)


@pytest.mark.parametrize(
    "offset",
    [
        0.0,
        1.0,
    ],
)
def test_a_config_that_ties_what_the_file_holds_twice(copy: Callable[[str], Path], offset: float) -> None:
    directory = copy("tied")
    _edit(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + offset}))
    assert not _open(directory).weights.has_all or _reads_what_is_loaded(directory)
