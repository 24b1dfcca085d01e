"""What can be wrong with a value, how bad that is, and why an operation makes such values."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from trustcore.debug.statistics import Statistics
from trustcore.graph import Address
from trustcore.graph.program import described


class Severity(enum.IntEnum):
    """How bad an issue is.

    INFO: harmless as far as the program shows, such as a NaN that a `where` takes out again. WARNING: likely a fault.
    ERROR: results hold Inf. CRITICAL: results hold NaN.
    """

    INFO = 0
    WARNING = 1
    ERROR = 2
    CRITICAL = 3


@dataclasses.dataclass(frozen=True)
class Input:
    """An input of the equation where an issue arose.

    Attributes:
        source: what gave it: an address, an argument, or a constant.
        statistics: None where it holds no floats or was not measured.
    """

    source: str
    statistics: Statistics | None


@dataclasses.dataclass(frozen=True)
class Issue:
    """Something that became wrong, at the first place in data flow where it did.

    Attributes:
        kind: "nan", "inf", "exploding", "vanishing", "zeros", "dead", "unusual".
        severity: how bad it is.
        address: the equation; None where it came in with an argument.
        argument: the argument's name; None where the function made it.
        turns: of the loops around, in the order of what they walk over (a reverse scan begins at the end).
        shard: place of the device along each `shard_map` around; () outside.
        statistics: of the value.
        inputs: of the equation.
        cause: why the operation gave it, as far as its inputs tell.
        chain: where it came from, first place first, ending here; one entry unless something else led to it.
        forward: in a gradient, the operations of the forward pass that the equation belongs to.
        reaches: results of the function that hold such values.
    """

    kind: str
    severity: Severity
    address: Address | None
    argument: str | None
    turns: tuple[int, ...]
    shard: tuple[int, ...]
    statistics: Statistics
    inputs: tuple[Input, ...] = ()
    cause: str = ""
    chain: tuple[str, ...] = ()
    forward: tuple[Address, ...] = ()
    reaches: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """Address with turns and shard, or the argument."""
        if self.address is None:
            return f"argument {self.argument}"
        shard = f" on shard {', '.join(map(str, self.shard))}" if self.shard else ""
        return described(self.address, self.turns) + shard

    @property
    def message(self) -> str:
        """The issue in a sentence or two."""
        words = {
            "nan": "NaN",
            "inf": "Inf",
            "exploding": "a value above 1e6",
            "vanishing": "values that vanish (below 1e-7)",
            "zeros": "nothing but zeros",
            "dead": "dead units",
            "unusual": "an unusual distribution",
        }[self.kind]
        if self.address is None:
            text = f"{words} came in with {self.where}: {self.statistics.short}."
        else:
            text = f"{words} first appeared in {self.where}: {self.statistics.short}."
        if self.cause:
            text += f" {self.cause[0].upper()}{self.cause[1:]}."
        if self.forward:
            names = " and ".join(dict.fromkeys(address.primitive for address in self.forward))
            text += f" It is part of the gradient of {names} at {self.forward[0].place or self.forward[0].name}."
        if len(self.chain) > 1:
            text += f" It goes back to {self.chain[0]}."
        return text

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as plain data."""
        address = self.address
        return {
            "kind": self.kind,
            "severity": self.severity.name.lower(),
            "where": self.where,
            "path": address.at(self.turns) if address else None,
            "primitive": address.primitive if address else None,
            "stage": address.stage if address else None,
            "file": address.frame.file if address and address.frame else None,
            "line": address.frame.line if address and address.frame else None,
            "argument": self.argument,
            "turns": list(self.turns),
            "shard": list(self.shard),
            "statistics": self.statistics.to_dict(),
            "inputs": [
                {"source": i.source, "statistics": i.statistics.to_dict() if i.statistics else None}
                for i in self.inputs
            ],
            "cause": self.cause,
            "chain": list(self.chain),
            "forward": [str(a) for a in self.forward],
            "reaches": list(self.reaches),
            "message": self.message,
        }


def cause_of(primitive: str, kind: str, output: Statistics, inputs: Sequence[Statistics | None]) -> str:
    """Returns why a primitive gave NaN or Inf for such inputs; "" where they do not tell."""
    first = inputs[0] if inputs else None
    second = inputs[1] if len(inputs) > 1 else None
    infinite = [i for i in inputs if i is not None and i.inf + i.negative_inf]
    if any(i is not None and i.nan for i in inputs):
        return "an input holds NaN already"
    if primitive == "sub" and kind == "nan" and len(infinite) > 1:
        return "Inf - Inf is NaN" + _masked(first)
    if primitive in ("add", "add_any", "reduce_sum", "dot_general", "cumsum", "psum") and kind == "nan" and infinite:
        return "a sum in which Inf meets -Inf or 0 is NaN"
    if primitive == "mul" and kind == "nan" and infinite:
        return "0 * Inf is NaN"
    if primitive == "div" and second is not None:
        if second.zeros:
            whole = " and the numerator, too" if first is not None and first.zeros and kind == "nan" else ""
            return f"the denominator is 0 in {second.zeros} of {second.size} places{whole}"
        if len(infinite) > 1 and kind == "nan":
            return "Inf / Inf is NaN"
    if first is not None and first.min is not None:
        reason = _domain(primitive, kind, first)
        if reason:
            return reason
    if kind == "inf" and not infinite:
        most = float(jnp.finfo(output.dtype).max) if not output.dtype.startswith("complex") else math.inf
        largest = max((i.largest for i in inputs if i is not None), default=0.0)
        return f"a result is beyond what {output.dtype} holds ({most:.4g}); its inputs reach {largest:.4g}"
    return "an input holds Inf" if infinite else ""


def _domain(primitive: str, kind: str, x: Statistics) -> str:
    low, high = x.min or 0.0, x.max or 0.0
    if primitive == "log" and low < 0 and kind == "nan":
        return f"the logarithm of a negative number ({low:.4g})"
    if primitive == "log" and x.zeros:
        return f"the logarithm of 0, in {x.zeros} of {x.size} places"
    if primitive == "log1p" and low <= -1:
        return f"log1p of {low:.4g}, which is not above -1"
    if primitive in ("sqrt", "rsqrt") and low < 0 and kind == "nan":
        return f"the square root of a negative number ({low:.4g})"
    if primitive in ("rsqrt", "integer_pow", "pow") and x.zeros and kind == "inf":
        return f"a negative power of 0, in {x.zeros} of {x.size} places"
    if primitive in ("exp", "exp2", "expm1", "sinh", "cosh") and kind == "inf" and not x.inf:
        return f"{primitive} of {high:.4g} is beyond what {x.dtype} holds"
    if primitive in ("asin", "acos", "atanh") and (low < -1 or high > 1):
        return f"{primitive} of a number outside [-1, 1] ({low if low < -1 else high:.4g})"
    if primitive == "atanh" and kind == "inf":
        return "atanh of 1 or -1"
    if primitive == "pow" and low < 0 and kind == "nan":
        return f"a fractional power of a negative number ({low:.4g})"
    if primitive == "convert_element_type" and kind == "inf" and not x.inf + x.negative_inf:
        return f"the target type cannot hold {x.largest:.4g}"
    if primitive in ("sin", "cos", "tan") and x.inf + x.negative_inf:
        return f"{primitive} of Inf is NaN"
    return ""


def _masked(x: Statistics | None) -> str:
    """A hint at the usual reason: a softmax over a row of which every entry is masked."""
    return "; a row whose entries are all -Inf (all masked) gives this in a softmax" if x and x.negative_inf else ""
