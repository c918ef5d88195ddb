"""One attempt: load one candidate, do its job, and measure both."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from executor import ui
from executor.card import Card, managed_bytes
from executor.device import check_abilities, choose_device, require_packages, torch_dtype
from executor.engines import Loaded, LoadRequest, find_engine
from executor.environment import describe
from executor.gauges import Gauges
from executor.infer import Generated, Generation, generate
from executor.inputs import Inputs
from executor.loading_progress import counting_tensors
from executor.measure import HostSampler, MomentMeter, held_bytes, resident_bytes
from executor.memory_errors import Shortage, shortage
from executor.options import RunOptions
from executor.output import OutputDirectory
from executor.quiet import silence_loaded
from executor.source import ModelSource
from executor.speculation.draft_model import Beside, Draft, find_draft, load_draft
from executor.stopping import StopRequest
from executor.vram_cap import VramCap
from planner.types import Candidate, Plan

if TYPE_CHECKING:
    import torch

    from executor.train import Trained


@dataclass
class Outcome:
    """What an attempt measured. Card figures are None on the CPU."""

    candidate: Candidate
    device: torch.device
    load_seconds: float = 0.0
    load_bytes: int | None = None
    allocated_peak_bytes: int | None = None
    reserved_peak_bytes: int | None = None
    process_peak_bytes: int | None = None
    context_bytes: int | None = None
    managed_bytes: int = 0
    host_peak_bytes: int | None = None
    host_base_bytes: int | None = None
    """The process with its libraries imported, before anything is loaded."""
    moments: dict[str, int] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    """Layers resident and streamed, slots, pinned bytes, traffic."""
    trained: Trained | None = None
    generated: Generated | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Attempt:
    """Carries one candidate out. Make it, `run` it once, throw it away."""

    def __init__(
        self,
        plan: Plan,
        candidate: Candidate,
        options: RunOptions,
        inputs: Inputs,
        source: ModelSource,
        output: OutputDirectory,
        card: Card,
        stop: StopRequest,
    ) -> None:
        self.plan, self.candidate, self.options, self.inputs = plan, candidate, options, inputs
        self.source, self.output, self.card, self.stop = source, output, card, stop
        self.meter: MomentMeter | None = None
        self._loaded: Loaded | None = None
        self._draft_source: ModelSource | None = None
        self._draft: Draft | None = None
        self._outcome: Outcome | None = None
        self._cap: VramCap | None = None
        self._process_peak = 0
        self._context: int | None = None

    def run(self) -> Outcome:
        """Load and work.

        Errors: those of the parts (exit 2 or 130); torch's out-of-memory error passes through for the
        caller to take the next candidate.
        """
        require_packages(self.candidate, self.plan.workload, self.options.report_to)
        load = find_engine(self.candidate.engine, self.options.resident_layers)
        device = choose_device(self.candidate)
        check_abilities(self.candidate, self.plan.workload, device)
        self._draft_source = find_draft(self.candidate.strategy, self.options)
        silence_loaded(self.options.debug)
        outcome = self._outcome = Outcome(self.candidate, device)
        self._open_card(device)
        self.meter = MomentMeter(device)
        gauges = Gauges(
            self.candidate,
            self.plan.workload,
            device,
            self.options.vram_cap_bytes,
            self.options.resident_layers,
        )
        sampler = HostSampler()
        outcome.host_base_bytes = sampler.peak_bytes
        try:
            with ui.watching(gauges):
                loaded = self._load(load, device, outcome)
                self._work(loaded, device, outcome)
        except BaseException:
            if self._loaded is not None:
                self._loaded.close()
            raise
        finally:
            outcome.host_peak_bytes = sampler.stop()
        self._close(loaded, device, outcome)
        self._loaded = None
        return outcome

    def shortage(self, error: BaseException) -> Shortage:
        """What was too small, after `run` ran out of memory; before `let_go`."""
        moment = self.meter.current if self.meter is not None else None
        device = self._outcome.device if self._outcome is not None else None
        allocated: int | None
        if device is not None and device.type == "cuda":
            import torch

            allocated = torch.cuda.memory_allocated(device)
        else:
            allocated = resident_bytes()
        held = held_bytes(self._loaded.model) if self._loaded is not None else {}
        if self._outcome is not None and self._outcome.load_bytes is not None and moment != "load":
            held["weights"] = self._outcome.load_bytes
        return shortage(error, self.plan, self.candidate, moment, allocated, held)

    def let_go(self) -> None:
        """Drop the model and everything measured on it."""
        self._loaded = self._draft = self._outcome = self._cap = None

    def _open_card(self, device: torch.device) -> None:
        if device.type != "cuda":
            if self.options.vram_cap_bytes is not None:
                from executor.errors import CannotHonour

                raise CannotHonour(
                    "--vram-cap is for a candidate that runs on a card; this one runs on the CPU"
                )
            return
        train = self.plan.workload.task == "train"
        self.card.open(device, torch_dtype(self.candidate.strategy.dtype), train)
        if self.options.vram_cap_bytes is not None:
            paged = sum(gpu.managed_bytes for gpu in self.candidate.estimate.gpus[:1])
            self._cap = VramCap(self.options.vram_cap_bytes, self.card, device, paged)

    def _load(self, load: Any, device: torch.device, outcome: Outcome) -> Loaded:
        import torch

        assert self.meter is not None
        self.meter.enter("load")
        began = time.monotonic()
        what = "making random weights for" if self.source.folder is None else "loading"
        text = f"{what} {self.plan.model.id} ({self.candidate.strategy.quant}, {device})"
        with ui.Steps(text) as steps, counting_tensors(steps):
            loaded: Loaded = load(
                LoadRequest(
                    source=self.source,
                    candidate=self.candidate,
                    workload=self.plan.workload,
                    device=device,
                    scratch=self.output.partial / "offload",
                    seed=self.options.seed,
                    remote_code=self.options.trust_remote_code,
                    resident_layers=self.options.resident_layers,
                    pack=self.options.pack,
                )
            )
            self._loaded = loaded
            if self._draft_source is not None:
                beside, strategy = Beside(self.source.config, loaded.tokenizer), self.candidate.strategy
                self._draft = load_draft(self._draft_source, strategy, device, self.options, beside)
        outcome.load_seconds = time.monotonic() - began
        outcome.notes += loaded.notes
        self.meter.leave()
        if device.type == "cuda":
            outcome.load_bytes = torch.cuda.memory_allocated(device)
        self._look()
        return loaded

    def _work(self, loaded: Loaded, device: torch.device, outcome: Outcome) -> None:
        common: dict[str, Any] = {
            "loaded": loaded,
            "workload": self.plan.workload,
            "strategy": self.candidate.strategy,
            "options": self.options,
            "output": self.output,
            "device": device,
            "meter": self.meter,
            "stop": self.stop,
        }
        if self.plan.workload.task == "train":
            from executor.train import Training, train

            outcome.trained = train(Training(**common, rows=self.inputs.rows, after_first_step=self._look))
            outcome.managed_bytes = outcome.trained.record.managed_bytes
            outcome.notes += outcome.trained.notes
        else:
            outcome.generated = generate(
                Generation(
                    **common,
                    prompts=self.inputs.prompts,
                    draft=self._draft,
                    facts=self.source.config,
                    after_first_batch=self._look,
                )
            )
            outcome.notes += outcome.generated.notes

    def _look(self) -> None:
        """Read the card's own figures while the run goes on; the context grows as kernels are loaded."""
        process = self.card.process_bytes() if self.card.device is not None else None
        if process is None:
            return
        self._process_peak = max(self._process_peak, process)
        managed = managed_bytes()
        if managed == 0:
            self._context = max(self._context or 0, self.card.context_bytes() or 0)
        if self._cap is not None:
            self._cap.tighten(managed)

    def _close(self, loaded: Loaded, device: torch.device, outcome: Outcome) -> None:
        assert self.meter is not None
        self.meter.leave()
        self._look()
        traffic = loaded.traffic()
        outcome.engine = {
            "layers_resident": loaded.layers_resident,
            "layers_streamed": loaded.layers_streamed,
            "layers_on_disk": loaded.layers_on_disk,
            "slots": loaded.slots,
            "pinned_bytes": loaded.pinned_bytes,
            "bytes_streamed": traffic.get("bytes_streamed", 0),
            "link_bytes_per_s": traffic.get("link_bytes_per_s"),
            "disk_bytes_read": traffic.get("disk_bytes_read", 0),
            "disk_bytes_per_s": traffic.get("disk_bytes_per_s"),
        }
        outcome.environment = describe(device)
        outcome.moments = dict(self.meter.moments)
        if device.type == "cuda":
            outcome.allocated_peak_bytes = self.meter.peak_bytes()
            outcome.reserved_peak_bytes = self.meter.reserved_peak_bytes
            outcome.context_bytes = self._context
            known = outcome.reserved_peak_bytes + (self._context or 0)
            outcome.process_peak_bytes = max(self._process_peak, known)
            # the card is read now and then; the allocator's own peak may lie in between
            basis = self.card.basis if self._process_peak >= known else "reserved + context"
            outcome.environment["process_bytes_basis"] = basis
            if self._cap is not None:
                outcome.notes.append(
                    self._cap.note(outcome.reserved_peak_bytes, self._context or 0, outcome.managed_bytes)
                )
        loaded.close()
