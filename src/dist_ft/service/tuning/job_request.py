"""Reads the body of a new job. Everything that can be said from the body alone is said here."""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass, field
from typing import Literal

from dist_ft.service.wire import (
    Json,
    Object,
    as_int,
    as_number,
    as_object,
    as_text,
    bad_request,
    refuse_unknown,
    shown,
)

Auto = Literal["auto"]
Method = Literal["supervised", "dpo"]
_MEMBERS = (
    "model", "training_file", "validation_file", "method", "hyperparameters", "suffix", "seed", "integrations",
    "metadata", "dist_ft",
)  # fmt: skip
_MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class Hyperparameters:
    """What the client set; `auto` is settled once the files are known."""

    n_epochs: int | Auto = "auto"
    batch_size: int | Auto = "auto"
    learning_rate_multiplier: float | Auto = "auto"
    beta: float | Auto | None = None

    def to_wire(self) -> Object:
        """Return the API's object; `beta` is in that of DPO only."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Wandb:
    """Where Weights & Biases gets the numbers."""

    project: str
    name: str | None = None
    entity: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class JobRequest:
    """The body of a new job, checked.

    Attributes:
        extensions: Keys of the run's config that the client sets (`dist_ft`).
    """

    model: str
    training_file: str
    validation_file: str | None
    method: Method
    hyperparameters: Hyperparameters
    suffix: str | None
    seed: int
    integrations: list[Wandb]
    metadata: dict[str, str] | None
    extensions: Object


def read_request(body: Object) -> JobRequest:
    """Read the body of a new job.

    Raises:
        ApiError: Names the first parameter that is wrong.
    """
    refuse_unknown(body, _MEMBERS)
    for key in ("model", "training_file"):
        if body.get(key) is None:
            raise bad_request(f"Missing required parameter: '{key}'.", key, "missing_required_parameter")
    method, settings = _read_method(body)
    suffix, seed, validation = body.get("suffix"), body.get("seed"), body.get("validation_file")
    return JobRequest(
        model=as_text(body["model"], "model", 200),
        training_file=as_text(body["training_file"], "training_file", 100),
        validation_file=None if validation is None else as_text(validation, "validation_file", 100),
        method=method,
        hyperparameters=settings,
        suffix=None if suffix is None else as_text(suffix, "suffix", 64),
        seed=secrets.randbelow(_MAX_SEED + 1) if seed is None else as_int(seed, "seed", 0, _MAX_SEED),
        integrations=_read_integrations(body.get("integrations")),
        metadata=read_metadata(body.get("metadata")),
        extensions={} if body.get("dist_ft") is None else as_object(body["dist_ft"], "dist_ft"),
    )


def read_metadata(value: Json) -> dict[str, str] | None:
    """Read up to 16 pairs of text.

    Raises:
        ApiError: They are something else.
    """
    if value is None:
        return None
    pairs = as_object(value, "metadata")
    if len(pairs) > 16:
        raise bad_request(
            f"Invalid 'metadata': too many properties. Expected at most 16, but got {len(pairs)}.", "metadata"
        )
    for key in pairs:
        as_text(key, "metadata", 64)
    return {key: as_text(item, "metadata", 512, 0) for key, item in pairs.items()}


def _read_method(body: Object) -> tuple[Method, Hyperparameters]:
    old, method = body.get("hyperparameters"), body.get("method")
    if method is None:
        return "supervised", _read_settings(old, "hyperparameters", "supervised")
    given = as_object(method, "method")
    asked = given.get("type")
    if asked == "reinforcement":
        raise bad_request("The method 'reinforcement' is not offered here; use 'supervised' or 'dpo'.", "method")
    if asked not in ("supervised", "dpo"):
        raise bad_request(f"Invalid value for 'method.type': {shown(asked)}. Supported: 'supervised', 'dpo'.", "method")
    kind: Method = "dpo" if asked == "dpo" else "supervised"
    refuse_unknown(given, ("type", "supervised", "dpo", "reinforcement"), "method")
    inner = given.get(kind)
    own = None if inner is None else as_object(inner, "method")
    if own is not None:
        refuse_unknown(own, ("hyperparameters",), "method")
    settings = None if own is None else own.get("hyperparameters")
    if old is not None and kind == "dpo":
        raise bad_request(
            "'hyperparameters' is for supervised jobs; use 'method.dpo.hyperparameters'.", "hyperparameters"
        )
    if settings is not None:
        read = _read_settings(settings, "method", kind)
        if old is not None and _read_settings(old, "hyperparameters", kind) != read:
            raise bad_request("'hyperparameters' and 'method' differ; give one of them.", "hyperparameters")
        return kind, read
    return kind, _read_settings(old, "hyperparameters", kind)


def _read_settings(value: Json, param: str, kind: Method) -> Hyperparameters:
    given = {} if value is None else as_object(value, param)
    refuse_unknown(
        given, ("n_epochs", "batch_size", "learning_rate_multiplier", *(("beta",) if kind == "dpo" else ())), param
    )
    epochs, batch, rate, beta = (
        None if given.get(key) == "auto" else given.get(key)
        for key in ("n_epochs", "batch_size", "learning_rate_multiplier", "beta")
    )
    return Hyperparameters(
        "auto" if epochs is None else as_int(epochs, param, 1, 50),
        "auto" if batch is None else as_int(batch, param, 1, 256),
        "auto" if rate is None else as_number(rate, param, 0),
        None if kind != "dpo" else "auto" if beta is None else as_number(beta, param, 0, 2),
    )


def _read_integrations(value: Json) -> list[Wandb]:
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > 5:
        raise bad_request(
            f"Invalid 'integrations': expected a list of at most 5, but got {shown(value)}.", "integrations"
        )
    found = []
    for item in value:
        given = as_object(item, "integrations")
        refuse_unknown(given, ("type", "wandb"), "integrations")
        if given.get("type") != "wandb":
            raise bad_request(
                f"Invalid 'integrations': type {shown(given.get('type'))}, expected 'wandb'.", "integrations"
            )
        wandb = as_object(given.get("wandb"), "integrations")
        refuse_unknown(wandb, ("project", "name", "entity", "tags"), "integrations")
        tags = [] if wandb.get("tags") is None else wandb["tags"]
        if not isinstance(tags, list):
            raise bad_request("Invalid 'integrations': 'tags' must be a list of strings.", "integrations")
        name, entity = wandb.get("name"), wandb.get("entity")
        found.append(
            Wandb(
                as_text(wandb.get("project"), "integrations", 128),
                None if name is None else as_text(name, "integrations", 128),
                None if entity is None else as_text(entity, "integrations", 128),
                [as_text(tag, "integrations", 128) for tag in tags],
            )
        )
    return found
