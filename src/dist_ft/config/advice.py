"""Keys and values that people bring from other tools, and that mean something here: what to do instead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

QUANTISED = (
    "quantised training is not supported: exact resumes need float32 masters and optimizer state of weights that are "
    "kept as they are. Use method.kind=lora with model.dtype=bfloat16; where memory is short, zero.stage=3 and "
    "zero.offload=true"
)
TOKEN = "secrets come from the environment only: remove it here; for a hub, set HF_TOKEN"

_KEYS = (
    (re.compile(r"load_in_[48]bit|bnb_.*|quanti[sz].*|q(lora|dora)|gptq|awq|loftq.*"), QUANTISED),
    (re.compile(r"(hf_|auth_|access_|use_auth_|hub_)?token"), TOKEN),
)
_VALUES = {"method.kind": re.compile(r"q-?(lora|dora)|bnb.*|gptq|awq", re.IGNORECASE)}
# As the hub writes them, and user info in a URL.
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{16,}|//[^/@\s]+@")


def advice_on_key(key: str) -> str | None:
    """Returns what to do instead of a key that the schema does not know, if it is a known one of others."""
    return next((advice for pattern, advice in _KEYS if pattern.fullmatch(key.lower())), None)


def advice_on_value(key: str, value: Any) -> str | None:
    """Returns what to do instead of a value that the key does not take, if it is a known one of others."""
    pattern = _VALUES.get(key)
    return QUANTISED if pattern is not None and isinstance(value, str) and pattern.fullmatch(value) else None


def keys_with_secrets(raw: Any, key: str = "") -> Iterator[str]:
    """Yields the keys whose values hold a token or the user info of a URL; the values must not be shown."""
    if isinstance(raw, dict):
        for name, value in raw.items():
            yield from keys_with_secrets(value, f"{key}.{name}".removeprefix("."))
    elif isinstance(raw, list):
        for index, value in enumerate(raw):
            yield from keys_with_secrets(value, f"{key}.{index}")
    elif isinstance(raw, str) and _SECRET.search(raw):
        yield key
