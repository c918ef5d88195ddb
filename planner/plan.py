"""plan.json: made, written, read back and trusted.

Same inputs give the same bytes: fields stand in the order of their types, keys of maps are sorted, there are
no timestamps. `digest` is the SHA-256 of everything else as canonical JSON (sorted keys, no spaces), so a
plan that was edited is refused while one that was only laid out anew is not.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from planner.errors import BadPlan
from planner.estimate import estimate as estimate_job
from planner.files import write_atomically
from planner.search import Estimator, search
from planner.strategies import Prefer
from planner.types import PLAN_SCHEMA, Machine, Plan, PlanModel, Stack, Workload
from profiles.schema import ModelProfile

LARGEST_PLAN_BYTES = 64 * 2**20
_AGAIN = "make it again with `planner plan`"


def make_plan(
    model: ModelProfile,
    machine: Machine,
    workload: Workload,
    *,
    pinned: Mapping[str, Any] | None = None,
    prefer: Prefer = "quality",
    repo_id: str | None = None,
    revision: str | None = None,
    path: str | None = None,
    stack: Stack | None = None,
    ledger_hash: str | None = None,
    estimator: Estimator = estimate_job,
) -> Plan:
    """The ranked plan of a job: candidates that fit, and why the others lost.

    `pinned`: fields of `Strategy` the user fixed. Without candidates, the rejections say what would fit.
    Errors: `BadOption` when what is fixed excludes itself.
    """
    found = search(model, machine, workload, pinned=pinned, prefer=prefer, stack=stack, estimator=estimator)
    plan = Plan(
        model=PlanModel(
            id=model.id,
            parameters=model.parameters,
            repo_id=repo_id,
            revision=revision,
            path=path,
            config_hash=hashlib.sha256(canonical(model.config)).hexdigest(),
            config=model.config,
        ),
        stack=found.stack,
        machine=machine,
        workload=workload,
        prefer=prefer,
        candidates=found.candidates,
        rejected=found.rejected,
        ledger_hash=ledger_hash,
    )
    return replace(plan, digest=digest_of(msgspec.to_builtins(plan)))


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces."""
    return msgspec.json.encode(value, order="sorted")


def digest_of(fields: Mapping[str, Any]) -> str:
    """SHA-256 of a plan without its digest."""
    rest = {name: value for name, value in fields.items() if name != "digest"}
    return hashlib.sha256(canonical(rest)).hexdigest()


def plan_bytes(plan: Plan) -> bytes:
    """A plan as its file holds it."""
    return msgspec.json.format(msgspec.json.encode(plan, order="deterministic"), indent=2) + b"\n"


def write_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan; a kill at any moment leaves the old file or the new one.

    Errors: `OSError` where the folder cannot be written.
    """
    write_atomically(Path(path), plan_bytes(plan))


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in a file, checked against its digest.

    Errors: `BadPlan`, in one line, for a file that is missing, no file, too large, no JSON, of another
    version, edited, or has a field of the wrong type.
    """
    raw = _read(Path(path))
    try:
        fields = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _bad(path, f"is no JSON: {_cause(error)}") from None
    _check_schema(path, fields)
    try:
        plan = msgspec.json.decode(raw, type=Plan)
        digest = digest_of(fields)
    except (msgspec.MsgspecError, OverflowError, RecursionError, UnicodeError) as error:
        raise _bad(path, f"is no plan: {_cause(error)}") from None
    if plan.digest != digest:
        raise BadPlan(f"{path} was changed after it was made", _AGAIN)
    return plan


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _bad(path, "is no file")
            raw = file.read(LARGEST_PLAN_BYTES + 1)
    except FileNotFoundError:
        raise BadPlan(f"no such plan: {path}", "make one with `planner plan MODEL -o plan.json`") from None
    except IsADirectoryError:
        raise _bad(path, "is a folder") from None
    except (OSError, ValueError) as error:
        raise BadPlan(f"cannot read {str(path)[:200]!a}: {_cause(error)}") from None
    if len(raw) > LARGEST_PLAN_BYTES:
        raise _bad(path, f"is larger than {LARGEST_PLAN_BYTES >> 20} MiB")
    if not raw.strip():
        raise _bad(path, "is empty")
    return raw


def _without_waiting(path: str, flags: int) -> int:
    # A pipe without a writer would block for ever.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_schema(path: str | os.PathLike[str], fields: Any) -> None:
    name, _, _ = PLAN_SCHEMA.partition("/")
    schema = fields.get("schema") if isinstance(fields, dict) else None
    if not isinstance(schema, str) or schema.partition("/")[0] != name:
        raise _bad(path, f"is no plan: its schema is not {PLAN_SCHEMA}")
    if schema != PLAN_SCHEMA:
        raise _bad(path, f"was made by another version: {schema[:60]!r}, and this reads {PLAN_SCHEMA}")


def _cause(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200]


def _bad(path: str | os.PathLike[str], what: str) -> BadPlan:
    return BadPlan(f"{str(path)[:200]} {what}", _AGAIN)
