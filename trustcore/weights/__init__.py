"""Checkpoint files as lazy read-only mappings: GGUF and safetensors, read by mmap and never trusted.

`open_checkpoint(path)` recognises the format. The formats themselves are in `gguf` (reader), `gguf_writer` and
`safetensors`, llama.cpp's importance matrices in `imatrix`; this package knows no model and no arithmetic
(`trustcore.quant` decodes packed weights).
"""

from trustcore.weights.checkpoint import Checkpoint, LazyArray, open_checkpoint
from trustcore.weights.imatrix import Imatrix, read_imatrix, write_imatrix

__all__ = ["Checkpoint", "Imatrix", "LazyArray", "open_checkpoint", "read_imatrix", "write_imatrix"]
