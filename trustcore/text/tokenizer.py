"""Text to token ids and back: `Tokenizer`, the same whether it came from a GGUF file or from a tokenizer.json.

    GGUF metadata ── gguf_tokenizer ──▶ Vocabulary ◀── json_tokenizer ── tokenizer.json
                                            │
                        Tokenizer: encode, decode, stream_decoder, chat

A tokenizer never changes. Two are equal, and have one hash, when everything that decides their ids and texts is equal,
so one can be a static part of a pytree without a second compilation.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trustcore.errors import TokenizerError
from trustcore.text.stream import StreamDecoder
from trustcore.text.vocabulary import Vocabulary


class Tokenizer:
    """Encodes text, decodes ids, renders chats.

    Example:
        >>> tokens = ["<unk>", "<s>", "</s>", "▁hi", "▁", "h", "i", "hi"]
        >>> tokenizer = Tokenizer.from_gguf({"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens})
        >>> tokenizer.encode("hi"), tokenizer.decode([3])
        ([1, 3], 'hi')
    """

    def __init__(self, vocabulary: Vocabulary):
        """Wraps a vocabulary; see `from_gguf` and `from_file`."""
        self._vocabulary = vocabulary

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer that stands in a GGUF file.

        Args:
            metadata: the file's key/value metadata as plain Python values.

        Raises:
            TokenizerError: the metadata has no tokenizer, or a key of it is not what it should be.
        """
        from trustcore.text.gguf_tokenizer import read_vocabulary

        return cls(read_vocabulary(metadata))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer of a tokenizer.json.

        Args:
            path: the file, or its folder. tokenizer_config.json, special_tokens_map.json, generation_config.json and
                chat_template.jinja beside it are read where they exist.

        Raises:
            TokenizerError: a file is missing or broken.
        """
        from trustcore.text.json_tokenizer import read_vocabulary

        return cls(read_vocabulary(path))

    def encode(self, text: str, *, parse_special: bool = False, add_special: bool = True) -> list[int]:
        """The ids of a text.

        Args:
            text: any string; half a surrogate pair, which is no character, counts as U+FFFD.
            parse_special: read "<|im_end|>" and the like as the tokens of that name. Leave it off for text that a
                user typed, or the user speaks with the voice of the system.
            add_special: put the tokens at start and end that the model was trained with.
        """
        return self._vocabulary.encode(_characters(text), parse_special, add_special)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continuation: bool = False) -> str:
        """The text of ids.

        Args:
            ids: tokens; bytes that are not UTF-8 become U+FFFD.
            skip_special: leave out control tokens.
            continuation: these ids go on from others. Where a tokenizer puts a space before the first word, that
                space is dropped from a whole text and kept in a continuation.
        """
        stream = self.stream_decoder(skip_special=skip_special, continuation=continuation)
        return "".join([stream.push(token) for token in ids]) + stream.flush()

    def stream_decoder(self, *, skip_special: bool = True, continuation: bool = False) -> StreamDecoder:
        """A decoder that takes one token at a time; its pieces together are what `decode` gives."""
        hidden = self._vocabulary.hidden if skip_special else frozenset()
        return StreamDecoder(
            lambda token: b"" if token in hidden else self.token_bytes(token),
            strip_space=self._vocabulary.strip_space and not continuation,
        )

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token adds to a text; for a control token the UTF-8 of its name."""
        self.token(id)
        return self._vocabulary.piece(id)

    def id(self, token: str) -> int | None:
        """The id of the token that the vocabulary spells like this; None where there is none."""
        return self._vocabulary.ids.get(token)

    def token(self, id: int) -> str:
        """The token as the vocabulary spells it.

        Raises:
            TokenizerError: no token has this id.
        """
        if not 0 <= id < self.vocab_size:
            raise TokenizerError(
                f"token id {id} does not exist: this vocabulary has {self.vocab_size} tokens from 0 on."
            )
        return self._vocabulary.tokens[id]

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return len(self._vocabulary.tokens)

    @property
    def bos_id(self) -> int | None:
        """The token at the beginning of a sequence."""
        return self._vocabulary.bos_id

    @property
    def eos_id(self) -> int | None:
        """The token at the end of a sequence."""
        return self._vocabulary.eos_id

    @property
    def unk_id(self) -> int | None:
        """The token for what has no token."""
        return self._vocabulary.unk_id

    @property
    def pad_id(self) -> int | None:
        """The token that fills up a batch."""
        return self._vocabulary.pad_id

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every token that ends an answer: end of sequence, of turn, of message."""
        return self._vocabulary.stop_ids

    @property
    def chat_template(self) -> str | None:
        """The jinja2 source of the model's chat format."""
        return self._vocabulary.chat_template

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt of a conversation; encode it with `parse_special=True, add_special=False`.

        Args:
            messages: {"role": ..., "content": ...} in order.
            add_generation_prompt: end with the head of the assistant's answer.
            variables: further variables of the template, such as `tools`.

        Raises:
            TokenizerError: there is no template, it fails, or it does what a template must not.
        """
        from trustcore.text.chat import render

        if self.chat_template is None:
            raise TokenizerError(
                "this tokenizer has no chat template: the checkpoint carries none. Write the prompt yourself and "
                "encode(prompt, parse_special=True)."
            )
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self.unk_id, "pad_token": self.pad_id}
        special = {name: "" if token is None else self.token(token) for name, token in names.items()}
        variables = {**special, **variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
        return render(self.chat_template, variables)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._vocabulary.digest == other._vocabulary.digest

    def __hash__(self) -> int:
        return hash(self._vocabulary.digest)

    def __copy__(self) -> Tokenizer:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokenizer:
        return self

    def __repr__(self) -> str:
        return f"Tokenizer({self._vocabulary.kind}, {self.vocab_size} tokens)"


def _characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
