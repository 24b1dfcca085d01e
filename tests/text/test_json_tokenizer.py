"""tokenizer.json and its neighbours, against the `tokenizers` package that wrote them."""

from __future__ import annotations

import json
import re

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Reference

from trustcore.errors import TokenizerError
from trustcore.text import Tokenizer

TEXTS = ["", " ", "Hello, world!", "  two  spaces ", "naïve 😀 中文\n\ttab", "a <mark> b", "<|im_end|> x"]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]


def byte_level():
    tokenizer = Reference(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def sentencepiece():
    pieces = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *"▁Helo,wrd!tspacan", "▁H", "el", "▁Hel", "▁▁"]
    ids = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("▁", "H"), ("e", "l"), ("▁H", "el"), ("▁", "▁")]
    tokenizer = Reference(models.BPE(ids, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


def wordpiece():
    pieces = [*SPECIAL, "hello", "wor", "##ld", "##s", ",", "!", "two", "space", "x", "a", "b"]
    tokenizer = Reference(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


def words():
    pieces = [*SPECIAL, "Hello", "world", "two", "spaces", "x"]
    tokenizer = Reference(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


KINDS = [byte_level, sentencepiece, wordpiece, words]


def save(folder, reference, **beside):
    reference.add_tokens([AddedToken("<mark>", special=False)])
    reference.save(str(folder / "tokenizer.json"))
    for name, content in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_is_the_package_s(kind, tmp_path):
    reference = kind()
    tokenizer = Tokenizer.from_file(save(tmp_path, reference))
    plain = kind()
    plain.add_tokens([AddedToken("<mark>", special=False)])
    plain.encode_special_tokens = True
    for text in TEXTS:
        assert tokenizer.encode(text, parse_special=True) == reference.encode(text).ids
        assert tokenizer.encode(text) == plain.encode(text).ids
    assert tokenizer.encode("<|im_end|>", parse_special=True, add_special=False)[-1] == 3
    assert 3 not in tokenizer.encode("<|im_end|>")


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_and_streaming_are_the_package_s(kind, tmp_path):
    reference = kind()
    tokenizer = Tokenizer.from_file(save(tmp_path, reference) / "tokenizer.json")
    for text in TEXTS:
        ids = reference.encode(text).ids
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
        stream = tokenizer.stream_decoder()
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)
    assert tokenizer.decode([3], skip_special=False) == "<|im_end|>" or kind is wordpiece


def test_the_neighbours_name_tokens_and_template(tmp_path):
    save(
        tmp_path,
        byte_level(),
        tokenizer_config={"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "config"},
        special_tokens_map={"unk_token": "<unk>", "pad_token": "</s>"},
        generation_config={"eos_token_id": [2, 7]},
    )
    tokenizer = Tokenizer.from_file(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id) == (1, 2, 0, 2)
    assert tokenizer.stop_ids == {2, 3, 7}
    assert tokenizer.chat([]) == "config"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file")
    assert Tokenizer.from_file(tmp_path).chat([]) == "<s>file"
    assert Tokenizer.from_file(tmp_path) != tokenizer
    assert Tokenizer.from_file(tmp_path / "tokenizer.json") == Tokenizer.from_file(tmp_path)


def test_one_of_several_templates_is_the_default(tmp_path):
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert (
        Tokenizer.from_file(save(tmp_path, words(), tokenizer_config={"chat_template": templates})).chat([]) == "plain"
    )


@pytest.mark.parametrize("by_template", [True, False])
def test_a_beginning_is_put_once(tmp_path, by_template):
    reference = byte_level()
    if by_template:
        reference.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = Tokenizer.from_file(
        save(tmp_path, reference, tokenizer_config={"bos_token": "<s>", "add_bos_token": True})
    )
    assert tokenizer.encode("x").count(1) == 1
    assert tokenizer.encode("x", add_special=False).count(1) == 0


def test_padding_and_truncation_of_the_file_are_off(tmp_path):
    reference = byte_level()
    reference.enable_truncation(2)
    reference.enable_padding(length=50)
    assert 2 < len(Tokenizer.from_file(save(tmp_path, reference)).encode("Hello, world! Hello")) < 50


def break_file(folder, name, content):
    save(folder, words())
    (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "tokenizer.json: not valid JSON: "),
        ("tokenizer.json", b"[]", "tokenizer.json: expected a JSON object, found list."),
        ("tokenizer.json", b"{}", "tokenizer.json: not a tokenizer that the tokenizers package can read: "),
        ("tokenizer.json", b"\xff", "tokenizer.json: not valid JSON: "),
        ("tokenizer.json", b"[" * 100_000, "tokenizer.json: not valid JSON: "),
        ("tokenizer_config.json", b"nonsense", "tokenizer_config.json: not valid JSON: "),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template is a int; expected a string, or a list of"),
        ("generation_config.json", b'{"eos_token_id": 99}', "eos_token_id 99 is no token id; expected 0 to 9."),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: not valid UTF-8: "),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    with pytest.raises(TokenizerError, match=re.escape(message)):
        Tokenizer.from_file(break_file(tmp_path, name, content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        TokenizerError, match=r"tokenizer\.json: no such file\. Expected a tokenizer\.json, or a folder"
    ):
        Tokenizer.from_file(tmp_path)


def test_an_unknown_decoder_is_named(tmp_path):
    reference = words()
    reference.decoder = decoders.CTC()
    with pytest.raises(TokenizerError, match=r"decoder of CTC is not supported\. Supported are ByteLevel, WordPiece"):
        Tokenizer.from_file(save(tmp_path, reference))


def test_ids_without_a_token_add_nothing(tmp_path):
    data = json.loads(words().to_str())
    data["model"]["vocab"]["far"] = 20
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = Tokenizer.from_file(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.decode([15, 20])) == (21, "far")
    data["model"]["vocab"]["far"] = 4_000_000_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(TokenizerError, match="an id of 4000000000; ids are nearly without gaps"):
        Tokenizer.from_file(tmp_path)
