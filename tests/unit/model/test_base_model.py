"""The base model: what identifies it, and what is refused with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from dist_ft.config import Config
from dist_ft.errors import DataError, ModelError, UserError
from dist_ft.jobs.prepare import check_model, prepare
from dist_ft.jobs.splits import make_renderer
from dist_ft.model.base import (
    check_weights,
    fingerprint,
    load_model,
    load_model_config,
    load_tokenizer,
    model_dir,
    skeleton,
    tokenizer_key,
)
from dist_ft.model.embedded import materialise
from dist_ft.model.exported import rehearse_export
from tests.helpers.configs import config_of, tiny_config, write_rows
from tests.helpers.families import make_family

WEIGHTS = "model.safetensors"


def _config(name: Path | str, **data: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "r"},
            "model": {"name": str(name), "dtype": "float32"},
            "data": {"train": [{"source": "embedded:orders/train"}], **data},
        }
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of the tiny model."""
    return Path(shutil.copytree(materialise("tiny-random"), tmp_path / "model"))


def _edit_weights(directory: Path, edit: Any) -> None:
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})


def test_a_directory_is_a_model(directory: Path) -> None:
    assert model_dir(_config(directory)) == directory
    model = load_model(_config(directory))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.is_meta for p in model.parameters())


def test_a_skeleton_has_the_shapes_and_no_memory(directory: Path) -> None:
    config = _config(directory)
    shapes = {name: p.shape for name, p in load_model(config).named_parameters()}
    empty = skeleton(config)
    assert {name: p.shape for name, p in empty.named_parameters()} == shapes
    assert all(p.is_meta for p in empty.parameters())


def test_the_fingerprint_is_that_of_the_contents(directory: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    (copy / WEIGHTS).touch()
    assert fingerprint(_config(directory)) == fingerprint(_config(copy)) == fingerprint(_config("tiny-random"))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.333, 0.5, 0.777, 0.999999])
def test_one_changed_byte_changes_the_fingerprint(directory: Path, share: float) -> None:
    before = fingerprint(_config(directory))
    data = bytearray((directory / WEIGHTS).read_bytes())
    data[int(share * len(data))] ^= 1
    (directory / WEIGHTS).write_bytes(data)
    assert fingerprint(_config(directory)) != before


def _truncate(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:-1])


def _rename(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "other.safetensors")


def _other_config(directory: Path) -> None:
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


@pytest.mark.parametrize("edit", [_truncate, _rename, _other_config])
def test_another_model_has_another_fingerprint(directory: Path, edit: Any) -> None:
    before = fingerprint(_config(directory))
    edit(directory)
    assert fingerprint(_config(directory)) != before


def test_every_part_of_a_large_file_is_sampled(directory: Path) -> None:
    before = (directory / "config.json").read_bytes()
    size = 16 << 20  # larger than 64 blocks of 64 KiB
    with (directory / WEIGHTS).open("wb") as file:
        file.truncate(size)
    first = fingerprint(_config(directory))
    for sixty_fourth in (0, 13, 31, 63):
        with (directory / WEIGHTS).open("r+b") as file:
            file.seek(sixty_fourth * size // 64)
            file.write(b"\1" * (size // 64))
        assert fingerprint(_config(directory)) != first
        with (directory / WEIGHTS).open("r+b") as file:
            file.seek(sixty_fourth * size // 64)
            file.write(b"\0" * (size // 64))
    assert fingerprint(_config(directory)) == first
    assert (directory / "config.json").read_bytes() == before


def test_a_directory_without_safetensors_is_refused(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        model_dir(_config(directory))


def test_a_tokenizer_needs_no_chat_template_by_itself(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()
    assert not load_tokenizer(_config(directory)).chat_template
    assert load_tokenizer(_config(directory, chat_template="plain")).chat_template


def test_a_chat_template_of_the_config_replaces_the_tokenizers(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages[0]['content'] }} ü", encoding="utf-8")
    own = load_tokenizer(_config(directory))
    replaced = load_tokenizer(_config(directory, chat_template=str(tmp_path / "mine.jinja")))
    assert replaced.chat_template == "{{ messages[0]['content'] }} ü"
    assert tokenizer_key(replaced) != tokenizer_key(own)


def test_the_key_of_a_tokenizer_is_stable(directory: Path) -> None:
    assert tokenizer_key(load_tokenizer(_config(directory))) == tokenizer_key(load_tokenizer(_config("tiny-random")))


@pytest.mark.parametrize("text", ["{}", "not JSON"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_broken_files_are_model_errors(directory: Path, name: str, text: str) -> None:
    (directory / name).write_text(text)
    load = load_model_config if name == "config.json" else load_tokenizer
    with pytest.raises(ModelError, match="cannot be read"):
        load(_config(directory))


@pytest.mark.parametrize(
    "text", ["{", "[]", "[1]", '{"eos_token_id": ', '{"eos_token_id": "x"}', '{"eos_token_id": ["x"]}', "\xff", "null"]
)
def test_a_damaged_generation_config_is_named_before_any_row_is_rendered(directory: Path, text: str) -> None:
    (directory / "generation_config.json").write_text(text, encoding="latin-1")
    config = _config(directory)
    with pytest.raises(ModelError, match=r"model\.name=.*generation_config\.json cannot be read"):
        make_renderer(config, load_tokenizer(config))
    with pytest.raises(ModelError, match=r"model\.name=.*generation_config\.json cannot be read"):
        check_weights(config)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n"
HALVES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def _point(name: str) -> Any:
    return lambda directory: (directory / name).write_text(POINTER)


def _annex(directory: Path) -> None:
    (directory / WEIGHTS).write_text("/annex/objects/SHA256E-s430944--4d7a.safetensors\n")


def _dangle(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).symlink_to("../../blobs/4d7a")


def _page(directory: Path) -> None:
    (directory / WEIGHTS).write_text("<!DOCTYPE html><title>Sign in</title>" * 100)


def _cut_in_the_header(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:100])


def _lengthen(directory: Path) -> None:
    with (directory / WEIGHTS).open("ab") as file:
        file.write(b"more")


def _index(directory: Path, weight_map: object) -> None:
    (directory / WEIGHTS).rename(directory / HALVES[0])
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _set(**values: object) -> Any:
    def edit(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_point(WEIGHTS), r"model\.safetensors is a pointer of Git LFS.*git lfs pull"),
        (_point("tokenizer.json"), r"tokenizer\.json is a pointer of Git LFS"),
        (_annex, r"is a pointer of git-annex.*git annex get"),
        (_dangle, r"is a link to \.\./\.\./blobs/4d7a, which does not exist"),
        (_page, r"is no safetensors file .*<!DOCTYPE html>"),
        (_cut_in_the_header, r"is no safetensors file"),
        (lambda directory: _truncate(directory), r"is cut short: it has 430,943 of 430,944 bytes; fetch it again"),
        (_lengthen, r"is damaged: .*not fully covered"),
        (
            lambda directory: _index(directory, dict(zip("ab", HALVES, strict=True))),
            r"names 2 files, of which 1 are mis",
        ),
        (lambda directory: _index(directory, {}), r"index\.json is damaged: it has no weight_map"),
        (_set(hidden_size=32), r"21 tensors .* other shapes .* lm_head\.weight: \[259, 64\], not \[259, 32\]"),
        (_set(num_hidden_layers=3), r"9 tensors are missing"),
        (_set(num_hidden_layers=1), r"holds layers that its config.json .*model\.layers\.1\."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_that_would_not_load_is_refused_from_its_headers(directory: Path, damage: Any, message: str) -> None:
    check_weights(_config(directory))
    damage(directory)
    with pytest.raises(ModelError, match=message):
        check_weights(_config(directory))


def test_a_model_may_have_fewer_layers_if_the_config_says_so(directory: Path) -> None:
    config = _config(directory)
    fewer = config.model.model_copy(update={"config_overrides": {"num_hidden_layers": 1}})
    check_weights(config.model_copy(update={"model": fewer}))


@pytest.mark.parametrize("text", ["[]", "null", '{"version": "1.0", "added_tokens": [], "model": {"type": "Odd"}}'])
def test_a_tokenizer_that_is_json_of_another_kind_is_a_model_error(directory: Path, text: str) -> None:
    (directory / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match="its tokenizer cannot be read"):
        load_tokenizer(_config(directory))


def test_an_export_is_rehearsed(directory: Path) -> None:
    rehearse_export(_config(directory))
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="its tokenizer cannot be read"):
        rehearse_export(_config(directory))


def test_a_token_without_a_row_is_refused_by_line_and_only_where_it_is_used(tmp_path: Path) -> None:
    """Tokenizers with tokens that the embedding lacks are common (gemma-3-1b); they are harmless until one is used."""
    model = make_family("llama", tmp_path / "model", vocab_size=259)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(model)
    write_rows(tmp_path / "train.jsonl", 5)
    config = config_of(tmp_path, str(tmp_path / "train.jsonl"), model__name=str(model))
    prepare(config)
    with (tmp_path / "train.jsonl").open("a") as file:
        turns = [{"role": "user", "content": "one <|more|>"}, {"role": "assistant", "content": "yes"}]
        file.write(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(DataError, match=r"train\.jsonl:6: token '<\|more\|>' has the id 259, .* has 259 rows"):
        prepare(config)


def _without_a_layer(directory: Path) -> None:
    _edit_weights(directory, lambda tensors: tensors.pop("model.layers.0.mlp.down_proj.weight"))


def _with_another_shape(directory: Path) -> None:
    _edit_weights(directory, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)}))


def _garbage(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(b"not tensors" * 100)


@pytest.mark.parametrize("damage", [_without_a_layer, _with_another_shape, _garbage, _truncate])
def test_weights_that_are_not_all_of_the_models_are_refused(directory: Path, damage: Any) -> None:
    damage(directory)
    with pytest.raises(ModelError):
        load_model(_config(directory))


def test_a_quantised_base_is_refused(directory: Path) -> None:
    path = directory / "config.json"
    quantised = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantised}))
    with pytest.raises(ModelError, match=r"is quantised with 'fp8' .*name the published model .*model\.quantization"):
        load_model_config(_config(directory))


@pytest.mark.parametrize(
    ("stored", "changes", "problem"),
    [
        ({"quant_method": "gptq", "bits": 4}, {}, "is quantised with 'gptq' (quantization_config in its config.json)"),
        (
            {"load_in_8bit": True},
            {"model__quantization": {"kind": "nf4"}},
            "model.quantization.kind=nf4, but the weights of model.name=",
        ),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, {}, "an unknown kind of weights, 'nf5'"),
        ({"load_in_8bit": True}, {"method__kind": "full"}, "(int8), freezes the base, so that method.kind=full"),
        (
            {"load_in_4bit": True},
            {"method__kind": "lora", "zero__stage": 3},
            "whose files are quantised (fp4), does not go with zero.stage=3",
        ),
    ],
)
def test_files_that_are_quantised_otherwise_are_refused(
    directory: Path, stored: dict[str, Any], changes: dict[str, Any], problem: str
) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": stored}))
    config = tiny_config(directory, **{"model__name": str(directory), "method__kind": "lora", **changes})
    with pytest.raises(UserError) as caught:
        check_model(config)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
