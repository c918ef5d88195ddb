"""scaled_dot_product_attention as torch carries it out on a CUDA card.

The choice of kernel is that of aten/native/transformers/cuda/sdp_utils.cpp: flash where there is no mask and
heads are of one size of at most 256; else the memory-efficient kernel, which takes a mask as numbers but no
grouped heads; else plain matrix products. Kernels and their gradients are torch's own, which know on the meta
device which tensors they return and keep.
"""

from __future__ import annotations

from typing import Any

import torch

_ATEN = torch.ops.aten
LARGEST_HEAD = 256
ALIGNED = 8


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """query [B, H, S, E], key and value [B, K, L, E and Ev] -> [B, H, S, Ev]."""
    wide = query.dtype not in (torch.float16, torch.bfloat16)
    plain = query.dim() != 4 or query.shape[0] != key.shape[0] or query.dtype == torch.float64
    head, odd = query.shape[-1], query.shape[-1] % ALIGNED
    if not plain and not wide and attn_mask is None and head == value.shape[-1] and head <= LARGEST_HEAD:
        return _flash(query, key, value, dropout_p, is_causal, scale)
    grouped = query.shape[1] != key.shape[1]
    if not plain and not grouped and not odd and not value.shape[-1] % ALIGNED:
        return _efficient(query, key, value, attn_mask, dropout_p, is_causal, scale)
    return _ATEN._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    head = query.shape[-1]
    scale = head**-0.5 if scale is None else scale
    if head % ALIGNED:  # padded for the kernel, and cut again
        more = ALIGNED - head % ALIGNED
        query, key, value = (torch.nn.functional.pad(x, (0, more)) for x in (query, key, value))
    out: torch.Tensor = _ATEN._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, False, scale=scale
    )[0]
    return out[..., :head] if out.shape[-1] != head else out


def _efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    bias = None if mask is None else _as_numbers(mask, query)
    keeps = any(x.requires_grad for x in (query, key, value)) and torch.is_grad_enabled()
    out: torch.Tensor = _ATEN._scaled_dot_product_efficient_attention(
        query, key, value, bias, keeps, dropout_p, is_causal, scale=scale
    )[0]
    return out


def _as_numbers(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A boolean mask as 0 and minus infinity, its last dimension padded to 16, as the kernel wants it."""
    columns = mask.shape[-1]
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    if columns % 16:
        padded: Any = torch.nn.functional.pad(mask, (0, 16 - columns % 16))
        mask = padded[..., :columns]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], columns)
