"""What generation and training share: one loaded candidate, the job, and what watches over both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from executor.engines import Loaded
from executor.measure import MomentMeter
from executor.options import RunOptions
from executor.output import OutputDirectory
from executor.stopping import StopRequest
from planner.types import Strategy, Workload

if TYPE_CHECKING:
    import torch

Look = Callable[[], None]
"""Called once the first step or batch is done, when every kernel has been loaded."""


@dataclass(kw_only=True)
class Task:
    """One loaded candidate and the job it is to do."""

    loaded: Loaded
    workload: Workload
    strategy: Strategy
    options: RunOptions
    output: OutputDirectory
    device: torch.device
    meter: MomentMeter
    stop: StopRequest
