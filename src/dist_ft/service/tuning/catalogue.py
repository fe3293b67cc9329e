"""The base models on offer, from a YAML file: each entry has the fields of `BaseModel`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dist_ft.config.yaml_file import Yaml, read_yaml
from dist_ft.errors import ConfigError
from dist_ft.service.wire import Object

DEFAULT = Path(__file__).with_name("catalogue.yaml")
_CREATED = 1_700_000_000
_KEYS = ("name", "model", "context", "learning_rate", "config", "tokens_per_s", "price_per_million_tokens")


@dataclass(frozen=True)
class BaseModel:
    """A base model on offer.

    Attributes:
        name: What clients ask for.
        model: `model.name` of a run.
        context: Longest example in tokens; longer ones are cut.
        learning_rate: That of `learning_rate_multiplier` 1.
        config: Further keys of the run's config.
        tokens_per_s: Speed of its jobs, as their runs print it; None: not known, so nobody is told how long one takes.
        price_per_million_tokens: Price of a million trained tokens, in whatever clients pay here; None: not known.
    """

    name: str
    model: str
    context: int
    learning_rate: float
    config: Object = field(default_factory=dict)
    tokens_per_s: float | None = None
    price_per_million_tokens: float | None = None

    def to_wire(self) -> Object:
        """Return the API's object, with what only we know beside it."""
        known: Object = {
            "context": self.context, "learning_rate": self.learning_rate, "tokens_per_s": self.tokens_per_s,
            "price_per_million_tokens": self.price_per_million_tokens,
        }  # fmt: skip
        return {
            "id": self.name, "object": "model", "created": _CREATED, "owned_by": "dist-ft", "shutdown_date": None,
            "dist_ft": known,
        }  # fmt: skip


def read_catalogue(path: Path) -> dict[str, BaseModel]:
    """Read a catalogue: the models by name, in the file's order.

    Raises:
        ConfigError: An entry is not as it should be.
    """
    entries = read_yaml(path).get("models")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: expected a list under `models`")
    found: dict[str, BaseModel] = {}
    for number, entry in enumerate(entries, 1):
        model = _read_entry(entry, f"{path}: entry {number}")
        if model.name in found:
            raise ConfigError(f"{path}: entry {number}: name {model.name} stands twice")
        found[model.name] = model
    return found


def _read_entry(entry: Yaml, where: str) -> BaseModel:
    if not isinstance(entry, dict) or not set(entry) <= set(_KEYS):
        raise ConfigError(f"{where} is {str(entry)[:100]}; expected the keys {', '.join(_KEYS)}")
    name, model, context, rate = (entry.get(key) for key in _KEYS[:4])
    config = entry.get("config") or {}
    if not isinstance(name, str) or not name or ":" in name:
        raise ConfigError(f"{where}: name={name!r}; expected text without a colon")
    if not isinstance(model, str) or not isinstance(context, int) or not isinstance(rate, float) or rate <= 0:
        raise ConfigError(
            f"{where}: expected model as text, context as a number of tokens, learning_rate such as 0.001"
        )
    if not isinstance(config, dict):
        raise ConfigError(f"{where}: config={str(config)[:100]}; expected keys of a run's config")
    numbers = [_positive(entry, key, where) for key in ("tokens_per_s", "price_per_million_tokens")]
    return BaseModel(name, model, context, rate, config, *numbers)


def _positive(entry: Object, key: str, where: str) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"{where}: {key}={value!r}; expected a number above 0")
    return float(value)
