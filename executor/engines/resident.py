"""Engine `resident`: the whole model on one device, or split over several cards by the plan's device map."""

from __future__ import annotations

from typing import Any

from executor.engines import Loaded, LoadRequest, attention_notes
from executor.errors import CannotHonour
from executor.load import layer_count, load_model, load_tokenizer


def load(request: LoadRequest) -> Loaded:
    """Load everything where the candidate places it.

    Errors: `CannotHonour` when its placement keeps weights outside the device.
    """
    strategy = request.candidate.strategy
    if strategy.placement not in ("full_gpu", "cpu"):
        raise CannotHonour(
            f"engine resident cannot do placement {strategy.placement}",
            "choose another candidate or --engine",
        )
    model = load_model(
        request.source, strategy, _device_map(request), request.device, request.seed, request.remote_code
    )
    tokenizer = load_tokenizer(request.source, request.remote_code)
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        layers_resident=layer_count(model),
        notes=attention_notes(model, strategy),
    )


def _device_map(request: LoadRequest) -> dict[str, Any]:
    cards = {place for place in request.candidate.device_map.values() if isinstance(place, int)}
    if len(cards) > 1 and request.workload.task == "infer":
        return dict(request.candidate.device_map)
    return {"": str(request.device)}
