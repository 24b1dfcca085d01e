"""What each way to take less memory would save a gradient, compiled and not guessed.

    print(savings(loss, params, batch, batch=(1,)))

One thing is changed at a time: the parameters' memory is given for the gradient (donation), blocks are computed again
(remat), the batch is split in two (microbatches), floats are of a narrower dtype. `fit` combines them for a budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trustcore import units
from trustcore.errors import ProgramError
from trustcore.memory.account import peak_of
from trustcore.memory.fit import microbatches, step_of


@dataclasses.dataclass(frozen=True)
class Saving:
    """One change.

    Attributes:
        name: of it.
        peak: bytes of the changed program.
        saved: bytes less than the plain one; negative where it takes more.
        flops: times those of the plain program; None where XLA does not count them.
    """

    name: str
    peak: int
    saved: int
    flops: float | None


@dataclasses.dataclass(frozen=True)
class Savings:
    """What `savings` found: the plain peak, and the changes, those that save most first."""

    plain: int
    found: tuple[Saving, ...]

    def __getitem__(self, name: str) -> Saving:
        """Returns the change of a name."""
        return {saving.name: saving for saving in self.found}[name]

    def as_json(self) -> dict[str, Any]:
        """Returns all of it as values that JSON can hold."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [f"{units.size(self.plain)} as it is"]
        for each in self.found:
            flops = "" if each.flops is None else f", {each.flops:.2f} times the FLOPs"
            sign = "saves" if each.saved >= 0 else "takes"
            more = "" if each.saved >= 0 else " more"
            lines.append(
                f"{each.name:22} {sign} {units.size(abs(each.saved)):>10}{more} ({units.size(each.peak)}{flops})"
            )
        return "\n".join(lines)


def savings(
    fn: Callable[..., Any], *args: Any, batch: Sequence[int] = (), argnums: int = 0, dtype: Any = "bfloat16"
) -> Savings:
    """Returns what donation, remat, microbatches and a narrower dtype would each save the gradient of `fn(*args)`.

    Args:
        fn: to a scalar, as `fit` takes it.
        args: of it, or their shapes.
        batch: numbers of the arguments whose arrays have the batch as their first axis; none: it is not split.
        argnums: of the argument with respect to which to differentiate.
        dtype: in which float arguments that are wider would be held and computed.

    Raises:
        ProgramError: dtype is no float type.

    Each change is compiled; nothing is run.
    """
    narrow = jnp.dtype(dtype)
    if not jnp.issubdtype(narrow, jnp.floating):
        raise ProgramError(f"savings: dtype {narrow.name} holds no floats; write bfloat16 or float16.")

    def cast(leaf: Any) -> Any:
        wide = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize > narrow.itemsize
        given = getattr(leaf, "sharding", None)
        return jax.ShapeDtypeStruct(leaf.shape, narrow if wide else leaf.dtype, sharding=given)

    def told(remat: str = "none", split: int = 1, *, donate: bool = False, given: Any = args) -> tuple[int, float]:
        step = step_of(fn, remat, split, tuple(batch), argnums)
        compiled = jax.jit(step, donate_argnums=argnums if donate else ()).lower(*given).compile()
        flops = float((compiled.cost_analysis() or {}).get("flops", 0.0)) * split
        return peak_of(compiled), max(flops, 0.0)

    plain, work = told()
    changes = {
        "donation": told(donate=True),
        "remat, products saved": told("products saved"),
        "remat, nothing saved": told("nothing saved"),
        narrow.name: told(given=tuple(jax.tree.map(cast, arg) for arg in args)),
    }
    splits = microbatches(args, batch)
    if len(splits) > 1:
        changes[f"{splits[1]} microbatches"] = told(split=splits[1])
    found = [
        Saving(name, peak, plain - peak, flops / work if work else None) for name, (peak, flops) in changes.items()
    ]
    return Savings(plain, tuple(sorted(found, key=lambda saving: -saving.saved)))
