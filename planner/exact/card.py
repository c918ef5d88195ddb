"""The meta device in the part of a CUDA card.

Modelling code asks tensors for their device and chooses by the answer; composite operators of torch choose by
the device too. A function mode stands between: it says `cuda`, sends what is made there to the meta device,
casts as CUDA's autocast does (the CPU's casts less), picks the attention kernel torch picks on a card, and
answers questions about contents, which nothing here has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

META = torch.device("meta")
CUDA = torch.device("cuda", 0)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# By the names Python code calls them; what torch itself calls inside a composite operator is reached through
# the outermost name.
LOWER = _names("""
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc linear matmul __matmul__
    __rmatmul__ mm mv bmm addmm addmv addr addbmm baddbmm chain_matmul multi_dot prelu einsum
    scaled_dot_product_attention
""")
"""Functions CUDA's autocast runs in 16 bits (aten/src/ATen/autocast_mode.h, lower_precision_fp)."""
FLOAT32 = _names("""
    acos asin cosh erfinv exp expm1 log log10 log2 log1p logsumexp reciprocal rsqrt sinh tan pow __pow__
    __rpow__ square softplus layer_norm native_layer_norm rms_norm group_norm cosine_similarity
    cosine_embedding_loss cross_entropy nll_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss dist
    cdist renorm binary_cross_entropy_with_logits interpolate
""")
"""Functions it runs in float32 (fp32); `square` is `pow` by the time autocast sees it."""
FLOAT32_RESULT = _names("prod softmax log_softmax cumprod cumsum sum")
"""Functions it asks for a float32 result unless told otherwise (fp32_set_opt_dtype)."""
PROMOTE = _names("""
    atan2 bilinear cross dot vdot grid_sampler index_put index_put_ tensordot scatter_add addcmul addcdiv cat
    stack
""")
"""Functions it runs in the widest type of their arguments."""

_CONTENTS = {"item": 0, "__bool__": True, "__int__": 0, "__float__": 0.0, "__index__": 0, "equal": True}


class CudaCard(TorchFunctionMode):
    """Makes the meta device pass for a CUDA card of one compute capability."""

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__()
        self.capability = capability
        self.guessed: set[str] = set()
        """Questions about contents that were answered by assumption."""
        self.on_copy: Callable[[torch.Tensor], None] = lambda _: None
        """Told of each copy autocast keeps until it is left."""
        self._cast: dict[int, torch.Tensor] = {}

    # ------------------------------------------------------------------ surroundings

    @contextlib.contextmanager
    def plugged_in(self) -> Iterator[None]:
        """Within, torch behaves as with this card: autocast can be entered, capabilities are known."""
        clear = torch.clear_autocast_cache

        def cleared() -> None:
            self._cast.clear()
            clear()

        with (
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            mock.patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
            mock.patch("torch.cuda.get_device_capability", lambda *_, **__: self.capability),
            mock.patch("torch.clear_autocast_cache", cleared),
            torch.autograd.set_multithreading_enabled(False),
            self,
        ):
            yield

    # ------------------------------------------------------------------ every call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._property(func, args)
        if name in _CONTENTS and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            self.guessed.add(name)
            return _CONTENTS[name]
        handler = _HANDLERS.get(name)
        if handler is not None:
            answer = handler(self, func, args, kwargs)
            if answer is not NotImplemented:
                return answer
        args, kwargs = _to_meta(name, args, kwargs)
        if torch.is_autocast_enabled("cuda"):
            args, kwargs = self._autocast(name, args, kwargs)
        return func(*args, **kwargs)

    def _property(self, func: Any, args: Any) -> Any:
        value = func(*args)
        if isinstance(value, torch.device) and value.type == "meta":
            return CUDA
        asked = getattr(func, "__self__", None)
        if asked is _IS_CUDA:
            return args[0].is_meta
        if asked is _IS_META:
            return False
        return value

    # ------------------------------------------------------------------ autocast

    def _autocast(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if name in LOWER:
            low = torch.get_autocast_dtype("cuda")
            return tree_map(lambda x: self._to(x, low), (args, kwargs))
        if name in FLOAT32:
            return tree_map(lambda x: self._to(x, torch.float32), (args, kwargs))
        if name in FLOAT32_RESULT:
            narrow = isinstance(args[0], torch.Tensor) and args[0].dtype in (torch.float16, torch.bfloat16)
            if narrow and kwargs.get("dtype") is None:
                return args, {**kwargs, "dtype": torch.float32}
        elif name in PROMOTE:
            return self._promote(args, kwargs)
        return args, kwargs

    def _promote(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        found: list[torch.dtype] = []
        tree_map(lambda x: found.append(x.dtype) if _eligible(x) else None, (args, kwargs))
        if torch.float32 in found and len(set(found)) > 1:
            return tree_map(lambda x: self._to(x, torch.float32), (args, kwargs))
        return args, kwargs

    def _to(self, x: Any, dtype: torch.dtype) -> Any:
        """autocast's cast: copies of float32 leaves that are trained are kept until autocast is left."""
        if not _eligible(x) or x.dtype == dtype:
            return x
        keeps = dtype != torch.float32 and x.dtype == torch.float32 and x.requires_grad and x.is_leaf
        if not keeps or x._is_view() or not torch.is_autocast_cache_enabled():
            return x.to(dtype)
        if id(x) not in self._cast:
            with torch.enable_grad():
                self._cast[id(x)] = x.to(dtype)
            self.on_copy(self._cast[id(x)])
        return self._cast[id(x)]


_IS_CUDA = vars(torch._C.TensorBase)["is_cuda"]
_IS_META = vars(torch._C.TensorBase)["is_meta"]


def _eligible(x: Any) -> bool:
    return (
        isinstance(x, torch.Tensor)
        and x.is_meta
        and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
    )


def _to_meta(name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The same call with the card's name replaced by the meta device's."""
    if any(_names_card(x) for x in args):
        args = tuple(META if _names_card(x) else x for x in args)
    if _names_card(kwargs.get("device")):
        kwargs = {**kwargs, "device": META}
    return args, kwargs


def _names_card(x: Any) -> bool:
    if isinstance(x, torch.device):
        return x.type == "cuda"
    return isinstance(x, str) and x.startswith("cuda")


# --------------------------------------------------------------------------- what a card does otherwise


def _dropout(card: CudaCard, func: Any, args: Any, kwargs: Any) -> Any:
    """One kernel that keeps a mask of one byte an element (aten/native/Dropout.cpp)."""
    x = args[0]
    p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    training = args[2] if len(args) > 2 else kwargs.get("training", True)
    if not training or p == 0:
        return x
    return torch.native_dropout(x, p, True)[0]


def _attention(card: CudaCard, func: Any, args: Any, kwargs: Any) -> Any:
    from planner.exact.attention import fused_attention

    if torch.is_autocast_enabled("cuda"):
        args, kwargs = card._autocast("scaled_dot_product_attention", args, kwargs)
    return fused_attention(*args, **kwargs)


def _listed(card: CudaCard, func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    if not x.is_meta:
        return NotImplemented
    card.guessed.add("tolist")
    return torch.zeros(x.shape, dtype=x.dtype).tolist()


_HANDLERS: dict[str, Any] = {
    "dropout": _dropout,
    "scaled_dot_product_attention": _attention,
    "tolist": _listed,
}
