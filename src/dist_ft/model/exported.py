"""Writes the files of an export besides its weights, and prepares a model for a merge."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from dist_ft.config import Config
from dist_ft.errors import ModelError
from dist_ft.model.base import load_model_config, load_tokenizer, model_dir
from dist_ft.printable import printable

_GENERATION = "generation_config.json"


def save_texts(config: Config, directory: Path) -> None:
    """Write tokenizer and generation config. The latter is the base's file: transformers refuses to write many."""
    load_tokenizer(config).save_pretrained(directory)
    source = model_dir(config) / _GENERATION
    if source.is_file():
        shutil.copyfile(source, directory / _GENERATION)
    else:
        (directory / _GENERATION).unlink(missing_ok=True)


def save_model_config(config: Config, architecture: str, dtype: str, directory: Path) -> None:
    """Write config.json, and the code that it names if the model brings its own."""
    model_config = load_model_config(config)
    model_config.dtype = getattr(torch, dtype)
    model_config.architectures = [architecture]
    model_config.save_pretrained(directory)
    _save_code(config, directory)


def save_merged(model: PreTrainedModel, config: Config, directory: Path) -> None:
    """Write a merged model, `save_texts` aside: weights, config, code."""
    if load_model_config(config).get_text_config().tie_word_embeddings:
        _tie_if_equal(model)
    model.generation_config = GenerationConfig()  # `save_texts` writes the base's own
    model.save_pretrained(directory)
    _save_code(config, directory)


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
