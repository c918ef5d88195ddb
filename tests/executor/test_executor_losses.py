"""The chunked loss against transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from executor.losses import chunked_loss
from planner.exact import chunked_loss as chunks

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


@pytest.mark.parametrize(
    ("kind", "extra"),
    [("llama", {}), ("gemma2", {"final_logit_softcapping": 2.0}), ("cohere", {"logit_scale": 0.3})],
)
@pytest.mark.parametrize("items", [None, 40])
def test_equals_the_full_loss(monkeypatch: Any, kind: str, extra: dict[str, Any], items: int | None) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 7)
    model = make(kind, **extra)
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


def test_logits_of_the_whole_batch_never_exist(monkeypatch: Any, tiny: Path) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 5)
    model = make("llama")
    rows: list[int] = []
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: (rows.append(x.shape[:-1].numel()), head(x))[1])
    with chunked_loss(model):
        loss_and_gradients(model, None)
    assert rows and max(rows) <= 5
