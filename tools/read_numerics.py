"""Read from transformers' source how each architecture multiplies its norms and rotates its queries.

Habits of the modelling code change what autograd keeps, and no config field tells them:

* norm: `weight * x.to(dtype)` keeps a 16-bit tensor, `(weight * x).to(dtype)` keeps float32;
* rope: an architecture that rotates part of a head and concatenates the rest leaves queries in another memory
  layout, so attention's output is copied once more before the output projection;
* LayerNorm: where it is no `nn.LayerNorm`, which stays in float32 under autocast, it is the same cast back
  (returned), spelled out (by_hand), or run in 16 bits (lowered);
* names: what attention returned, or its normed input, that a layer's frame still names while the feed-forward
  runs, stays alive for that long;
* embeddings: peft asks the embedding module's output for a gradient; where the model goes on with a product,
  a sum or a norm of it (moved, positioned, placed, normed), that output stays beside the first layer's input;
* inline: a feed-forward written out in the layer's own forward lets its input go after the first linear.
* rope_by_term: each of the two products of a rotation is widened to float32 (Ernie 4.5);
* rope_by_kind: one pair of rotary tables for each kind of layer, made before the first;
* ungrouped: torch's attention is handed one key head for many query heads, which no fused kernel takes;
* routers: where the weights of the chosen experts stay float32, so do the experts' weighted outputs; autocast
  decides otherwise than the code says (`sum` answers in float32, `linear` in 16 bits);
* shared_first: shared experts run before the routed ones; clamped_experts: they bound gate and up (GPT-OSS);
  shared_code: they run in transformers' common code for experts, which engines may replace.

Writes {"transformers": version, one list of model types a habit, "layer_norm", "embeddings", "routers" and
"eager" (attention with sinks): {model type: form}}.
Usage: python tools/read_numerics.py OUT.json
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from pathlib import Path


def main(out: str) -> None:
    """Scan every `models/*/modeling_*.py` that defines a causal language model."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    classes: dict[str, set[str]] = {}
    for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for model_type, name in names.items():
            for one in (name,) if isinstance(name, str) else name:
                classes.setdefault(one, set()).add(model_type)
    lists: dict[str, set[str]] = {name: set() for name in HABITS}
    forms: dict[str, dict[str, str]] = {name: {} for name in FORMS}
    root = Path(transformers.__file__).parent / "models"
    for path in sorted(root.glob("*/modeling_*.py")):
        tree = ast.parse(path.read_text())
        defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        types = {t for name in defined & set(classes) for t in classes[name]}
        if not types:
            continue
        types |= {f"{path.parent.name}_text"} if f"{path.parent.name}_text" in _model_types() else set()
        for name, holds in HABITS.items():
            if holds(tree):
                lists[name] |= types
        for name, form in FORMS.items():
            if found := form(tree):
                forms[name] |= dict.fromkeys(types, found)
    facts = {
        "transformers": transformers.__version__,
        **{name: sorted(found) for name, found in lists.items()},
        **{name: dict(sorted(found.items())) for name, found in forms.items()},
    }
    temporary = Path(f"{out}.tmp")
    temporary.write_text(json.dumps(facts, indent=1) + "\n")
    os.replace(temporary, out)


def _model_types() -> set[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return set(CONFIG_MAPPING_NAMES)


def _float32_norm(tree: ast.Module) -> bool:
    """Does the text model's RMS norm multiply by its weight before it leaves float32?"""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("RMSNorm") and "Vision" not in node.name:
            body = ast.unparse(node)
            if "self.weight * hidden_states).to(" in body or "type_as(" in body:
                return True
            wide = ("self.weight.float()", "self.weight.to(torch.float32) * hidden_states")
            return any(text in body for text in wide)
    return False


LAYER_NORMS = {
    "_cast_if_autocast_enabled": "lowered",
    "F.layer_norm(hidden_states.to(": "returned",
    ".pow(2).mean(-1, keepdim=True)": "by_hand",
}
"""What the forward of a class called LayerNorm says, and which form that is."""


def _layer_norm(tree: ast.Module) -> str | None:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and "LayerNorm" in node.name:
            body = ast.unparse(node)
            for text, form in LAYER_NORMS.items():
                if text in body:
                    return form
    return None


def _concatenated_rope(tree: ast.Module) -> bool:
    """Does rotation end in a concatenation of a rotated and an untouched part?"""
    source = ast.unparse(tree)
    return "q_pass], dim=-1)" in source or "query_pass), dim=-1)" in source


def _float32_rope(tree: ast.Module) -> bool:
    """Does rotation widen queries and keys first?"""
    rotate = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "apply_rotary_pos_emb"]
    return any("q = q.float()" in ast.unparse(node) for node in rotate)


def _rope_by_term(tree: ast.Module) -> bool:
    """Does rotation widen queries and keys product by product?"""
    rotate = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "apply_rotary_pos_emb"]
    return any("q.float() * cos" in ast.unparse(node) for node in rotate)


def _rope_by_kind(tree: ast.Module) -> bool:
    """Does the model make rotary tables for each kind of layer?"""
    return "self.rotary_emb(hidden_states, position_ids, layer_type)" in ast.unparse(tree)


def _ungrouped(tree: ast.Module) -> bool:
    """Does attention call torch's own with key heads that are neither repeated nor announced as grouped?"""
    for node in tree.body:
        text = ast.unparse(node) if isinstance(node, ast.ClassDef) else ""
        if "scaled_dot_product_attention(" in text and "multi_query" in text and "enable_gqa" not in text:
            return True
    return False


ATTENTION = ("attn", "attention", "mixer")
CHANNEL = ("mlp", "feed_forward", "fc1", "ffn", "moe", "ff")


def _names_at_feed_forward(tree: ast.Module) -> set[str]:
    """Of attention's output and its normed input, what the layer's frame names when the feed-forward runs."""
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or not node.name.endswith(("DecoderLayer", "Block", "Layer")):
            continue
        if "Vision" in node.name or "Audio" in node.name:
            continue
        forward = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "forward"), None)
        if forward is not None and (named := _named(forward)) is not None:
            return named
    return set()


def _inline(tree: ast.Module) -> bool:
    """Does a layer's own forward call the two linears of its feed-forward?"""
    layers = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name.endswith("DecoderLayer")]
    return any("self.fc1(hidden_states)" in ast.unparse(layer) for layer in layers)


def _named(forward: ast.FunctionDef) -> set[str] | None:
    origin: dict[str, str] = {}
    seen = False
    for statement in _statements(forward.body):
        called = _called(statement)
        if seen and called.startswith(CHANNEL):
            return set(origin.values())
        if not isinstance(statement, ast.Assign):
            continue
        target = statement.targets[0]
        first = target.elts[0] if isinstance(target, ast.Tuple) else target
        if not isinstance(first, ast.Name):
            continue
        value = statement.value
        origin.pop(first.id, None)
        if isinstance(value, ast.Subscript) and isinstance(value.value, ast.Name):
            held = origin.get(value.value.id)
        elif "norm" in called or called.startswith("ln_"):
            held = None if seen else "normed"
        elif any(word in called for word in ATTENTION):
            held, seen = "attention", True
        else:
            held = None
        if held:
            origin[first.id] = held
    return None


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements in order, the first branch of each condition among them."""
    out: list[ast.stmt] = []
    for statement in body:
        out += _statements(statement.body) if isinstance(statement, ast.If) else [statement]
    return out


def _called(statement: ast.stmt) -> str:
    """The attribute of self that a statement calls first; empty for none."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("self."):
            return ast.unparse(node.func)[len("self.") :]
    return ""


def _embeddings(tree: ast.Module) -> str | None:
    """What happens to `inputs_embeds` before the first layer."""
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or not node.name.endswith(("Model", "Decoder")):
            continue
        if "Vision" in node.name or "Audio" in node.name:
            continue
        forward = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "forward"), None)
        for statement in _statements(forward.body) if forward is not None else []:
            if isinstance(statement, ast.For):
                break
            if not isinstance(statement, ast.Assign):
                continue
            if ast.unparse(statement.targets[0]) not in ("hidden_states", "inputs_embeds"):
                continue
            called, text = _called(statement), ast.unparse(statement.value)
            if isinstance(statement.value, ast.BinOp) and "inputs_embeds" in text:
                if "position_embeds" in text:
                    return "positioned"
                return "placed" if "pos" in text else "moved"
            if "norm" in called or called.startswith("ln"):
                return "normed"
    return None


def _routers(tree: ast.Module) -> str | None:
    """When experts are handed float32 weights: always, in inference, or in training (under autocast)."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and "Router" in node.name and "topk" in ast.unparse(node):
            text = ast.unparse(node)
            break
    else:
        return None
    if re.search(r"\.to\((hidden_states|router_logits|x)\.dtype\)|type_as\(hidden_states\)", text):
        return None
    explicit = "torch.float" in text or ".float()" in text
    softmax = "softmax" in text and "dtype=router_top_value.dtype" not in text
    logits_widened = re.search(r"\)\.to\(torch\.float32\)|logits\.(float|to|type)\(", text)
    divided = re.search(r"= \w+ / \(?(\w+\.sum\(|denominator)", text)
    training = softmax or logits_widened or divided
    return (
        "always" if explicit and training else "inference" if explicit else "training" if training else None
    )


def _shared_first(tree: ast.Module) -> bool:
    """Do shared experts run before the routed ones?"""
    for node in tree.body:
        text = ast.unparse(node) if isinstance(node, ast.ClassDef) else ""
        routed, shared = text.find("self.experts("), text.find("self.shared_expert")
        calls = [text.find(f"self.shared_expert{end}(") for end in ("", "s")]
        called = max(calls)
        if routed > 0 and shared > 0 and called > 0:
            return called < routed
    return False


def _clamped_experts(tree: ast.Module) -> bool:
    """Do experts clamp gate and up before they meet?"""
    experts = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name.endswith("Experts")]
    return any("gate.clamp(" in ast.unparse(node) and "alpha" in ast.unparse(node) for node in experts)


def _shared_code(tree: ast.Module) -> bool:
    """Does a class of experts leave its forward to `integrations/moe.py`?"""
    marks = (mark for node in tree.body if isinstance(node, ast.ClassDef) for mark in node.decorator_list)
    return any(ast.unparse(mark).startswith("use_experts_implementation") for mark in marks)


def _eager(tree: ast.Module) -> str | None:
    """Eager attention whose softmax stays in its input's dtype (shifted), or is rescaled by a sink, or which
    is written out in a layer that returns its weights (returned)."""
    if "alibi.baddbmm(" in ast.unparse(tree):
        return "returned"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "eager_attention_forward":
            text = ast.unparse(node)
            return "shifted" if ".max(dim=-1" in text else "rescaled" if "logsumexp" in text else None
    return None


HABITS = {
    "clamped_experts": _clamped_experts,
    "shared_first": _shared_first,
    "shared_code": _shared_code,
    "float32_norm": _float32_norm,
    "concatenated_rope": _concatenated_rope,
    "float32_rope": _float32_rope,
    "rope_by_term": _rope_by_term,
    "rope_by_kind": _rope_by_kind,
    "ungrouped": _ungrouped,
    "keeps_attention": lambda tree: "attention" in _names_at_feed_forward(tree),
    "inline_feed_forward": _inline,
    "keeps_normed": lambda tree: "normed" in _names_at_feed_forward(tree),
}
FORMS = {"layer_norm": _layer_norm, "embeddings": _embeddings, "routers": _routers, "eager": _eager}


if __name__ == "__main__":
    main(sys.argv[1])
