"""What CUDA kernels take for themselves and give back before they return.

No dispatch mode sees these bytes, and the stand-ins that give shapes on the meta device do not ask for them.
Each entry names the code it was read from; T rows, B batch, H heads, S sequence, E head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from planner.memory.forward import packed_rows
from planner.memory.tape import rounded

Kernel = Callable[..., int]


def passing_bytes(func: Any, args: Any, kwargs: Any, out: Any, card: Any) -> int:
    """Bytes alive beside inputs and outputs at the fullest moment of one operator; 0 for most."""
    kernel = _KERNELS.get(func.name())
    return 0 if kernel is None else kernel(args, kwargs, out, card)


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _flash_backward(args: Any, kwargs: Any, out: Any, card: Any) -> int:
    """float32 dq, the rows' sums, and dk, dv of every query head before groups are summed
    (aten/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd)."""
    query, key = args[1], args[2]
    batch, heads, rows, e = query.shape
    padded = _up(rows, 128)
    n = rounded(4 * batch * heads * padded * _up(e, 32)) + rounded(4 * batch * heads * padded)
    if key.shape[1] != heads:
        n += 2 * rounded(batch * heads * key.shape[2] * e * query.element_size())
    return n


def _efficient_backward(args: Any, kwargs: Any, out: Any, card: Any) -> int:
    """float32 dq and the rows' sums (aten/native/transformers/cuda/attention_backward.cu)."""
    query = args[1]
    batch, heads, rows, e = query.shape
    return rounded(4 * batch * heads * _up(rows, 64) * e) + rounded(4 * batch * heads * _up(rows, 64))


CUSTOM_GEMM_ROWS = {10: 32}
"""Rows up to which bitsandbytes multiplies packed 4-bit weights directly, by the card's major version
(backends/cuda/ops.py, `_gemm_4bit_use_custom_cuda`, the widest of its tiers); elsewhere 256. Its whole rule
for H100 and H200 is in `planner.memory.forward`."""


def _gemm_4bit(args: Any, kwargs: Any, out: Any, card: Any) -> int:
    """The dequantized weight and its float32 scales, for more rows than the custom kernel takes."""
    x, _, shape = args[0], args[1], args[2]
    rows = x.numel() // x.shape[-1]
    most = CUSTOM_GEMM_ROWS.get(card.major, 256)
    if rows <= (packed_rows(shape[1], shape[0], x.element_size()) if card.major == 9 else most):
        return 0
    elements = shape[0] * shape[1]
    nested = kwargs.get("absmax_8bit") is not None
    return rounded(elements * x.element_size()) + (rounded(elements // args[4] * 4) if nested else 0)


def _int8_quant(args: Any, kwargs: Any, out: Any, card: Any) -> int:
    """|A| and the mask of its outliers (backends/cuda/ops.py, int8_vectorwise_quant)."""
    n: int = args[0].numel()
    return rounded(2 * n) + rounded(n)


def _int8_mixed(args: Any, kwargs: Any, out: Any, card: Any) -> int:
    """int32 product, the outlier columns of the weight dequantized through float32, the 16-bit result
    before outliers are added (backends/default/ops.py, int8_mixed_scaled_mm)."""
    x, columns, weight = args[0], args[5], args[2]
    rows, width = x.shape[0], x.element_size()
    picked = 0 if columns is None else columns.numel()
    product = rounded(rows * weight.shape[0] * 4) + (rounded(rows * weight.shape[0] * 2) if width == 2 else 0)
    if not picked:
        return product
    held = rounded(weight.shape[0] * picked * width)
    out_bytes = rounded(rows * weight.shape[0] * width)
    return max(weight.shape[0] * picked * 9 - out_bytes, held + product)


def _safe_softmax(args: Any, kwargs: Any, out: Any, card: Any) -> int:
    """Which scores are minus infinity, to find rows masked as a whole (aten/native/SoftMax.cpp)."""
    n: int = args[0].numel()
    return rounded(n)


def _embedding_backward(args: Any, kwargs: Any, out: Any, card: Any) -> int:
    """Sorted and original positions (aten/native/cuda/Embedding.cu)."""
    n: int = args[1].numel()
    return 4 * rounded(8 * n) if n > 3072 else 0


def _softmax_backward(args: Any, kwargs: Any, out: Any, card: Any) -> int:
    """grad * output, made first (aten/native/cuda/SoftMax.cu, softmax_backward_cuda_out)."""
    grad = args[0]
    return rounded(grad.numel() * grad.element_size())


_KERNELS: dict[str, Kernel] = {
    "aten::_softmax_backward_data": _softmax_backward,
    "aten::_scaled_dot_product_flash_attention_backward": _flash_backward,
    "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "aten::_safe_softmax": _safe_softmax,
    "aten::embedding_dense_backward": _embedding_backward,
    "bitsandbytes::gemm_4bit": _gemm_4bit,
    "bitsandbytes::int8_vectorwise_quant": _int8_quant,
    "bitsandbytes::int8_mixed_scaled_mm": _int8_mixed,
}


# --------------------------------------------------------------------------- stand-ins


class Outliers:
    """Share of input columns with an entry of 6.0 or more at the int8 linear that runs now."""

    share = 0.0


def _quantize_rows(a: torch.Tensor, threshold: float = 0.0) -> tuple[Any, ...]:
    columns = None
    if threshold > 0:
        columns = torch.empty(int(a.shape[-1] * Outliers.share), dtype=torch.int64, device=a.device)
    rows = torch.empty(a.numel() // a.shape[-1], dtype=torch.float32, device=a.device)
    return torch.empty(a.shape, dtype=torch.int8, device=a.device), rows, columns


def _mixed_product(
    a: torch.Tensor,
    ca: torch.Tensor,
    cb: torch.Tensor,
    sca: torch.Tensor,
    scb: torch.Tensor,
    outlier_cols: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    picked = 0 if outlier_cols is None else outlier_cols.numel()
    out = torch.empty((*ca.shape[:-1], cb.shape[0]), dtype=a.dtype, device=a.device)
    return out, torch.empty((a.shape[0], picked), dtype=a.dtype, device=a.device)


def _scalar(x: torch.Tensor) -> Any:
    return torch.zeros((), dtype=x.dtype).item()


STAND_INS: dict[str, Callable[..., Any]] = {
    "aten::equal": lambda a, b: True,
    "aten::_local_scalar_dense": _scalar,
    "bitsandbytes::int8_vectorwise_quant": _quantize_rows,
    "bitsandbytes::int8_mixed_scaled_mm": _mixed_product,
}
"""Operators whose own shape functions need sizes that only data decides."""
