"""Training as the executor does where layers stream: one node an adapter, layers computed again in one go."""

from __future__ import annotations

import itertools
import weakref
from collections import UserDict
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from executor.streaming.adapters import LowRankUpdate, _drop, _masked, _scale_of_kept, join_adapters
from executor.streaming.recompute import _Recomputing, recomputing
from executor.streaming.training import lean

pytestmark = pytest.mark.executor
HIDDEN = 48


class Mixer(nn.Module):
    """Two linears of one input, as queries and keys are."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(HIDDEN, 32), nn.Linear(HIDDEN, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) * torch.sigmoid(self.right(x))


def adapted(joined: bool, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Any:
    torch.manual_seed(3)
    rank = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.3, "target_modules": ["left", "right"], **config}
    model = get_peft_model(Mixer().to(dtype), LoraConfig(**rank)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    if joined:
        assert join_adapters(model) == 2
    return model


def step(model: Any, dtype: torch.dtype, autocast: bool = True, at: int = 0) -> list[torch.Tensor]:
    """Output and gradients of one pass."""
    torch.manual_seed(at)
    x = torch.randn(2, 7, HIDDEN).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = model(x)
    y.float().square().sum().backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    return [y.detach(), x.grad, *trained]  # type: ignore[list-item]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, True), (torch.float32, False)])
def test_a_joined_adapter_has_the_bits_of_pefts(dtype: torch.dtype, autocast: bool, dropout: float) -> None:
    got, want = (
        step(adapted(joined, dtype, lora_dropout=dropout), dtype, autocast) for joined in (True, False)
    )
    assert len(got) == 6 and same(got, want)
    assert all(tensor.abs().sum() > 0 for tensor in got)


@pytest.mark.parametrize("use", ["eval", "disabled", "merged", "widened"])
def test_whatever_is_no_plain_training_is_left_to_peft(monkeypatch: pytest.MonkeyPatch, use: str) -> None:
    """An input of another dtype than products have is cast by peft, and stays with it."""

    def fails(*_: Any) -> None:
        raise AssertionError("joined")

    models = [adapted(joined) for joined in (True, False)]
    monkeypatch.setattr(LowRankUpdate, "apply", fails)
    monkeypatch.setattr("executor.streaming.adapters.updated", fails)
    outputs = []
    for model in models:
        torch.manual_seed(1)
        x = torch.randn(2, 5, HIDDEN, dtype=torch.float32 if use == "widened" else torch.bfloat16)
        if use == "eval":
            model.eval()
        if use == "merged":
            model.merge_adapter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if use == "disabled":
                with model.disable_adapter():
                    outputs.append(model(x))
            else:
                outputs.append(model(x))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("share", [0.04, 0.05, 0.15, 0.52])
def test_what_dropout_left_is_made_again_bit_by_bit(share: float) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(64, 512, device=device).to(dtype)
        kept, mask = _drop(x, share)
        assert torch.equal(_masked(x, mask, _scale_of_kept(share)), kept)


@pytest.mark.parametrize(("share", "bits"), [(0.04, 0x3F855556), (0.05, 0x3F86BCA2)])
def test_the_scale_is_that_of_a_cards_dropout(share: float, bits: int) -> None:
    found = torch.tensor(_scale_of_kept(share)).view(torch.int32).item()
    assert found == bits


def test_an_update_may_be_written_into() -> None:
    """As Gemma 3n does with what its linears say."""
    x = torch.randn(2, 7, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    found = []
    for joined in (True, False):
        linear = adapted(joined, lora_dropout=0.0).base_model.model.left
        with torch.autocast("cpu", dtype=torch.bfloat16):
            linear(x).clamp_(-0.5, 0.5).sum().backward()
        found.append([linear.lora_A["default"].weight.grad, linear.lora_B["default"].weight.grad])
    assert same(*found)


@pytest.mark.parametrize("later", [{}, {"use_dora": True}])
def test_an_adapter_that_came_later_is_left_to_peft(later: dict[str, Any]) -> None:
    """It may have left a linear out, or be another kind of update."""
    outputs = []
    for joined in (True, False):
        model = adapted(joined, dtype=torch.float32, lora_dropout=0.0)
        torch.manual_seed(8)
        model.add_adapter("later", LoraConfig(r=2, target_modules=["left"], init_lora_weights=False, **later))
        model.set_adapter("later")
        for magnitude in model.base_model.model.left.lora_magnitude_vector.values():
            magnitude.weight.data *= 1.5  # DoRA begins as LoRA
        outputs.append(model.train()(torch.ones(3, HIDDEN)))
    assert torch.equal(*outputs)


def test_peft_has_its_classes_back_afterwards() -> None:
    model = adapted(False)
    before = {name: type(module) for name, module in model.named_modules()}
    model.get_base_model = Stack
    with lean(model):
        assert {name for name, m in model.named_modules() if type(m) is not before[name]} == {
            "base_model.model.left",
            "base_model.model.right",
        }
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True, "lora_dropout": 0.0}])
def test_other_adapters_are_not_joined(config: dict[str, Any]) -> None:
    assert join_adapters(adapted(False, **config)) == 0


def test_neighbours_share_what_is_kept_of_their_input() -> None:
    """peft keeps a copy of the input for each adapter, of which dropout took its share."""

    def wide(joined: bool) -> int:
        seen: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if (
                tensor.shape[-1] == HIDDEN
                and tensor.numel() == 14 * HIDDEN
                and tensor.dtype == torch.bfloat16
            ):
                seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        model = adapted(joined)
        x = torch.randn(2, 7, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        with saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16):
            model(x)
        return len(seen)

    assert wide(True) == 1 and wide(False) == 2


# ----------------------------------------------------------------- checkpointing


class Layer(nn.Module):
    """Takes a second tensor by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(HIDDEN, HIDDEN)
        self._gradient_checkpointing_func: Any = None

    def forward(self, x: torch.Tensor, beside: torch.Tensor | None = None) -> torch.Tensor:
        def run(x: torch.Tensor, beside: torch.Tensor | None) -> torch.Tensor:
            y = torch.dropout(torch.tanh(self.inner(x)), 0.2, True)
            return x + (y if beside is None else y * beside)

        if self._gradient_checkpointing_func is None:
            return run(x, beside)
        return self._gradient_checkpointing_func(partial(run, beside=beside), x)  # type: ignore[no-any-return]


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: torch.Tensor, beside: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, beside=beside)
        return x


def passes(how: str, keyword: bool, kind: type[Stack] = Stack) -> tuple[list[torch.Tensor], int]:
    """Output and gradients of two passes, and how many layers were recomputed as this project does."""
    torch.manual_seed(5)
    model = kind()
    if how != "recorded":
        for layer in model.layers:
            layer._gradient_checkpointing_func = lambda run, *args: checkpoint(
                run, *args, use_reentrant=False
            )
    counted = itertools.count()
    stock = _Recomputing.__call__

    def call(self: Any, *args: Any) -> Any:
        out = stock(self, *args)
        if type(out.grad_fn).__name__ == "_RecomputedBackward":
            next(counted)
        return out

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Recomputing, "__call__", call)
        x = torch.randn(4, HIDDEN, requires_grad=True)
        beside = torch.rand(4, HIDDEN, requires_grad=True) if keyword else None

        def two() -> None:
            for _ in range(2):
                y = model(x, beside=beside)
                y.square().sum().backward()
                seen.append(y.detach())

        if how == "ours":
            with recomputing(model):
                two()
        else:
            two()
    seen += [p.grad for p in [x, *model.parameters()] if p.grad is not None]
    return seen + ([beside.grad] if beside is not None else []), next(counted)  # type: ignore[list-item]


@pytest.mark.parametrize("keyword", [False, True])
def test_layers_computed_again_have_the_bits_of_recorded_ones(keyword: bool) -> None:
    """Gradients of what comes by keyword included, which torch's reentrant checkpointing loses."""
    got, ours = passes("ours", keyword)
    assert same(got, passes("recorded", keyword)[0])
    assert ours == (0 if keyword else 6)


def test_a_layers_output_is_let_go_before_its_backward() -> None:
    there: list[bool] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        inner = x * 2
        output = inner + 1
        if torch.is_grad_enabled():  # computed again
            seen = weakref.ref(output)
            inner.register_hook(lambda _: there.append(seen() is not None))
        return output

    x = torch.ones(3, requires_grad=True)
    _Recomputing(checkpoint)(run, x).sum().backward()
    assert there == [False] and torch.equal(x.grad, torch.full((3,), 2.0))


class Sharing(Stack):
    """Later layers read what the first has put into a container, as Gemma 3n shares keys and values."""

    def forward(self, x: torch.Tensor, beside: Any = None) -> torch.Tensor:
        shared: UserDict[str, torch.Tensor] = UserDict()
        for layer in self.layers:
            run = partial(self.run, layer, shared=shared)
            checkpointed = layer._gradient_checkpointing_func
            x = run(x) if checkpointed is None else checkpointed(run, x)
        return x

    @staticmethod
    def run(layer: Layer, x: torch.Tensor, shared: Any) -> torch.Tensor:
        inner = torch.tanh(layer.inner(x))
        return x + inner * shared.setdefault("first", inner)


class Routed(Stack):
    """Something within a layer takes part in the loss: transformers' hooks bring it there."""

    config = SimpleNamespace(output_router_logits=True)

    def forward(self, x: torch.Tensor, beside: Any = None) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        hooks = [
            layer.inner.register_forward_hook(lambda _m, _a, out: seen.append(out)) for layer in self.layers
        ]
        x = super().forward(x)
        for hook in hooks:
            hook.remove()
        return x * torch.stack(seen).square().mean()


@pytest.mark.parametrize("kind", [Sharing, Routed])
def test_gradients_past_arguments_and_results_are_kept(kind: type[Stack]) -> None:
    got, ours = passes("ours", False, kind)
    assert same(got, passes("recorded", False, kind)[0])
    assert ours == 0


def test_nothing_is_left_behind() -> None:
    model = Stack()

    def stock(run: Any, *args: Any) -> Any:
        return checkpoint(run, *args, use_reentrant=False)

    for layer in model.layers:
        layer._gradient_checkpointing_func = stock
    with recomputing(model):
        model(torch.randn(2, HIDDEN, requires_grad=True))
        assert all(isinstance(layer._gradient_checkpointing_func, _Recomputing) for layer in model.layers)
    assert all(layer._gradient_checkpointing_func is stock for layer in model.layers)


def test_training_mode_is_set_where_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(False)
    monkeypatch.setattr(model, "get_base_model", Stack)
    model.base_model.eval()  # as it is loaded, below a module of peft's that trains
    with lean(model):
        assert model.training and model.train() is model
        assert all(module.training for module in model.modules())
        model.eval()
        assert not any(module.training for module in model.modules())
        model.train()
        assert all(module.training for module in model.modules())
    assert "train" not in vars(model)
