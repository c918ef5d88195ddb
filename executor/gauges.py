"""Memory of card and process while a run goes on, beside what was predicted, for the live view."""

from __future__ import annotations

from typing import TYPE_CHECKING

from executor.measure import resident_bytes
from executor.predicted_lines import is_estimated
from planner.types import Candidate, Speed, Workload
from planner.units import format_bytes

if TYPE_CHECKING:
    import torch


class Gauges:
    """Reads the allocator's books and /proc; never the card, never a lock that the work holds for long."""

    def __init__(
        self,
        candidate: Candidate,
        workload: Workload,
        device: torch.device,
        cap_bytes: int | None,
        resident_layers: int | None = None,
    ) -> None:
        """`resident_layers`: as the command line names them."""
        self._device, self._cap = device, cap_bytes
        known = is_estimated(candidate, resident_layers)
        gpus = candidate.estimate.gpus if known else ()
        self._peak = gpus[0].allocated_peak_bytes if gpus else None
        self._ram = (candidate.estimate.host.ram_bytes or None) if known else None
        speed = candidate.speed if known else Speed()
        rate = speed.train_tokens_per_s if workload.task == "train" else speed.decode_tokens_per_s
        self.tokens_per_s = rate.typical if rate is not None else None
        """Predicted speed of the job."""

    def pieces(self) -> list[str]:
        """Card and RAM as short texts; what cannot be read is left out."""
        return [*self._card(), *self._host()]

    def _card(self) -> list[str]:
        if self._device.type != "cuda":
            return []
        import torch

        books = torch.cuda.memory_stats_as_nested_dict(self._device)
        if not books:
            return []
        allocated, reserved = (
            books[name]["all"]["current"] for name in ("allocated_bytes", "reserved_bytes")
        )
        total = self._cap or torch.cuda.get_device_properties(self._device).total_memory
        room = "cap" if self._cap else "card"
        peak = [f"predicted peak {format_bytes(self._peak)}"] if self._peak else []
        return [
            f"{format_bytes(allocated)} allocated",
            f"{format_bytes(reserved)} reserved of {format_bytes(total)} {room}",
            *peak,
        ]

    def _host(self) -> list[str]:
        resident = resident_bytes()
        if resident is None:
            return []
        predicted = f" of {format_bytes(self._ram)} predicted" if self._ram else ""
        return [f"RAM {format_bytes(resident)}{predicted}"]
