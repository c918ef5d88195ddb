"""Which slab file a load takes its weights from, if any; with --pack it is made first."""

from __future__ import annotations

from executor import ui
from executor.engines import LoadRequest
from executor.streaming.pack import PackJob, pack
from executor.streaming.recipe import recipe_of
from executor.streaming.slab_file import SlabFile
from executor.streaming.slab_places import any_there, find_slab_file, place_for


def slab_file_for(request: LoadRequest) -> tuple[SlabFile | None, list[str]]:
    """The slab file of the request's weights and precision, and what the report says of files.

    Errors: `BadWeights` naming a file that is damaged or cut short; with --pack those are written anew, and
    the errors are those of packing.
    """
    source, strategy = request.source, request.candidate.strategy
    if not request.pack and not any_there(source, strategy):
        return None, []
    recipe = recipe_of(source, strategy, request.device.type, request.seed)
    found, notes = find_slab_file(source, strategy, recipe, replace=request.pack)
    if found is None and request.pack:
        for note in notes:
            ui.say(f"note: {note}")
        name = source.folder.name if source.folder is not None else "random weights"
        path = place_for(source, strategy)
        job = PackJob(name, source, strategy, request.device, recipe, path, request.seed, request.remote_code)
        written = pack(job, shown=False)
        found, notes = SlabFile.open(path), [f"slab file {path} packed in {written.seconds:.1f} s"]
    return found, [*notes, *([f"loaded from slab file {found.path}"] if found else [])]
