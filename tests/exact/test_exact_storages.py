"""Storages are booked when made, dropped when nobody holds them; gradients are added as the engine does."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs the [executor] extra")

from planner.exact.card import CudaCard  # noqa: E402
from planner.exact.storages import Storages  # noqa: E402

pytestmark = pytest.mark.executor
KIB = 1024


def meta(*shape: int, **kwargs: object) -> torch.Tensor:
    return torch.empty(shape, device="meta", **kwargs)


def test_views_are_free_and_sizes_are_blocks_of_512() -> None:
    card = Storages(9)
    with card:
        card.begin("forward")
        a = meta(1000)  # 4000 bytes
        b = a.view(10, 100)[2:5]
        assert card.total == 4096
        del a
        assert card.total == 4096  # b still holds it
        del b
        assert card.total == 0
        card.end()
    assert card.segments[0].bytes == 4096 and card.segments[0].fresh == 4096


def test_a_second_gradient_goes_into_the_first_ones_buffer() -> None:
    """x reaches the loss on three ways: the engine holds one sum and what is added to it, no third tensor."""
    card = Storages(9)
    x = meta(256, 1024, requires_grad=True)  # 1 MiB
    weight = meta(256, 1024)
    with card:
        card.begin("forward")
        loss = (x * weight + x * weight + x * weight).sum()
        kept = card.total
        card.begin("backward", origin="gradients")
        torch.autograd.backward(loss)
        card.end()
    # and 512 bytes for the gradient of the loss
    assert card.segments[1].bytes - kept == 2 * 1024 * KIB + 512
    assert card.live["gradients"] == 1024 * KIB


def test_an_expanded_gradient_is_not_added_into() -> None:
    """What a sum hands back is one number seen as many: the addition needs a tensor of its own."""
    card = Storages(9)
    x = meta(256, 1024, requires_grad=True)
    weight = meta(256, 1024)
    with card:
        card.begin("forward")
        loss = (x * weight).sum() + x.sum()
        kept = card.total
        card.begin("backward", origin="gradients")
        torch.autograd.backward(loss)
        card.end()
    assert card.segments[1].bytes - kept == 2 * 1024 * KIB + 512


def test_autocast_casts_as_on_a_card() -> None:
    """Norms in float32 and products in 16 bits; the CPU's autocast leaves norms alone."""
    cuda = CudaCard((9, 0))
    x, weight = meta(4, 64, dtype=torch.bfloat16), meta(64, 64, requires_grad=True)
    with cuda.plugged_in(), torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.nn.functional.layer_norm(x, (64,)).dtype == torch.float32
        assert torch.nn.functional.linear(x.float(), weight).dtype == torch.bfloat16
        assert torch.softmax(x, -1).dtype == torch.float32
        assert x.device.type == "cuda" and x.is_cuda
    assert x.device.type == "meta"


def test_autocast_keeps_one_copy_of_a_trained_float32_weight() -> None:
    cuda, card = CudaCard((9, 0)), Storages(9)
    x, weight = meta(4, 64, dtype=torch.bfloat16), meta(64, 64, requires_grad=True)
    with cuda.plugged_in(), card:
        card.begin("forward")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            first = torch.nn.functional.linear(x, weight)
            once = card.total
            second = torch.nn.functional.linear(x, weight)
            assert card.total - once == once - 64 * 64 * 2
        del first, second
        assert card.total == 0  # left with autocast


def test_every_function_autocast_knows_is_in_a_list() -> None:
    """A kernel of a newer torch must not pass unnoticed: it is listed, or no language model calls it."""
    from planner.exact import card

    listed = card.LOWER | card.FLOAT32 | card.FLOAT32_RESULT | card.PROMOTE
    reached = {  # through a listed function, or never by a causal language model
        "convolution", "_convolution", "cudnn_convolution", "cudnn_convolution_transpose", "nll_loss2d",
        "linalg_multi_dot", "linalg_vecdot", "_scaled_dot_product_flash_attention", "grid_sampler",
    }  # fmt: skip
    elsewhere = ("upsample", "_upsample", "_thnn", "lstm", "gru", "rnn", "loss", "norm", "pdist")
    names = {
        name.removeprefix("aten::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("aten::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutocastCUDA")
    }
    missing = {name for name in names - listed - reached if not any(part in name for part in elsewhere)}
    assert missing <= {"binary_cross_entropy", "kl_div"}


def test_dropout_keeps_a_mask_of_one_byte_an_element() -> None:
    cuda, card = CudaCard((9, 0)), Storages(9)
    x = meta(1024, 512, dtype=torch.bfloat16, requires_grad=True)
    with cuda.plugged_in(), card:
        card.begin("forward")
        out = torch.nn.functional.dropout(x, 0.1)
        assert card.total == 1024 * KIB + 512 * KIB
        del out


@pytest.mark.parametrize(
    ("shape", "masked", "kernel"),
    [
        ((1, 8, 64, 64), False, "Flash"),
        ((1, 8, 64, 320), False, "Efficient"),
        ((1, 8, 64, 64), True, "Efficient"),
    ],
)
def test_attention_takes_the_kernel_a_card_takes(shape: tuple[int, ...], masked: bool, kernel: str) -> None:
    cuda = CudaCard((9, 0))
    q = meta(*shape, dtype=torch.bfloat16, requires_grad=True)
    mask = meta(1, 1, 64, 64, dtype=torch.bool) if masked else None
    with cuda.plugged_in():
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask, is_causal=not masked)
    assert kernel in type(out.grad_fn).__name__
