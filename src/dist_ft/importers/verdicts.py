"""Types of an import: what becomes of each key of another tool's config.

Left to others: the tables of the tools, and how findings are printed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dist_ft.config.yaml_file import Yaml
from dist_ft.errors import ConfigError

Verdict = Literal["same", "close", "no effect", "refused"]
"""What a key becomes. `close` trains something slightly different, `refused` stops the import."""


@dataclass(frozen=True)
class Options:
    """Says what the user decides on the command line, because the file does not."""

    gpus: int | None = None
    """World size of the run in the other tool."""
    unquantised: bool = False
    """Train the same adapters on the base as it is, where the file quantises it."""
    templates: Path | None = None
    """Folder of Jinja files, by name of the template."""
    dataset_dir: Path | None = None
    """Folder with dataset_info.json, in place of the file's (LLaMA-Factory)."""
    trust_remote_code: bool = False
    """Take over a permission to run code that comes with a model."""
    method: Literal["sft", "dpo", "kto"] = "sft"
    """The command of TRL that the file is for."""


@dataclass(frozen=True)
class Source:
    """A config of another tool: the keys that are set, and the user's options."""

    path: Path
    values: dict[str, Yaml]
    """Without keys that are null or empty."""
    options: Options = Options()

    def number(self, key: str, default: float) -> float:
        """Return a number. `2e-5` and `1_000` are numbers to these tools."""
        return as_number(key, self.values.get(key, default))

    def whole(self, key: str, default: int) -> int:
        """Return a whole number."""
        return as_whole(key, self.values.get(key, default))

    def flag(self, key: str, default: bool = False) -> bool:
        """Return a flag."""
        return as_flag(key, self.values.get(key, default))

    def text(self, key: str, default: str = "") -> str:
        """Return a text."""
        return as_text(key, self.values.get(key, default))


@dataclass(frozen=True)
class Outcome:
    """What a rule makes of one key."""

    verdict: Verdict
    why: str = ""
    """The reason, and for a refused key the way out."""
    settings: dict[str, Yaml] = field(default_factory=dict)
    """Keys of a dist-ft config, such as `train.epochs`, with their values."""


Rule = Callable[[Source, Yaml], Outcome]
"""Judges one key. It may read others, because keys act together."""


@dataclass(frozen=True)
class Finding:
    """What becomes of one key of the file, or of one that it leaves out."""

    key: str
    outcome: Outcome
    is_left_out: bool = False
    """The file leaves the key out; the tool's default is meant."""


@dataclass(frozen=True)
class Imported:
    """The result of an import."""

    tool: str
    path: Path
    findings: list[Finding]
    unknown: list[str]
    """Keys of the file that are in no table."""
    notes: tuple[str, ...]
    """What always differs between the tool and dist-ft."""

    @property
    def refused(self) -> list[Finding]:
        """Findings that stop the import."""
        return [finding for finding in self.findings if finding.outcome.verdict == "refused"]

    @property
    def settings(self) -> dict[str, Yaml]:
        """The keys of the dist-ft config with their values; a mapping may come from several keys."""
        found: dict[str, Yaml] = {}
        for finding in self.findings:
            found |= finding.outcome.settings
        return found


def as_number(key: str, value: Yaml) -> float:
    """Return a value as a finite number.

    Raises:
        ConfigError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _wrong_type(key, value, "a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _wrong_type(key, value, "a number") from None
    if not math.isfinite(number):
        raise _wrong_type(key, value, "a finite number")
    if isinstance(value, str):
        return int(number) if value.strip().lstrip("+-").replace("_", "").isdigit() else number
    return value


def as_whole(key: str, value: Yaml) -> int:
    """Return a value as a whole number.

    Raises:
        ConfigError: It is none.
    """
    number = as_number(key, value)
    if number != int(number):
        raise _wrong_type(key, value, "a whole number")
    return int(number)


def as_flag(key: str, value: Yaml) -> bool:
    """Return a value as a flag; YAML 1.1, which these tools read, has `yes` and `on` too.

    Raises:
        ConfigError: It is none.
    """
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise _wrong_type(key, value, "true or false")


def as_text(key: str, value: Yaml) -> str:
    """Return a value as text.

    Raises:
        ConfigError: It is none.
    """
    if isinstance(value, str):
        return value
    raise _wrong_type(key, value, "a text")


def as_texts(key: str, value: Yaml) -> list[str]:
    """Return a value as a list of texts; one text is a list of one.

    Raises:
        ConfigError: It is none.
    """
    return [as_text(key, item) for item in value] if isinstance(value, list) else [as_text(key, value)]


def as_numbers(key: str, value: Yaml) -> list[float]:
    """Return a value as a list of numbers; one number is a list of one.

    Raises:
        ConfigError: It is none.
    """
    return [float(as_number(key, item)) for item in (value if isinstance(value, list) else [value])]


def as_mapping(key: str, value: Yaml) -> dict[str, Yaml]:
    """Return a value as a mapping.

    Raises:
        ConfigError: It is none.
    """
    if isinstance(value, dict):
        return value
    raise _wrong_type(key, value, "a mapping")


def as_mappings(key: str, value: Yaml) -> list[dict[str, Yaml]]:
    """Return a value as a list of mappings.

    Raises:
        ConfigError: It is none.
    """
    if isinstance(value, list):
        return [as_mapping(f"{key}.{index}", item) for index, item in enumerate(value)]
    raise _wrong_type(key, value, "a list of mappings")


def is_set(value: Yaml) -> bool:
    """Return whether a value is set; these tools treat null and empty values as left out."""
    return value is not None and value not in ("", [], {})


def is_off(value: Yaml) -> bool:
    """Return whether a value turns its key off, in any of the spellings of YAML 1.1, which these tools read."""
    return value is False or value == 0 or (isinstance(value, str) and value.lower() in ("false", "no", "off"))


def _wrong_type(key: str, value: Yaml, expected: str) -> ConfigError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return ConfigError(f"{key}={shown} ({type(value).__name__}): expected {expected}; correct it")
