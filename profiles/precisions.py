"""Ways to store linear weights and what they take. Data: `profiles/precisions.json`.

Bytes of a weight of `rows` x `columns` elements = elements x bits / 8, one scale a block (or a row), and
under double quantization one second-level scale a group of scales. Tables that do not grow with the weight
(the 16 values of NF4, the mean that double quantization subtracts) are left out: under 2 KiB a tensor.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import msgspec

from profiles.data import read_table
from profiles.schema import Precision

STORED: dict[str | None, Literal["nf4", "int8"]] = {"bitsandbytes-nf4": "nf4", "bitsandbytes-int8": "int8"}
"""Precisions of checkpoints that run as they are stored, by `Architecture.pretrained_quantization`."""


@cache
def load_precisions() -> dict[str, Precision]:
    """Every precision by id, in the order of the file."""
    found = msgspec.json.decode(read_table("precisions.json"), type=tuple[Precision, ...])
    return {precision.id: precision for precision in found}


def weight_bytes_per_parameter(precision: Precision, columns: int | None = None) -> float:
    """Bytes of one element with its share of the scales, for weights much larger than a block.

    `columns` (inputs of the linear) is needed where every row has a scale; without it the scale counts
    nothing, which is 4 / columns bytes too little (0.1 % at 4096).

    >>> round(8 * weight_bytes_per_parameter(load_precisions()["nf4"]), 3)
    4.127
    """
    bits = float(precision.bits)
    if precision.scale_per_row:
        return (bits + (precision.scale_bits / columns if columns else 0.0)) / 8
    if precision.block_size:
        bits += precision.scale_bits / precision.block_size
        if precision.double_quant_block:
            bits += precision.double_quant_scale_bits / (precision.block_size * precision.double_quant_block)
    return bits / 8


def stored_bytes(precision: Precision, rows: int, elements: int) -> tuple[int, ...]:
    """Bytes of each tensor that one weight is stored as: packed elements, scales, second-level scales; the
    last block of each rounded up.

    >>> stored_bytes(load_precisions()["nf4"], 4096, 4096 * 4096)
    (8388608, 262144, 4096)
    """
    packed = _bytes(elements * precision.bits)
    if precision.scale_per_row:
        return packed, rows * _bytes(precision.scale_bits)
    if not precision.block_size:
        return (packed,)
    scales = -(-elements // precision.block_size)
    first = _bytes(scales * precision.scale_bits)
    if not precision.double_quant_block:
        return packed, first
    groups = -(-scales // precision.double_quant_block)
    return packed, first, _bytes(groups * precision.double_quant_scale_bits)


def weight_bytes(precision: Precision, rows: int, columns: int) -> int:
    """Bytes of one weight of `rows` x `columns` with its scales.

    >>> weight_bytes(load_precisions()["nf4"], 4096, 4096)
    8654848
    """
    return sum(stored_bytes(precision, rows, rows * columns))


def _bytes(bits: int) -> int:
    return -(-bits // 8)
