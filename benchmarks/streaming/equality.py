"""Engine stream beside engine resident on the first card: logits and gradients, bit by bit.

    python benchmarks/streaming/equality.py [--model qwen2.5-0.5b]

Random weights in the real shapes. Every precision, no and half of the layers resident, prefill and decode;
gradients of LoRA adapters without checkpointing, reentrant and non-reentrant. Then with embeddings in RAM and
the output projection in blocks of the vocabulary (beside the same blocks of a resident one), and with
checkpoints in RAM. Prints a JSON line a case; exit code 1 if one differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402  after the workspace is set

from executor.activation_offload import offloading  # noqa: E402
from executor.engines import LoadRequest, resident, stream  # noqa: E402
from executor.losses import chunked_loss  # noqa: E402
from executor.source import ModelSource  # noqa: E402
from executor.streaming.head import BlockedLinear  # noqa: E402
from planner.estimate import estimate  # noqa: E402
from planner.exact.adapters import add_adapters  # noqa: E402
from planner.exact.vocabulary import blocks_of  # noqa: E402
from planner.machine import machine_from_gpus  # noqa: E402
from planner.types import Candidate, Quant, Strategy, Workload  # noqa: E402
from profiles.catalogue import load_model  # noqa: E402
from profiles.hardware import load_gpu  # noqa: E402

torch.backends.cuda.enable_cudnn_sdp(False)  # as the executor does; its results change from run to run
DEVICE = torch.device("cuda", 0)
QUANTS: tuple[Quant, ...] = ("none", "nf4", "int8")
MODES = ("none", "reentrant", "non-reentrant")
OUTSIDE = ("model.embed_tokens", "lm_head")
"""Modules that are no layers; tied in the model compared."""


def main() -> int:
    """Compare everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-0.5b")
    model = parser.parse_args().model
    torch.use_deterministic_algorithms(True, warn_only=True)
    layers = load_model(model).config["num_hidden_layers"]
    differ = 0
    for quant in QUANTS:
        want = logits(load(resident, model, quant, None))
        for kept in (0, layers // 2):
            differ += report("logits", quant, kept, want, logits(load(stream, model, quant, kept)))
        for mode in MODES:
            want = gradients(resident, model, quant, None, mode)
            got = gradients(stream, model, quant, 0, mode)
            differ += report(f"gradients, checkpointing {mode}", quant, 0, want, got)
    return int(differ + parts(model, layers) > 0)


def parts(model: str, layers: int) -> int:
    """Weights outside the layers in RAM, and checkpoints in RAM; how many comparisons differ."""
    differ = 0
    want = logits(in_blocks(load(resident, model, "nf4", None)))
    plain = logits(load(resident, model, "nf4", None))
    # other kernels may sum in another order: told, and not counted
    report("logits, blocks of a resident head beside the whole", "nf4", layers, plain, want)
    for kept in (0, layers):
        got = logits(load(stream, model, "nf4", kept, OUTSIDE))
        differ += report("logits, head in blocks", "nf4", kept, want, got)
    mode = "non-reentrant"
    want = gradients(resident, model, "nf4", None, mode, fused=True)
    for kept in (0, layers):
        got = gradients(stream, model, "nf4", kept, mode, OUTSIDE, fused=True)
        differ += report("gradients, head in blocks", "nf4", kept, want, got)
    for mode in MODES[1:]:
        want = gradients(resident, model, "nf4", None, mode)
        for engine, kept in ((resident, None), (stream, 0)):
            got = gradients(engine, model, "nf4", kept, mode, away=True)
            what = f"gradients, {mode} checkpoints in RAM"
            differ += report(what, "nf4", layers if kept is None else kept, want, got)
    return differ


def in_blocks(loaded: Any) -> Any:
    """A resident model, its output projection read in the blocks of a streamed one."""
    head = loaded.model.get_output_embeddings()
    head.vocabulary_blocks = blocks_of(head)
    head.__class__ = BlockedLinear
    return loaded


def report(what: str, quant: str, kept: int, want: list[Any], got: list[Any]) -> bool:
    """Print one comparison; whether it differs."""
    equal = len(want) == len(got) and all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    finite = all(bool(t.isfinite().all()) for t in want)
    row = {"case": what, "quant": quant, "resident_layers": kept, "tensors": len(want), "equal": equal}
    print(json.dumps({**row, "finite": finite}), flush=True)
    return not (equal and finite)


def request(
    model: str, quant: Quant, kept: int | None, job: Workload, outside: tuple[str, ...] = ()
) -> LoadRequest:
    """To load random weights of `model` with `kept` resident layers and the modules `outside` in RAM."""
    profile, how = load_model(model), Strategy(quant=quant)
    answer = estimate(profile, machine_from_gpus([(load_gpu("h200"), 1)]), job, how)
    places: dict[str, int | str] = {"": 0, **dict.fromkeys(outside, "cpu")}
    candidate = Candidate(
        rank=1, strategy=how, engine="stream", device_map=places, estimate=answer, speed=answer.speed
    )
    return LoadRequest(
        source=ModelSource(None, dict(profile.config)),
        candidate=candidate,
        workload=job,
        device=DEVICE,
        scratch=Path("nowhere"),
        seed=3,
        resident_layers=kept,
    )


def load(engine: Any, model: str, quant: Quant, kept: int | None, outside: tuple[str, ...] = ()) -> Any:
    """The loaded model of an engine for inference."""
    return engine.load(request(model, quant, kept, Workload(task="infer"), outside))


def logits(loaded: Any) -> list[torch.Tensor]:
    """Of a prefill over 300 tokens and eight decode steps, twice over."""
    ids = torch.randint(0, 1000, (2, 300), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    seen = []
    with torch.no_grad():
        for _round in range(2):
            step = loaded.model(ids, use_cache=True)
            seen.append(step.logits[:, -1].cpu())
            for at in range(8):
                past = step.past_key_values
                step = loaded.model(ids[:, at : at + 1], past_key_values=past, use_cache=True)
                seen.append(step.logits[:, -1].cpu())
    _close(loaded)
    return seen


def gradients(
    engine: Any,
    name: str,
    quant: Quant,
    kept: int | None,
    mode: str,
    outside: tuple[str, ...] = (),
    *,
    fused: bool = False,
    away: bool = False,
) -> list[torch.Tensor]:
    """Loss and adapter gradients of two micro-batches of different lengths; `fused`: with the loss in chunks;
    `away`: with checkpoints in RAM."""
    job = Workload(task="train", method="lora" if quant == "none" else "qlora", lora_dropout=0.0)
    asked = request(name, quant, kept, job, outside)
    loaded = engine.load(asked)
    torch.manual_seed(0)
    model = add_adapters(loaded.model, job, asked.candidate.strategy).train()
    model.config.use_cache = False
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0.0, 0.05)
    if mode != "none":
        model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
    if mode == "reentrant":
        model.enable_input_require_grads()
    draws = torch.Generator().manual_seed(4)
    seen = []
    with ExitStack() as stack:
        if fused:
            stack.enter_context(chunked_loss(model))
        if away:
            stack.enter_context(offloading(model.get_base_model(), 2 * 256, DEVICE))
        for length in (256, 130):
            ids = torch.randint(0, 1000, (2, length), generator=draws).to(DEVICE)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            seen.append(loss.detach().cpu())
    seen += [p.grad.cpu() for p in model.parameters() if p.grad is not None]
    _close(loaded)
    return seen


def _close(loaded: Any) -> None:
    synchronize(DEVICE)
    loaded.close()
    loaded.model = None
    torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for a card; nothing else has to be waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
