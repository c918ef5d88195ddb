"""Errors of a run. Each prints as one `error:` line and, where there is one, a `hint:` line.

FitwrightError (planner)   exit 2
├── BadOption              from the planner: options that exclude each other
├── BadPlan                from the planner: a plan that cannot be trusted
├── BadDataset             a row of a dataset or prompt file, named by its line
├── BadWeights             missing, truncated or foreign weights, named by tensor and file
├── CannotHonour           the candidate asks for what cannot be done here; nothing is put in its place
├── CannotWrite            a disk is full, read-only or broken; what was saved before is kept
├── DirectoryInUse         another run holds the output directory, or it belongs to another plan
├── OutOfMemory            exit 3: every candidate ran out
└── Interrupted            exit 130: ctrl-C or SIGTERM, after what could be saved was saved
"""

from __future__ import annotations

from planner.errors import BadOption, BadPlan, FitwrightError

__all__ = [
    "BadDataset",
    "BadOption",
    "BadPlan",
    "BadWeights",
    "CannotHonour",
    "CannotWrite",
    "DirectoryInUse",
    "FitwrightError",
    "Interrupted",
    "MissingPackage",
    "OutOfMemory",
]


class BadDataset(FitwrightError):
    """A dataset or prompt file that cannot be read; the message names file and line."""


class BadWeights(FitwrightError):
    """Weights that are missing, cut short, or not safetensors."""


class CannotHonour(FitwrightError):
    """What the candidate or the command line asks for cannot be done on this machine."""


class CannotWrite(FitwrightError):
    """A file of the run could not be written: no space, no permission, a broken disk."""


class DirectoryInUse(FitwrightError):
    """The output directory is locked by another run or holds another plan's run."""


class MissingPackage(FitwrightError):
    """A library of the executor extra is not installed."""


class OutOfMemory(FitwrightError):
    """Every candidate tried ran out of memory."""

    exit_code = 3


class Interrupted(FitwrightError):
    """The user stopped the run."""

    exit_code = 130
