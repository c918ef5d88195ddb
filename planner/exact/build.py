"""The real module tree of a job, without weights: transformers, bitsandbytes, peft.

Everything is built on the meta device, so a model of any size takes seconds and no memory. Quantized weights
are bitsandbytes' own parameter classes around storages of the packed size; what they do in forward and
backward is bitsandbytes' own code.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from planner.errors import BadConfig
from planner.exact.adapters import add_adapters
from planner.exact.kernels import Outliers
from planner.memory.forward import outlier_share
from planner.types import Strategy, Workload

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
META = torch.device("meta")
_NOT_FIELDS = ("model_type", "architectures", "quantization_config", "auto_map", "transformers_version")


def load_config(facts: Mapping[str, Any]) -> Any:
    """transformers' config object for the fields of a config.json.

    Errors: `BadConfig` where transformers does not know the model_type or refuses the fields.
    """
    from transformers import AutoConfig

    model_type = str(facts.get("model_type", ""))
    fields = {key: value for key, value in facts.items() if key not in _NOT_FIELDS}
    try:
        config = AutoConfig.for_model(model_type, **json.loads(json.dumps(fields)))
    except Exception as error:  # each config class checks in its own way
        raise BadConfig(f"transformers cannot build {model_type[:60]!r}: {_first_line(error)}") from None
    return config


def build_model(config: Any, how: Strategy) -> Any:
    """The causal language model `config` describes, unquantized, on the meta device.

    Errors: `BadConfig` for an architecture without a causal language model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    dtype = DTYPES[how.dtype]
    kind: Any = AutoModelForCausalLM
    if type(config) not in kind._model_mapping and type(config) in AutoModelForImageTextToText._model_mapping:
        kind = AutoModelForImageTextToText
    wanted = "eager" if how.attention == "eager" else "sdpa"
    last: Exception | None = None
    for attention in dict.fromkeys((wanted, "eager")):
        try:
            with torch.device(META), _no_initialisation():
                model = kind.from_config(config, dtype=dtype, attn_implementation=attention)
            break
        except Exception as error:
            last = error
    else:
        raise BadConfig(f"transformers cannot build {config.model_type}: {_first_line(last)}") from None
    _keep_float32(model, dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


@contextlib.contextmanager
def _no_initialisation() -> Iterator[None]:
    """Weights have no values here, so nothing is drawn for them."""
    from unittest import mock

    from transformers import PreTrainedModel

    with mock.patch.object(PreTrainedModel, "init_weights", lambda self, *_, **__: self.tie_weights()):
        yield


def _keep_float32(model: Any, dtype: torch.dtype) -> None:
    """Parameters transformers keeps in float32 whatever was asked for (`_get_dtype_plan`)."""
    import re

    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    usual = (getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
    names = [*strict, *usual]
    if not names or dtype == torch.float32:
        return
    pattern = re.compile("|".join(rf"((^|\.){re.escape(name)}($|\.))" for name in names))
    for name, parameter in model.named_parameters():
        if pattern.search(name):
            parameter.data = parameter.data.float()


# --------------------------------------------------------------------------- quantized linears


def quantize(model: Any, how: Strategy, tokens: int) -> None:
    """Put bitsandbytes' linears where transformers puts them, with storages of the packed size.

    `tokens`: rows of a pass, which decide how many columns LLM.int8 finds outliers in.
    """
    if how.quant == "none":
        return
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    four = how.quant == "nf4"
    settings = BitsAndBytesConfig(
        load_in_4bit=four,
        load_in_8bit=not four,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[how.dtype],
    )
    untouched = HfQuantizer.get_modules_to_not_convert(
        model, None, getattr(model, "_keep_in_fp32_modules", None)
    )
    replace_with_bnb_linear(model, untouched, settings)
    hidden = model.config.get_text_config().hidden_size
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            _pack_4bit(module, DTYPES[how.dtype])
        elif type(module).__name__ == "Linear8bitLt":
            # the linear fed by a gated product meets large entries
            gated = name.rpartition(".")[2] in ("down_proj", "w2")
            _pack_8bit(module, outlier_share(hidden, tokens) if gated else 0.0)
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt") and module.bias is not None:
            module.bias.data = module.bias.data.to(DTYPES[how.dtype])
    for flag in ("is_loaded_in_4bit",) if four else ("is_loaded_in_8bit",):
        setattr(model, flag, True)
    model.is_quantized = True
    model.config.quantization_config = settings


def _pack_4bit(module: Any, dtype: torch.dtype) -> None:
    """NF4 with double quantization (bitsandbytes functional.py, quantize_4bit)."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    rows, columns = module.out_features, module.in_features
    n = rows * columns
    blocks = -(-n // 64)
    inner = QuantState(
        absmax=torch.empty(-(-blocks // 256), device=META),
        code=torch.empty(256, device=META),
        blocksize=256,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8, device=META),
        shape=torch.Size((rows, columns)),
        code=torch.empty(16, device=META),
        blocksize=64,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty((), device=META),
        state2=inner,
    )
    data = torch.empty(((n + 1) // 2, 1), dtype=torch.uint8, device=META)
    module.weight = Params4bit(
        data, requires_grad=False, quant_state=state, quant_type="nf4", module=module, bnb_quantized=True
    )
    module.quant_state = state


def _pack_8bit(module: Any, outliers: float) -> None:
    """int8 rows with a float32 scale each (bitsandbytes nn/modules.py, Int8Params)."""
    from bitsandbytes.nn import Int8Params

    data = torch.empty((module.out_features, module.in_features), dtype=torch.int8, device=META)
    module.weight = Int8Params(data, requires_grad=False, has_fp16_weights=False)
    module.state.CB, module.state.SCB = data, torch.empty(module.out_features, device=META)
    module.state.has_fp16_weights = False

    def runs(*_: Any) -> None:
        Outliers.share = outliers

    module.register_forward_pre_hook(runs)


def quantization_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name of the module, tensor) of all scales and tables beside quantized weights."""
    for name, module in model.named_modules():
        state = getattr(module, "quant_state", None)
        if state is not None and getattr(state, "state2", None) is not None:
            inner = state.state2
            for tensor in (state.absmax, state.code, state.offset, inner.absmax, inner.code):
                yield name, tensor
        rows = getattr(getattr(module, "state", None), "SCB", None)
        if isinstance(rows, torch.Tensor):
            yield name, rows


# --------------------------------------------------------------------------- adapters


def adapt(model: Any, work: Workload, how: Strategy) -> Any:
    """The model with the executor's adapters on it, made on the meta device too."""
    with torch.device(META):
        return add_adapters(model, work, how)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Libraries announce what they do for people who watch a run; nobody watches this one."""
    from transformers.utils import logging as announcements

    before = announcements.get_verbosity()
    announcements.set_verbosity_error()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        announcements.set_verbosity(before)


def _first_line(error: BaseException | None) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__
