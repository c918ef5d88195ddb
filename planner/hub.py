"""Facts of a model on the Hugging Face Hub: its config.json and the parameter count of its safetensors.

Nothing else is fetched: no weights, no code. A machine without network is told so at once instead of after
the client's retries, hence the probe of the connection before the client is imported.
"""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from msgspec import Struct

from planner.errors import FitwrightError, UnknownModel

PROBE_SECONDS = 1.2
REQUEST_SECONDS = 10
_TRUE = {"1", "on", "yes", "true"}


class HubModel(Struct, frozen=True):
    """What the Hub says about a model."""

    repo_id: str
    revision: str | None
    """Commit the facts were read at."""
    config_path: Path
    """config.json in the Hub's own cache."""
    parameters: int | None
    """Elements in the safetensors headers; None if the repository has none."""


def fetch(repo_id: str, *, offline: bool = False) -> HubModel:
    """Facts of `repo_id` from the Hub, or from its local cache when offline.

    Errors: `UnknownModel` if there is no such model (or nothing cached and offline), `FitwrightError` for a
    gated model or no network.
    """
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE
    if offline:
        return _cached(repo_id, "offline")
    if not _reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co")):
        return _cached(repo_id, "the Hugging Face Hub cannot be reached")
    return _ask(repo_id)


def _reachable(endpoint: str) -> bool:
    """Whether something listens at the endpoint, or at the proxy in front of it, within `PROBE_SECONDS`."""
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    url = urlsplit(proxy or endpoint)
    answers: list[bool] = []

    def connect() -> None:
        try:
            address = (url.hostname or "", url.port or (80 if url.scheme == "http" else 443))
            socket.create_connection(address, timeout=PROBE_SECONDS).close()
        except (OSError, ValueError):
            return
        answers.append(True)

    # Name resolution has no time limit of its own, so it is left behind in a thread.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return bool(answers)


def _cached(repo_id: str, why: str) -> HubModel:
    """The newest config.json in the Hub's local cache, read without the client."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    folder = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{repo_id.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text().strip()
        path = folder / "snapshots" / revision / "config.json"
        known = path.is_file()
    except OSError:
        known = False
    if not known:
        raise UnknownModel(
            f"{repo_id} is neither in the catalogue nor in the local Hub cache ({why})",
            "give a folder with its config.json, or a catalogue id: `planner models`",
        )
    return HubModel(repo_id, revision, path, None)


def _ask(repo_id: str) -> HubModel:
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        info: Any = hub.HfApi().model_info(repo_id, expand=["sha", "safetensors"], timeout=REQUEST_SECONDS)
        path = hub.hf_hub_download(repo_id, "config.json", revision=info.sha, etag_timeout=REQUEST_SECONDS)
    except errors.GatedRepoError:
        raise FitwrightError(
            f"{repo_id} is gated on the Hub", "accept its licence there and log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UnknownModel(
            f"no model {repo_id}: neither in the catalogue nor on the Hub",
            "list the catalogue with `planner models`",
        ) from None
    except errors.EntryNotFoundError:
        raise FitwrightError(
            f"{repo_id} has no config.json on the Hub", "only transformers checkpoints work"
        ) from None
    except Exception as error:
        # The client raises whatever its HTTP library does; all of it means the same to the user.
        raise FitwrightError(
            f"the Hub did not answer for {repo_id}: {error}", "try again, or give a folder"
        ) from error
    headers = getattr(info, "safetensors", None)
    return HubModel(repo_id, info.sha, Path(path), getattr(headers, "total", None))
