"""Checkpoint files as lazy read-only mappings: GGUF and safetensors, read by mmap and never trusted.

`open_checkpoint(path)` recognises the format. The formats themselves are in `gguf` (reader), `gguf_writer` and
`safetensors`; this package knows no model and no arithmetic (`trustcore.quant` decodes packed weights).
"""

from trustcore.weights.checkpoint import Checkpoint, LazyArray, open_checkpoint

__all__ = ["Checkpoint", "LazyArray", "open_checkpoint"]
