"""Read from transformers' source how each architecture multiplies its norms and rotates its queries.

Two habits of the modelling code change what autograd keeps, and no config field tells them:

* norm: `weight * x.to(dtype)` keeps a 16-bit tensor, `(weight * x).to(dtype)` keeps float32;
* rope: an architecture that rotates part of a head and concatenates the rest leaves queries in another memory
  layout, so attention's output is copied once more before the output projection.

Writes {"transformers": version, "float32_norm": [model types], "concatenated_rope": [model types]}.
Usage: python tools/read_numerics.py OUT.json
"""

from __future__ import annotations

import ast
import json
import os
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
    float32: set[str] = set()
    concatenated: set[str] = set()
    root = Path(transformers.__file__).parent / "models"
    for path in sorted(root.glob("*/modeling_*.py")):
        tree = ast.parse(path.read_text())
        defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        types = {t for name in defined & set(classes) for t in classes[name]}
        if not types:
            continue
        types |= {f"{path.parent.name}_text"} if f"{path.parent.name}_text" in _model_types() else set()
        source = ast.unparse(tree)
        if _float32_norm(tree):
            float32 |= types
        if _concatenated_rope(source):
            concatenated |= types
    facts = {
        "transformers": transformers.__version__,
        "float32_norm": sorted(float32),
        "concatenated_rope": sorted(concatenated),
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


def _concatenated_rope(source: str) -> bool:
    """Does rotation end in a concatenation of a rotated and an untouched part?"""
    return "q_pass], dim=-1)" in source or "query_pass), dim=-1)" in source


if __name__ == "__main__":
    main(sys.argv[1])
