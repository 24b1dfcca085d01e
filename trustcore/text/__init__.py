"""Text: tokenizers from GGUF metadata or tokenizer.json, chat templates, and streaming back to characters."""

from trustcore.text.stream import StreamDecoder
from trustcore.text.tokenizer import Tokenizer

__all__ = ["StreamDecoder", "Tokenizer"]
