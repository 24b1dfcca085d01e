"""Broken metadata: one `TokenizerError` that names the key, what stands there and what was expected."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trustcore.errors import TokenizerError
from trustcore.text import Tokenizer

G = "tokenizer.ggml."
SPM = {f"{G}model": "llama", f"{G}tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab"]}
BPE = {f"{G}model": "gpt2", f"{G}pre": "gpt-2", f"{G}tokens": ["a", "b", "ab"], f"{G}merges": ["a b"]}
WPM = {f"{G}model": "bert", f"{G}tokens": ["[UNK]", "▁a"]}

CASES = [
    ({}, "tokenizer.ggml.model is missing: the file carries no tokenizer. Expected one of gpt2, llama, bert"),
    ({f"{G}model": "t5"}, "tokenizer.ggml.model is 't5'; supported are gpt2, llama, bert."),
    ({f"{G}model": 3}, "tokenizer.ggml.model: expected a string, found int 3."),
    ({f"{G}model": "llama"}, "tokenizer.ggml.tokens is missing: expected an array of strings."),
    ({**SPM, f"{G}tokens": []}, "tokenizer.ggml.tokens is empty"),
    ({**SPM, f"{G}tokens": "abc"}, "tokenizer.ggml.tokens: expected an array, found str 'abc'."),
    ({**SPM, f"{G}tokens": ["a", 7]}, "tokenizer.ggml.tokens[1]: expected a string, found int 7."),
    ({**SPM, f"{G}tokens": ["a", "b", "a"]}, "tokenizer.ggml.tokens[2] is 'a', as token 0 is: tokens differ."),
    ({**SPM, f"{G}tokens": ["a", "\udc80"]}, r"tokenizer.ggml.tokens[1] is '\udc80', which is not valid UTF-8."),
    ({**SPM, f"{G}scores": [0.0]}, "tokenizer.ggml.scores has 1 values, but tokenizer.ggml.tokens has 6 tokens"),
    ({**SPM, f"{G}scores": [float("nan")] * 6}, "tokenizer.ggml.scores[0]: expected a number, found float nan."),
    ({**SPM, f"{G}scores": ["x"] * 6}, "tokenizer.ggml.scores[0]: expected a number, found str 'x'."),
    ({**SPM, f"{G}token_type": [1]}, "tokenizer.ggml.token_type has 1 values, but tokenizer.ggml.tokens has 6 tokens"),
    (
        {**SPM, f"{G}token_type": [1] * 5 + [9]},
        "tokenizer.ggml.token_type[5]: expected a number from 0 to 6, found int 9.",
    ),
    ({**SPM, f"{G}token_type": [6] * 6}, "tokenizer.ggml.tokens: '<unk>' is of type byte; expected <0x00> to <0xFF>."),
    (
        {**SPM, f"{G}bos_token_id": 6},
        "tokenizer.ggml.bos_token_id is 6, but tokenizer.ggml.tokens has 6 tokens (0 to 5).",
    ),
    ({**SPM, f"{G}eos_token_id": True}, "tokenizer.ggml.eos_token_id: expected a token id, found bool True."),
    ({**SPM, f"{G}add_bos_token": 1}, "tokenizer.ggml.add_bos_token: expected true or false, found int 1."),
    ({**SPM, "tokenizer.chat_template": 5}, "tokenizer.chat_template: expected a string, found int 5."),
    ({**BPE, f"{G}pre": "martian"}, "the pre-tokenizer 'martian' is unknown. Known are a.x-4.0, bailingmoe,"),
    ({**BPE, f"{G}pre": "kimi-k2"}, "the pre-tokenizer 'kimi-k2' is unknown."),
    ({k: v for k, v in BPE.items() if "merges" not in k}, "tokenizer.ggml.merges is missing"),
    ({**BPE, f"{G}merges": ["ab"]}, "tokenizer.ggml.merges[0] is 'ab'; expected two tokens with a space between them."),
    ({**BPE, f"{G}merges": ["b a"]}, "tokenizer.ggml.merges: merge 0, 'b' + 'a', needs 'ba', which is not in"),
    (WPM, "tokenizer.ggml.bos_token_id is missing: a WordPiece vocabulary needs that token."),
]


@pytest.mark.parametrize(("metadata", "message"), CASES, ids=[message[:50] for _, message in CASES])
def test_broken_metadata_is_named(metadata, message):
    with pytest.raises(TokenizerError, match=re.escape(message)):
        Tokenizer.from_gguf(metadata)


@pytest.mark.parametrize("metadata", [SPM, BPE])
def test_what_the_cases_break_is_whole(metadata):
    assert Tokenizer.from_gguf(metadata).encode("ab", add_special=False)[-1] == len(metadata[f"{G}tokens"]) - 1


def test_arrays_may_be_numpy_s():
    plain = {**SPM, f"{G}scores": [0.0] * 6, f"{G}token_type": [2, 3, 3, 1, 1, 1]}
    arrays = {
        **plain,
        f"{G}scores": np.zeros(6, np.float32),
        f"{G}token_type": np.array([2, 3, 3, 1, 1, 1], np.int32),
    }
    assert Tokenizer.from_gguf(arrays) == Tokenizer.from_gguf(plain)


def test_an_empty_token_gets_a_name_of_its_own():
    tokenizer = Tokenizer.from_gguf({**SPM, f"{G}tokens": ["<unk>", "<s>", "</s>", "", "a"]})
    assert tokenizer.token(3) == "[EMPTY_3]"


def test_a_default_beyond_the_vocabulary_is_no_token():
    tokenizer = Tokenizer.from_gguf({**SPM, f"{G}tokens": ["a"]})
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (None, None, 0)
    assert tokenizer.encode("a") == [0, 0, 0, 0]  # no BOS; the space in front is three bytes without a token


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 9) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=6),
)


@settings(deadline=None, max_examples=300)
@given(
    base=st.sampled_from([SPM, BPE, WPM]),
    key=st.sampled_from([*SPM, *BPE, f"{G}scores", f"{G}token_type", f"{G}eos_token_id", "tokenizer.chat_template"]),
    value=VALUES,
)
def test_anything_in_a_key_is_a_tokenizer_or_a_tokenizer_error(base, key, value):
    try:
        tokenizer = Tokenizer.from_gguf({**base, key: value})
    except TokenizerError:
        return
    tokenizer.decode(tokenizer.encode("a b ab é"))
