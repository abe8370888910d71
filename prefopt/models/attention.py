"""Attention over prompt trees, registered with transformers as ``prefopt_tree``.

Every segment of a tree (a prompt, or a completion with its prompt as prefix) is an ordinary causal
attention of its own, aligned at the bottom right. On the CPU each segment is one SDPA call; on CUDA
in half precision one variable-length flash attention call serves all segments, with the prefix keys
gathered in front of each completion's own. Calls without a tree (generation, plain forwards) behave
as ``sdpa``, but that a token drawn with a cache copies no shared keys.
"""

from __future__ import annotations

from functools import cached_property
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prefopt.data.tree import Segment, TreeBatch

TREE_ATTENTION = "prefopt_tree"


class TreeMap:
    """What attends to what in one batch, with the masks and indices made once for all layers."""

    def __init__(self, batch: TreeBatch) -> None:
        self.segments = batch.segments
        self.num_positions = batch.input_ids.numel()
        self.device = batch.input_ids.device
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def mask(self, segment: Segment, window: int | None) -> Tensor:
        """Which key a query may see, [queries, keys]: bottom-right causal, within the window."""
        queries, keys = segment.length, segment.prefix_length + segment.length
        if (queries, keys, window) not in self._masks:
            columns = torch.arange(keys, device=self.device)
            rows = columns[-queries:, None]
            allowed = columns <= rows
            if window is not None:
                allowed &= columns > rows - window
            self._masks[queries, keys, window] = allowed
        return self._masks[queries, keys, window]

    @cached_property
    def query_index(self) -> Tensor:
        """Flat positions of all real tokens in segment order, [tokens]."""
        return self._ranges([(s.start, s.length) for s in self.segments])

    @cached_property
    def key_index(self) -> Tensor:
        """Flat positions of the keys: prefix, then own tokens, segment by segment, [keys]."""
        return self._ranges(
            [
                part
                for s in self.segments
                for part in ((s.prefix_start, s.prefix_length), (s.start, s.length))
            ]
        )

    @cached_property
    def query_bounds(self) -> Tensor:
        """Cumulative query lengths, int32, [segments + 1]."""
        return self._bounds([s.length for s in self.segments])

    @cached_property
    def key_bounds(self) -> Tensor:
        """Cumulative key lengths, int32, [segments + 1]."""
        return self._bounds([s.prefix_length + s.length for s in self.segments])

    @cached_property
    def longest(self) -> tuple[int, int]:
        """Longest query run and longest key run."""
        return (
            max(s.length for s in self.segments),
            max(s.prefix_length + s.length for s in self.segments),
        )

    @cached_property
    def pieces(self) -> list[tuple[int, Segment | None]]:
        """All positions as runs in order: each run's length and its segment, None for padding."""
        pieces: list[tuple[int, Segment | None]] = []
        cursor = 0
        for s in self.segments:
            if s.start > cursor:
                pieces.append((s.start - cursor, None))
            pieces.append((s.length, s))
            cursor = s.start + s.length
        if cursor < self.num_positions:
            pieces.append((self.num_positions - cursor, None))
        return pieces

    def _ranges(self, parts: list[tuple[int, int]]) -> Tensor:
        ranges = [torch.arange(start, start + length) for start, length in parts]
        return torch.cat(ranges).to(self.device)

    def _bounds(self, lengths: list[int]) -> Tensor:
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        return bounds.to(self.device, torch.int32)


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    tree_map: TreeMap | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function transformers calls in every layer.

    Args:
        module: The attention module.
        query: Queries, [rows, heads, width, head_dim].
        key: Keys, [rows, key_value_heads, width, head_dim].
        value: Values, [rows, key_value_heads, width, head_dim].
        attention_mask: Used only without a tree.
        dropout: Dropout probability on the attention weights.
        scaling: Factor on the scores; 1/sqrt(head_dim) when None.
        sliding_window: How many positions back a token sees, itself included.
        softcap: Gemma 2's bound on the scores.
        tree_map: The tree's geometry; None means plain attention.
        **kwargs: What else the model passes on.

    Returns:
        The output, [rows, width, heads, head_dim], and None for the weights.
    """
    rows, heads, width, _ = query.shape
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if tree_map is None:
        if softcap is None:
            if width == 1 and heads > key.shape[1] and kwargs.get("position_bias") is None:
                return _one_token(query, key, value, attention_mask, scale, dropout), None
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, **kwargs
            )
        key, value = (repeat_kv(t, heads // t.shape[1]) for t in (key, value))
        if attention_mask is None:  # sdpa_mask leaves out a mask that is causal and nothing more
            keys = torch.arange(key.shape[2], device=key.device)
            attention_mask = keys <= keys[-width:, None]
        out = _softcapped(query, key, value, attention_mask, scale, softcap, dropout)
        return out.contiguous(), None
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings leave float32 behind
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(dtype) for t in (query, key, value))
    flat_q, flat_k, flat_v = (t.transpose(0, 1).flatten(1, 2) for t in (query, key, value))
    if _flash_takes(query, value) and softcap is None and dropout == 0.0:
        out = _varlen(flat_q, flat_k, flat_v, tree_map, scale, sliding_window)
    else:
        out = _segments(flat_q, flat_k, flat_v, tree_map, scale, sliding_window, softcap, dropout)
    return out.unflatten(0, (rows, width)), None


def _one_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """Attention of one new token a row, [rows, 1, heads, head_dim].

    Query heads that share keys stand as queries of one head, which sees the keys where they are;
    with a mask, transformers' ``sdpa`` makes a copy of all keys and values for every query head.
    """
    grouped = query.unflatten(1, (key.shape[1], -1))[..., 0, :]
    out = F.scaled_dot_product_attention(grouped, key, value, mask, dropout, scale=scale)
    return out.flatten(1, 2)[:, None]


def _flash_takes(query: Tensor, value: Tensor) -> bool:
    """Whether flash attention has a kernel for this device, type and head size."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    size = query.shape[-1]
    return query.is_cuda and half and size == value.shape[-1] and size % 8 == 0 and size <= 256


def _segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree_map: TreeMap,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """One attention call per segment; [heads, positions, head_dim] to [positions, heads, dim]."""
    # elsewhere than on the CPU, a mask and shared key heads meet only in the slowest kernel
    shared_heads = query.device.type == "cpu" and softcap is None
    if not shared_heads:
        groups = query.shape[0] // key.shape[0]
        key, value = (repeat_kv(t[None], groups)[0] for t in (key, value))
    # split, not sliced: the backward of every single slice fills a tensor of the batch's length
    lengths = [length for length, _ in tree_map.pieces]
    queries, keys, values = (t.split(lengths, 1) for t in (query, key, value))
    outputs: list[Tensor] = []
    piece_at: dict[int, int] = {}
    for i, (length, s) in enumerate(tree_map.pieces):
        if s is None:  # padding, whose output nobody reads
            outputs.append(query.new_zeros(length, query.shape[0], value.shape[-1]))
            continue
        piece_at[s.start] = i
        q, k, v = queries[i], keys[i], values[i]
        if s.prefix_length:
            prefix = piece_at[s.prefix_start]
            k, v = torch.cat([keys[prefix], k], 1), torch.cat([values[prefix], v], 1)
        if softcap is not None:
            visible = tree_map.mask(s, window)
            outputs.append(_softcapped(q, k, v, visible, scale, softcap, dropout))
            continue
        plain = not s.prefix_length and (window is None or s.length <= window)
        mask = None if plain else tree_map.mask(s, window)
        out = F.scaled_dot_product_attention(
            q[None], k[None], v[None], mask, dropout, plain, scale=scale, enable_gqa=shared_heads
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float,
    dropout: float,
) -> Tensor:
    """Attention with bounded scores (Gemma 2), [..., heads, q, dim] to [..., q, heads, dim]."""
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * scale / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, torch.float32)
    # a row of padding sees nothing: its softmax is NaN and its output is never read
    weights = F.dropout(weights.nan_to_num(0.0).to(query.dtype), dropout)
    return (weights @ value).transpose(-2, -3)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, tree_map: TreeMap, scale: float, window: int | None
) -> Tensor:
    """All segments in one flash attention call with gathered keys; shapes as ``_segments``."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 groups the queries by itself, later versions want to be told
    grouped = query.shape[0] != key.shape[0] and "enable_gqa" in signature(varlen_attn).parameters
    options: dict[str, Any] = {"enable_gqa": True} if grouped else {}
    longest_query, longest_key = tree_map.longest
    out: Any = varlen_attn(
        query[:, tree_map.query_index].transpose(0, 1),
        key[:, tree_map.key_index].transpose(0, 1),
        value[:, tree_map.key_index].transpose(0, 1),
        tree_map.query_bounds,
        tree_map.key_bounds,
        longest_query,
        longest_key,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    positions = query.new_zeros(tree_map.num_positions, query.shape[0], value.shape[-1])
    return positions.index_copy(0, tree_map.query_index, out)


AttentionInterface.register(TREE_ATTENTION, tree_attention)
AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)
