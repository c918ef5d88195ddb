"""`executor pack`: a model's weights quantized once and laid out layer by layer in one file.

Engine stream, the next time it loads this model in this precision, reads the file straight into the memory
it runs from. An interrupted packing goes on where it was when the same command is given again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executor import ui
from executor.errors import BadOption, BadWeights, CannotHonour, Interrupted
from executor.quiet import silence, silence_loaded
from executor.stopping import StopRequest
from planner.units import format_bytes

if TYPE_CHECKING:
    import torch

    from executor.source import ModelSource
    from executor.streaming.pack import PackJob
    from planner.types import Strategy

PACK_SCHEMA = "fitwright.pack/1"


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """What the command line asks for. None: as the model or the machine has it."""

    model: str
    quant: str | None = None
    quant_experts: str = "none"
    dtype: str = "auto"
    output: Path | None = None
    offline: bool = False
    trust_remote_code: bool = False
    json: bool = False
    debug: bool = False


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What packing did."""

    schema: str
    path: str
    quant: str
    dtype: str
    device: str
    bytes: int
    """Of the slab file."""
    checkpoint_bytes: int
    kept_bytes: int
    """Of the file, packed before this call."""
    seconds: float
    host_peak_bytes: int | None
    """This process's own memory at most, above what it had with its libraries loaded."""
    found_by_runs: bool
    """False where the file is in a place of its own and the data folder takes no link to it."""


def pack_command(options: PackOptions) -> int:
    """Pack; the exit code.

    Errors: `BadOption` for an output that is something else, `BadWeights`, `CannotWrite` for a full disk,
    `Interrupted`.
    """
    silence(options.debug)
    with StopRequest():
        try:
            report = _pack(options)
        except KeyboardInterrupt:
            raise Interrupted("interrupted", "the same command goes on from the last layer written") from None
    if options.json:
        print(json.dumps(asdict(report), indent=1))
    else:
        _show(report)
    return 0


def _pack(options: PackOptions) -> PackReport:
    from executor.source import find_weights, plan_model
    from planner.resolve import resolve

    _refuse_foreign(options.output)
    found = resolve(options.model, offline=options.offline)
    model = plan_model(found)
    source = find_weights(model, options.offline, options.trust_remote_code)
    quant = _quant(source, options.quant)
    with ui.stage("starting torch"):
        device = _start(options.debug)
    strategy = _strategy(options, quant, device)
    return _run(_job(model.id, source, strategy, device, options))


def _start(debug: bool) -> torch.device:
    """The device that quantizes, once the libraries and the card are ready."""
    import importlib

    import torch

    importlib.import_module("transformers.modeling_utils")  # else packing would be charged for its memory
    silence_loaded(debug)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.zeros(1, device=device)
    return device


def _refuse_foreign(output: Path | None) -> None:
    """Errors: `BadOption` where the file named with -o is there and is no slab file, or cannot be one."""
    if output is None:
        return
    try:
        if not output.parent.is_dir():
            raise BadOption(f"there is no folder {output.parent}", "make it, or give another -o")
        if output.exists() and not _begins_as_slab_file(output):
            raise BadOption(f"{output} exists and is no slab file", "give another -o")
    except OSError as error:
        raise BadOption(f"cannot use {output}: {error.strerror}", "give another -o") from None


def _begins_as_slab_file(path: Path) -> bool:
    if not path.is_file():  # opening a pipe would wait for its writer
        return False
    with open(path, "rb") as file:
        return file.read(6) == b"FWSLAB"


def _quant(source: ModelSource, asked: str | None) -> str:
    """The precision: what was asked for, else that of a quantized checkpoint, else NF4."""
    assert source.folder is not None
    config = json.loads((source.folder / "config.json").read_bytes())
    stored = config.get("quantization_config")
    if not stored:
        return asked or "nf4"
    found = "nf4" if stored.get("load_in_4bit") else "int8" if stored.get("load_in_8bit") else None
    if found is None:
        raise CannotHonour(
            f"{source.folder} is quantized by {stored.get('quant_method')}, which engine stream does not run",
            "take the model's 16-bit weights",
        )
    if asked not in (None, found):
        raise BadOption(f"{source.folder} is quantized to {found} already", f"pack with --quant {found}")
    return found


def _strategy(options: PackOptions, quant: str, device: torch.device) -> Strategy:
    from executor.surroundings import read_machine
    from planner.inspect.system import System
    from planner.rates import auto_dtype
    from planner.types import Strategy

    on_card = device.type == "cuda"
    dtype: Any = options.dtype
    if dtype == "auto":
        dtype = auto_dtype(read_machine(System())) if on_card else "bf16"
    if options.quant_experts != "none" and quant != "nf4":
        raise BadOption("--quant-experts nf4 goes with --quant nf4")
    fields: dict[str, Any] = {"dtype": dtype, "quant": quant, "quant_experts": options.quant_experts}
    return Strategy(**fields, placement="full_gpu" if on_card else "cpu", engine="stream")


def _job(
    name: str, source: ModelSource, strategy: Strategy, device: torch.device, options: PackOptions
) -> PackJob:
    from executor.streaming.pack import PackJob
    from executor.streaming.recipe import recipe_of
    from executor.streaming.slab_places import place_for

    return PackJob(
        name=name,
        source=source,
        strategy=strategy,
        device=device,
        recipe=recipe_of(source, strategy, device.type, seed=0),
        path=options.output or place_for(source, strategy),
        remote_code=options.trust_remote_code,
    )


def _run(job: PackJob) -> PackReport:
    from executor.measure import HostSampler
    from executor.streaming.pack import pack
    from executor.streaming.slab_places import link_to

    sampler = HostSampler()
    before = sampler.peak_bytes
    try:
        done = _reused(job) or pack(job)
    finally:
        peak = sampler.stop()
    found_by_runs = link_to(job.path, job.source, job.strategy)
    if not found_by_runs:
        ui.say(f"warning: Fitwright's data folder cannot be written: runs will not find {job.path}")
    return PackReport(
        schema=PACK_SCHEMA,
        path=str(job.path),
        quant=job.strategy.quant,
        dtype=job.strategy.dtype,
        device=str(job.device),
        bytes=done.bytes,
        checkpoint_bytes=job.source.bytes,
        kept_bytes=done.kept_bytes,
        seconds=done.seconds,
        host_peak_bytes=peak - before if peak is not None and before is not None else None,
        found_by_runs=found_by_runs,
    )


def _reused(job: PackJob) -> Any:
    """The finished file where it is there already; None where it is to be made, or made again."""
    from executor.streaming.pack import Packed
    from executor.streaming.recipe import difference
    from executor.streaming.slab_file import SlabFile

    try:
        found = SlabFile.open(job.path)
    except (FileNotFoundError, IsADirectoryError):  # the latter is refused where the file is made
        return None
    except (OSError, BadWeights) as error:
        ui.say(f"note: {error}; packing again")
        return None
    differs = difference(found.index.recipe, job.recipe)
    if differs is not None:
        ui.say(f"note: {job.path} is replaced: {differs}")
        return None
    try:
        found.check()
    except (OSError, BadWeights) as error:
        ui.say(f"note: {error}; packing again")
        return None
    return Packed(job.path, found.nbytes, found.nbytes, 0.0)


def _show(report: PackReport) -> None:
    size = format_bytes(report.bytes)
    if report.kept_bytes == report.bytes:
        print(f"{report.path}: packed before, {size}; its recipe is this model's in {report.quant}")
        return
    new = report.bytes - report.kept_bytes
    rate = f"{format_bytes(int(new / max(report.seconds, 1e-9)))}/s"
    print(f"{report.path}: {size} in {report.seconds:.1f} s ({rate}), {report.quant} on {report.device}")
    if report.found_by_runs:
        print("engine stream reads it the next time it loads this model in this precision")
