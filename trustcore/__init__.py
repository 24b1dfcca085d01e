"""trustcore: the transformer core layer for JAX. From any checkpoint to any chip.

import trustcore as tc
model = tc.load("smollm2")
print(tc.generate(model, "The capital of France is"))

Names are imported when they are first used: importing the package starts no device and loads no optional library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trustcore import debug, graph, kernels, memory, tune
    from trustcore.catalogue import pull
    from trustcore.convert import convert_checkpoint, quantize_checkpoint
    from trustcore.errors import TrustcoreError
    from trustcore.evaluation import compare, perplexity
    from trustcore.generation import Sampling, Stats, Stream, chat, generate, generate_tokens
    from trustcore.loading import load
    from trustcore.models import Decoder, DecoderConfig, embed
    from trustcore.quant import QuantizedArray, quantize
    from trustcore.saving import save
    from trustcore.text import Tokenizer
    from trustcore.weights import Checkpoint, open_checkpoint

__version__ = "0.1.0"

_HOMES = {
    "Checkpoint": "trustcore.weights",
    "Decoder": "trustcore.models",
    "DecoderConfig": "trustcore.models",
    "QuantizedArray": "trustcore.quant",
    "Sampling": "trustcore.generation",
    "Stats": "trustcore.generation",
    "Stream": "trustcore.generation",
    "Tokenizer": "trustcore.text",
    "TrustcoreError": "trustcore.errors",
    "chat": "trustcore.generation",
    "compare": "trustcore.evaluation",
    "convert_checkpoint": "trustcore.convert",
    "embed": "trustcore.models",
    "generate": "trustcore.generation",
    "generate_tokens": "trustcore.generation",
    "load": "trustcore.loading",
    "open_checkpoint": "trustcore.weights",
    "perplexity": "trustcore.evaluation",
    "pull": "trustcore.catalogue",
    "quantize": "trustcore.quant",
    "quantize_checkpoint": "trustcore.convert",
    "save": "trustcore.saving",
}

# Used by their names: `trustcore.debug.inspect`.
_MODULES = ("debug", "graph", "kernels", "memory", "tune")

__all__ = [  # noqa: RUF022 - in the order in which they are met
    "load",
    "generate",
    "chat",
    "embed",
    "generate_tokens",
    "pull",
    "quantize",
    "quantize_checkpoint",
    "convert_checkpoint",
    "save",
    "perplexity",
    "compare",
    "open_checkpoint",
    "debug",
    "graph",
    "kernels",
    "memory",
    "tune",
    "Checkpoint",
    "Decoder",
    "DecoderConfig",
    "QuantizedArray",
    "Sampling",
    "Stats",
    "Stream",
    "Tokenizer",
    "TrustcoreError",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"trustcore.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'trustcore' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
