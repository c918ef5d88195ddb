"""Engine `accelerate`: layers the card has no room for wait in RAM or on disk and come to it in each pass.

transformers loads by the plan's device map and accelerate's hooks (`accelerate.hooks.AlignDevicesHook`) do
the rest: before a module with tensors of its own runs, they are copied to the card; afterwards they are
dropped there. One such module is on the card at a time, nothing is fetched ahead, and the allocator's cache
is emptied after every tensor.

Layers on "cpu" are held in this process's RAM. Layers on "disk" are read in place from the checkpoint's
safetensors files; what no file holds as the model needs it (random weights, experts that loading puts
together) is written to the offload folder first, which is gone after the run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executor.device import torch_dtype
from executor.engines import Loaded, LoadRequest, attention_notes
from executor.engines.offload_hooks import Traffic, prepare
from executor.errors import BadWeights, CannotHonour
from executor.load import attention_for, layer_count, load_model, load_tokenizer, read_config
from planner.units import format_bytes

if TYPE_CHECKING:
    import torch

_PLAN_AGAIN = "make the plan again"
_FOLDER_HINT = "free some space, or give another --output: the offload folder is made in it"


def load(request: LoadRequest) -> Loaded:
    """Load every module where the candidate's device map says.

    Errors: `CannotHonour` for what accelerate's offload cannot do, a device map that does not match the
    model, or too little room in RAM or on disk; `BadWeights` as the loader finds them.
    """
    _refuse(request)
    card = card_of(request.device)
    planned = request.candidate.device_map
    places = {name: card if isinstance(place, int) else place for name, place in planned.items()}
    places, sizes = settle_places(_skeleton(request), places, card)
    _require_ram(sizes["cpu"])
    folder = _make_folder(request.scratch, sizes["disk"] if request.source.folder is None else 0)
    try:
        model = _load(request, places, folder)
        prepare(model, request.device, mapped=request.source.folder is not None)
        _try(model, request.device)
        _give_back(request.device)
        traffic = Traffic(model)
        tokenizer = load_tokenizer(request.source, request.remote_code)
    except BaseException:
        _remove(folder)
        raise
    away = _layers_away(places)
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        layers_resident=layer_count(model) - away,
        layers_streamed=away,
        layers_on_disk=_layers_away(places, "disk"),
        notes=attention_notes(model, request.candidate.strategy),
        traffic=traffic.read,
        close=lambda: _remove(folder),
    )


def _refuse(request: LoadRequest) -> None:
    strategy = request.candidate.strategy
    if strategy.placement not in ("mixed_offload", "disk_offload"):
        raise CannotHonour(
            f"engine accelerate offloads layers, and placement {strategy.placement} offloads none",
            "--engine resident, or choose another candidate",
        )
    if request.workload.task == "train":
        raise CannotHonour(
            "training does not run under accelerate's offload: backward needs weights that left the card",
            "choose a candidate with placement full_gpu or cpu",
        )
    if strategy.quant != "none":
        raise CannotHonour(
            f"accelerate's offload leaves modules unquantized; the candidate asks for {strategy.quant}",
            "make the plan again with `--quant none`",
        )


# --------------------------------------------------------------------------- places


def card_of(device: torch.device) -> Any:
    """The place to compute, as accelerate names it; without a card, that is the CPU.

    accelerate takes the string "cpu" for offloaded and the device of that name for a place to compute.
    """
    return device.index if device.type == "cuda" else device


def settle_places(skeleton: Any, places: dict[str, Any], card: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """The map for this class of model, and bytes of weights by place ("card", "cpu", "disk"), tied ones once.

    `skeleton` is on the meta device. Buffers the plan does not know (rotary tables have many names) go to the
    card; names without weights that this class lacks are dropped.

    Errors: `CannotHonour` naming a layer the model lacks, or weights the map leaves out.
    """
    names = {name for name, _ in skeleton.named_modules()} | set(skeleton.state_dict())
    strange = sorted(name for name in places if name not in names and name.rsplit(".", 1)[-1].isdigit())
    if strange:
        raise CannotHonour(f"the plan places {strange[0]}, which this model does not have", _PLAN_AGAIN)
    settled = {name: place for name, place in places.items() if name in names}
    for tied, origin in (getattr(skeleton, "all_tied_weights_keys", None) or {}).items():
        if _place_of(tied, settled) is None and (place := _place_of(origin, settled)) is not None:
            settled[tied.rsplit(".", 1)[0]] = place
    sizes = {"card": 0, "cpu": 0, "disk": 0}
    for name, tensor in skeleton.named_parameters():
        place = _place_of(name, settled)
        if place is None:
            raise CannotHonour(f"the plan's device map has no place for {name}", _PLAN_AGAIN)
        sizes[place if isinstance(place, str) else "card"] += tensor.numel() * tensor.element_size()
    for name, _ in skeleton.named_buffers():
        if _place_of(name, settled) is None:
            settled[name.rsplit(".", 1)[0] if _owns_only_buffers(skeleton, name) else name] = card
    return settled, sizes


def _owns_only_buffers(skeleton: Any, name: str) -> bool:
    owner = skeleton.get_submodule(name.rpartition(".")[0])
    return "." in name and not any(True for _ in owner.parameters())


def _place_of(name: str, places: dict[str, Any]) -> Any:
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), -1, -1))
    found = next((prefix for prefix in prefixes if prefix in places), None)
    return None if found is None else places[found]


def _skeleton(request: LoadRequest) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    strategy = request.candidate.strategy
    config = read_config(request.source, request.remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config,
            dtype=torch_dtype(strategy.dtype),
            attn_implementation=attention_for(config, strategy),
            trust_remote_code=request.remote_code,
        )


def _layers_away(places: dict[str, Any], *where: str) -> int:
    """Layers in RAM and on disk, or `where` alone: the planner names decoder layers one by one, everything
    else as a whole."""
    wanted = where or ("cpu", "disk")
    return sum(place in wanted and name.rsplit(".", 1)[-1].isdigit() for name, place in places.items())


# --------------------------------------------------------------------------- room


def available_ram() -> int | None:
    """RAM this process may still take, inside its container's limit; None where it cannot be read."""
    from planner.inspect.cgroup import read_mounts
    from planner.inspect.host import inspect_host
    from planner.inspect.system import System

    system = System()
    return inspect_host(system, read_mounts(system), []).ram_available_bytes


def _require_ram(needed: int) -> None:
    """Errors: `CannotHonour` when RAM cannot hold the layers; the system would end the process instead."""
    available = available_ram() if needed else None
    if available is not None and needed > available:
        raise CannotHonour(
            f"the layers kept in RAM take {format_bytes(needed)} and {format_bytes(available)} are available",
            "close other programs, or plan with `--placement disk_offload`",
        )


def _make_folder(folder: Path, needed: int) -> Path:
    """The empty offload folder with room for `needed` bytes."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise CannotHonour(
            f"cannot make the offload folder {folder}: {error.strerror}", _FOLDER_HINT
        ) from None
    if needed > free:
        _remove(folder)
        raise CannotHonour(
            f"the layers kept on disk take {format_bytes(needed)} and {folder.parent} has "
            f"{format_bytes(free)} free",
            _FOLDER_HINT,
        )
    return folder


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # the folder above it stays where something else is in it
        folder.parent.rmdir()


# --------------------------------------------------------------------------- loading


def _load(request: LoadRequest, places: dict[str, Any], folder: Path) -> Any:
    from safetensors import SafetensorError

    try:
        with _one_tensor_at_a_time(request.source.folder is None):
            model = load_model(
                request.source,
                request.candidate.strategy,
                places,
                request.device,
                request.seed,
                request.remote_code,
                offload_folder=folder,
            )
    except (OSError, SafetensorError, BadWeights) as error:
        if isinstance(error, OSError) or "serializing" in str(error):
            reason = str(error).split(": ")[-1].strip() or type(error).__name__
            raise CannotHonour(f"cannot write the offload folder {folder}: {reason}", _FOLDER_HINT) from None
        raise
    return model


@contextmanager
def _one_tensor_at_a_time(random: bool) -> Iterator[None]:
    """Random weights are drawn on the card, also those that leave it: only one may stand beside the rest."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    if random:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if random:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def _give_back(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        # what the trial left must not look like a part of the loaded model
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def _try(model: Any, device: torch.device) -> None:
    """A prefill and a decode: some classes read a module's weights without calling the module."""
    import torch

    try:
        with torch.inference_mode():
            ids = torch.zeros((1, 2), dtype=torch.long, device=device)
            mask = torch.ones_like(ids)
            length = {"max_new_tokens": 2, "min_new_tokens": 2}
            model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **length)
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        raise CannotHonour(
            f"{type(model).__name__} reads weights past their modules, where accelerate does not bring them",
            "choose a candidate that offloads less, or placement full_gpu or cpu",
        ) from None
