"""Checkpoint files as lazy read-only mappings, read by mmap and never trusted.

`open_checkpoint(path)` recognises the format. `place` and `load_arrays` put tensors straight onto a sharding. The
formats themselves are in `gguf`, `safetensors`, `pytorch`, `npz`, `flax_msgpack` and `orbax`, their writers in
`gguf_writer`, `safetensors_writer` and `orbax`, llama.cpp's importance matrices in `imatrix`; this package knows no
model and no arithmetic (`trustcore.quant` decodes packed weights).
"""

from trustcore.weights.checkpoint import Checkpoint, LazyArray
from trustcore.weights.imatrix import Imatrix, read_imatrix, write_imatrix
from trustcore.weights.opening import open_checkpoint
from trustcore.weights.placement import load_arrays, place, prefetch

__all__ = [
    "Checkpoint",
    "Imatrix",
    "LazyArray",
    "load_arrays",
    "open_checkpoint",
    "place",
    "prefetch",
    "read_imatrix",
    "write_imatrix",
]
