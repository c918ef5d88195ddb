"""Which classes refuse sdpa: the table against the installed transformers."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs the [executor] extra")

from planner.attention_kernel import refuses_sdpa
from profiles.facts import language_model_types

pytestmark = pytest.mark.executor
WITHOUT_ATTENTION = {"falcon_mamba", "mamba", "mamba2", "rwkv"}


def test_the_table_says_what_the_classes_say() -> None:
    import transformers
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    version = ".".join(transformers.__version__.split(".")[:2])
    wrong = []
    for model_type in set(language_model_types()) & set(CONFIG_MAPPING) - WITHOUT_ATTENTION:
        if CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
            continue
        refused = not MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]._supports_sdpa
        if refused != refuses_sdpa(model_type, version):
            wrong.append(model_type)
    assert wrong == []
