"""The ops that declare what may be tuned of them, by name, and the hash of their sources.

Built-in declarations stand beside their ops; a file is imported when an op of it is first asked for. A user's own are
`register`ed, for this process.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kernels_pallas.tuning import Tunable
from trustcore.errors import TuningError

# A family stands for all of its ops, whose names begin with its own.
FAMILIES: tuple[str, ...] = (
    "attention", "cross_entropy", "norm", "activation", "packed_product", "decode_attention", "grouped_matmul",
    "selective_scan",
)  # fmt: skip
_registered: dict[str, Tunable] = {}


def register(tunable: Tunable) -> None:
    """Makes an op of your own known by its name, in this process.

    Raises:
        TuningError: the name belongs to an op of trustcore.
    """
    if any(tunable.op.startswith(family) for family in FAMILIES):
        raise TuningError(f"{tunable.op}: names that begin with {', '.join(FAMILIES)} belong to trustcore.")
    _registered[tunable.op] = tunable


def declared(op: str) -> Tunable:
    """Returns the declaration of an op.

    Raises:
        TuningError: there is none.
    """
    found = known(op)
    if found is None:
        raise TuningError(f"{op!r} is no op that can be tuned; choose of {', '.join(names())}.")
    return found


def known(op: str) -> Tunable | None:
    """Returns the declaration of an op; None where it declares nothing."""
    if op in _registered:
        return _registered[op]
    family = family_of(op)
    return _family(family).get(op) if family else None


def family_of(op: str) -> str:
    """Returns the family that an op's name begins with, "" for an op of your own."""
    return next((f for f in FAMILIES if op.startswith(f)), "")


def members(name: str) -> tuple[Tunable, ...]:
    """Returns the declarations that a name stands for: that of an op, or all of a family; none if it is neither."""
    if name in FAMILIES:
        return tuple(_family(name).values())
    found = known(name)
    return () if found is None else (found,)


def names() -> tuple[str, ...]:
    """Returns the names of all ops that can be tuned."""
    return (*(op for family in FAMILIES for op in _family(family)), *_registered)


@functools.cache
def _family(family: str) -> dict[str, Tunable]:
    if family == "attention":
        from kernels_pallas.attention import tunable as home
    elif family == "cross_entropy":
        from kernels_pallas.cross_entropy import tunable as home
    elif family == "packed_product":
        from trustcore.quant import tunable as home
    elif family == "decode_attention":
        from kernels_pallas.decode import tunable as home
    elif family == "grouped_matmul":
        from kernels_pallas.grouped_matmul import tunable as home
    elif family == "selective_scan":
        from kernels_pallas.selective_scan import tunable as home
    else:
        from kernels_pallas import row_tunables as home
    return {t.op: t for t in home.TUNABLES if t.op.startswith(family)}


@functools.lru_cache(maxsize=256)
def _hash(sources: tuple[str | Callable[..., Any], ...]) -> str:
    texts = hashlib.sha256()
    for source in sources:
        if not isinstance(source, str):
            texts.update(inspect.getsource(source).encode() + b"\0")
            continue
        spec = importlib.util.find_spec(source)
        if spec is None or spec.origin is None:
            raise TuningError(f"{source}: its source is not found; a declaration's `sources` are names of modules.")
        # A package with sources in another language counts with all of them.
        folder = Path(spec.origin).parent
        more = (
            sorted(p for p in folder.iterdir() if p.suffix in (".cc", ".h")) if spec.submodule_search_locations else []
        )
        for path in (Path(spec.origin), *more):
            texts.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return texts.hexdigest()[:16]


def source_hash(tunable: Tunable) -> str:
    """Returns a hash of the sources that a declaration names."""
    return _hash(tunable.sources)
