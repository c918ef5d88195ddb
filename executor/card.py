"""What a process takes of its card: the allocator's books, the context beside them, managed memory.

process = reserved + context + managed. The context (driver structures, loaded kernels, library handles) is on
nobody's books; it is what NVML counts for this process beyond what the allocator reserved.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Card:
    """One CUDA device as NVML sees it.

    Make it before the first CUDA call of the process: where NVML cannot tell this process from others (some
    containers), the context is the growth of the card's use since then.
    """

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        self._used_before: dict[str, int] = {}
        """Bytes in use on each card by its uuid, before this process had a context there."""
        self._before = 0
        self.device: torch.device | None = None
        self.basis = "unknown"
        """How the process figure was read: nvml_process, nvml_card or unknown."""
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            for i in range(pynvml.nvmlDeviceGetCount()):
                handle = pynvml.nvmlDeviceGetHandleByIndex(i)
                self._used_before[_text(pynvml.nvmlDeviceGetUUID(handle))] = self._used(handle)
        except Exception:  # no driver, no NVML, no permission: nothing can be read, and nothing is claimed
            self._nvml = None

    def open(self, device: torch.device, dtype: torch.dtype, train: bool) -> None:
        """Create the context of `device` and load the libraries a run of this kind uses."""
        import torch

        self.device = device
        _settle_libraries(train)
        torch.cuda.init()
        # Trainer, accelerate and bitsandbytes take the current card where nobody tells them another
        torch.cuda.set_device(device)
        _warm_up(device, dtype, train)
        if self._nvml is not None:
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._before = self._used_before.get(uuid, 0)
            for i in range(self._nvml.nvmlDeviceGetCount()):
                handle = self._nvml.nvmlDeviceGetHandleByIndex(i)
                if _text(self._nvml.nvmlDeviceGetUUID(handle)) == uuid:
                    self._handle = handle

    def process_bytes(self) -> int | None:
        """Bytes of the card that this process holds now, context and resident managed memory included."""
        if self._handle is None:
            return None
        own = [p for p in self._processes() if p.pid == os.getpid() and p.usedGpuMemory]
        if own:
            self.basis = "nvml_process"
            return int(own[0].usedGpuMemory)
        self.basis = "nvml_card"
        return self._used(self._handle) - self._before

    def context_bytes(self) -> int | None:
        """Bytes beside the allocator. Read it while no managed memory is in use: NVML counts that in too."""
        import torch

        process = self.process_bytes()
        return None if process is None else max(0, process - torch.cuda.memory_reserved(self.device))

    def _processes(self) -> list[Any]:
        try:
            return list(self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle))
        except self._nvml.NVMLError:
            return []

    def _used(self, handle: Any) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(handle).used)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _allocator_settings() -> list[str]:
    """What the user's environment tells torch's allocator."""
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    return [os.environ[name] for name in names if name in os.environ]


def expandable_segments() -> bool:
    """Does the allocator grow its segments page by page: by our own setting, or by the user's?"""
    given = _allocator_settings()
    return not given or any("expandable_segments:true" in text.lower() for text in given)


def _settle_libraries(train: bool) -> None:
    """Settings of torch that make the most of a card; the user's own environment wins.

    Expandable segments leave no holes between blocks, so that a run needs hardly more than its tensors
    (without them the smallest working cap of the same run lies 1 to 20 % above its allocated peak).
    cuDNN's attention builds a plan for every new length of the cache, about a millisecond a layer and
    token: decoding Qwen2.5-7B on an H200 runs at 27 tokens/s with it and at 73 without. Nor are its results
    the same from run to run (benchmarks/streaming/repeats.py).
    """
    import torch

    if not _allocator_settings():
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    if not train:
        torch.backends.cuda.enable_cudnn_sdp(False)


def _warm_up(device: torch.device, dtype: torch.dtype, train: bool) -> None:
    """Load cuBLAS and the common kernels, then give the allocator's memory back.

    Backward kernels and the autograd thread's library handle cost a generation context it never needs.
    """
    import torch

    a = torch.zeros(64, 64, dtype=dtype, device=device, requires_grad=train)
    q = torch.zeros(1, 2, 16, 64, dtype=dtype, device=device)
    with torch.set_grad_enabled(train):
        total = (a @ a).float().softmax(-1).sum()
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    if train:
        total.backward()
    torch.cuda.synchronize(device)
    del a, q, total
    # cuBLAS' workspaces are the allocator's memory too: a run allocates its own where a plain script would
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def managed_bytes() -> int:
    """Managed (paged) memory that bitsandbytes' paged optimizers hold."""
    import sys

    functional = sys.modules.get("bitsandbytes.functional")
    if functional is None:
        return 0
    pages = functional.GlobalPageManager.get_instance().paged_tensors
    return sum(page.numel() * page.element_size() for page in pages)
