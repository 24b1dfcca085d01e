"""GGUF metadata to a tokenizer that gives the ids that llama.cpp gives.

`tokenizer.ggml.model` says which of three algorithms: "gpt2" (byte-level BPE, by the `tokenizers` package, its words
cut as `tokenizer.ggml.pre` names), "llama" (SentencePiece BPE by score), "bert" (WordPiece). A text is first cut at
special tokens (`special_tokens.py`); each algorithm sees ordinary text only.

Metadata is untrusted: every field is checked before use, and what is wrong is one `TokenizerError` that names the key,
what stands there and what was expected. Defaults are llama.cpp's, with one exception: a byte-level BPE file without
`bos_token_id` or `eos_token_id` has no such token here (llama.cpp takes token 11, GPT-2's comma).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from trustcore.errors import TokenizerError
from trustcore.text.pre_tokenizers import PreTokenizer, pre_tokenizer
from trustcore.text.sentencepiece import SPACE, ScoreMerger
from trustcore.text.special_tokens import (
    BYTE,
    CONTROL,
    NORMAL,
    TYPES,
    UNKNOWN,
    USER_DEFINED,
    SpecialTokens,
    correct,
)
from trustcore.text.vocabulary import Vocabulary, from_byte_characters
from trustcore.text.wordpiece import WordPiece

# A word encoder: (ordinary text, whether a special token or nothing stands before it) to ids.
Words = Callable[[str, bool], list[int]]

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MODELS = ("gpt2", "llama", "bert")
# Where a file names no such token: (model, token) to the id that llama.cpp then takes.
_DEFAULT_IDS = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "bert": {"bos": 101, "unknown": 100, "seperator": 102, "padding": 0},
    "gpt2": {},
}
_ID_KEYS = "bos eos eot eom unknown seperator padding mask fim_pre fim_suf fim_mid fim_pad fim_rep fim_sep".split()  # noqa: SIM905 (reads better as words)


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """The tokenizer that this metadata describes.

    Raises:
        TokenizerError: a key is missing or its value is not what GGUF says it is.
    """
    fields = _Fields(metadata)
    model = fields.text("model")
    if model is None:
        raise TokenizerError(
            f"{_key('model')} is missing: the file carries no tokenizer. Expected one of {', '.join(_MODELS)}; "
            "load the tokenizer of the original model with Tokenizer.from_file."
        )
    if model not in _MODELS:
        raise TokenizerError(
            f"{_key('model')} is {model!r}; supported are {', '.join(_MODELS)}. "
            "Load the model's tokenizer.json with Tokenizer.from_file."
        )
    tokens = _tokens(fields)
    ids = {token: i for i, token in enumerate(tokens)}
    declared = {name: fields.token(name, len(tokens), _DEFAULT_IDS[model].get(name)) for name in _ID_KEYS}
    named = {name: i for name, i in declared.items() if i is not None}
    types, stops = correct(ids, _types(fields, tokens), named)

    pre_name = fields.text("pre") or "default"
    family = pre_tokenizer(pre_name) if model == "gpt2" else None
    add_bos = fields.flag("add_bos_token", family.add_bos if family else True)
    add_eos = fields.flag("add_eos_token", model == "bert")
    add_space = fields.flag("add_space_prefix", model == "llama")
    if model == "gpt2":
        words, piece, strip_space = _bpe_words(fields, ids, family), from_byte_characters, False
    elif model == "llama":
        words, piece, strip_space = _score_words(fields, ids, named.get("unknown"), add_space), _unmark, add_space
    else:
        words, piece, strip_space = _wordpiece_words(fields, ids, named), _unmark, True
        add_bos = add_eos = True  # [CLS] and [SEP], whatever the file says

    prefix = [named["bos"]] if add_bos and "bos" in named else []
    closing = named.get("seperator") if model == "bert" else named.get("eos")
    suffix = [closing] if add_eos and closing is not None else []
    special = SpecialTokens.of(tokens, types, _strip_after(metadata, tokens, types))
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"tokenizer.chat_template: expected a string, found {_show(template)}.")

    def encode(text: str, parse_special: bool, add_special: bool) -> list[int]:
        out = list(prefix) if add_special else []
        after_special = True
        for fragment in special.split(text, parse_special=parse_special):
            if isinstance(fragment, int):
                out.append(fragment)
            else:
                out += words(fragment, after_special)
            after_special = isinstance(fragment, int)
        return out + (suffix if add_special else [])

    def token_piece(token: int) -> bytes:
        text, kind = tokens[token], types[token]
        if kind in (CONTROL, USER_DEFINED, UNKNOWN):
            return text.encode()
        if kind == NORMAL:
            return piece(text)
        return bytes([int(text[3:5], 16)]) if kind == BYTE else b""

    return Vocabulary(
        kind=f"BPE {pre_name}" if model == "gpt2" else {"llama": "SentencePiece BPE", "bert": "WordPiece"}[model],
        tokens=tuple(tokens),
        ids=ids,
        encode=encode,
        piece=token_piece,
        hidden=frozenset(i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)),
        strip_space=strip_space,
        bos_id=named.get("bos"),
        eos_id=named.get("eos"),
        unk_id=named.get("unknown"),
        pad_id=named.get("padding"),
        stop_ids=stops,
        chat_template=template,
        digest=_digest(metadata),
    )


# Algorithms


def _bpe_words(fields: _Fields, ids: dict[str, int], family: PreTokenizer | None) -> Words:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    assert family is not None
    merges: dict[tuple[str, str], None] = {}  # llama.cpp keeps the first of two equal merges
    for i, merge in enumerate(fields.strings("merges", required=True)):
        cut = merge.find(" ", 1)
        if cut < 0:
            raise TokenizerError(f"{_key('merges')}[{i}] is {merge!r}; expected two tokens with a space between them.")
        merges.setdefault((merge[:cut], merge[cut + 1 :]))
    for i, (left, right) in enumerate(merges):
        absent = next((part for part in (left, right, left + right) if part not in ids), None)
        if absent is not None:
            raise TokenizerError(
                f"{_key('merges')}: merge {i}, {left!r} + {right!r}, needs {absent!r}, which is not in "
                f"{_key('tokens')}. Both halves and their union must be tokens."
            )
    tokenizer = Tokenizer(models.BPE(ids, list(merges), ignore_merges=family.ignore_merges))
    cuts: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in family.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return lambda text, after_special: tokenizer.encode(text, add_special_tokens=False).ids


def _score_words(fields: _Fields, ids: dict[str, int], unk_id: int | None, add_space: bool) -> Words:
    scores = fields.numbers("scores", len(ids))
    merge = ScoreMerger(ids, scores, unk_id)
    return lambda text, after_special: merge((" " + text if add_space and after_special else text).replace(" ", SPACE))


def _wordpiece_words(fields: _Fields, ids: dict[str, int], named: dict[str, int]) -> Words:
    for name in ("bos", "seperator", "unknown"):
        if name not in named:
            raise TokenizerError(f"{_key(name + '_token_id')} is missing: a WordPiece vocabulary needs that token.")
    lowercase = fields.flag("normalizer.lowercase", True)
    strip_accents = fields.flag("normalizer.strip_accents", lowercase)
    pieces = WordPiece(ids, named["unknown"], lowercase=lowercase, strip_accents=strip_accents)
    return lambda text, after_special: pieces(text)


def _unmark(token: str) -> bytes:
    return token.replace(SPACE, " ").encode()


# Fields


def _key(name: str) -> str:
    return f"tokenizer.ggml.{name}"


def _show(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


class _Fields:
    """Typed access to the `tokenizer.ggml.` keys."""

    def __init__(self, metadata: Mapping[str, Any]):
        self._metadata = metadata

    def text(self, name: str) -> str | None:
        value = self._metadata.get(_key(name))
        if value is not None and not isinstance(value, str):
            raise TokenizerError(f"{_key(name)}: expected a string, found {_show(value)}.")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._metadata.get(_key(name), default)
        if not isinstance(value, bool):
            raise TokenizerError(f"{_key(name)}: expected true or false, found {_show(value)}.")
        return value

    def token(self, name: str, count: int, default: int | None) -> int | None:
        key = _key(f"{name}_token_id")
        if key not in self._metadata:
            return default if default is not None and default < count else None
        value = self._metadata[key]
        if isinstance(value, bool) or not isinstance(value, int):
            raise TokenizerError(f"{key}: expected a token id, found {_show(value)}.")
        if not 0 <= value < count:
            raise TokenizerError(f"{key} is {value}, but {_key('tokens')} has {count} tokens (0 to {count - 1}).")
        return value

    def array(self, name: str) -> list[Any] | None:
        value = self._metadata.get(_key(name))
        if value is None:
            return None
        if isinstance(value, str | bytes) or not hasattr(value, "__len__") or not hasattr(value, "__iter__"):
            raise TokenizerError(f"{_key(name)}: expected an array, found {_show(value)}.")
        return value.tolist() if hasattr(value, "tolist") else list(value)

    def strings(self, name: str, *, required: bool = False) -> list[str]:
        values = self.array(name)
        if values is None and required:
            raise TokenizerError(f"{_key(name)} is missing: expected an array of strings.")
        for i, value in enumerate(values or ()):
            if type(value) is not str:
                raise TokenizerError(f"{_key(name)}[{i}]: expected a string, found {_show(value)}.")
        return values or []

    def numbers(self, name: str, count: int) -> list[float]:
        values = self.array(name)
        if values is None:
            return [0.0] * count
        if len(values) < count:
            raise TokenizerError(
                f"{_key(name)} has {len(values)} values, but {_key('tokens')} has {count} tokens; each needs one."
            )
        for i, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
                raise TokenizerError(f"{_key(name)}[{i}]: expected a number, found {_show(value)}.")
        return values[:count]


def _tokens(fields: _Fields) -> list[str]:
    tokens = fields.strings("tokens", required=True)
    if not tokens:
        raise TokenizerError(f"{_key('tokens')} is empty: a vocabulary has at least one token.")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if len(set(tokens)) < len(tokens):
        first: dict[str, int] = {}
        i = next(i for i, token in enumerate(tokens) if first.setdefault(token, i) != i)
        raise TokenizerError(f"{_key('tokens')}[{i}] is {tokens[i]!r}, as token {first[tokens[i]]} is: tokens differ.")
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError:
        i = next(i for i, token in enumerate(tokens) if not _is_unicode(token))
        raise TokenizerError(f"{_key('tokens')}[{i}] is {tokens[i]!r}, which is not valid UTF-8.") from None
    return tokens


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _types(fields: _Fields, tokens: list[str]) -> list[int]:
    types = fields.array("token_type")
    if types is None:
        return [NORMAL] * len(tokens)
    if len(types) < len(tokens):
        raise TokenizerError(
            f"{_key('token_type')} has {len(types)} values, but {_key('tokens')} has {len(tokens)} tokens; "
            "each needs one."
        )
    if not set(map(type, types)) <= {int} or not set(types) <= TYPES:
        i = next(i for i, kind in enumerate(types) if type(kind) is not int or kind not in TYPES)
        raise TokenizerError(f"{_key('token_type')}[{i}]: expected a number from 0 to 6, found {_show(types[i])}.")
    for token, kind in zip(tokens, types, strict=False):
        if kind == BYTE and not _BYTE_TOKEN.fullmatch(token):
            raise TokenizerError(f"{_key('tokens')}: {token!r} is of type byte; expected <0x00> to <0xFF>.")
    return types[: len(tokens)]


def _strip_after(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> set[int]:
    """Tokens after which white space is dropped: all special ones but three, in the Phi-3 models (llama.cpp's list)."""
    name = str(metadata.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return set()
    special = {i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN, USER_DEFINED)}
    return {i for i in special if tokens[i] not in ("<unk>", "<s>", "<|endoftext|>")}


def _digest(metadata: Mapping[str, Any]) -> str:
    keys = sorted(key for key in metadata if key.startswith("tokenizer.") or key == "general.name")
    content = {key: v.tolist() if hasattr(v := metadata[key], "tolist") else v for key in keys}
    return hashlib.sha256(json.dumps(content, default=list).encode()).hexdigest()
