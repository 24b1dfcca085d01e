"""BERT's WordPiece, as llama.cpp computes it (`llm_tokenizer_wpm`).

The text is cut at white space; punctuation, ASCII symbols and ideographs are words of their own; control characters
are dropped, and case and accents where the model was trained without them. Of each word, with `▁` before it, the
longest token that it starts with is taken, and so on with the rest; a word that does not come out even is `unk_id`.

As in llama.cpp, and unlike in BERT's own code, a character without its accents is the first character of its canonical
decomposition: a Hangul syllable becomes its first letter.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping

SPACE = "▁"
_WHITE_SPACE = frozenset(
    "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
)
# The blocks that BERT calls Chinese characters; 2B920 is what the reference implementation has.
_IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


class WordPiece:
    """Encodes text with a vocabulary in which the start of a word is marked by `SPACE`."""

    def __init__(self, ids: Mapping[str, int], unk_id: int, *, lowercase: bool, strip_accents: bool):
        """Prepares the vocabulary; `unk_id` stands for a word that has no tokens."""
        self._ids = ids
        self._unk_id = unk_id
        self._lowercase = lowercase
        self._strip_accents = strip_accents
        self._longest = max(map(len, ids))

    def __call__(self, text: str) -> list[int]:
        """The ids of a text."""
        return [token for word in self._words(text) for token in self._tokens(SPACE + word)]

    def _words(self, text: str) -> Iterator[str]:
        word = ""
        for char in text:
            if self._strip_accents:
                char = unicodedata.normalize("NFD", char)[0]
            kind = unicodedata.category(char)
            if char in _WHITE_SPACE:
                yield from filter(None, [word])
                word = ""
            elif char in "\0\ufffd" or (kind[0] == "C" and kind != "Cn") or (self._strip_accents and kind[0] == "M"):
                continue
            else:
                letter = char.lower()[0] if self._lowercase else char
                if kind[0] == "P" or (kind[0] == "S" and char < "\x7f") or _is_ideograph(char):
                    yield from filter(None, [word, letter])
                    word = ""
                else:
                    word += letter
        yield from filter(None, [word])

    def _tokens(self, word: str) -> list[int]:
        out, start = [], 0
        while start < len(word):
            for end in range(min(len(word), start + self._longest), start, -1):
                token = self._ids.get(word[start:end])
                if token is not None:
                    out.append(token)
                    start = end
                    break
            else:
                return [self._unk_id]
        return out


def _is_ideograph(char: str) -> bool:
    return any(first <= ord(char) <= last for first, last in _IDEOGRAPHS)
