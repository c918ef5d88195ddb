"""The types that pass between the parts of Fitwright. All frozen; all JSON through msgspec.

The planner works on `ModelProfile`, `Machine`, `Workload` and `Strategy` and gives an `Estimate`;
ranked `Candidate`s make a `Plan`; the executor turns a plan into a `RunReport`. `plan.json` is the only
thing that passes from planner to executor.

Bytes are `int`, rates end in `_per_s`, counts of tokens in `_tokens`. JSON shapes: those of
`schemas/`: `fitwright.estimate/1`, `fitwright.plan/1`, `fitwright.run/1`, `fitwright.machine/1`.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from msgspec import Struct

from planner.machine_types import MACHINE_SCHEMA as MACHINE_SCHEMA
from planner.machine_types import Disk as Disk
from planner.machine_types import Gpu as Gpu
from planner.machine_types import GpuProcess as GpuProcess
from planner.machine_types import Host as Host
from planner.machine_types import Machine as Machine
from planner.machine_types import ProbeResult as ProbeResult

Task = Literal["infer", "train"]
Method = Literal["full", "lora", "qlora"]
Quant = Literal["none", "nf4", "int8"]
Placement = Literal["full_gpu", "mixed_offload", "disk_offload", "cpu"]
Engine = Literal["resident", "accelerate", "stream"]
Cache = Literal["dynamic", "static", "offloaded", "quantized"]
AttentionKernel = Literal["sdpa", "eager", "flash_attention_2"]
Dtype = Literal["bf16", "fp16", "fp32"]
Basis = Literal["counted", "modelled", "measured", "traced"]
Verdict = Literal["fits", "tight", "does_not_fit", "unknown"]
GOOD: Final = ("fits", "tight")
"""Verdicts a job may be started with, the better first."""
Moment = Literal[
    "load", "prefill", "decode", "forward", "loss", "backward", "optimizer_step", "checkpoint_save"
]

ESTIMATE_SCHEMA: Final = "fitwright.estimate/1"
PLAN_SCHEMA: Final = "fitwright.plan/1"
RUN_SCHEMA: Final = "fitwright.run/1"

# --------------------------------------------------------------------------- what is asked


class Workload(Struct, frozen=True, kw_only=True):
    """The job: what is to be generated or trained. Defaults are those of the command line."""

    task: Task = "infer"
    prompt_tokens: int = 1024
    new_tokens: int = 256
    batch_size: int = 1
    concurrency: int = 1
    method: Method = "qlora"
    seq_len: int = 2048
    gradient_accumulation_steps: int = 1
    train_tokens: int | None = None
    lora_rank: int = 8
    lora_alpha: int = 32
    lora_targets: Literal["all-linear", "attention"] = "all-linear"
    lora_dropout: float = 0.05
    adapter_dtype: Literal["fp32", "bf16"] = "fp32"
    lora_variant: Literal["lora", "dora", "rslora"] = "lora"

    @property
    def sequences(self) -> int:
        """Sequences in one forward pass on one card."""
        return self.batch_size * (self.concurrency if self.task == "infer" else 1)


class Strategy(Struct, frozen=True, kw_only=True):
    """How the job is carried out: everything that changes memory or speed without changing the job."""

    dtype: Dtype = "bf16"
    quant: Quant = "none"
    quant_experts: Literal["none", "nf4"] = "none"
    placement: Placement = "full_gpu"
    engine: Engine = "resident"
    cache: Cache = "dynamic"
    gradient_checkpointing: bool = True
    activation_offload: bool = False
    optimizer: str = "adamw_torch_fused"
    """A transformers `optim` name."""
    attention: AttentionKernel = "sdpa"
    loss: Literal["full", "fused"] = "full"
    kernels: Literal["torch", "liger"] = "torch"
    upcast_frozen: bool = False
    speculate: Literal["none", "lookup", "draft"] = "none"
    draft: str | None = None
    prefill_chunk_tokens: int = 0
    """Most tokens of a prompt in one pass; 0: all of them."""


class Stack(Struct, frozen=True):
    """Versions of the libraries whose behaviour the estimate describes (major.minor)."""

    torch: str
    transformers: str
    bitsandbytes: str
    peft: str


# --------------------------------------------------------------------------- the answer


class MemoryLine(Struct, frozen=True):
    """One component of memory at one moment."""

    name: str
    bytes: int
    formula: str
    """Arithmetic a person can follow, with the numbers in it."""
    basis: Basis


class GpuEstimate(Struct, frozen=True, kw_only=True):
    """Memory on one card. Fields as the contract defines them."""

    index: int
    budget_bytes: int | None
    budget_basis: str
    load_bytes: int
    allocated_peak_bytes: int
    required_bytes: int
    context_bytes: int
    process_bytes: int
    low_bytes: int
    high_bytes: int
    managed_bytes: int
    peak_moment: Moment
    components: tuple[MemoryLine, ...]
    moments: dict[str, int] = {}
    """Allocated bytes at the peak of each moment of the run."""


class HostEstimate(Struct, frozen=True, kw_only=True):
    """Host RAM at its peak, page cache not counted."""

    ram_bytes: int
    pinned_bytes: int = 0
    components: tuple[MemoryLine, ...] = ()


class DiskEstimate(Struct, frozen=True, kw_only=True):
    """Disk a job fills, line by line: download, offload folder, checkpoints, final model."""

    components: tuple[MemoryLine, ...] = ()

    @property
    def bytes(self) -> int:
        """All lines together."""
        return sum(line.bytes for line in self.components)


class Range(Struct, frozen=True):
    """A speed: tokens per second at worst, typically and at best."""

    low: float
    typical: float
    high: float


class Speed(Struct, frozen=True, kw_only=True):
    """Predicted speed; None where the task has none or the card's rates are not known."""

    decode_tokens_per_s: Range | None = None
    prefill_tokens_per_s: Range | None = None
    train_tokens_per_s: Range | None = None
    bound: str | None = None
    """What limits it: memory bandwidth, compute, link, launch, disk."""
    basis: str | None = None
    """Where the rates came from (catalogue, probe of a date)."""


class ModelRef(Struct, frozen=True):
    """The model an estimate is about."""

    id: str
    parameters: int | None


class PlacementMap(Struct, frozen=True, kw_only=True):
    """Where each layer lives. `device_map` is accelerate's: module name to card index, "cpu" or "disk"."""

    device_map: dict[str, int | str] = {}
    layers_on_gpu: int = 0
    layers_in_ram: int = 0
    layers_on_disk: int = 0


class MeasuredHere(Struct, frozen=True, kw_only=True):
    """What earlier runs of the same model, job and strategy measured on this machine under the libraries
    installed now: medians of `runs` runs. Shown beside an estimate, which it does not change."""

    runs: int
    kind: Literal["rehearsal", "run"]
    """Rehearsals have the planned shapes exactly; runs take what their data brings."""
    last: str
    """Day of the latest."""
    load_bytes: int | None = None
    allocated_peak_bytes: int | None = None
    reserved_peak_bytes: int | None = None
    process_bytes: int | None = None
    context_bytes: int | None = None
    ram_bytes: int | None = None
    decode_tokens_per_s: float | None = None
    prefill_tokens_per_s: float | None = None
    train_tokens_per_s: float | None = None


class Estimate(Struct, frozen=True, kw_only=True):
    """The whole answer for one model, machine, job and strategy."""

    schema: Literal["fitwright.estimate/1"] = ESTIMATE_SCHEMA
    model: ModelRef
    stack: Stack
    gpus: tuple[GpuEstimate, ...]
    host: HostEstimate
    disk: DiskEstimate
    speed: Speed
    verdict: Verdict
    reasons: tuple[str, ...] = ()
    placement: PlacementMap = PlacementMap()
    defaulted: tuple[str, ...] = ()
    """Config fields filled from transformers' own defaults."""
    measured_here: MeasuredHere | None = None


# --------------------------------------------------------------------------- the plan


class PlanModel(Struct, frozen=True, kw_only=True):
    """Which weights a plan is about, as the user named them."""

    id: str
    parameters: int | None
    repo_id: str | None = None
    revision: str | None = None
    path: str | None = None
    config_hash: str = ""
    """SHA-256 of the canonical JSON of the config facts."""
    config: dict[str, Any] = {}
    """The config facts themselves, so that `rehearse` and `run` need no catalogue."""


class Candidate(Struct, frozen=True, kw_only=True):
    """One way to run the job, with what it needs."""

    rank: int
    strategy: Strategy
    engine: Engine
    device_map: dict[str, int | str]
    estimate: Estimate
    speed: Speed
    reasons: tuple[str, ...] = ()


class Rejected(Struct, frozen=True, kw_only=True):
    """A way that is not offered, and why."""

    strategy: Strategy
    reason: str
    needs: str | None = None
    """What would make it fit or legal."""
    process_bytes: int | None = None


class Plan(Struct, frozen=True, kw_only=True):
    """Ranked candidates for one job on one machine. Same inputs give the same bytes: no timestamps."""

    schema: Literal["fitwright.plan/1"] = PLAN_SCHEMA
    model: PlanModel
    stack: Stack
    machine: Machine
    workload: Workload
    prefer: Literal["quality", "speed", "headroom"] = "quality"
    candidates: tuple[Candidate, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    ledger_hash: str | None = None
    digest: str = ""
    """SHA-256 of the rest of the plan; an edited plan is refused."""


# --------------------------------------------------------------------------- the run


class Evaluation(Struct, frozen=True):
    """Mean loss of the learned tokens of the held-out rows, after a step."""

    step: int
    loss: float


class Speculated(Struct, frozen=True, kw_only=True):
    """What became of drafted tokens. The pass over the prompt checks none and is left out."""

    drafted: int
    accepted: int
    passes: int
    acceptance_rate: float | None
    """Accepted of drafted; None where nothing was drafted."""
    tokens_per_pass: float | None
    """Each pass adds the tokens it accepts and one of its own."""


class RunReport(Struct, frozen=True, kw_only=True):
    """What a run did and measured. Null where a figure does not apply (no card, no training)."""

    schema: Literal["fitwright.run/1"] = RUN_SCHEMA
    task: Task
    status: Literal["finished", "interrupted", "failed"] = "finished"
    model: ModelRef
    plan_digest: str
    candidate: int
    """Rank of the candidate used."""
    skipped: tuple[str, ...] = ()
    """Candidates left before it and why."""
    engine: Engine
    device: str
    strategy: Strategy
    workload: Workload
    layers_resident: int
    layers_streamed: int = 0
    layers_on_disk: int = 0
    """Of the streamed ones, those that are read from disk for each pass."""
    slots: int = 0
    bytes_streamed: int = 0
    link_bytes_per_s: float | None = None
    """While the link was at work; so for the disk."""
    disk_bytes_read: int = 0
    disk_bytes_per_s: float | None = None
    load_bytes: int | None = None
    allocated_peak_bytes: int | None = None
    reserved_peak_bytes: int | None = None
    process_peak_bytes: int | None = None
    context_bytes: int | None = None
    managed_bytes: int | None = None
    host_peak_bytes: int | None = None
    pinned_bytes: int | None = None
    moments: dict[str, int] = {}
    """Allocated peak of each moment."""
    decode_tokens_per_s: float | None = None
    prefill_tokens_per_s: float | None = None
    train_tokens_per_s: float | None = None
    speculation: Speculated | None = None
    """Null without speculation."""
    steps: int | None = None
    resumed_from_step: int = 0
    losses: tuple[float, ...] = ()
    step_seconds: tuple[float, ...] = ()
    """Of each training step of this process, saving not counted."""
    evaluations: tuple[Evaluation, ...] = ()
    components: dict[str, int] = {}
    """Measured bytes where a component can be told apart (weights, adapters, gradients, optimizer)."""
    error: dict[str, float] = {}
    """measured / predicted - 1 for each predicted figure."""
    environment: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
