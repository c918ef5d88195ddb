"""The chunked loss against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from executor.losses import chunked_loss
from planner.exact import chunked_loss as chunks
from planner.exact import vocabulary

pytestmark = pytest.mark.executor


def make(kind: str, **extra: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, vocab_size=80, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **extra,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")


def loss_and_gradients(model: Any, items: int | None) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(1)
    ids = torch.randint(3, 80, (3, 11))
    labels = ids.clone()
    labels[0, :4] = -100
    model.zero_grad()
    extra = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    loss = model(input_ids=ids, labels=labels, use_cache=False, **extra).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def small_parts(monkeypatch: Any) -> None:
    """Blocks of 24 words, the last of 8, for 7 tokens; so many tokens where there are no blocks."""
    monkeypatch.setattr(vocabulary, "head_block_rows", lambda *_: 24)
    monkeypatch.setattr(chunks, "CHUNK_LOGITS", 7 * 24)
    monkeypatch.setattr(chunks, "CHUNK", 7)


class OddLinear(torch.nn.Linear):
    """A projection that cannot be read in blocks."""


@pytest.mark.parametrize("head", [torch.nn.Linear, OddLinear])
@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("llama", {}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("phi", {}),
    ],
)
@pytest.mark.parametrize("items", [None, 40])
@pytest.mark.usefixtures("small_parts")
def test_equals_the_full_loss(kind: str, extra: dict[str, Any], items: int | None, head: Any) -> None:
    """All weights are trained, those of the output projection (phi's has a bias, gemma2's is tied) too."""
    model = make(kind, **extra)
    model.lm_head.__class__ = head
    full, full_gradients = loss_and_gradients(model, items)
    with chunked_loss(model):
        chunked, gradients = loss_and_gradients(model, items)
    torch.testing.assert_close(chunked, full)
    assert gradients.keys() == full_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, full_gradients[name], msg=name)
    again, _ = loss_and_gradients(model, items)
    torch.testing.assert_close(again, full)
    if "final_logit_softcapping" in extra:
        assert model.config.final_logit_softcapping == 2.0


@pytest.mark.usefixtures("small_parts")
def test_logits_of_the_whole_batch_never_exist(monkeypatch: Any) -> None:
    model = make("llama")
    seen: list[int] = []
    product = chunks.product
    monkeypatch.setattr(
        chunks, "product", lambda *args: (seen.append(product(*args).numel()), product(*args))[1]
    )
    with chunked_loss(model):
        loss_and_gradients(model, None)
    # 33 tokens in chunks of 7 (21 for the last block), 80 words: twice
    assert sum(seen) == 2 * 33 * 80 and max(seen) == 7 * 24
