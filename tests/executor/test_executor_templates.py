"""The answer and nothing else, under chat templates as models ship them and tokenizers of several kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from executor.examples import IGNORED, prepare
from executor.rows import Row
from executor.tiny import END, PAD, START, byte_tokenizer

pytestmark = pytest.mark.executor

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<|im_start|>[INST] ' + m['content'].strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim"
    " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
THINKING = (  # earlier turns lose their thinking, the last gets a block of it, as in Qwen3
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last and '</think>' not in m['content'] %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ (m['content'] if loop.last else m['content'].split('</think>')[-1]) | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REASONING = (  # the prompt opens a thought that the conversation does not keep, as in DeepSeek-R1
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'].split('</think>')[-1] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant><think>\n' }}{% endif %}"
)
COUNTING = (
    "{{ messages | length }}{% for m in messages %}{{ '[' + m['role'] + '|' + m['content'] + eos_token }}"
    "{{ ']' }}{% endfor %}"
)
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{%- generation -%}{{ m['content'] + eos_token }}{%- endgeneration -%}{% else %}"
    "{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

# the second answer repeats what was asked, words are cut by spaces, and characters take several bytes
TALK = (
    {"role": "user", "content": "four?"},
    {"role": "assistant", "content": "<think>hm</think>two  "},
    {"role": "user", "content": "say é four 🙂"},
    {"role": "assistant", "content": "say é four 🙂"},
)
E, THOUGHT = END, "<think>hm</think>two  "
LAST = "say é four 🙂" + E
EXPECTED = {
    "chatml": (CHATML, [THOUGHT + E, LAST]),
    "llama2": (LLAMA2, [" <think>hm</think>two " + E, " say é four 🙂 " + E]),
    "llama3": (LLAMA3, [THOUGHT.strip() + E, LAST]),
    "gemma": (GEMMA, [THOUGHT.strip() + E, LAST]),
    "vicuna": (VICUNA, [" " + THOUGHT + E, " " + LAST]),
    "thinking": (THINKING, ["two" + E, "<think>\n\n</think>\n\n" + LAST]),
    "reasoning": (REASONING, ["two  " + E, LAST]),
    "counting": (COUNTING, [THOUGHT + E, LAST]),
    "generation": (GENERATION, [THOUGHT + E, LAST]),
    "plain": (PLAIN, [THOUGHT + "\n", "say é four 🙂\n"]),
}


def trained(metaspace: bool) -> Any:
    """A BPE with merges: byte-level that leaves spaces out of its offsets (Llama 3), or with words that carry
    the space before them (Llama 2)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=metaspace, unk_token="<unk>" if metaspace else None))
    specials = [AddedToken(t, special=True, normalized=False) for t in (START, END, PAD)]
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        specials += ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        tokenizer.decoder = decoders.ByteLevel()
    alphabet = [] if metaspace else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    texts = [
        *(m["content"] for m in TALK),
        "USER: four ASSISTANT: say [INST] [/INST] assistant\n\nmodel user",
    ] * 9
    tokenizer.train_from_iterator([*texts, "\n [ ] | : < > / ? 0 1 2 3 4"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {"bytes": byte_tokenizer(), "byte-level": trained(False), "metaspace": trained(True)}


def answers(tokenizer: Any, row: Row) -> list[str]:
    """The learned runs of tokens as text."""
    (example,) = prepare(Path("d"), [row], tokenizer, 1000).examples
    assert all(b in (IGNORED, a) for a, b in zip(example.input_ids, example.labels, strict=True))
    runs: list[list[int]] = [[]]
    for label in example.labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs if run]


@pytest.mark.parametrize("kind", ["bytes", "byte-level", "metaspace"])
@pytest.mark.parametrize("style", EXPECTED)
def test_every_answer_and_nothing_else_is_learned(tokenizers: dict[str, Any], kind: str, style: str) -> None:
    tokenizer = tokenizers[kind]
    template, expected = EXPECTED[style]
    tokenizer.chat_template = template
    found = answers(tokenizer, Row(1, messages=TALK))
    (last,) = answers(tokenizer, Row(1, messages=TALK, answer_from=2))
    assert last == found[-1]
    if kind == "metaspace" or style == "plain":
        # a first word's space is lost in decoding; a token that holds the prompt's last space and the first
        # of the answer is learned
        found, expected = [f.lstrip(" ") for f in found], [e.lstrip(" ") for e in expected]
    assert found == expected


def test_a_prompt_keeps_its_own_tokens_and_ends_are_not_doubled(tokenizers: dict[str, Any]) -> None:
    for tokenizer in tokenizers.values():
        for prompt, completion in (("say four", " two"), ("sa", "y four"), ("say", "é" + END)):
            (example,) = prepare(
                Path("d"), [Row(1, prompt=prompt, completion=completion)], tokenizer, 99
            ).examples
            before = tokenizer(prompt)["input_ids"]
            assert example.input_ids[: len(before)] == before
            assert example.labels[: len(before)] == [IGNORED] * len(before)
            assert IGNORED not in example.labels[len(before) :]
            assert example.input_ids.count(tokenizer.eos_token_id) == 1
            if prompt == "say four":
                assert tokenizer.decode(example.input_ids) == f"say four two{END}"
        (text,) = prepare(Path("d"), [Row(1, text="two" + END)], tokenizer, 99).examples
        assert text.input_ids.count(tokenizer.eos_token_id) == 1


def test_a_template_that_ends_no_turn_is_counted(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["bytes"]
    for template, endless in ((PLAIN, 1), (CHATML, 0)):
        tokenizer.chat_template = template
        assert prepare(Path("d"), [Row(1, messages=TALK)], tokenizer, 999).endless == endless


def test_labels_are_those_of_trl(tokenizers: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    """trl's SFTTrainer over the same rows: a template with generation marks, and prompt with completion."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = tokenizers["bytes"]
    tokenizer.chat_template = GENERATION
    talk = [list(TALK), list(TALK[:2])]
    pairs = [("say ", "four"), ("é", " 🙂")]
    cases = [
        (
            [{"messages": m} for m in talk],
            {"assistant_only_loss": True},
            [Row(1, messages=tuple(m)) for m in talk],
        ),
        (
            [{"prompt": p, "completion": c} for p, c in pairs],
            {"completion_only_loss": True},
            [Row(1, prompt=p, completion=c) for p, c in pairs],
        ),
        ([{"text": "two four"}], {}, [Row(1, text="two four")]),
    ]
    for rows, settings, ours in cases:
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(tiny),
            SFTConfig(str(tmp_path), use_cpu=True, bf16=False, max_length=None, report_to=[], **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        mine = prepare(Path("d"), ours, tokenizer, 999).examples
        for theirs, example in zip(trainer.train_dataset, mine, strict=True):
            batch = trainer.data_collator([theirs])
            assert batch["input_ids"][0].tolist() == example.input_ids
            assert batch["labels"][0].tolist() == example.labels
