"""What holds for any tokenizer: round trips, streaming, special tokens, equality."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trustcore.errors import TokenizerError
from trustcore.text import Tokenizer

TEXT = st.text(st.characters(codec="utf-8"), max_size=80)
_PACE = settings(deadline=None, max_examples=150)


@pytest.fixture(scope="module")
def spm(spm_metadata):
    return Tokenizer.from_gguf(spm_metadata)


@pytest.fixture(scope="module")
def bpe(bpe_metadata):
    return Tokenizer.from_gguf(bpe_metadata)


@_PACE
@given(text=TEXT)
def test_byte_level_text_comes_back(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


@_PACE
@given(text=TEXT)
def test_sentencepiece_text_comes_back(spm, text):
    text = text.replace("▁", "_")  # which is how a space is spelled
    assert spm.decode(spm.encode(text)) == text


@_PACE
@given(text=TEXT)
def test_the_demo_model_s_text_comes_back(smollm2_tokenizer, text):
    # The vocabulary lacks the bytes that UTF-8 rarely has; llama.cpp drops them too.
    known = {smollm2_tokenizer.token_bytes(i) for i in range(17, 600)}
    text = "".join(char for char in text if all(bytes([b]) in known for b in char.encode()))
    assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(text)) == text


@_PACE
@given(ids=st.lists(st.integers(0, 1300), max_size=40), skip=st.booleans(), continuation=st.booleans())
def test_a_stream_is_the_whole_text_in_whole_characters(spm, bpe, ids, skip, continuation):
    for tokenizer in (spm, bpe):
        known = [i % tokenizer.vocab_size for i in ids]
        options = {"skip_special": skip, "continuation": continuation}
        stream = tokenizer.stream_decoder(**options)
        pieces = [stream.push(i) for i in known] + [stream.flush()]
        assert "".join(pieces) == tokenizer.decode(known, **options)


@_PACE
@given(text=TEXT)
def test_no_piece_of_a_stream_has_half_a_character(bpe, text):
    text = text.replace("\ufffd", "")
    stream = bpe.stream_decoder()
    pieces = [stream.push(i) for i in bpe.encode(text, add_special=False)] + [stream.flush()]
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_appears_with_its_last_byte(bpe):
    ids = [bpe.id(char) for char in "ðŁĺĢ"]  # the four bytes of U+1F600
    stream = bpe.stream_decoder()
    assert [stream.push(i) for i in ids] == ["", "", "", "😀"]
    assert [stream.push(ids[0]), repr(stream), stream.flush()] == ["", "StreamDecoder(1 bytes held back)", "\ufffd"]


def test_a_stream_starts_anew_after_flush(spm):
    stream = spm.stream_decoder()
    ids = spm.encode("Hello")
    assert ["".join(map(stream.push, ids)) + stream.flush() for _ in range(2)] == ["Hello", "Hello"]


def test_a_continuation_keeps_its_space(spm):
    ids = spm.encode("Hello")
    assert spm.decode(ids, continuation=True) == " Hello"


def test_half_a_surrogate_pair_is_a_replacement_character(bpe):
    assert bpe.encode("a\ud800b") == bpe.encode("a\ufffdb")
    assert bpe.encode("\ud83d\ude00") == bpe.encode("😀")


def test_special_text_is_text_unless_parsed(smollm2_tokenizer):
    text = "<|im_start|>user"
    assert smollm2_tokenizer.encode(text, parse_special=True)[0] == smollm2_tokenizer.id("<|im_start|>") == 1
    plain = smollm2_tokenizer.encode(text)
    assert 1 not in plain
    assert smollm2_tokenizer.decode(plain) == text


def test_decoding_shows_control_tokens_on_request(smollm2_tokenizer):
    ids = smollm2_tokenizer.encode("<|im_start|>user\nHi<|im_end|>", parse_special=True)
    assert smollm2_tokenizer.decode(ids) == "user\nHi"
    assert smollm2_tokenizer.decode(ids, skip_special=False) == "<|im_start|>user\nHi<|im_end|>"


def test_equal_content_is_an_equal_tokenizer(bpe_metadata, bpe):
    same = Tokenizer.from_gguf(dict(reversed(bpe_metadata.items())))
    other = Tokenizer.from_gguf({**bpe_metadata, "tokenizer.ggml.pre": "gpt-2"})
    assert same == bpe and hash(same) == hash(bpe) and {same: 1}[bpe] == 1
    assert other != bpe and bpe != "bpe"
    assert copy.deepcopy(bpe) is bpe


def test_phi_3_drops_white_space_after_special_tokens(spm_metadata, spm):
    phi = Tokenizer.from_gguf({**spm_metadata, "general.name": "Phi-3 mini"})
    text = "<|im_end|> \n Hi"
    ids = phi.encode(text, parse_special=True)
    assert ids == phi.encode("<|im_end|>Hi", parse_special=True) != spm.encode(text, parse_special=True)


def test_repr_is_short(smollm2_tokenizer):
    assert repr(smollm2_tokenizer) == "Tokenizer(BPE smollm, 49152 tokens)"


@pytest.mark.parametrize("token", [-1, 49152])
def test_an_unknown_id_is_named(smollm2_tokenizer, token):
    for use in (smollm2_tokenizer.token, smollm2_tokenizer.token_bytes, lambda i: smollm2_tokenizer.decode([i])):
        with pytest.raises(TokenizerError, match=f"token id {token} does not exist: this vocabulary has 49152 tokens"):
            use(token)


def test_harmony_s_end_closes_a_message_and_not_the_answer():
    names = ["a", "<|end|>", "<|return|>", "<|call|>", "<|channel|>", "<|endoftext|>"]
    tokens = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *names]}
    tokenizer = Tokenizer.from_gguf(tokens)
    assert {tokenizer.token(i) for i in tokenizer.stop_ids} == {"</s>", "<|return|>", "<|call|>", "<|endoftext|>"}
    assert tokenizer.decode([tokenizer.id("<|channel|>")]) == "<|channel|>"


def test_importing_loads_no_tokenizer_library(fresh_python):
    source = "import sys, trustcore.text; print(sorted({'tokenizers', 'jinja2', 'jax'} & set(sys.modules)))"
    loaded = fresh_python(source)
    assert "tokenizers" not in loaded and "jinja2" not in loaded
