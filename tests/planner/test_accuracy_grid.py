"""The committed grid: ids and halves follow from the cells, as wide as it says, predicted whole."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from benchmarks.accuracy.cells import PREDICTIONS, identified, model_of, predict, read_cells, read_lines
from planner.errors import FitwrightError
from planner.memory.optimizer import OPTIMIZERS

CELLS = read_cells()
PREDICTED = {row["id"]: row for row in read_lines(PREDICTIONS) if "id" in row}


def test_ids_and_halves_are_chosen_by_nobody():
    again = [identified(msgspec.structs.replace(cell, id="", half="fit")) for cell in CELLS]
    assert [(c.id, c.half) for c in again] == [(c.id, c.half) for c in CELLS]
    assert len({cell.id for cell in CELLS}) == len(CELLS)
    halves = Counter(cell.half for cell in CELLS)
    assert min(halves.values()) >= 0.4 * len(CELLS)


def test_cells_that_are_there_stay_and_only_models_that_lack_are_drawn():
    from benchmarks.accuracy.grid import grid

    there = [cell for cell in CELLS if cell.model != "opt-1.3b"]
    again = list(grid(there))
    assert again[: len(there)] == there
    assert {cell.model for cell in again[len(there) :]} == {"opt-1.3b"}


def test_grid_is_as_wide_as_it_says():
    assert len(CELLS) >= 200
    assert len({model_of(cell.model).config["model_type"] for cell in CELLS}) >= 20
    wanted = {
        "optimizer": set(OPTIMIZERS),
        "quant": {"none", "nf4", "int8"},
        "cache": {"dynamic", "static", "offloaded", "quantized"},
        "attention": {"sdpa", "eager"},
        "placement": {"full_gpu", "mixed_offload", "disk_offload"},
        "loss": {"full", "fused"},
        "kernels": {"torch", "liger"},
        "upcast_frozen": {False, True},
        "gradient_checkpointing": {False, True},
    }
    for name, values in wanted.items():
        assert values <= {getattr(cell.strategy, name) for cell in CELLS}, name
    assert {cell.data for cell in CELLS} == {"random", "ragged", "packed"}
    jobs = [cell.workload for cell in CELLS]
    assert {"lora", "dora", "rslora"} <= {job.lora_variant for job in jobs}
    assert {1, 2, 4, 8, 16} <= {job.batch_size for job in jobs}
    assert max(job.prompt_tokens for job in jobs) >= 32768 and max(job.seq_len for job in jobs) >= 16384


def test_every_cell_was_predicted_before_it_is_measured():
    assert PREDICTED.keys() == {cell.id for cell in CELLS}


@pytest.mark.parametrize("cell", CELLS[:: len(CELLS) // 12], ids=lambda cell: cell.id)
def test_every_cell_can_still_be_predicted(cell):
    try:
        assert predict(cell).gpus[0].allocated_peak_bytes > 0
    except FitwrightError:
        assert "refused" in PREDICTED[cell.id]
