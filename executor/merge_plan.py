"""Which tensors of a checkpoint an adapter changes, and how: peft's own arithmetic, one tensor at a time.

The model is built without storage, peft wraps it, and each adapted layer gets real tensors only while its
one weight is merged. So the result is peft's `merge_and_unload()` to the last bit, in the memory of a few
matrices. Where the checkpoint stores a parameter in pieces (experts one by one), transformers' own reverse of
its loading cuts the difference into the same pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executor.errors import BadWeights

if TYPE_CHECKING:
    import torch

    Change = Callable[[torch.Tensor], torch.Tensor]

ADAPTER = "default"
_PREFIX = "base_model.model."
OTHER_MODEL = "give the folder of the model that the run was made with as --base"


@dataclass
class Changes:
    """What a merge does to a checkpoint; everything not named here is copied."""

    changed: dict[str, Change] = field(default_factory=dict)
    """By the name of the tensor in the checkpoint."""
    added: dict[str, tuple[str, Change]] = field(default_factory=dict)
    """New tensors: the tensor of the checkpoint each is made from, and how."""
    untied: bool = False
    """Input and output embedding were one tensor and no longer are."""


def find_changes(base: Path, adapter: Path, shapes: Mapping[str, tuple[int, ...]], code: bool) -> Changes:
    """What `adapter` changes in the checkpoint in `base`, whose tensors have these `shapes`.

    Errors: `BadWeights` where the adapter is of another model or of a kind that cannot be folded.
    """
    import warnings

    import torch

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # peft's advice to those who train
        return _Planner(base, adapter, shapes, code).plan()


class _Planner:
    def __init__(self, base: Path, adapter: Path, shapes: Mapping[str, tuple[int, ...]], code: bool) -> None:
        from safetensors.torch import load_file

        self._adapter, self._shapes = adapter, shapes
        self._tensors = load_file(adapter / "adapter_model.safetensors")
        self._model = _hollow_model(base, code)
        self._tied = self._model.config.get_text_config().tie_word_embeddings
        self._used: set[str] = set()
        self._changes = Changes()
        head, inputs = self._model.get_output_embeddings(), self._model.get_input_embeddings()
        names = {module: name for name, module in self._model.named_modules()}
        self._head = None if head is None else f"{names[head]}.weight"
        self._embedding = None if inputs is None else f"{names[inputs]}.weight"

    def plan(self) -> Changes:
        from peft.tuners.lora.layer import LoraLayer, ParamWrapper
        from peft.utils import ModulesToSaveWrapper

        self._keep_tied = self._wrap()
        for name, module in self._model.named_modules():
            if isinstance(module, ParamWrapper):
                self._stacked(name, module)
            elif isinstance(module, LoraLayer):
                self._single(name, module)
            elif isinstance(module, ModulesToSaveWrapper):
                self._retrained(name, module)
        unknown = sorted(self._tensors.keys() - self._used)
        if unknown:
            raise BadWeights(
                f"{self._adapter} does not belong to this model: nothing in it takes {unknown[0]}",
                OTHER_MODEL,
            )
        return self._changes

    def _wrap(self) -> bool:
        """Let peft wrap the model; whether it is to keep tied embeddings tied."""
        from peft import LoraConfig, PeftConfig, get_peft_model

        config = PeftConfig.from_pretrained(self._adapter)
        if not isinstance(config, LoraConfig) or getattr(config, "lora_bias", False):
            raise BadWeights(
                f"{self._adapter} is no adapter that can be folded into weights (LoRA, rsLoRA and DoRA can)"
            )
        config.init_lora_weights = False
        try:
            get_peft_model(self._model, config, low_cpu_mem_usage=True)
        except ValueError as error:
            reason = str(error).splitlines()[0][:160]
            raise BadWeights(
                f"{self._adapter} does not belong to this model: {reason}", OTHER_MODEL
            ) from None
        return bool(getattr(config, "ensure_weight_tying", False))

    def _single(self, name: str, layer: Any) -> None:
        """A linear or embedding layer with one weight."""
        tensors = self._take(name, layer)
        shape = tuple(layer.get_base_layer().weight.shape)
        key = f"{_PREFIX}{name}.base_layer.weight"  # peft saves the base of embeddings with the adapter
        if key in self._tensors:
            self._check(key, shape)
        self._add(f"{name}.weight", shape, _Fold(layer, tensors, self._tensors.get(key)))

    def _stacked(self, name: str, layer: Any) -> None:
        """A parameter that stacks experts; nested wrappers share the module, hence the doubled names."""
        tensors = self._take(name, layer)
        parameter = f"{name.replace('.base_layer', '')}.{layer.parameter_name}"
        shape = tuple(layer.get_param().shape)
        pieces = {parameter: shape} if parameter in self._shapes else self._pieces(parameter, shape)
        difference = _Difference(self._model, parameter, layer, tensors, len(pieces))
        for piece, piece_shape in pieces.items():
            self._add(piece, piece_shape, _AddPiece(difference, piece))

    def _retrained(self, name: str, wrapper: Any) -> None:
        for inner, parameter in wrapper.modules_to_save[ADAPTER].named_parameters():
            key = f"{_PREFIX}{name}.{inner}"
            self._check(key, tuple(parameter.shape))
            self._add(f"{name}.{inner}", tuple(parameter.shape), _Replace(self._tensors[key]))

    def _take(self, name: str, layer: Any) -> dict[str, torch.Tensor]:
        """The adapter's tensors of one layer, by their path in the layer."""
        taken = {}
        for path, parameter in _own_parameters(layer):
            key = f"{_PREFIX}{name}.{path.replace(f'.{ADAPTER}', '')}"
            if key not in self._tensors:
                key = key.removesuffix(".weight")  # DoRA's magnitudes
            self._check(key, tuple(parameter.shape))
            taken[path] = self._tensors[key]
        return taken

    def _check(self, key: str, shape: tuple[int, ...]) -> None:
        found = self._tensors.get(key)
        if found is None or tuple(found.shape) != shape:
            what = "is missing" if found is None else f"has the shape {tuple(found.shape)}"
            raise BadWeights(
                f"{self._adapter} does not belong to this model: {key} {what}, expected {shape}", OTHER_MODEL
            )
        self._used.add(key)

    def _add(self, parameter: str, shape: tuple[int, ...], change: Change) -> None:
        """File a change under the checkpoint's name of `parameter`."""
        if self._tied and parameter in (self._head, self._embedding):
            self._add_tied(parameter, shape, change)
            return
        tensor = parameter
        if tensor not in self._shapes:
            tensor, *others = self._pieces(parameter, shape)
            if others:
                raise BadWeights(f"folding into {parameter}, which is stored in pieces, is not built")
        self._file(tensor, shape, change)

    def _file(self, tensor: str, shape: tuple[int, ...], change: Change) -> None:
        if self._shapes[tensor] != shape:
            raise BadWeights(
                f"{tensor} of the base has the shape {self._shapes[tensor]}, the adapter is for {shape}",
                OTHER_MODEL,
            )
        self._changes.changed[tensor] = change

    def _add_tied(self, parameter: str, shape: tuple[int, ...], change: Change) -> None:
        """The other end of tied embeddings does not follow, unless training kept them tied."""
        assert self._embedding is not None and self._head is not None
        shared = self._embedding if self._embedding in self._shapes else self._head
        if shared not in self._shapes:
            shared, *_ = self._pieces(self._embedding, shape)
        if self._keep_tied:
            self._file(shared, shape, change)
            return
        self._changes.untied = True
        other = self._head if shared != self._head else self._embedding
        if other in self._shapes:
            self._file(parameter, shape, change)
        elif parameter == other:
            self._changes.added[other] = (shared, change)
        else:
            self._file(shared, shape, change)
            self._changes.added.setdefault(other, (shared, lambda weight: weight))

    def _pieces(self, parameter: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Names and shapes that the checkpoint has for a parameter named or shaped otherwise in the model."""
        import torch

        try:
            found = _as_stored(self._model, {parameter: torch.empty(shape, device="meta")})
        except (KeyError, ValueError, RuntimeError, IndexError):
            found = {}
        pieces = {name: tuple(tensor.shape) for name, tensor in found.items()}
        if not pieces or not pieces.keys() <= self._shapes.keys():
            raise BadWeights(
                f"the base has no tensor for {parameter}, which the adapter changes", OTHER_MODEL
            )
        return pieces


def _hollow_model(base: Path, code: bool) -> Any:
    """The model on the meta device, with transformers' record of how its checkpoint is stored."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            base, device_map="meta", local_files_only=True, use_safetensors=True, trust_remote_code=code
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BadWeights(f"transformers cannot build the model in {base}: {reason[0][:160]}") from None


def _as_stored(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, state))


def _own_parameters(layer: Any) -> Iterator[tuple[str, Any]]:
    for path, parameter in layer.named_parameters():
        if path.startswith("lora_"):
            yield path, parameter


@dataclass
class _Fold:
    """peft's merge of one layer, with real tensors for as long as it takes."""

    layer: Any
    tensors: dict[str, torch.Tensor]
    base: torch.Tensor | None = None
    """The layer's own weight where the adapter brings it."""

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        import torch

        base = self.layer.get_base_layer()
        weight = weight if self.base is None else self.base.to(weight.dtype)
        base.weight = torch.nn.Parameter(weight, requires_grad=False)
        _fill(self.layer, self.tensors)
        self.layer.merge(adapter_names=[ADAPTER])
        merged: torch.Tensor = base.weight.data.to(weight.dtype)
        _hollow(self.layer)
        return merged


@dataclass
class _Difference:
    """What an adapter adds to a stack of experts, held until every piece of it has been fetched."""

    model: Any
    parameter: str
    layer: Any
    tensors: dict[str, torch.Tensor]
    left: int
    _pieces: dict[str, torch.Tensor] = field(default_factory=dict)

    def piece(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Hand out one piece."""
        import torch

        if not self._pieces:
            base, own = self.layer.get_base_layer(), self.layer.parameter_name
            shape = self.layer.get_param().shape
            # peft asks only for its dtype and device: one element stands for all
            stand_in = torch.empty(1, dtype=dtype).expand(shape)
            setattr(base, own, torch.nn.Parameter(stand_in, requires_grad=False))
            _fill(self.layer, self.tensors)
            whole = {self.parameter: self.layer.get_delta_weight(ADAPTER)}
            _hollow(self.layer)
            self._pieces = whole if name == self.parameter else _as_stored(self.model, whole)
        self.left -= 1
        found = self._pieces[name].to(dtype)
        if self.left == 0:
            self._pieces = {}
        return found


@dataclass
class _AddPiece:
    difference: _Difference
    name: str

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.difference.piece(self.name, weight.dtype)


@dataclass
class _Replace:
    tensor: torch.Tensor

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return self.tensor.to(weight.dtype)


def _fill(layer: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Give the layer's adapter its tensors, 16-bit ones in fp32, as peft loads them."""
    import torch

    for path, tensor in tensors.items():
        owner, _, leaf = path.rpartition(".")
        wide = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        setattr(layer.get_submodule(owner), leaf, torch.nn.Parameter(wide, requires_grad=False))


def _hollow(layer: Any) -> None:
    """Take all storage from the layer again."""
    layer.to("meta")
    layer.merged_adapters.clear()
    layer._caches.clear()
