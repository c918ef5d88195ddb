"""Engine `stream`: layers the card has no room for wait in page-locked RAM or on disk and pass through slots
on it.

Weights are those of engine `resident`, loaded and quantized by the same code, and layers compute with the
same kernels on the same bytes: results are equal bit by bit. On the CPU everything runs as on a card, with
copies that end at once.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from executor.engines import Loaded, LoadRequest
from executor.errors import CannotHonour
from executor.load import layer_count, load_model, load_tokenizer
from planner.memory.stream import SLOTS


def load(request: LoadRequest) -> Loaded:
    """Load the model with all but the wanted number of layers in host memory.

    Errors: `CannotHonour` for jobs that change the streamed weights, and where RAM or disk is too small;
    `BadWeights` as the loader finds them.
    """
    from executor.streaming.arena import Arena
    from executor.streaming.disk_tier import Spill
    from executor.streaming.loading import Packer, handing_over
    from executor.streaming.outside import Outside
    from executor.streaming.slab_load import SlabLoad
    from executor.streaming.slab_use import slab_file_for

    _refuse(request)
    slab, notes = slab_file_for(request)
    where, places = request.device, request.candidate.device_map
    with ExitStack() as held:
        arena = Arena(where)
        held.callback(arena.close)
        resident, outside = _resident_layers(request), Outside(_outside(request), arena)
        packer: Any
        if slab is None:
            packer = Packer(resident, arena, places, Spill(request.scratch))
            loading = handing_over(packer)
        else:
            packer = SlabLoad(slab, resident, arena, outside, where, places)
            loading = packer.loading()
        held.callback(packer.close)
        with loading, outside.taking():
            model = load_model(
                request.source,
                request.candidate.strategy,
                {"": str(where)},
                where,
                request.seed,
                request.remote_code,
            )
            # a slab file is still being read
            tokenizer = load_tokenizer(request.source, request.remote_code)
        loaded = _start(request, model, tokenizer, packer, outside, arena, held)
        loaded.notes[:0] = _notes(request, model, arena)
        loaded.notes += notes
        loaded.close = held.pop_all().close
    return loaded


def _start(
    request: LoadRequest,
    model: Any,
    tokenizer: Any,
    packer: Any,
    outside: Any,
    arena: Any,
    held: ExitStack,
) -> Loaded:
    """What has to end with the run is put on `held`."""
    from executor.streaming.outside import start_head
    from executor.streaming.saved import SavedWeights
    from executor.streaming.streamer import Streamer

    layers = packer.layers()
    blocks = outside.serve(model, layers, request.device)
    notes = outside.notes(blocks)
    if not layers and not blocks:
        return Loaded(
            model=model,
            tokenizer=tokenizer,
            layers_resident=layer_count(model),
            pinned_bytes=arena.pinned_bytes,
            outside_on_host=outside.names,
            notes=notes,
        )
    if request.device.type == "cuda":
        # blocks that loading has left must not stand beside the slots
        import torch

        torch.cuda.empty_cache()
    carried = [*layers, *blocks]
    streamer = Streamer(carried, min(SLOTS, len(carried)), request.device, arena)
    held.callback(streamer.close)
    start_head(model, blocks, streamer)
    if request.candidate.strategy.quant != "none":
        from executor.streaming.linears import adopt

        adopt(streamer)
    if request.workload.task == "train" and request.workload.lora_variant == "dora":
        from executor.streaming.dora import acquire_for_norms

        held.callback(acquire_for_norms(streamer))
    held.callback(SavedWeights(streamer, packer.stack.owner).remove)
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        layers_resident=len(packer.stack.layers) - len(layers),
        layers_streamed=len(layers),
        layers_on_disk=streamer.layers_on_disk,
        slots=streamer.slots,
        pinned_bytes=arena.pinned_bytes,
        outside_on_host=outside.names,
        notes=notes,
        traffic=streamer.traffic,
    )


def _refuse(request: LoadRequest) -> None:
    strategy, workload = request.candidate.strategy, request.workload
    if workload.task == "train" and workload.method == "full":
        raise CannotHonour(
            "engine stream brings weights to the card and never back; full fine-tuning changes them",
            "plan with `--method lora` or `--method qlora`",
        )
    if workload.task == "train" and strategy.upcast_frozen:
        raise CannotHonour("engine stream keeps frozen weights as they are", "plan without `--upcast-frozen`")
    away = _outside(request)
    if workload.task == "train" and strategy.kernels == "liger" and away:
        raise CannotHonour(
            f"liger's loss reads weights where they are, and the plan has {' and '.join(away)} in RAM",
            "plan with `--kernels torch --loss fused`",
        )
    cards = {place for place in request.candidate.device_map.values() if isinstance(place, int)}
    if len(cards) > 1:
        raise CannotHonour("engine stream uses one card", "plan with one `--gpu`, or --engine resident")


def _resident_layers(request: LoadRequest) -> int:
    """As the command line says, else as the plan places the layers, else none."""
    if request.resident_layers is not None:
        return request.resident_layers
    if request.candidate.strategy.placement not in ("mixed_offload", "disk_offload"):
        return 0
    return sum(
        isinstance(place, int) and name.rsplit(".", 1)[-1].isdigit()
        for name, place in request.candidate.device_map.items()
    )


def _outside(request: LoadRequest) -> list[str]:
    """Names of modules that are no layers and that the plan places in RAM."""
    return [
        name
        for name, place in request.candidate.device_map.items()
        if name and not isinstance(place, int) and not name.rsplit(".", 1)[-1].isdigit()
    ]


def _notes(request: LoadRequest, model: Any, arena: Any) -> list[str]:
    wanted = request.candidate.strategy.attention
    notes = []
    if model.config._attn_implementation != wanted:
        notes.append(f"this model has no {wanted} attention in transformers; eager ran instead")
    if arena.refused is not None:
        notes.append(
            f"warning: the system locks no more memory ({arena.refused}); copies from the rest "
            f"{'go through a small locked buffer and ' if arena.bounce_buffers() else ''}are slower: raise "
            "`ulimit -l`, the container's limit, or under WSL2 the memory of the virtual machine"
        )
    return notes
