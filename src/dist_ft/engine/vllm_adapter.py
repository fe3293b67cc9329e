"""Says from the files of an export alone how vLLM serves it: as an adapter beside its base, or merged. No torch.

vLLM refuses some adapters only when a GPU holds the base already, and scales others wrongly without a word. The rules
are read off its `lora/peft_helper.py` and `config/lora.py`. Nothing of this has run with vLLM yet.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_ft.checkpoint.tensorfile import read_header
from dist_ft.errors import CheckpointError, UsageError
from dist_ft.storage.store import LocalStore

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be; its default is 16."""
_SETTINGS, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NOT_LINEAR = ("embed_tokens", "lm_head")
"""Layers that vLLM splits by vocabulary; it takes no adapter of them."""


@dataclass(frozen=True)
class VllmAdapter:
    """An export as vLLM serves it.

    Attributes:
        directory: The export.
        base: What the adapter names as its base; None for a whole model.
        max_rank: What `--max-lora-rank` has to be, for an adapter that is served as one.
        refused: What of an adapter vLLM does not take, so that it has to be merged first.
    """

    directory: Path
    base: str | None = None
    max_rank: int | None = None
    refused: str | None = None

    def way(self, name: str) -> str:
        """Return how it is served, in a sentence.

        Args:
            name: What clients ask for.
        """
        if self.refused is not None:
            return (
                f"vLLM takes no adapter with {self.refused}; `dist-ft export RUN --merge --to DIR` and "
                f"`{shlex.join(['vllm', 'serve', 'DIR', '--served-model-name', name])}`"
            )
        if self.base is None:
            return f"`{shlex.join(['vllm', 'serve', str(self.directory), '--served-model-name', name])}`"
        adapter = ["--enable-lora", "--max-lora-rank", str(self.max_rank), "--lora-modules", f"{name}={self.directory}"]
        return f"`{shlex.join(['vllm', 'serve', self.base, *adapter])}`"


def vllm_adapter(directory: Path) -> VllmAdapter:
    """Return how vLLM serves a directory.

    Raises:
        UsageError: It is neither a model nor an adapter in safetensors.
    """
    if not (directory / _SETTINGS).is_file():
        if not (directory / "config.json").is_file():
            raise UsageError(f"{directory} is neither a model (config.json) nor an adapter ({_SETTINGS})")
        return VllmAdapter(directory)
    try:
        settings = json.loads((directory / _SETTINGS).read_bytes())
        tensors = read_header(LocalStore(directory), _WEIGHTS)
    except (OSError, ValueError, CheckpointError) as error:
        raise UsageError(f"{directory} is an adapter that cannot be read: {error}") from error
    # The rank of a layer, whatever the config says: A is [r, in].
    rank = max((entry.shape[0] for name, entry in tensors.items() if name.endswith("lora_A.weight")), default=0)
    refused = _setting_refused(settings) or _tensor_refused(list(tensors))
    if refused is None and rank > RANKS[-1]:
        refused = f"r={rank} (at most {RANKS[-1]})"
    if refused is not None:
        return VllmAdapter(directory, refused=refused)
    return VllmAdapter(
        directory, str(settings.get("base_model_name_or_path")), next(most for most in RANKS if most >= rank)
    )


def _setting_refused(settings: Mapping[str, Any]) -> str | None:
    """Return a setting that vLLM refuses, or does not read: it scales all layers by one alpha and r."""
    if settings.get("peft_type") != "LORA":
        return f"peft_type={settings.get('peft_type')}"
    for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern"):
        if settings.get(key):
            return f"{key}={json.dumps(settings[key])}"
    if settings.get("bias", "none") != "none":
        return f"bias={settings['bias']}"
    return None


def _tensor_refused(names: list[str]) -> str | None:
    for name in names:
        if not name.endswith((".lora_A.weight", ".lora_B.weight")):
            return f"the tensor {name}"
        if (module := name.split(".lora_")[0].rpartition(".")[2]) in _NOT_LINEAR:
            return f"a layer {module}"
    return None
