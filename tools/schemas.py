"""Write `schemas/*.schema.json` from the types, and an example file of each.

    python tools/schemas.py

The schemas follow the types alone. The examples come from the planner itself, but for the run, whose figures
are made up to show the fields.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from planner.commands.estimate import as_json
from planner.estimate import estimate
from planner.machine import machine_from_gpus
from planner.plan import make_plan, plan_bytes
from planner.types import Estimate, Machine, MemoryLine, ModelRef, Plan, RunReport, Workload
from planner.units import GIB
from profiles.catalogue import load_model
from profiles.hardware import load_gpu

FOLDER = Path(__file__).parent.parent / "schemas"
TYPES: dict[str, type] = {"estimate": Estimate, "machine": Machine, "plan": Plan, "run": RunReport}
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema of one kind of file."""
    _, parts = msgspec.json.schema_components([TYPES[name]], ref_template="#/$defs/{name}")
    body = dict(parts.pop(TYPES[name].__name__))
    if name == "estimate":
        body = _as_printed(body)
        parts.pop("DiskEstimate")
    body["required"] = ["schema", *body["required"]]
    defs = {each: parts[each] for each in sorted(parts)}
    return {"$schema": DIALECT, "title": f"fitwright {name}", **body, "$defs": defs}


def _as_printed(body: dict[str, Any]) -> dict[str, Any]:
    """`planner estimate --json` prints disk as one figure beside its lines."""
    lines = {"type": "array", "items": {"$ref": f"#/$defs/{MemoryLine.__name__}"}}
    properties: dict[str, Any] = {}
    for field, value in body["properties"].items():
        if field == "disk":
            properties |= {"disk_bytes": {"type": "integer"}, "disk_components": lines}
        else:
            properties[field] = value
    required = [each for field in body["required"] for each in _printed_names(field)]
    return {**body, "properties": properties, "required": required}


def _printed_names(field: str) -> tuple[str, ...]:
    return ("disk_bytes", "disk_components") if field == "disk" else (field,)


def example(name: str) -> bytes:
    """An example file of one kind."""
    model = load_model("qwen2.5-7b")
    machine = machine_from_gpus([(load_gpu("rtx-3090"), 1)], ram_bytes=64 * GIB, disk_bytes=200 * GIB)
    if name == "machine":
        return _pretty(machine)
    workload = Workload(task="train", method="qlora")
    plan = make_plan(model, machine, workload, repo_id="Qwen/Qwen2.5-7B")
    best = plan.candidates[0]
    if name == "plan":
        return plan_bytes(plan)
    if name == "estimate":
        return _pretty(as_json(estimate(model, machine, workload, best.strategy), None))
    return _pretty(
        RunReport(
            task="train",
            model=ModelRef(model.id, model.parameters),
            plan_digest=plan.digest,
            candidate=best.rank,
            engine=best.engine,
            device="cuda:0",
            strategy=best.strategy,
            workload=workload,
            layers_resident=best.estimate.placement.layers_on_gpu,
            allocated_peak_bytes=9_900_000_000,
            process_peak_bytes=11_800_000_000,
            context_bytes=700_000_000,
            train_tokens_per_s=800.0,
            steps=3,
            losses=(2.5, 2.4, 2.3),
            moments={"forward": 7_000_000_000, "loss": 9_900_000_000},
            error={"allocated_peak_bytes": 0.01},
            environment={"torch": "2.13.0"},
            notes=("an example: these figures are made up",),
        )
    )


def _pretty(value: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def files() -> dict[Path, bytes]:
    """Every schema by its path."""
    return {FOLDER / f"{name}.schema.json": _pretty(schema(name)) for name in TYPES}


def main() -> None:
    """Write schemas and examples."""
    (FOLDER / "examples").mkdir(parents=True, exist_ok=True)
    for path, data in files().items():
        path.write_bytes(data)
    for name in TYPES:
        (FOLDER / "examples" / f"{name}.json").write_bytes(example(name))


if __name__ == "__main__":
    main()
