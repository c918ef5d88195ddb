"""Where a run's weights are: the plan's path, else the Hub cache, else a download said beforehand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from executor import ui
from executor.containment import refuse_strange_names, refuse_way_out
from executor.errors import BadWeights
from executor.quiet import stay_offline
from executor.weights import check_weights, read_headers, refuse_packed_numbers
from planner.resolve import ResolvedModel
from planner.types import PlanModel
from planner.units import format_bytes

WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]
CODE = ["*.py"]


@dataclass(frozen=True)
class ModelSource:
    """A folder with config.json, weights and tokenizer; `folder` is None when weights are made, not read."""

    folder: Path | None
    config: dict[str, Any]
    bytes: int = 0
    """Bytes of the weight files."""


def plan_model(named: ResolvedModel) -> PlanModel:
    """A model that was named on the command line, or as a draft, as a plan holds it."""
    return PlanModel(
        id=named.profile.id,
        parameters=named.profile.parameters,
        repo_id=named.repo_id,
        revision=named.revision,
        path=named.path,
        config=named.profile.config,
    )


def find_weights(model: PlanModel, offline: bool, remote_code: bool = False) -> ModelSource:
    """The model's folder with its weights, checked to be whole.

    Errors: `BadWeights` when they are nowhere, incomplete, or do not fit on the disk.
    """
    refuse_strange_names(model)
    if model.path is not None:
        folder = Path(model.path)
        folder = folder.parent if _is(folder, Path.is_file) else folder
        if not _is(folder, Path.is_dir):
            raise BadWeights(
                f"the plan's model folder {str(folder)[:200]} is not there",
                "make the plan again where the model is",
            )
    elif model.repo_id is not None:
        folder = _from_hub(model.repo_id, model.revision, offline, remote_code)
    else:
        raise BadWeights(
            f"the plan names no weights for {model.id}", "`executor rehearse` runs it with random weights"
        )
    refuse_way_out(folder)
    config = _refuse_other_model(folder, model)
    size = check_weights(folder)
    if not config.get("quantization_config"):
        refuse_packed_numbers(folder, read_headers(folder))
    stay_offline()
    return ModelSource(folder, dict(model.config), size)


def _is(path: Path, what: Callable[[Path], bool]) -> bool:
    """A name that no file system takes is neither file nor folder."""
    try:
        return what(path)
    except OSError:
        return False


def _refuse_other_model(folder: Path, model: PlanModel) -> dict[str, Any]:
    """The plan's numbers hold for the facts it was made from; weights of another shape are another job."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise BadWeights(f"cannot read {folder / 'config.json'}", "download the model again")
    for name, planned in model.config.items():
        found = config.get(name, planned)
        if type(planned) is int and found != planned:
            raise BadWeights(
                f"{folder} is another model than the plan's: {name} is {found}, planned was {planned}",
                "make the plan again",
            )
    return config


def without_weights(model: PlanModel) -> ModelSource:
    """For `rehearse`: the config facts of the plan alone."""
    stay_offline()
    if not model.config:
        raise BadWeights("the plan holds no config facts to build the model from", "make the plan again")
    return ModelSource(None, dict(model.config))


def _from_hub(repo_id: str, revision: str | None, offline: bool, remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = WANTED + (CODE if remote_code else [])
    try:
        cached = Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=patterns, local_files_only=True)
        )
        check_weights(cached)
        return cached
    except (LocalEntryNotFoundError, BadWeights, ValueError):
        pass
    if offline:
        raise BadWeights(
            f"the weights of {repo_id} are not on this machine and --offline was given",
            "run once without --offline, or rehearse with random weights",
        )
    try:
        return _download(repo_id, revision, patterns)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise BadWeights(
            f"cannot download {repo_id}: {reason}",
            "check network and name; `hf auth login` for gated models; or rehearse with random weights",
        ) from None


def _download(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    from fnmatch import fnmatch

    from huggingface_hub import HfApi, constants, snapshot_download

    info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
    wanted = [f for f in info.siblings or () if any(fnmatch(f.rfilename, p) for p in patterns)]
    if not any(f.rfilename.endswith(".safetensors") for f in wanted):
        raise BadWeights(f"{repo_id} has no safetensors weights", "only safetensors are loaded")
    size = sum(f.size or 0 for f in wanted)
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if size > free:
        raise BadWeights(
            f"{repo_id} takes {format_bytes(size)} and {cache} has {format_bytes(free)} free",
            "free some space, or set HF_HOME to a larger disk",
        )
    ui.say(f"downloading {repo_id}: {format_bytes(size)} to {cache} ({format_bytes(free)} free)")
    return Path(snapshot_download(repo_id, revision=info.sha, allow_patterns=patterns))
