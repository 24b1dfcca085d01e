"""Every error that trustcore raises on purpose, as one tree.

A message says what was wrong, what was given, what is allowed and what to write instead. Each class is also a
standard Python error, so `except ValueError` keeps working for callers who do not know this file.
"""

from __future__ import annotations

import os


class TrustcoreError(Exception):
    """Root of the tree: catching it catches every refusal of trustcore and nothing else."""


class CheckpointError(TrustcoreError, ValueError):
    """A checkpoint file is broken, hostile, or not of the kind it claims to be.

    Args:
        message: what was found and what was expected.
        path: the file.
        field: the field of the format that is wrong, in the format's own words (`tensor_count`, `tensor 'x'.offset`).
        offset: where that field starts, in bytes from the start of the file.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | os.PathLike[str] | None = None,
        field: str | None = None,
        offset: int | None = None,
    ):
        self.path, self.field, self.offset = path, field, offset
        where = [str(path)] if path is not None else []
        if field is not None:
            where.append(field if offset is None else f"{field} at byte {offset}")
        elif offset is not None:
            where.append(f"byte {offset}")
        super().__init__(": ".join([*where, message]))


class TokenizerError(TrustcoreError, ValueError):
    """A tokenizer cannot be built from what the checkpoint holds, or a token or template is not its own."""


class ModelError(TrustcoreError, ValueError):
    """A configuration or a set of weights does not describe a model that trustcore can build."""


class QuantizationError(TrustcoreError, ValueError):
    """An array cannot be packed in, or unpacked from, the format that was asked for."""


class ImplementationError(TrustcoreError, ValueError):
    """An implementation that was asked for by name cannot compute this call."""


class GenerationError(TrustcoreError, ValueError):
    """A generation request is impossible: a prompt that does not fit, a sampling value out of range."""


class EvaluationError(TrustcoreError, ValueError):
    """A model cannot be measured as asked: a text that is too short, models that do not compare."""


class ProgramError(TrustcoreError, ValueError):
    """A program cannot be looked into, or cannot do what was asked of it: fit into a budget, for example."""


class CatalogueError(TrustcoreError, OSError):
    """A model name is unknown, or its files could not be brought to this machine."""


class BackendError(TrustcoreError, RuntimeError):
    """A backend is not installed, does not start, or has no such device."""


class TuningError(TrustcoreError, ValueError):
    """An op cannot be tuned as asked: it declares nothing, its facts are wrong, or no candidate is right."""


class DebugError(TrustcoreError, ValueError):
    """A function cannot be inspected as asked: a pattern that fits nothing, arguments that are gone, a broken file."""


class PoolError(TrustcoreError, RuntimeError):
    """A pool of buffers cannot do what was asked: a buffer that is gone, no such policy, a limit out of range."""
