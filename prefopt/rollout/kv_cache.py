"""The keys and values of a batch that shrinks: appended in place, and dropped with their rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 128  # positions to have in store


class RoomyLayer(DynamicLayer):
    """Keys and values with room behind them, so that a token's are appended without a copy.

    ``DynamicLayer`` copies all there are for every token, which on a CPU takes longer than the
    matrix products do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rooms: list[Tensor | None] = [None, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends keys and values, [rows, heads, new positions, size]; returns all there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        pasts, news = (self.keys, self.values), (key_states, value_states)
        for i, (past, new) in enumerate(zip(pasts, news, strict=True)):
            self.rooms[i] = _with_room(self.rooms[i], past, new)
        end = self.keys.shape[-2] + key_states.shape[-2]
        self.keys, self.values = (room[..., :end, :] for room in self.rooms if room is not None)
        return self.keys, self.values


def _with_room(room: Tensor | None, past: Tensor, new: Tensor) -> Tensor:
    """A tensor that begins with ``past`` and ``new``: ``room``, if ``past`` lies in it and fits."""
    start, end = past.shape[-2], past.shape[-2] + new.shape[-2]
    if room is None or room.shape[-2] < end or room.data_ptr() != past.data_ptr():
        room = new.new_empty(*new.shape[:-2], end + ROOM, new.shape[-1])
        room[..., :start, :] = past
    room[..., start:end, :] = new
    return room


def roomy_cache(model: PreTrainedModel) -> DynamicCache | None:
    """An empty cache of roomy layers; None for a model that keeps more than keys and values.

    Layers with a sliding window stay as they are, being short.
    """
    if not model._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config)
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    cache.layers = [
        RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def keep_rows(cache: DynamicCache, rows: list[int]) -> None:
    """Makes the cache that of the given rows, of which some may recur."""
    device = next(layer.keys.device for layer in cache.layers)
    cache.reorder_cache(torch.tensor(rows, device=device))
