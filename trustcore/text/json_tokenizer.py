"""A tokenizer.json, and the files that Hugging Face puts beside it, to a tokenizer.

The `tokenizers` package encodes; what a token adds to a text is derived here from the file's decoder, token by token,
because streaming needs it so. A decoder's clean-up of spaces before punctuation (BERT) is left out: it takes away text
that was there, and cannot be done one token at a time.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trustcore.errors import TokenizerError
from trustcore.text.sentencepiece import SPACE
from trustcore.text.special_tokens import CONTROL, NORMAL, correct
from trustcore.text.vocabulary import Vocabulary, from_byte_characters

_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")


def read_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """The tokenizer of a folder, or of the tokenizer.json itself.

    Raises:
        TokenizerError: a file is missing or broken, or its decoder is of a kind that is not supported.
    """
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise TokenizerError(f"{file}: no such file. Expected a tokenizer.json, or a folder that holds one.")
    content = {name: other.read_bytes() for name in _BESIDE if (other := file.parent / name).is_file()}
    source = file.read_bytes()
    data = _json(source, file)
    config, names, generation = (
        _json(content[name], file.parent / name) if name in content else {} for name in _BESIDE[:3]
    )
    tokenizer = _load(source, file, parse_special=True)

    ids = dict(tokenizer.get_vocab(with_added_tokens=True))
    tokens = _by_id(ids, file)
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    piece, strip_space = _pieces(data, file)

    def named(name: str) -> int | None:
        text = config.get(f"{name}_token") or names.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        return ids.get(text) if isinstance(text, str) else None

    bos_id, eos_id = named("bos"), named("eos")
    model = data.get("model")
    unk = model.get("unk_token") if isinstance(model, dict) else None
    types = [CONTROL if i in special else NORMAL for i in range(len(tokens))]
    _, stops = correct(ids, types, {} if eos_id is None else {"eos": eos_id})
    stops |= frozenset(_ids(generation.get("eos_token_id"), len(tokens), file.parent / "generation_config.json"))

    @functools.cache
    def variant(parse_special: bool) -> Any:
        return tokenizer if parse_special else _load(source, file, parse_special=False)

    head = [bos_id] if config.get("add_bos_token") is True and bos_id is not None else []

    def encode(text: str, parse_special: bool, add_special: bool) -> list[int]:
        out = variant(parse_special).encode(text, add_special_tokens=add_special).ids
        if add_special and head and out[:1] != head:
            return head + out
        return out

    def token_piece(token: int) -> bytes:
        if token in special:
            return tokens[token].encode()
        text = tokenizer.id_to_token(token)  # an added token as its normalizer spells it, which is what decoding sees
        return piece(text) if text else b""

    return Vocabulary(
        kind=f"{model.get('type', 'model') if isinstance(model, dict) else 'model'} of {file.name}",
        tokens=tokens,
        ids=ids,
        encode=encode,
        piece=token_piece,
        hidden=frozenset(special),
        strip_space=strip_space,
        bos_id=bos_id,
        eos_id=eos_id,
        unk_id=named("unk") if named("unk") is not None else ids.get(unk) if isinstance(unk, str) else None,
        pad_id=named("pad"),
        stop_ids=stops,
        chat_template=_template(content, config, file.parent),
        digest=hashlib.sha256(b"\0".join([source, *(n.encode() + b"\0" + c for n, c in content.items())])).hexdigest(),
    )


def _json(source: bytes, file: Path) -> dict[str, Any]:
    try:
        data = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file}: not valid JSON: {error}.") from None
    if not isinstance(data, dict):
        raise TokenizerError(f"{file}: expected a JSON object, found {type(data).__name__}.")
    return data


def _load(source: bytes, file: Path, *, parse_special: bool) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(source.decode())
    except Exception as error:  # the package raises plain Exception
        raise TokenizerError(f"{file}: not a tokenizer that the tokenizers package can read: {error}.") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = not parse_special
    return tokenizer


def _by_id(ids: dict[str, int], file: Path) -> tuple[str, ...]:
    if not ids:
        raise TokenizerError(f"{file}: the vocabulary is empty.")
    count = max(ids.values()) + 1
    if count > 4 * len(ids) + 65536:
        raise TokenizerError(f"{file}: {len(ids)} tokens, but an id of {count - 1}; ids are nearly without gaps.")
    tokens = [""] * count  # an id without a token adds nothing to a text
    for token, i in ids.items():
        tokens[i] = token
    return tuple(tokens)


def _ids(value: object, count: int, file: Path) -> list[int]:
    values: list[Any] = [] if value is None else value if isinstance(value, list) else [value]
    for i in values:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < count:
            raise TokenizerError(f"{file}: eos_token_id {i!r} is no token id; expected 0 to {count - 1}.")
    return values


def _template(content: dict[str, bytes], config: dict[str, Any], folder: Path) -> str | None:
    if "chat_template.jinja" in content:
        try:
            return content["chat_template.jinja"].decode()
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{folder / 'chat_template.jinja'}: not valid UTF-8: {error}.") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t["name"]: t["template"] for t in template if isinstance(t, dict) and t.keys() >= {"name", "template"}}
        template = named.get("default") or next(iter(named.values()), None)
    if template is not None and not isinstance(template, str):
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: chat_template is a {type(template).__name__}; expected a string, or "
            'a list of {"name": ..., "template": ...}.'
        )
    return template


# What a token adds to a text


def _pieces(data: dict[str, Any], file: Path) -> tuple[Callable[[str], bytes], bool]:
    """The bytes of an ordinary token, and whether a whole text starts with one space too many."""
    decoding = list(steps(data.get("decoder"), "decoders"))
    kinds = [step.get("type") for step in decoding]
    if "ByteLevel" in kinds or (not kinds and "ByteLevel" in _kinds(data.get("pre_tokenizer"), "pretokenizers")):
        return from_byte_characters, any(_prefixes(s) for s in steps(data.get("pre_tokenizer"), "pretokenizers"))
    if not kinds:  # the package then joins tokens with spaces
        return lambda token: b" " + token.encode(), True
    if "WordPiece" in kinds:
        mark = decoding[kinds.index("WordPiece")].get("prefix", "##")
        return (
            lambda token: token.removeprefix(mark).encode() if token.startswith(mark) else b" " + token.encode(),
            True,
        )
    known = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
    if set(kinds) <= known and kinds.count("Replace") + kinds.count("Metaspace") == 1:
        strip_space = any(
            (s["type"] == "Strip" and s.get("content") == " " and s.get("start", 0) > 0)
            or (s["type"] == "Metaspace" and _prefixes(s))
            for s in decoding
        )
        return functools.partial(_sentence_piece, "ByteFallback" in kinds), strip_space
    raise TokenizerError(
        f"{file}: decoder of {', '.join(map(str, kinds))} is not supported. Supported are ByteLevel, WordPiece, "
        f"Metaspace, and Replace with any of {', '.join(sorted(known - {'Replace', 'Metaspace'}))}."
    )


def _sentence_piece(byte_fallback: bool, token: str) -> bytes:
    if byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes.fromhex(token[3:5])
        except ValueError:
            pass  # "<0xZZ>" is text
    return token.replace(SPACE, " ").encode()


def steps(part: Any, inner: str) -> Iterator[dict[str, Any]]:
    """A decoder or pre-tokenizer as the list of what it does in turn."""
    if isinstance(part, dict) and part.get("type") == "Sequence":
        for step in part.get(inner) or ():
            yield from steps(step, inner)
    elif isinstance(part, dict):
        yield part


def _kinds(part: Any, inner: str) -> list[Any]:
    return [step.get("type") for step in steps(part, inner)]


def _prefixes(step: dict[str, Any]) -> bool:
    """Whether this step puts a space before the first word."""
    if "prepend_scheme" in step:
        return step["prepend_scheme"] != "never"
    return step.get("type") in ("ByteLevel", "Metaspace") and step.get("add_prefix_space") is True
