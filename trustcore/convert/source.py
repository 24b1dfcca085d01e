"""A checkpoint of either kind seen as a GGUF file: metadata, and tensors that are read by rows.

A GGUF file is passed on as it is, whatever its architecture. A safetensors model has its names, its rotary layout, its
configuration and its tokenizer put into GGUF's words first; nothing of a tensor is read before its rows are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from trustcore.errors import ModelError, QuantizationError
from trustcore.models.config import DecoderConfig
from trustcore.models.from_checkpoint import described_in, read_config
from trustcore.models.to_gguf import Computed, gguf_divisors, gguf_metadata, gguf_tensors
from trustcore.quant import QuantizedArray
from trustcore.quant.formats import BLOCK_FORMATS
from trustcore.text.to_gguf import gguf_tokenizer
from trustcore.weights import Checkpoint, LazyArray, open_checkpoint
from trustcore.weights.checkpoint import TOKENIZER_GGUF

PLAIN = ("f32", "f16", "bf16", "f64")
_PARTS = ("split.no", "split.count", "split.tensors.count")  # what comes out is one file
_BYTES = ("tokenizer.ggml.precompiled_charsmap",)  # llama.cpp takes this array as bytes only


@dataclass(frozen=True, eq=False)
class SourceTensor:
    """A tensor of the source under its GGUF name.

    Attributes:
        name: in GGUF files.
        shape: `[..., N, K]`.
        encoding: as it is stored.
        array: on disk, computed when it is asked for, or in memory.
        order: which row of the array is written where; None: as they lie.
    """

    name: str
    shape: tuple[int, ...]
    encoding: str
    array: LazyArray | Computed | np.ndarray
    order: np.ndarray | None = None

    @property
    def rows(self) -> int:
        """All rows, of every matrix of a stack."""
        return prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """In the source."""
        return self.array.nbytes

    @property
    def is_packed(self) -> bool:
        """Whether it is stored in blocks."""
        return self.encoding not in PLAIN

    def stored(self, start: int, stop: int) -> np.ndarray:
        """Returns rows as they are stored: numbers `[rows, K]`, or the bytes of blocks, uint8 `[rows, bytes]`."""
        array = self.array
        if isinstance(array, LazyArray) and self.is_packed:
            whole = array.raw()
        else:
            whole = array if isinstance(array, np.ndarray) else array.numpy()
        rows = whole.reshape(self.rows, whole.shape[-1] if whole.ndim else 1)
        return rows[start:stop] if self.order is None else rows[self.order[start:stop]]

    def floats(self, start: int, stop: int) -> np.ndarray:
        """Returns rows as float32 `[rows, K]`."""
        stored = self.stored(start, stop)
        if self.is_packed:
            return np.asarray(QuantizedArray.from_blocks(self.encoding, stored, transposed=True).dequantize())
        return stored.astype(np.float32)

    def release(self) -> None:
        """Hands the pages of the file back; see `LazyArray.release`."""
        if not isinstance(self.array, np.ndarray):
            self.array.release()


@dataclass(frozen=True)
class Source:
    """A model as a GGUF file would hold it."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, SourceTensor]


def read_source(checkpoint: Checkpoint) -> Source:
    """Returns what a GGUF file of the checkpoint holds.

    Raises:
        ModelError: a safetensors model is of a family that is not supported, or its tensors do not fit.
        TokenizerError: its tokenizer has no counterpart in GGUF.
        QuantizationError: a tensor is stored in a way that cannot be read.
    """
    source = _of_gguf(checkpoint) if checkpoint.format == "gguf" else _of_safetensors(checkpoint)
    unknown = [
        f"{tensor.name} is stored as {tensor.encoding}"
        for tensor in source.tensors.values()
        if tensor.encoding not in (*PLAIN, *BLOCK_FORMATS) and len(tensor.shape) > 1
    ]
    if unknown:
        readable = ", ".join(dict.fromkeys((*PLAIN, *BLOCK_FORMATS)))
        raise QuantizationError(f"{checkpoint.path}: {'; '.join(unknown[:20])}. Readable: {readable}.")
    return source


def _of_gguf(checkpoint: Checkpoint) -> Source:
    tensors = {n: SourceTensor(n, array.shape, array.encoding, array) for n, array in checkpoint.items()}
    return Source(_metadata(checkpoint), tensors)


def _of_safetensors(checkpoint: Checkpoint) -> Source:
    config = read_config(checkpoint)
    if not isinstance(config, DecoderConfig):
        raise ModelError(
            f"{checkpoint.path}: GGUF files hold decoders here, and this is a {config.family} model. Give a folder in "
            "place of a .gguf file: it takes safetensors."
        )
    metadata = gguf_metadata(config)
    tensors = {
        name: SourceTensor(name, tensor.shape, tensor.encoding, tensor, rows)
        for name, (tensor, rows) in gguf_tensors(config, checkpoint).items()
    }
    divisors = gguf_divisors(config)
    tensors = {**{name: SourceTensor(name, d.shape, "f32", d) for name, d in divisors.items()}, **tensors}
    tokenizer = _tokenizer(checkpoint.path.parent, config.vocab_size)
    given = described_in(checkpoint).get("_name_or_path") or checkpoint.path.resolve().parent.name
    metadata = {"general.name": str(given).rstrip("/").rsplit("/", 1)[-1], **metadata}
    return Source({**metadata, **tokenizer}, tensors)


def _tokenizer(folder: Path, vocab_size: int) -> Mapping[str, Any]:
    """The `tokenizer.` keys: from tokenizer.json, or as they came, if the model once was a GGUF file."""
    kept = folder / TOKENIZER_GGUF
    if (folder / "tokenizer.json").is_file() or not kept.is_file():
        return gguf_tokenizer(folder, vocab_size=vocab_size)
    with open_checkpoint(kept) as checkpoint:
        return {key: value for key, value in _metadata(checkpoint).items() if key.startswith("tokenizer.")}


def _metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        key: np.asarray(value, np.uint8) if key in _BYTES else value
        for key, value in checkpoint.metadata.items()
        if key not in (*_PARTS, "general.alignment")
    }
