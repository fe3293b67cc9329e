"""Keys and values of a batch whose rows come and go.

Legend: R rows, H heads, T places, D width of a head. Rows are aligned right: their newest tokens share a place, shorter
rows have padding on the left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from dist_ft.errors import ModelError

_SERVED = ("full_attention", "sliding_attention", "chunked_attention")
_SPARE = 64
"""Places that are kept free for next tokens: without them each token would copy the whole cache."""


class RowsLayer(DynamicLayer):
    """The keys and values of one layer, in memory with spare places at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: torch.Tensor
        self.values: torch.Tensor
        self._stored: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append places; return all of them as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._hold(key_states, value_states)
            return self.keys, self.values
        assert self._stored is not None
        begin = self.keys.shape[-2]
        end = begin + key_states.shape[-2]
        if end > self._stored[0].shape[-2]:
            self._hold(self.keys, self.values, spare=max(_SPARE, end // 4))
            assert self._stored is not None
        self._stored[0][:, :, begin:end] = key_states
        self._stored[1][:, :, begin:end] = value_states
        self.keys, self.values = (stored[:, :, :end] for stored in self._stored)
        return self.keys, self.values

    def rebuild(self, parts: Sequence[tuple[torch.Tensor, torch.Tensor]], width: int) -> None:
        """Hold the rows of parts, each aligned right in so many places."""
        self.is_initialized = True
        self._hold(*(torch.cat([_fitted(part[side], width) for part in parts]) for side in (0, 1)))

    def _hold(self, keys: torch.Tensor, values: torch.Tensor, spare: int = _SPARE) -> None:
        length = keys.shape[-2]
        self._stored = pad(keys, (0, 0, 0, spare)), pad(values, (0, 0, 0, spare))
        self.keys, self.values = (stored[:, :, :length] for stored in self._stored)


class RowsCache(Cache):
    """The cache of a batch.

    Args:
        config: Of the model.

    Raises:
        ModelError: The model keeps something else than keys and values, such as the state of a recurrence.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        text = config.get_text_config()
        kinds = set(getattr(text, "layer_types", None) or ())  # not all families have it
        if odd := sorted(kinds - set(_SERVED)):
            raise ModelError(f"the model has layers of kind {odd[0]}, which the engine torch does not serve")
        super().__init__(layers=[RowsLayer() for _ in range(text.num_hidden_layers)])

    def rebuild(self, parts: Sequence[tuple[RowsCache, Sequence[int]]], width: int) -> None:
        """Hold rows of other caches, or of this one.

        Args:
            parts: Caches, and which of their rows.
            width: Places of the longest row.
        """
        for number, layer in enumerate(self.layers):
            taken = []
            for cache, rows in parts:
                source, index = cache.layers[number], torch.tensor(rows)
                if source.is_initialized:
                    index = index.to(source.keys.device)
                    taken.append((source.keys[index], source.values[index]))
            layer.rebuild(taken, width)


def _fitted(part_RHTD: torch.Tensor, width: int) -> torch.Tensor:
    """Return rows in so many places: padding is cut or added on the left."""
    surplus = part_RHTD.shape[-2] - width
    return part_RHTD[:, :, surplus:] if surplus >= 0 else pad(part_RHTD, (0, 0, -surplus, 0))
