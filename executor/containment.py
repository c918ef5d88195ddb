"""Nothing a plan or a model folder says makes the executor read outside that folder.

Checked before a library opens anything: links among the model's files, names of other files inside its JSON
files, and what a plan calls a repository or a revision.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from executor.errors import BadPlan, BadWeights
from executor.weights import INDEX, SINGLE
from planner.types import PlanModel

_TOKENIZER_FILES = ("vocab_file", "merges_file", "tokenizer_file", "spm_file", "fast_tokenizer_files")
"""Fields of tokenizer_config.json that some releases of transformers open as files."""
_REPO = re.compile(r"[\w.-]+(/[\w.-]+)?")
_REVISION = re.compile(r"\w[\w./-]*")


def refuse_strange_names(model: PlanModel) -> None:
    """Errors: `BadPlan` when repository or revision of a plan are no names of such things but paths."""
    for what, name, form in (("repository", model.repo_id, _REPO), ("revision", model.revision, _REVISION)):
        if name is not None and (not form.fullmatch(name) or ".." in name or len(name) > 200):
            raise BadPlan(f"the plan names the {what} {name[:80]!r}", "make the plan again")


def refuse_way_out(folder: Path) -> None:
    """Errors: `BadWeights` naming what leads out of a model's folder, or is a pipe that nobody may fill."""
    home = folder.resolve()
    # the Hub's cache keeps one folder of contents for all revisions of a repository, and links into it
    allowed = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    for path in _files(folder):
        if path.is_symlink() and not any(_leads_into(path, place) for place in allowed):
            raise BadWeights(
                f"{path} is a link to a file outside the model's folder, or to none",
                "put the file itself there, or make the plan with the folder where the files are",
            )
        if not path.is_file() and not path.is_dir() and not path.is_symlink():
            raise BadWeights(f"{path} is neither file nor folder", "take it out of the model's folder")
    for name in _names_in(folder / "tokenizer_config.json", _TOKENIZER_FILES):
        # published tokenizers often tell where they once lay; what is not there cannot be read
        there = folder / name
        if _exists(there) and not there.resolve().is_relative_to(home):
            raise BadWeights(
                f"{folder / 'tokenizer_config.json'} names a file outside its folder: {name[:100]!r}"
            )
    _refuse_other_weights(folder)
    for name in _code(folder / "config.json", folder / "tokenizer_config.json"):
        module = name.rpartition("--")[2]
        if "/" in module or "\\" in module or ".." in module:
            raise BadWeights(f"{folder / 'config.json'} names code outside its folder: {name[:100]!r}")


def _leads_into(link: Path, place: Path) -> bool:
    try:
        return link.resolve().is_relative_to(place) and link.exists()
    except (OSError, RuntimeError):  # a circle of links: RuntimeError until Python 3.12, left as it is since
        return False


def _refuse_other_weights(folder: Path) -> None:
    """The loader of transformers follows these to weights that nobody has checked."""
    named = _read(folder / "config.json").get("transformers_weights")
    if named not in (None, SINGLE, INDEX):
        raise BadWeights(
            f"{folder / 'config.json'} names its weights {str(named)[:100]!r}",
            f"only {SINGLE} and {INDEX} are read; take transformers_weights out",
        )
    if (folder / "adapter_config.json").exists():
        raise BadWeights(
            f"{folder} holds an adapter (adapter_config.json), which loading would put into the model",
            "plan with the base model's folder, or with what `executor merge` makes of the two",
        )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _files(folder: Path) -> Iterator[Path]:
    yield from folder.iterdir()
    templates = folder / "additional_chat_templates"
    if templates.is_dir():
        yield from templates.iterdir()


def _names_in(file: Path, fields: tuple[str, ...]) -> Iterator[str]:
    content = _read(file)
    for field in fields:
        value = content.get(field)
        yield from (v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str) and v)


def _code(*files: Path) -> Iterator[str]:
    for file in files:
        found = _read(file).get("auto_map")
        values = found.values() if isinstance(found, dict) else ()
        for value in values:
            yield from (v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str))


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}  # what reads it for good says what is wrong with it
    return content if isinstance(content, dict) else {}
