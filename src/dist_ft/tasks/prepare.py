"""Checks model and data and makes token shards: what must be right before any process group exists."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import xxhash

from dist_ft.checkpoint.manifest import Fingerprint
from dist_ft.config import Config, config_from_dict
from dist_ft.errors import ConfigError
from dist_ft.model.adapter import adapter_hash
from dist_ft.model.base import at_commit, fingerprint, load_model_config, load_tokenizer, skeleton, tokenizer_key
from dist_ft.model.dropout import check_dropout
from dist_ft.model.render import RENDERING_VERSION, Renderer
from dist_ft.model.trained import select_trained
from dist_ft.stream.cache import PreparedSplit, SplitRequest, prepare_split
from dist_ft.stream.mixing import epoch_size
from dist_ft.stream.order import run_length

CACHE_NAME = ".dist-ft-cache"
"""Folder of prepared data in `run.output_dir`, which all machines see."""


def run(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of `coordinator.core.Prepared`.

    Raises:
        UserError: Of the kind that says what is wrong.
    """
    parsed = at_commit(config_from_dict(config))
    check_model(parsed)
    tokenizer = load_tokenizer(parsed)
    splits, eval_split = prepare_splits(parsed, tokenizer)
    max_steps, num_positions = plan_length(parsed, splits)
    return {
        "splits": [asdict(split) for split in splits],
        "eval_split": asdict(eval_split) if eval_split else None,
        "fingerprint": asdict(make_fingerprint(parsed, splits)),
        "max_steps": max_steps,
        "num_positions": num_positions,
        "commit": parsed.model.commit,
    }


def prepare_splits(config: Config, tokenizer: Any) -> tuple[list[PreparedSplit], PreparedSplit | None]:
    """Prepares the training sources, each as a split, and the held-out rows of all of them, or of a source, as one."""
    render, render_key = make_renderer(config, tokenizer)
    train, held_out = split_requests(config, render_key)
    directory = cache_dir(config)
    splits = [prepare_split(request, render, directory) for request in train]
    return splits, prepare_split(held_out, render, directory) if held_out else None


def prepare_held_out(config: Config, tokenizer: Any) -> PreparedSplit | None:
    """Prepares the held-out rows alone; None when there are none."""
    render, render_key = make_renderer(config, tokenizer)
    held_out = split_requests(config, render_key)[1]
    return prepare_split(held_out, render, cache_dir(config)) if held_out else None


def make_renderer(config: Config, tokenizer: Any) -> tuple[Renderer, str]:
    """Returns what turns rows into tokens, and a key of all that decides which."""
    train_on = config.data.train_on
    return Renderer(tokenizer, train_on), f"{tokenizer_key(tokenizer)} {train_on} {RENDERING_VERSION}"


def split_requests(config: Config, render_key: str) -> tuple[list[SplitRequest], SplitRequest | None]:
    """Returns what a run prepares: a split a training source, and the held-out one."""
    data = config.data
    common = SplitRequest(
        sources=(),
        seq_len=data.seq_len,
        packing=data.packing,
        render_key=render_key,
        held_out=data.eval_fraction or 0.0,
        group_by=data.group_by,
        long_samples=data.long_samples,
        bad_rows=data.bad_rows,
    )
    train = [replace(common, sources=(source,)) for source in data.train]
    if data.eval_source:
        return train, replace(common, sources=(data.eval_source,))
    return train, replace(common, sources=tuple(data.train), take_held_out=True) if data.eval_fraction else None


def cache_dir(config: Config) -> Path:
    """Returns the directory of prepared data, which all machines see."""
    return Path(config.run.output_dir).absolute() / CACHE_NAME / "data"


def prepare_ahead(config: Config) -> tuple[list[tuple[str, PreparedSplit, bool]], str]:
    """Prepares the data of a run that comes later.

    Returns:
        Each split as (name, split, whether it was there already), and the directory where they lie.
    """
    directory = cache_dir(config)
    before = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    splits, eval_split = prepare_splits(config, load_tokenizer(config))
    named = [(f"train.{index}", split) for index, split in enumerate(splits)]
    named += [("eval", eval_split)] if eval_split else []
    return [(name, split, split.key in before) for name, split in named], str(directory)


def plan_length(config: Config, splits: list[PreparedSplit]) -> tuple[int, int]:
    """Returns (steps, positions) of the run."""
    epoch = epoch_size([split.num_sequences for split in splits], config.data.weights, config.data.exhaust)
    return run_length(epoch, config.train.global_batch_size, config.train.epochs, config.train.max_steps)


def make_fingerprint(config: Config, splits: list[PreparedSplit]) -> Fingerprint:
    """Returns what checkpoints of this config belong to."""
    method = config.method.model_dump(mode="json")
    trained = method if config.method.kind == "lora" else {key: method[key] for key in ("kind", "freeze")}
    if config.method.init_from is not None:
        trained["init_from"] = adapter_hash(config.method.init_from)
    return Fingerprint(
        model=fingerprint(config),
        data=xxhash.xxh3_128_hexdigest(
            f"{[split.key for split in splits]} {config.data.weights} {config.data.shuffle}".encode()
        ),
        seed=config.run.seed,
        method=", ".join(f"{key}={value}" for key, value in trained.items()),
        global_batch_size=config.train.global_batch_size,
    )


def check_model(config: Config) -> None:
    """Checks the model's limits, and that the adapter fits its structure, without loading a weight.

    Raises:
        ConfigError: With both values.
    """
    # As an attribute: families spell the key differently and map it. Some say -1 for no limit.
    limit = getattr(load_model_config(config).get_text_config(), "max_position_embeddings", None)
    if limit is not None and 0 < limit < config.data.seq_len:
        raise ConfigError(
            f"data.seq_len={config.data.seq_len} is longer than the model allows "
            f"(max_position_embeddings={limit} in the config of {config.model.name}); set data.seq_len <= {limit}"
        )
    model = skeleton(config)
    check_dropout(model)
    select_trained(model, config)
