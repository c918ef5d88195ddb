"""A candidate's settings as arguments of transformers, and the loading that every engine shares."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executor import ui
from executor.device import torch_dtype
from executor.errors import BadWeights, CannotHonour
from executor.prequantized import take_as_stored
from executor.random_weights import lazy_state_dict
from executor.source import ModelSource
from executor.weights import read_headers
from planner.types import Strategy

if TYPE_CHECKING:
    import torch


def quantization_config(strategy: Strategy) -> Any:
    """bitsandbytes settings of a strategy: NF4 with double quantization, LLM.int8, or None."""
    from transformers import BitsAndBytesConfig

    if strategy.quant == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch_dtype(strategy.dtype),
        )
    return BitsAndBytesConfig(load_in_8bit=True) if strategy.quant == "int8" else None


def load_model(
    source: ModelSource,
    strategy: Strategy,
    device_map: dict[str, Any],
    device: torch.device,
    seed: int,
    remote_code: bool = False,
    offload_folder: Path | None = None,
) -> Any:
    """The model in eval mode, placed by `device_map`; random weights where `source` has no folder.

    `offload_folder`: where layers on "disk" go that no checkpoint file holds as the model needs them.

    Errors: `BadWeights` naming tensors that the checkpoint lacks or that have other shapes.
    """

    config = read_config(source, remote_code)
    stored = take_as_stored(config, strategy)
    common: dict[str, Any] = {
        "config": config,
        "dtype": torch_dtype(strategy.dtype),
        "attn_implementation": attention_for(config, strategy),
        "device_map": device_map,
        "quantization_config": None if stored else quantization_config(strategy),
        "output_loading_info": True,
        "offload_folder": offload_folder,
        "ignore_mismatched_sizes": True,  # they are refused below, by name and file
    }
    packs = strategy.quant_experts != "none"
    with whole_errors(), _packing_experts() if packs else nullcontext():
        if source.folder is None:
            dtype, attention = common["dtype"], common["attn_implementation"]
            kind, state = lazy_state_dict(config, dtype, device, seed, attention, packs)
            model, info = kind.from_pretrained(None, state_dict=state, **common)
        else:
            model, info = _from_folder(source, common, remote_code)
    _refuse_incomplete(info, source)
    if strategy.quant != "none":
        _refuse_other_shapes(model, source)
    return model.eval()


def _packing_experts() -> AbstractContextManager[None]:
    from executor.packed_loading import packing_experts  # imports transformers' loader

    return packing_experts()


@contextmanager
def whole_errors() -> Iterator[None]:
    """Let errors of loading through as they are.

    transformers notes an error while a tensor is converted or quantized in a log and raises another one at
    the end, in which running out of memory cannot be told from corrupt weights.
    """
    from transformers import core_model_loading

    @contextmanager
    def let_through(*_: Any, **__: Any) -> Iterator[None]:
        yield

    noted = getattr(core_model_loading, "log_conversion_errors", None)
    if noted is None:
        yield
        return
    core_model_loading.log_conversion_errors = let_through
    try:
        yield
    finally:
        core_model_loading.log_conversion_errors = noted


def _from_folder(source: ModelSource, common: dict[str, Any], remote_code: bool) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            source.folder,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=remote_code,
            **common,
        )
    except SafetensorError as error:
        raise BadWeights(f"{source.folder}: {error}", "download the weights again") from None


def read_config(source: ModelSource, remote_code: bool) -> Any:
    """transformers' config object: from the folder, else from the config facts of the plan.

    Errors: `CannotHonour` for an architecture transformers lacks, or one that needs remote code without
    leave.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if source.folder is None:
        return make_config(source.config)
    try:
        return AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=remote_code)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        if "trust_remote_code" in str(error):
            raise CannotHonour(
                f"{source.folder} needs Python code that comes with it",
                "give --trust-remote-code if you trust its authors",
            ) from None
        raise CannotHonour(f"transformers cannot read {source.folder}: {_one_line(error)}") from None


def attention_for(config: Any, strategy: Strategy) -> str:
    """The strategy's attention, or eager where transformers' class of this model refuses it."""
    from transformers import AutoModelForCausalLM

    wanted = strategy.attention
    try:
        kind = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        return wanted
    supported = getattr(
        kind, {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}.get(wanted, ""), True
    )
    return wanted if supported else "eager"


def make_config(facts: dict[str, Any]) -> Any:
    """transformers' config object from the config facts of a plan."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    fields = {
        k: v for k, v in facts.items() if k not in {"model_type", "architectures", "quantization_config"}
    }
    try:
        return AutoConfig.for_model(facts["model_type"], **fields)
    except (KeyError, ValueError, StrictDataclassError) as error:
        raise CannotHonour(f"transformers cannot build this architecture: {_one_line(error)}") from None


def load_tokenizer(source: ModelSource, remote_code: bool = False) -> Any:
    """The tokenizer beside the weights, with a padding token.

    Errors: `BadWeights` when the folder has none, or one of special tokens only: where the vocabulary's file
    is missing, transformers 5 makes an empty one without a word, and every prompt would be no text at all.
    """
    from transformers import AutoTokenizer

    if source.folder is None:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise BadWeights(
            f"{source.folder} has no usable tokenizer: {_one_line(error)}",
            "put tokenizer.json beside the weights",
        ) from None
    if tokenizer.vocab_size <= len(tokenizer.all_special_tokens):
        raise BadWeights(
            f"{source.folder} has no usable tokenizer: it knows nothing but special tokens",
            "put tokenizer.json beside the weights",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def layer_count(model: Any) -> int:
    """Decoder layers of the text model."""
    return int(model.config.get_text_config().num_hidden_layers)


def _refuse_incomplete(info: dict[str, Any], source: ModelSource) -> None:
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise BadWeights(
            f"{source.folder} lacks {len(missing)} tensor(s) of the model, first {missing[0]}",
            "download the weights again",
        )
    mismatched = sorted(tuple(entry) for entry in info.get("mismatched_keys") or ())
    if mismatched:
        name, there, asked = mismatched[0]
        raise other_shape(f"{_file_of(source, name)}: {name}", there, asked)
    unused = sorted(info.get("unexpected_keys") or ())
    if unused:
        ui.say(
            f"warning: {len(unused)} tensor(s) of {source.folder} are not in the model that config.json "
            f"describes and are not used, first {unused[0]}"
        )


def _refuse_other_shapes(model: Any, source: ModelSource) -> None:
    for name, module in model.named_modules():
        differing = differing_shape(module)
        if differing is not None:
            weight = f"{name}.weight"
            raise other_shape(f"{_file_of(source, weight)}: {weight}", *differing)


def differing_shape(module: Any) -> tuple[tuple[int, ...], tuple[int, int]] | None:
    """Shape of a quantized linear's weight in its file, and what config.json asks for, where they differ:
    transformers compares no shapes of what it quantizes."""
    bnb = sys.modules.get("bitsandbytes")  # without it nothing is quantized
    if bnb is None:
        return None
    if isinstance(module, bnb.nn.Linear4bit):
        there = getattr(getattr(module.weight, "quant_state", None), "shape", None)
    elif isinstance(module, bnb.nn.Linear8bitLt):
        there = module.weight.shape
    else:
        return None
    asked = (module.out_features, module.in_features)
    return None if there is None or tuple(there) == asked else (tuple(there), asked)


def other_shape(tensor: str, there: Iterable[int], asked: Iterable[int]) -> BadWeights:
    """The error for a tensor of the checkpoint that has another shape than the model's."""
    found, wanted = ("x".join(map(str, shape)) for shape in (there, asked))
    return BadWeights(
        f"{tensor} has the shape {found} and config.json asks for {wanted}",
        "config.json or the weights are of another model; download both again",
    )


def _file_of(source: ModelSource, tensor: str) -> Path | None:
    """The weight file of a tensor; the folder where the loader has renamed it."""
    if source.folder is None:
        return None
    found = read_headers(source.folder).get(tensor)
    return found.file if found is not None else source.folder
