"""Text from tokens, one token at a time, never half a character.

`StreamDecoder.push(id)` returns the text that is certain after that token, `flush()` the rest. Invariant, for any ids:

    "".join(push(id) for id in ids) + flush() == decode(ids)

A UTF-8 character that is spread over several tokens is held back until its last byte is there. Bytes that cannot
become a character are U+FFFD, by the same rule as `bytes.decode("utf-8", "replace")`.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable


class StreamDecoder:
    """Incremental text; made by `Tokenizer.stream_decoder`."""

    def __init__(self, piece: Callable[[int], bytes], *, strip_space: bool):
        """Starts before the first token.

        Args:
            piece: the bytes of a token; empty for one that is not to be seen.
            strip_space: leave out one space at the start of the text.
        """
        self._piece = piece
        self._strip_space = strip_space
        self._at_start = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        data = self._piece(token)
        if self._at_start and data:
            self._at_start = False
            if self._strip_space:
                data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is still held back, at the end of the text; the decoder then starts anew."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self._at_start = True
        return rest

    def __repr__(self) -> str:
        held, _ = self._utf8.getstate()
        return f"StreamDecoder({len(held)} bytes held back)"
