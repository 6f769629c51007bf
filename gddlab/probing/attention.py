"""Entropies of softmax attention, read where the network computes it: after whatever it does to queries and keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)
_AT_ONCE = 1 << 22
"""Numbers of a piece of attention maps that are held at once."""


class Softmaxes(TorchFunctionMode):
    """Inside, `seen` is given the entropies of each softmax attention, (B, heads, queries), as it is computed.

    That is a call of `scaled_dot_product_attention`, of which all of PyTorch's and diffusers' usual processors make
    one, or a softmax over the last axis of maps (B, heads, queries, keys) or (B * heads, queries, keys).

    Args:
        rows: Gives the rows of the pass, B; None where nothing is to be seen now.
        seen: Takes the entropies.
    """

    def __init__(self, rows: Callable[[], int | None], seen: Callable[[Tensor], None]):
        super().__init__()
        self._rows, self._seen = rows, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            if self._rows() is not None and query.ndim == 4:
                self._seen(entropies(*args, **kwargs))
        elif func in _SOFTMAX and isinstance(out, Tensor) and out.ndim in (3, 4):
            axis = args[1] if len(args) > 1 else kwargs.get("dim")
            rows = self._rows()
            if rows and axis in (-1, out.ndim - 1) and len(out) % rows == 0:
                self._seen(_of_maps(out.detach().reshape(rows, -1, *out.shape[-2:])))
        return out


def entropies(
    query: Float[Tensor, "b heads q d"],
    key: Float[Tensor, "b groups k d"],
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "b heads q"]:
    """Entropy of the attention of each query, nats; arguments of `scaled_dot_product_attention`, float32 or float64.

    Maps are computed in pieces, so that memory does not grow with rows, heads or queries.
    """
    query, key = query.detach(), key.detach()
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    b, heads, q, k = *query.shape[:-1], key.shape[-2]
    mask = None if attn_mask is None else attn_mask.detach().expand(b, heads, q, k)
    if is_causal:
        mask = torch.ones(q, k, dtype=torch.bool, device=query.device).tril().expand(b, heads, q, k)
    kind = query.dtype if query.dtype == torch.float64 else torch.float32
    out = query.new_empty(b, heads, q, dtype=kind)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        step = max(1, _AT_ONCE // k)  # queries of one head
        for i in range(b):
            for h in range(heads):
                for j in range(0, q, step):
                    score = query[i, h, j : j + step].to(kind) @ key[i, h].to(kind).mT * factor
                    if mask is not None:
                        part = mask[i, h, j : j + step]
                        score = score.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else score + part
                    out[i, h, j : j + step] = _entropy(score.log_softmax(-1))
    return out


def _of_maps(p: Float[Tensor, "b heads q k"]) -> Float[Tensor, "b heads q"]:
    """Of the probabilities themselves."""
    p = p if p.dtype == torch.float64 else p.float()
    return torch.stack([_entropy(part.log()) for part in p])


def _entropy(log: Float[Tensor, "*rest k"]) -> Float[Tensor, "*rest"]:
    """-sum p ln p, where 0 ln 0 is 0."""
    p = log.exp()
    return -torch.where(p > 0, p * log, torch.zeros_like(p)).sum(-1)
