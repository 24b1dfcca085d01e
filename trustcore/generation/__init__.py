"""From a prompt to text: sampling on the device, several tokens a dispatch, streaming on the host."""

from trustcore.generation.engine import generate_tokens
from trustcore.generation.sampling import Sampling
from trustcore.generation.stream import Stats, Stream
from trustcore.generation.text import chat, generate

__all__ = ["Sampling", "Stats", "Stream", "chat", "generate", "generate_tokens"]
