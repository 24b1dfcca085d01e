"""What a tokenizer is once its file has been read: the common ground of the GGUF and the tokenizer.json route."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

# GPT-2's printable stand-in for each byte: printable Latin-1 stands for itself, the others for U+0100 and up.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [b for b in range(0x100) if b not in _PRINTABLE]
BYTE_OF = {chr(b): bytes([b]) for b in _PRINTABLE} | {chr(0x100 + i): bytes([b]) for i, b in enumerate(_OTHERS)}


def from_byte_characters(token: str) -> bytes:
    """The bytes that a byte-level token stands for; a character outside GPT-2's alphabet is its own UTF-8."""
    return b"".join(BYTE_OF.get(char) or char.encode() for char in token)


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """Tokens, their bytes, and how text becomes ids.

    Attributes:
        kind: the algorithm in a few words, for `repr`.
        tokens: text of each token, as the file spells it.
        ids: token by text.
        encode: (text, parse_special, add_special) to ids.
        piece: the bytes that a token adds to a text.
        hidden: tokens that decoding leaves out unless it is told otherwise.
        strip_space: the text of a whole encoding starts with one space too many.
        bos_id: beginning of a sequence, where there is such a token; eos_id, unk_id, pad_id alike.
        stop_ids: tokens that end an answer.
        chat_template: jinja2 source.
        digest: SHA-256 of everything that decides what this tokenizer does.
    """

    kind: str
    tokens: tuple[str, ...]
    ids: Mapping[str, int]
    encode: Callable[[str, bool, bool], list[int]]
    piece: Callable[[int], bytes]
    hidden: frozenset[int]
    strip_space: bool
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    pad_id: int | None
    stop_ids: frozenset[int]
    chat_template: str | None
    digest: str
