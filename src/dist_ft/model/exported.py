"""Writes the files of an export besides its weights, and prepares a model for a merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dist_ft.config import Config
from dist_ft.errors import ModelError
from dist_ft.model.base import load_model_config, load_tokenizer, model_dir, special_tokens
from dist_ft.printable import printable

_GENERATION = "generation_config.json"


def save_texts(config: Config, directory: Path) -> None:
    """Write tokenizer and generation config. The latter is the base's file: transformers refuses to write many.

    Special tokens of the config replace those of the base; where generation ended before, it still ends.
    """
    tokenizer = load_tokenizer(config)
    tokenizer.save_pretrained(directory)
    source, target = model_dir(config) / _GENERATION, directory / _GENERATION
    target.unlink(missing_ok=True)
    if ids := _special_ids(config, tokenizer):
        found = json.loads(source.read_text(encoding="utf-8")) if source.is_file() else {}
        target.write_text(json.dumps(_with_special_ids(found, ids), indent=2) + "\n", encoding="utf-8")
    elif source.is_file():
        shutil.copyfile(source, target)


def _special_ids(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the ids of the special tokens that the config sets, by their keys in config.json."""
    return {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in special_tokens(config).items()}


def _with_special_ids(generation: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    """Return a generation config with special tokens replaced; what ended an answer before still ends one."""
    replaced: dict[str, Any] = {
        name: number for name, number in ids.items() if name in ("bos_token_id", "pad_token_id")
    }
    if (end := ids.get("eos_token_id")) is not None:
        before = generation.get("eos_token_id", [])
        replaced["eos_token_id"] = [end, *(o for o in (before if isinstance(before, list) else [before]) if o != end)]
    return generation | replaced


def save_model_config(config: Config, architecture: str, dtype: str, directory: Path) -> None:
    """Write config.json, and the code that it names if the model brings its own."""
    model_config = load_model_config(config)
    model_config.dtype = getattr(torch, dtype)
    model_config.architectures = [architecture]
    _set_special_ids(model_config, config)
    model_config.save_pretrained(directory)
    _save_code(config, directory)


def save_merged(model: PreTrainedModel, config: Config, directory: Path) -> None:
    """Write a merged model, `save_texts` aside: weights, config, code."""
    if load_model_config(config).get_text_config().tie_word_embeddings:
        _tie_if_equal(model)
    _set_special_ids(model.config, config)
    model.generation_config = GenerationConfig()  # `save_texts` writes the base's own
    model.save_pretrained(directory)
    _save_code(config, directory)


def _set_special_ids(model_config: PreTrainedConfig, config: Config) -> None:
    if special_tokens(config):
        for name, number in _special_ids(config, load_tokenizer(config)).items():
            setattr(model_config, name, number)


def rehearse_export(config: Config) -> None:
    """Write the files of an export besides the weights, and delete them, so that no export can fail for them.

    Raises:
        ModelError: A file of the model cannot be read, or not written again.
    """
    with TemporaryDirectory(prefix="dist-ft-export-") as directory:
        try:
            save_texts(config, Path(directory))
            save_model_config(config, "", "float32", Path(directory))
        except ModelError:
            raise
        except Exception as error:  # tokenizers and remote code raise what they like
            raise ModelError(
                f"model.name={config.model.name}: an export could not write tokenizer and config again "
                f"({type(error).__name__}: {printable(str(error), 300)}); mend them in {model_dir(config)}"
            ) from error


def untie(model: PreTrainedModel) -> None:
    """Give the output layer weights of its own if it has the embedding's, so that an adapter can change one alone."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is not None and output.weight is embedding.weight:
        output.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        _set_tied(model, False)


def _tie_if_equal(model: PreTrainedModel) -> None:
    """Ties the output layer to the embedding again if the adapter has left both equal."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is not None and torch.equal(output.weight, embedding.weight):
        _set_tied(model, True)
        model.tie_weights()


def _set_tied(model: PreTrainedModel, is_tied: bool) -> None:
    for section in (model.config, model.config.get_text_config()):
        section.tie_word_embeddings = is_tied
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False) if is_tied else {}


def _save_code(config: Config, directory: Path) -> None:
    """Copy the Python files of a model that brings its own; an export of all weights cannot be loaded without."""
    if config.model.trust_remote_code:
        for file in model_dir(config).glob("*.py"):
            shutil.copyfile(file, directory / file.name)
