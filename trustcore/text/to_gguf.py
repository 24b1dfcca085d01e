"""A tokenizer.json as the metadata that GGUF files carry it in: tokens, types, merges or scores, special ids, template.

Two kinds of tokenizer.json have a GGUF counterpart. Byte-level BPE keeps its merges; how text is cut into words has no
place in GGUF but a name, so the name is found by trying: the one whose patterns cut a page of probes as the file does.
BPE over SentencePiece's tokens (Llama 2, Mistral) becomes the "llama" model, whose merges go by score: a token's score
is minus the rank of the first merge that makes it, which is the order in which the file merges.

Invariant: what is written gives the ids of the tokenizer.json on every probe; anything else is refused by name.
"""

# ruff: noqa: RUF001 (the probes hold what texts hold)
from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trustcore.errors import TokenizerError
from trustcore.text.json_tokenizer import steps
from trustcore.text.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from trustcore.text.special_tokens import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from trustcore.text.tokenizer import Tokenizer

# Names that files carry, most common first; the others of the table are tried after them.
_NAMES = ("llama-bpe", "qwen2", "smollm", "gpt-2", "tekken", "deepseek-llm", "deepseek-coder", "deepseek-v3", "gpt-4o")

PROBES = (
    "Hello, World! It's what they'd DONE: we'll see, I'm sure; they've said so, HE'S LATE.",
    "1 12 123 1234 12345678901234567890 3.14159 0xdeadbeef 2024-02-29 a1b22c333d4444",
    "def f(n):\n    if n < 2:\n\t\treturn n  # trailing  \n\n\n\n    return f(n - 1) + f(n - 2)\r\n",
    "  leading   inner      spaces   \n \t\n trailing   ",
    "camelCase PascalCase snake_case SCREAMING kebab-case a/b\\c <|x|> [y] {z} !!! ... ### $5 50% @user #tag",
    "naïve café Straße ŒUVRE Привет, мир! ΚΕΦΑΛΑΙΑ μικρά १२३ ١٢٣",
    "你好，世界！日本語のテキスト한국어 文章 พจนานุกรม נְקֻדּוֹת 😀👍🏽 x²≥0",
)


def gguf_tokenizer(path: str | os.PathLike[str], *, vocab_size: int) -> dict[str, Any]:
    """Returns the `tokenizer.` keys of a GGUF file.

    Args:
        path: a tokenizer.json, or the folder that holds it, with the files that stand beside it.
        vocab_size: rows of the model's table of tokens; ids beyond the vocabulary become unused tokens.

    Raises:
        TokenizerError: the tokenizer cannot be read, GGUF has no counterpart of it, or it has more tokens than the
            model has rows.
    """
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    original = Tokenizer.from_file(file)
    data = json.loads(file.read_bytes())
    model = data.get("model") or {}
    if original.vocab_size > vocab_size:
        raise TokenizerError(
            f"{file}: {original.vocab_size} tokens, but the model has a table of {vocab_size}; they do not belong "
            "together."
        )
    if model.get("type") != "BPE":
        raise TokenizerError(
            f"{file}: a GGUF file of a decoder cannot hold a {model.get('type')} tokenizer; expected BPE. Take a GGUF "
            "file of the model as the source."
        )
    byte_level = "ByteLevel" in [step.get("type") for step in steps(data.get("pre_tokenizer"), "pretokenizers")]
    common = _common(original, data, vocab_size)
    if byte_level:
        return _byte_level(file, data, common, original)
    return _sentence_piece(file, data, common, original)


def _common(original: Tokenizer, data: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """What both kinds have: tokens, types, special ids, template."""
    added = {token["id"]: token for token in data.get("added_tokens") or ()}
    tokens, types = [], []
    for i in range(vocab_size):
        text = original.token(i) if i < original.vocab_size else ""
        if not text:
            tokens.append(f"[PAD{i}]")
            types.append(UNUSED)
            continue
        tokens.append(text)
        types.append(NORMAL if i not in added else CONTROL if added[i].get("special") else USER_DEFINED)
    start = original.encode("", add_special=True)
    values: dict[str, Any] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": original.bos_id is not None and start[:1] == [original.bos_id],
        "tokenizer.ggml.add_eos_token": original.eos_id is not None and start[1:][-1:] == [original.eos_id],
    }
    named = {"bos": original.bos_id, "eos": original.eos_id, "unknown": original.unk_id, "padding": original.pad_id}
    values |= {f"tokenizer.ggml.{name}_token_id": i for name, i in named.items() if i is not None}
    if original.chat_template is not None:
        values["tokenizer.chat_template"] = original.chat_template
    return values


def _byte_level(file: Path, data: dict[str, Any], common: dict[str, Any], original: Tokenizer) -> dict[str, Any]:
    values = {
        "tokenizer.ggml.model": "gpt2",
        **common,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.merges": [
            # GGUF parts the halves by a space; one inside a token is written as byte-level BPE writes spaces.
            " ".join(half.replace(" ", "\u0120") for half in pair)
            for pair in _merges(data)
        ],
    }
    ignores = bool(data["model"].get("ignore_merges"))
    for name in _names_that_cut_alike(file):
        found = {**values, "tokenizer.ggml.pre": name}
        if PRE_TOKENIZERS[name].ignore_merges == ignores and _agree(found, original):
            return found
    raise TokenizerError(
        f"{file}: it cuts text into words as none of the pre-tokenizers does that GGUF files name. Take a GGUF file of "
        f"the model as the source. Known are {', '.join(sorted(PRE_TOKENIZERS))}."
    )


def _names_that_cut_alike(file: Path) -> Iterator[str]:
    """Names of GGUF pre-tokenizers that part every probe where the file does; one name of each family."""
    from tokenizers import Regex, pre_tokenizers
    from tokenizers import Tokenizer as Reference

    def words(cutter: Any) -> list[list[tuple[int, int]]]:
        return [[place for _, place in cutter.pre_tokenize_str(probe)] for probe in PROBES]

    expected = words(Reference.from_str(file.read_text(encoding="utf-8")).pre_tokenizer)
    tried: list[PreTokenizer] = []
    for name in (*_NAMES, *PRE_TOKENIZERS):
        family = PRE_TOKENIZERS[name]
        if family not in tried:
            tried.append(family)
            cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in family.patterns]
            bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            if words(pre_tokenizers.Sequence([*cuts, bytes_])) == expected:
                yield name


def _sentence_piece(file: Path, data: dict[str, Any], common: dict[str, Any], original: Tokenizer) -> dict[str, Any]:
    tokens, types = common["tokenizer.ggml.tokens"], common["tokenizer.ggml.token_type"]
    for i, token in enumerate(tokens):
        if types[i] == NORMAL and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = BYTE
    if original.unk_id is not None:
        types[original.unk_id] = UNKNOWN
    scores = dict.fromkeys(tokens, 0.0)
    for rank, pair in enumerate(_merges(data)):
        scores["".join(pair)] = scores.get("".join(pair)) or -float(rank + 1)
    normal = [step.get("type") for step in steps(data.get("normalizer"), "normalizers")]
    spaced = [step.get("prepend_scheme") for step in steps(data.get("pre_tokenizer"), "pretokenizers")]
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        **common,
        "tokenizer.ggml.scores": [scores[token] for token in tokens],
        "tokenizer.ggml.add_space_prefix": "Prepend" in normal or "always" in spaced or "first" in spaced,
    }
    if not _agree(values, original):
        raise TokenizerError(
            f"{file}: the SentencePiece tokenizer of GGUF files would give other ids than this one. Take a GGUF file "
            "of the model as the source."
        )
    return values


def _merges(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in data["model"].get("merges") or ():
        left, _, right = merge.partition(" ") if isinstance(merge, str) else (merge[0], " ", merge[1])
        yield left, right


def _agree(values: dict[str, Any], original: Tokenizer) -> bool:
    """Whether the GGUF tokenizer gives the ids of the original on every probe, with and without what stands before."""
    written = Tokenizer.from_gguf(values)
    return all(
        written.encode(probe, add_special=special) == original.encode(probe, add_special=special)
        for probe in PROBES
        for special in (False, True)
    )
