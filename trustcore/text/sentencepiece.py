"""SentencePiece's byte-pair encoding by score, as llama.cpp computes it (`llm_tokenizer_spm`).

Characters are merged pairwise. A pair may be merged when its union is a token; the union with the highest score goes
first, the leftmost of equals. What is left and is no token becomes its UTF-8 bytes, as the tokens "<0x00>".."<0xFF>".

Not built onto the `tokenizers` package: its BPE ranks pairs, not unions, so equal scores (▁▁▁▁ from 1+3 or 2+2) come
out in another order, and it cannot merge through a character that is no token itself.

A merge over the border of two characters needs a token in which these two stand side by side. Where no token has
them, the text falls into chunks that are encoded independently, and remembered: in practice these are the words.
O(n log n) for a chunk of n characters.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence

SPACE = "▁"  # U+2581, which stands for a space in the tokens
_REMEMBERED = 32768  # chunks


class ScoreMerger:
    """Encodes text whose spaces are already `SPACE`."""

    def __init__(self, ids: Mapping[str, int], scores: Sequence[float], unk_id: int | None):
        """Prepares the vocabulary.

        Args:
            ids: token by text.
            scores: the score of each token.
            unk_id: stands for a byte that has no token; None drops the byte.
        """
        self._ids = ids
        self._scores = scores
        self._bytes = [ids.get(f"<0x{b:02X}>", ids.get(chr(b), unk_id) if b < 128 else unk_id) for b in range(256)]
        self._neighbours = {token[i : i + 2] for token in ids for i in range(len(token) - 1)}
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """The ids of a text."""
        out: list[int] = []
        for chunk in self._chunks(text):
            ids = self._known.get(chunk)
            if ids is None:
                ids = self._merge(chunk)
                if len(self._known) >= _REMEMBERED:
                    self._known.clear()
                self._known[chunk] = ids
            out += ids
        return out

    def _chunks(self, text: str) -> Iterator[str]:
        start = 0
        for i in range(1, len(text)):
            if text[i - 1 : i + 1] not in self._neighbours:
                yield text[start:i]
                start = i
        if text:
            yield text[start:]

    def _merge(self, chunk: str) -> list[int]:
        symbols = list(chunk)  # the text of each symbol; empty once it is merged into its left neighbour
        before = list(range(-1, len(symbols) - 1))
        after = [*range(1, len(symbols)), -1]
        queue: list[tuple[float, int, int, int]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                union = symbols[left] + symbols[right]
                token = self._ids.get(union)
                if token is not None:
                    heapq.heappush(queue, (-self._scores[token], left, right, len(union)))

        for i in range(1, len(symbols)):
            offer(i - 1, i)
        while queue:
            _, left, right, length = heapq.heappop(queue)
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != length:
                continue  # one of the two has been merged since this pair was offered
            symbols[left] += symbols[right]
            symbols[right] = ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])

        out: list[int] = []
        for symbol in filter(None, symbols):
            token = self._ids.get(symbol)
            found = [token] if token is not None else [self._bytes[b] for b in symbol.encode()]
            out += [t for t in found if t is not None]
        return out
