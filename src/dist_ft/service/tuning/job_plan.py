"""Turns a job into the config of a run: the rules of "auto", and which keys a client may set. Pure."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from dist_ft.config import config_from_dict
from dist_ft.errors import ConfigError
from dist_ft.service.tuning.catalogue import BaseModel
from dist_ft.service.tuning.job_request import Hyperparameters, JobRequest
from dist_ft.service.wire import Json, Object, bad_request

_MIN_EXAMPLES, _MAX_EXAMPLES = 100, 25_000
"""Bounds of examples times epochs under "auto"."""
_FORMATS = {"chat": "messages", "preference": "preference", "completion": "prompt_completion"}
_KEPT_CHECKPOINTS = 3
_CHARACTERS_PER_TOKEN = 4
_CLOSED: dict[str, tuple[str, ...]] = {
    "method": ("init_from",), "train": (), "optimizer": (), "schedule": (), "zero": (), "checkpoint": (), "failure": (),
    "eval": (), "objective": ("reference", "teacher", "teacher_revision", "kind"),
    "data": ("train", "eval", "cache_dir", "loader", "chat_template", "limits", "preparation"),
}  # fmt: skip
"""Sections of the config that a client may set, each with the keys in it that name files, and are the server's."""


@dataclass(frozen=True)
class RunFiles:
    """Where a run finds what it needs.

    Attributes:
        runs: Parent of the run directories, a path or URL, as the others.
        training: The examples.
        validation: The held-out examples.
        format: Format of both; see `FileCheck`.
        start: Export of an earlier job to start from.
        adapter_base: Base model of that export, if it is an adapter.
    """

    runs: str
    training: str
    validation: str | None
    format: str
    start: str | None = None
    adapter_base: str | None = None


def settle(asked: Hyperparameters, num_examples: int) -> Hyperparameters:
    """Return numbers in place of "auto".

    Epochs: 3, but so many that examples × epochs lies within 100 and 25,000, and within 1 and 25. Batch: 0.2 % of the
    examples, within 1 and 256. The multiplier is 1, of the base model's own learning rate; beta is 0.1.
    """
    epochs = asked.n_epochs
    if epochs == "auto":
        least, most = math.ceil(_MIN_EXAMPLES / num_examples), max(1, _MAX_EXAMPLES // num_examples)
        epochs = min(25, max(1, min(max(3, least), most)))
    batch = asked.batch_size
    if batch == "auto":
        batch = min(256, max(1, round(num_examples * 0.002)))
    rate = 1.0 if asked.learning_rate_multiplier == "auto" else asked.learning_rate_multiplier
    return Hyperparameters(epochs, batch, rate, 0.1 if asked.beta == "auto" else asked.beta)


@dataclass(frozen=True)
class Estimate:
    """What a job will take, told before it starts.

    Attributes:
        steps: Optimizer steps.
        tokens: Tokens of all epochs, four characters each; truth depends on the tokenizer.
        seconds: Time of training, where the catalogue knows the speed; waiting and start come on top.
        price: Price, where the catalogue knows it.
    """

    steps: int
    tokens: int
    seconds: float | None
    price: float | None

    def to_wire(self) -> Object:
        """Return the object that clients see."""
        return {"steps": self.steps, "tokens": self.tokens, "seconds": self.seconds, "price": self.price}


def estimate(base: BaseModel, settings: Hyperparameters, num_examples: int, num_characters: int) -> Estimate:
    """Return what a job with settled hyperparameters will take."""
    batch, epochs = settings.batch_size, settings.n_epochs
    assert isinstance(batch, int) and isinstance(epochs, int)
    tokens = max(num_examples, num_characters // _CHARACTERS_PER_TOKEN) * epochs
    speed, price = base.tokens_per_s, base.price_per_million_tokens
    return Estimate(
        steps=max(1, math.ceil(num_examples / batch)) * epochs,
        tokens=tokens,
        seconds=None if speed is None else tokens / speed,
        price=None if price is None else tokens * price / 1e6,
    )


def check_extensions(base: BaseModel, request: JobRequest) -> None:
    """Refuse keys in `dist_ft` that are the server's, or that the config does not know.

    Raises:
        ApiError: Names the key.
    """
    for section, keys in request.extensions.items():
        if section not in _CLOSED:
            raise bad_request(f"dist_ft.{section[:60]} cannot be set here; sections: {', '.join(_CLOSED)}.", "dist_ft")
        if not isinstance(keys, dict):
            raise bad_request(f"dist_ft.{section} must be an object.", "dist_ft")
        if taken := [key for key in keys if key in _CLOSED[section]]:
            raise bad_request(f"dist_ft.{section}.{taken[0]} is set by the server.", "dist_ft")
    files = RunFiles("/runs", "/train.jsonl", None, "chat")
    try:
        config_from_dict(run_config("ftjob-check", request, base, settle(request.hyperparameters, 10), 10, files))
    except ConfigError as error:
        raise bad_request(f"dist_ft: {error}", "dist_ft") from error


def run_config(
    job: str, request: JobRequest, base: BaseModel, settings: Hyperparameters, num_examples: int, files: RunFiles
) -> Object:
    """Return the config of a job's run."""
    batch, epochs, rate = settings.batch_size, settings.n_epochs, settings.learning_rate_multiplier
    assert isinstance(batch, int) and isinstance(epochs, int) and rate != "auto"
    row_format = _FORMATS[files.format]
    steps_per_epoch = max(1, math.ceil(num_examples / batch))
    data: Object = {
        "train": [{"source": files.training, "format": row_format}], "seq_len": base.context, "packing": False,
    }  # fmt: skip
    measured: Object = {}
    if files.validation is not None:
        data["eval"] = {"source": files.validation, "format": row_format}
        measured = {"every_steps": steps_per_epoch, "best_metric": "eval_loss"}
    wandb = request.integrations[0] if request.integrations else None
    made: Object = {
        "run": {"name": job, "output_dir": files.runs, "seed": request.seed},
        "model": {"name": base.model},
        "data": data,
        "train": {"global_batch_size": batch, "micro_batch_size": min(batch, 8), "epochs": epochs},
        "eval": measured,
        "optimizer": {"lr": base.learning_rate * rate},
        "checkpoint": {"every_steps": steps_per_epoch, "keep_last": _KEPT_CHECKPOINTS, "in_background": False},
        "monitor": {"wandb": "auto" if wandb else "disabled", **({"project": wandb.project} if wandb else {})},
    }
    if request.method == "dpo":
        made["objective"] = {"kind": "dpo", "beta": settings.beta}
    made = _merged(made, _copied(base.config))
    if files.start is not None and files.adapter_base is not None:  # the adapter's own settings stand
        made = _merged(made, {"model": {"name": files.adapter_base}})
        made["method"] = {"kind": "lora", "init_from": files.start}
    elif files.start is not None:
        made = _merged(made, {"model": {"name": files.start}})
    return _merged(made, _copied(request.extensions))


def _copied(value: Object) -> Object:
    copied: Object = json.loads(json.dumps(value))
    return copied


def _merged(below: Object, above: Object) -> Object:
    """Return an object in which the members of `above` replace those of `below`, section by section."""
    merged = dict(below)
    for key, value in above.items():
        old: Json = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
