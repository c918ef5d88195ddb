"""Keep the libraries' own messages away from the user unless they are asked for with --debug.

Must run before torch, transformers or bitsandbytes are imported: some speak while they are imported.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings


def silence(debug: bool) -> None:
    """Telemetry off always; progress bars, warnings and log lines of libraries off unless `debug`."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if debug:
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.filterwarnings("ignore")
    for name in (
        "bitsandbytes",
        "accelerate",
        "peft",
        "torch",
        "trl",
        "datasets",
        "huggingface_hub",
        "liger_kernel",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    # bitsandbytes reports at warning level that optional CPU kernels are absent, while it is being imported
    logging.getLogger("bitsandbytes.backends").setLevel(logging.CRITICAL)


def silence_loaded(debug: bool) -> None:
    """The part that needs the libraries imported: their progress bars."""
    if debug:
        return
    with contextlib.suppress(ImportError):
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


def stay_offline() -> None:
    """From here on no library reaches for the network; the weights are on this machine."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    import sys

    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
