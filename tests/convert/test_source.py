"""Safetensors models as GGUF files: the same logits, the same ids, and metadata that llama.cpp knows."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from tests.convert.folders import LLAMA3, QWEN2, byte_level, hugging_face_folder, write_tokenizer
from tests.models.small import CONFIG
from trustcore.convert import quantize_checkpoint
from trustcore.errors import ModelError, TokenizerError
from trustcore.loading import load
from trustcore.models.config import DecoderConfig
from trustcore.models.to_gguf import gguf_divisors, gguf_metadata, interleaved_rows
from trustcore.ops.rope import RopeConfig
from trustcore.saving import save
from trustcore.text import Tokenizer
from trustcore.text.to_gguf import PROBES, gguf_tokenizer
from trustcore.weights import open_checkpoint


@pytest.mark.parametrize("changes", [{}, {"model_type": "mistral", "sliding_window": 9, "head_dim": 16}])
def test_a_llama_folder_computes_the_same_as_a_gguf_file(tmp_path, changes):
    hugging_face_folder(tmp_path, **changes)
    quantize_checkpoint(tmp_path, tmp_path / "m.gguf", "f32")
    ours, theirs = load(tmp_path / "m.gguf"), load(tmp_path / "model.safetensors")
    assert ours.config.rope.interleaved and not theirs.config.rope.interleaved
    assert ours.config.window == changes.get("sliding_window")
    text = "Hello, world! 12"
    assert ours.tokenizer.encode(text) == theirs.tokenizer.encode(text)
    assert ours.tokenizer.encode(text)[0] == ours.tokenizer.bos_id == theirs.tokenizer.bos_id
    assert (ours.tokenizer.eos_id, ours.tokenizer.chat_template) == (theirs.tokenizer.eos_id, "{{ messages }}")
    assert ours.tokenizer.stop_ids == theirs.tokenizer.stop_ids
    tokens = np.array([ours.tokenizer.encode(text)])
    np.testing.assert_allclose(ours(tokens), theirs(tokens), atol=2e-5)


def test_a_gguf_file_saved_as_safetensors_finds_its_way_back(tmp_path):
    """Its tokenizer went along as metadata."""
    hugging_face_folder(tmp_path)
    quantize_checkpoint(tmp_path, tmp_path / "m.gguf", "f32")
    save(load(tmp_path / "m.gguf"), tmp_path / "saved")
    quantize_checkpoint(tmp_path / "saved", tmp_path / "back.gguf", "f32")
    with open_checkpoint(tmp_path / "m.gguf") as before, open_checkpoint(tmp_path / "back.gguf") as after:
        assert before.metadata == after.metadata | {"general.name": before.metadata["general.name"]}
        assert list(before) == list(after)
        for name, tensor in before.items():
            np.testing.assert_array_equal(tensor.numpy(), after[name].numpy())


def test_packed_rows_are_in_gguf_order(tmp_path):
    model = hugging_face_folder(tmp_path)
    quantize_checkpoint(tmp_path, tmp_path / "m.gguf", "q8_0")
    before = np.asarray(model.blocks[0].attention.query.kernel.get_value())
    after = np.asarray(load(tmp_path / "m.gguf").blocks[0].attention.query.kernel.get_value().dequantize())
    np.testing.assert_allclose(after, before, atol=np.abs(before).max() / 200)


def test_the_metadata_of_a_folder(tmp_path):
    hugging_face_folder(tmp_path, _name_or_path="someone/Small-Llama")
    quantize_checkpoint(tmp_path, tmp_path / "m.gguf", "q4_k_m", search=False)
    with open_checkpoint(tmp_path / "m.gguf") as written:
        found = written.metadata
    assert found["general.name"] == "Small-Llama" and found["general.architecture"] == "llama"
    assert (found["llama.block_count"], found["llama.vocab_size"]) == (2, 320)
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 320
    assert tokens[319] == "[PAD319]" and types[319] == 5 and types[:3] == [3, 3, 3] and types[3] == 1
    assert found["tokenizer.ggml.add_bos_token"] is True and found["tokenizer.ggml.add_eos_token"] is False


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(16, theta=1e4, interleaved=True, original_context=128),
        RopeConfig(16, theta=5e5, interleaved=True, scaling="linear", factor=4.0, original_context=128),
        RopeConfig(16, interleaved=True, scaling="yarn", factor=4.0, original_context=32),
        RopeConfig(16, interleaved=True, scaling="yarn", factor=4.0, original_context=32, attention_factor=1.5),
        RopeConfig(16, interleaved=True, scaling="llama3", factor=8.0, original_context=64),
        RopeConfig(8, interleaved=True, original_context=128),
    ],
)
def test_a_configuration_reads_back_from_its_metadata(rope):
    config = dataclasses.replace(CONFIG, rope=rope)
    divisors = gguf_divisors(config).get("rope_freqs.weight")
    read = DecoderConfig.from_gguf(
        gguf_metadata(config), vocab_size=96, tied=False, rope_divisors=() if divisors is None else tuple(divisors)
    )
    np.testing.assert_allclose(read.rope.frequencies(), rope.frequencies(), rtol=1e-6)
    assert read.rope.magnitude == pytest.approx(rope.magnitude)
    assert dataclasses.replace(read, rope=rope) == config


def test_what_gguf_cannot_say_is_refused(tmp_path):
    rope = RopeConfig(16, scaling="dynamic", factor=2.0, original_context=128)
    with pytest.raises(ModelError, match="cannot say that rotary positions are scaled dynamically"):
        gguf_metadata(dataclasses.replace(CONFIG, rope=rope))
    hugging_face_folder(tmp_path, vocab_size=319)
    with pytest.raises(ModelError, match=r"embed_tokens\.weight has shape \[320, 64\], expected \[319, 64\]"):
        quantize_checkpoint(tmp_path, tmp_path / "m.gguf", "f16")
    hugging_face_folder(tmp_path, attention_bias=True)
    with pytest.raises(ModelError, match=r"self_attn\.q_proj\.bias is missing"):
        quantize_checkpoint(tmp_path, tmp_path / "m.gguf", "f16")


def test_rows_of_halves_to_interleaved_pairs():
    assert interleaved_rows(1, 8, 8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert interleaved_rows(2, 4, 2).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert interleaved_rows(2, 6, 4).tolist() == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]


@pytest.mark.parametrize(
    ("made", "name"),
    [
        ({"pattern": LLAMA3, "ignore_merges": True}, "llama-bpe"),
        ({"pattern": LLAMA3}, "dbrx"),
        ({"pattern": QWEN2}, "qwen2"),
        ({"digits": True}, "smollm"),
        ({}, "gpt-2"),
    ],
)
def test_the_pre_tokenizer_is_found_by_what_it_does(tmp_path, made, name):
    write_tokenizer(tmp_path, byte_level(**made))
    found = gguf_tokenizer(tmp_path, vocab_size=300)
    assert found["tokenizer.ggml.pre"] == name
    ours, theirs = Tokenizer.from_gguf(found), Tokenizer.from_file(tmp_path)
    for text in (*PROBES, "<|im_start|>user"):
        assert ours.encode(text, parse_special=True) == theirs.encode(text, parse_special=True)


def test_a_tokenizer_that_cuts_otherwise_is_refused(tmp_path):
    write_tokenizer(tmp_path, byte_level(pattern="[aeiou]"))
    with pytest.raises(TokenizerError, match="cuts text into words as none of the pre-tokenizers does"):
        gguf_tokenizer(tmp_path, vocab_size=300)
    write_tokenizer(tmp_path, byte_level())
    with pytest.raises(TokenizerError, match="300 tokens, but the model has a table of 200"):
        gguf_tokenizer(tmp_path, vocab_size=200)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"] = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**data, "added_tokens": []}))
    with pytest.raises(TokenizerError, match="cannot hold a WordLevel tokenizer; expected BPE"):
        gguf_tokenizer(tmp_path, vocab_size=300)


def sentence_piece():
    """Llama 2's kind: merges whose order is that of the pieces' scores."""
    from tokenizers import Tokenizer as Reference
    from tokenizers import decoders, models, normalizers

    letters = sorted({c for probe in PROBES for c in probe if c.isascii() and c.isalpha()} | {"▁", ",", "!", "'"})
    base = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters]
    merges = [("▁", "t"), ("h", "e"), ("i", "n"), ("▁t", "he"), ("l", "l"), ("e", "ll"), ("l", "o"), ("ell", "o")]
    merges += [("▁", "▁"), ("▁▁", "▁▁"), ("r", "e"), ("t", "u"), ("re", "tu"), ("retu", "r"), ("retur", "n")]
    ids = {piece: i for i, piece in enumerate([*base, *("".join(merge) for merge in merges)])}
    tokenizer = Reference(models.BPE(ids, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def test_sentencepiece_merges_become_scores(tmp_path):
    write_tokenizer(tmp_path, sentence_piece(), bos="<s>")
    found = gguf_tokenizer(tmp_path, vocab_size=400)
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is True
    types = found["tokenizer.ggml.token_type"]
    assert types[:3] == [2, 3, 3] and set(types[3:259]) == {6}
    ours, theirs = Tokenizer.from_gguf(found), Tokenizer.from_file(tmp_path)
    for text in (*PROBES, "hello the return  of   the    hellotherein"):
        assert ours.encode(text) == theirs.encode(text)
    assert found["tokenizer.ggml.scores"][theirs.id("▁the")] < found["tokenizer.ggml.scores"][theirs.id("▁t")] < 0
