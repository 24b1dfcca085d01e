"""Which tokens are no ordinary text: how they are found in a text, and which of them end an answer.

A GGUF file gives each token a type. Files are often wrong about it, so llama.cpp corrects the type of some tokens by
their text and finds the stop tokens by their text (`llama_vocab::impl::load`); `correct` does the same.

`SpecialTokens.split` cuts a text at special tokens, the longest token first over the whole text, as llama.cpp's
`tokenizer_st_partition` does: user-defined tokens always, control and unknown tokens only where `parse_special` asks
for it.
"""

# ruff: noqa: RUF001, SIM905 (DeepSeek writes its tokens with a wide bar; names read better as words)
from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TYPES = {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE, 0}

# Texts of tokens that end an answer, whatever the file says about them.
_STOPS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> "
    "<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> "
    "<｜end▁of▁sentence｜> [e~[".split()
)
# Texts of fill-in-the-middle tokens. Padding, repository and file separators also end an answer.
_FILL_STOPS = {
    "pad": frozenset("<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]".split()),
    "rep": frozenset("<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>".split()),
    "sep": frozenset(["<|file_sep|>"]),
}
_FILL = frozenset(
    "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|> "
    "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|> "
    "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>".split()
)
# Channel marks of the harmony format are part of the text that a program reads.
_ALWAYS_SHOWN = frozenset("<|channel|> <|message|> <|start|> <|constrain|>".split())


def correct(
    ids: Mapping[str, int], types: Sequence[int], declared: Mapping[str, int]
) -> tuple[list[int], frozenset[int]]:
    """The types of the tokens, corrected by their texts, and the tokens that end an answer.

    Args:
        ids: token by text.
        types: the types that the file gives.
        declared: the ids that the file names: "eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep", where it has them.
    """
    types = list(types)
    stops = {declared[name] for name in ("eos", "eot", "eom") if name in declared}
    for kind, names in _FILL_STOPS.items():
        key = f"fim_{kind}"
        if key in declared:
            stops.add(declared[key])
            continue
        found = {ids[name] for name in names if name in ids}
        stops |= found
        for token in found:
            types[token] = CONTROL
    for name in _STOPS & ids.keys():
        stops.add(ids[name])
        types[ids[name]] = CONTROL
    for name in _FILL & ids.keys():
        types[ids[name]] = CONTROL
    for name in _ALWAYS_SHOWN & ids.keys():
        types[ids[name]] = USER_DEFINED

    # In the harmony and Solar formats <|end|> closes a message, not the answer.
    texts = {name for name in _STOPS & ids.keys() if ids[name] in stops}
    calls = texts & {"<|call|>", "<|calls|>"}
    if "<|end|>" in texts and (("<|return|>" in texts and calls) or ("<|flush|>" in texts and calls)):
        stops.discard(ids["<|end|>"])
        types[ids["<|end|>"]] = USER_DEFINED
    if "</s>" in texts and "<|tool_response>" in texts:
        stops.discard(ids["</s>"])
        types[ids["</s>"]] = NORMAL
    return types, frozenset(stops)


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a vocabulary, as they are looked for in a text.

    Attributes:
        always: (text, id) of the tokens that are found in any text; longest first.
        parsed: the same with the control and unknown tokens among them.
        rstrip: tokens after which white space is dropped.
    """

    always: tuple[tuple[str, int], ...]
    parsed: tuple[tuple[str, int], ...]
    rstrip: frozenset[int] = frozenset()

    @classmethod
    def of(cls, tokens: Sequence[str], types: Sequence[int], rstrip: Collection[int] = ()) -> SpecialTokens:
        """The special tokens among `tokens`."""
        special = [i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN, USER_DEFINED)]
        special.sort(key=lambda i: -len(tokens[i].encode()))
        return cls(
            tuple((tokens[i], i) for i in special if types[i] == USER_DEFINED),
            tuple((tokens[i], i) for i in special),
            frozenset(rstrip),
        )

    def split(self, text: str, *, parse_special: bool) -> Iterator[str | int]:
        """The pieces of a text: strings that are ordinary text, and ids of special tokens."""
        pieces: list[str | int] = [text] if text else []
        for name, token in self.parsed if parse_special else self.always:
            if name in text:
                pieces = [p for piece in pieces for p in self._cut(piece, name, token)]
        yield from pieces

    def _cut(self, piece: str | int, name: str, token: int) -> Iterator[str | int]:
        if isinstance(piece, int):
            yield piece
            return
        first, *rest = piece.split(name)
        if first:
            yield first
        for part in rest:
            yield token
            text = part.lstrip(" \t\n\v\f\r") if token in self.rstrip else part
            if text:
                yield text
