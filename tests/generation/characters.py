"""A tokenizer of bytes, for small models: token i is byte i; 256 begins a text, 257 ends it."""

import dataclasses

from tests.models.small import CONFIG, random_decoder


class StreamDecoder:
    def __init__(self):
        self._bytes = b""

    def push(self, token):
        self._bytes += bytes([token]) if token < 256 else b""
        for cut in range(len(self._bytes), max(-1, len(self._bytes) - 4), -1):
            try:
                text = self._bytes[:cut].decode()
            except UnicodeDecodeError:
                continue
            self._bytes = self._bytes[cut:]
            return text
        return ""

    def flush(self):
        text, self._bytes = self._bytes.decode(errors="replace"), b""
        return text


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    bos_id: int | None = 256
    stop_ids: frozenset[int] = frozenset({257})

    def encode(self, text, *, parse_special=False, add_special=True):
        ids = list(text.encode())
        return [256, *ids] if add_special else ids

    def token(self, token):
        return "<s>" if token == 256 else chr(token)

    def stream_decoder(self, *, continuation=False):
        return StreamDecoder()

    def chat(self, messages):
        return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant: "


def byte_model(seed=0):
    """A small random decoder that reads and writes bytes."""
    model = random_decoder(dataclasses.replace(CONFIG, vocab_size=260), seed)
    model.tokenizer = ByteTokenizer()
    return model
