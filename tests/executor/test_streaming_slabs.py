"""Slabs, their host memory, and finding what goes into them."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from executor.errors import CannotHonour
from executor.streaming.arena import Arena
from executor.streaming.layers import find_stack
from executor.streaming.residency import Tables
from executor.streaming.slab import SLAB_ALIGNMENT, TENSOR_ALIGNMENT, lay_out

pytestmark = pytest.mark.executor
DTYPES = st.sampled_from([torch.uint8, torch.int8, torch.float32, torch.bfloat16])
SHAPES = st.lists(st.integers(1, 9), max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(SHAPES, DTYPES, st.booleans()), min_size=1, max_size=8))
def test_everything_comes_out_as_it_went_in(kinds: list[tuple[list[int], torch.dtype, bool]]) -> None:
    tensors = [torch.randint(0, 100, shape).to(dtype) for shape, dtype, _ in kinds]
    tensors = [t.mT if swap and t.dim() > 1 else t for t, (*_, swap) in zip(tensors, kinds, strict=True)]
    layout = lay_out(tensors)
    block = torch.full((layout.nbytes,), 255, dtype=torch.uint8)
    for view, tensor in zip(layout.views(block), tensors, strict=True):
        view.copy_(tensor)
    for view, tensor in zip(layout.views(block), tensors, strict=True):
        assert torch.equal(view, tensor) and view.dtype == tensor.dtype
        assert view.stride() == tensor.stride(), "kernels sum in the order of memory"
    assert layout.nbytes % SLAB_ALIGNMENT == 0
    assert all(piece.offset % TENSOR_ALIGNMENT == 0 for piece in layout.pieces)
    ends = [piece.offset + piece.nbytes for piece in layout.pieces]
    assert all(end <= piece.offset for end, piece in zip(ends, layout.pieces[1:], strict=False))
    assert layout.nbytes - sum(t.nbytes for t in tensors) < TENSOR_ALIGNMENT * len(tensors) + SLAB_ALIGNMENT


def test_a_slice_of_something_larger_is_laid_out_densely() -> None:
    part = torch.arange(20.0).reshape(4, 5)[:, :3]
    layout = lay_out([part])
    view = layout.views(torch.zeros(layout.nbytes, dtype=torch.uint8))[0]
    assert view.copy_(part).is_contiguous() and torch.equal(view, part)


def test_layers_of_equal_shapes_share_a_layout() -> None:
    first, second = ([torch.ones(3, 4), torch.ones(3)] for _ in range(2))
    assert lay_out(first) == lay_out(second) != lay_out([torch.ones(4, 3), torch.ones(3)])


def test_blocks_take_their_size() -> None:
    arena = Arena(torch.device("cpu"))
    block = arena.take(3 * SLAB_ALIGNMENT)
    assert (block.numel(), block.dtype) == (3 * SLAB_ALIGNMENT, torch.uint8)
    assert arena.pinned_bytes == 0 and arena.refused is None
    arena.close()


def test_equal_tables_are_kept_once() -> None:
    tables, nf4, int8 = Tables(), torch.arange(16.0), torch.arange(256.0)
    assert tables.shared(nf4) is nf4 and tables.shared(int8) is int8
    assert tables.shared(nf4.clone()) is nf4


class Model(nn.Module):
    """A small list outside, a large one of layers with lists of their own in it."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
        self.body = nn.Module()
        self.body.blocks = nn.ModuleList(self._layer() for _ in range(3))

    @staticmethod
    def _layer() -> nn.Module:
        layer = nn.Module()
        layer.scale = nn.Parameter(torch.ones(4))
        layer.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(12))
        return layer


def test_the_outermost_list_with_most_weights_is_the_stack() -> None:
    model = Model()
    stack = find_stack(model)
    assert (stack.name, len(stack.layers), stack.owner) == ("body.blocks", 3, model.body)
    names = stack.parameter_names(1, frozenset({"body.blocks.1.experts.0.weight"}))
    assert "body.blocks.1.experts.1.weight" in names and len(names) == 23
    assert "body.blocks.1.scale" not in names, "of the layer itself"
    assert "body.blocks.1.experts.0.weight" not in names, "tied"


def test_a_model_without_layers() -> None:
    with pytest.raises(CannotHonour, match="no list of layers"):
        find_stack(nn.Linear(2, 2))
