"""How the next token is chosen, and when to stop, as arguments of `generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from executor.errors import BadOption, Interrupted
from executor.options import RunOptions
from executor.stopping import StopRequest

if TYPE_CHECKING:
    import torch

_LEAST_TEMPERATURE = 1e-6
"""Below it logits over temperature come near the end of fp32, and nothing but the likeliest token is left."""


def check_sampling(options: RunOptions) -> None:
    """Errors: `BadOption` for options that exclude each other."""
    if options.greedy and _asked(options):
        raise BadOption("--greedy leaves nothing to sample", "leave --temperature and --top-p away")
    if options.temperature is not None and options.temperature < _LEAST_TEMPERATURE:
        raise BadOption(f"--temperature {options.temperature:g} is greedy decoding", "give --greedy")
    if options.top_p == 0:
        raise BadOption("--top-p 0 is greedy decoding", "give --greedy")


def sampling(options: RunOptions, defaults: Any) -> dict[str, Any]:
    """Greedy, sampled as the options say, or as the model's own `defaults` (its generation config) say.

    What is given on the command line takes the place of the default; a default of transformers that the
    model's authors did not set (top_k 50) does not come back in.
    """
    if options.greedy or options.rehearse:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if not _asked(options):
        return {}
    return {
        "do_sample": True,
        "temperature": _first(options.temperature, defaults.temperature, 1.0),
        "top_p": _first(options.top_p, defaults.top_p, 1.0),
        "top_k": _first(defaults.top_k, 0),
    }


def _asked(options: RunOptions) -> bool:
    return options.temperature is not None or options.top_p is not None


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


class StopSoon:
    """A stopping criterion of `generate`: leaves it at the next token once the user asked to stop.

    The batch in work is lost, earlier ones are kept.
    """

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop
        self._no: torch.Tensor | None = None

    def __call__(self, ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        import torch

        if self._stop.requested:
            raise Interrupted("interrupted", "the same command goes on from here")
        if self._no is None or self._no.shape[0] != ids.shape[0]:
            self._no = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        return self._no


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    known = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    return {token for token in known if token is not None}
