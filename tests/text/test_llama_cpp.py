"""Encoding, token for token against what llama.cpp gave (`tests/oracles/record_llama_cpp.py`)."""

from __future__ import annotations

import time

import pytest

from trustcore.text import Tokenizer
from trustcore.text.pre_tokenizers import PRE_TOKENIZERS


def differences(tokenizer, texts, cases):
    """Every recorded encoding that the tokenizer does not give: (text, options, what it gives, what was recorded)."""
    found = []
    for text, case in zip(texts, cases, strict=True):
        for options, expected in (
            ({}, case["ids"]),
            ({"parse_special": True}, case.get("parsed", case["ids"])),
            ({"add_special": False}, case.get("bare", case["ids"])),
        ):
            ids = tokenizer.encode(text, **options)
            if ids != expected:
                found.append((text, options, ids, expected))
    return found


def test_the_demo_model_encodes_as_llama_cpp(smollm2_tokenizer, recorded):
    cases = recorded("smollm2_tokens")["cases"]
    assert len(cases) >= 60
    assert differences(smollm2_tokenizer, [case["text"] for case in cases], cases) == []


def test_the_demo_model_has_llama_cpp_s_special_tokens(smollm2_tokenizer, recorded):
    data = recorded("smollm2_tokens")
    assert smollm2_tokenizer.vocab_size == data["vocab_size"]
    assert (smollm2_tokenizer.bos_id, smollm2_tokenizer.eos_id) == (data["bos"], data["eos"])
    assert smollm2_tokenizer.stop_ids == set(data["stops"])
    hidden = [
        i
        for i in range(smollm2_tokenizer.vocab_size)
        if smollm2_tokenizer.token_bytes(i) and not smollm2_tokenizer.decode([i])
    ]
    assert hidden == data["controls"]


def test_the_demo_model_has_llama_cpp_s_bytes(smollm2_tokenizer, recorded):
    pieces = recorded("smollm2_tokens")["pieces_hex"]
    assert {i: smollm2_tokenizer.token_bytes(int(i)).hex() for i in pieces} == pieces


def test_the_recorded_prompts_have_the_recorded_ids(smollm2_tokenizer, recorded):
    for prompt in recorded("smollm2_greedy")["prompts"]:
        ids = smollm2_tokenizer.encode(prompt["text"], parse_special=prompt["parse_special"])
        assert ids == prompt["prompt_ids"], prompt["name"]
        text = smollm2_tokenizer.decode(prompt["ids"][: prompt["first_stop"]], continuation=True)
        assert text == prompt["continuation"]


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_cuts_as_llama_cpp(pre, recorded):
    data = recorded("vocab_bpe")
    cases = [next(case for case in given if pre in case["pre"]) for given in data["cases"]]
    tokenizer = Tokenizer.from_gguf({**data["metadata"], "tokenizer.ggml.pre": pre})
    assert differences(tokenizer, data["texts"], cases) == []


def test_the_recording_tells_the_families_apart(recorded):
    """Without this, a table that held one pattern for all names might pass."""
    data = recorded("vocab_bpe")
    by_name = {
        pre: str([next(c["ids"] for c in given if pre in c["pre"]) for given in data["cases"]])
        for pre in PRE_TOKENIZERS
    }
    families = {family.patterns: name for name, family in PRE_TOKENIZERS.items()}
    results = {by_name[name] for name in families.values()}
    # Two of them differ in writing alone: after a greedy \\s*, [\\r\\n] and [\\r\\n]+ match the same.
    assert by_name["bailingmoe"] == by_name["qwen2"]
    assert len(results) == len(families) - 1
    tokenizer = Tokenizer.from_gguf({**data["metadata"], "tokenizer.ggml.pre": "qwen2"})
    cases = [next(c for c in given if "llama-bpe" in c["pre"]) for given in data["cases"]]
    assert differences(tokenizer, data["texts"], cases)


@pytest.mark.parametrize("variant", ["ranked", "ties", "flat", "reversed", "no_prefix", "bos_and_eos"])
def test_sentencepiece_merges_as_llama_cpp(variant, recorded):
    data = recorded("vocab_spm")
    given = data["variants"][variant]
    tokenizer = Tokenizer.from_gguf({**data["metadata"], **given["metadata"]})
    assert differences(tokenizer, data["texts"], given["cases"]) == []
    assert tokenizer.stop_ids == set(given["stops"])


@pytest.mark.parametrize("variant", ["uncased", "cased", "accents"])
def test_wordpiece_cuts_as_llama_cpp(variant, recorded):
    data = recorded("vocab_wpm")
    given = data["variants"][variant]
    tokenizer = Tokenizer.from_gguf({**data["metadata"], **given["metadata"]})
    assert differences(tokenizer, data["texts"], given["cases"]) == []


@pytest.mark.serial
def test_the_demo_tokenizer_is_built_quickly(smollm2_metadata):
    Tokenizer.from_gguf(smollm2_metadata)  # the package is loaded
    start = time.perf_counter()
    Tokenizer.from_gguf(smollm2_metadata)
    assert time.perf_counter() - start < 0.5  # 0.12 s on a Zen 3 core
