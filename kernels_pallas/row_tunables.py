"""What may be tuned of the ops over rows (norms, activations): rows and columns of a tile, and warps.

One declaration a program of `rows.py`. Which op a program belongs to shows in its operands and results: LayerNorm keeps
a mean, a gated activation has an `up`. Plain XLA has no parameters: where nothing else runs, nothing is tuned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import rows
from kernels_pallas.dispatch import Target
from kernels_pallas.glu import front as glu
from kernels_pallas.glu.oracle import bias_activation_oracle, glu_oracle
from kernels_pallas.norm import front as norm
from kernels_pallas.norm.oracle import layer_norm_oracle, rms_norm_oracle
from kernels_pallas.tuning import Cost, Facts, Tunable, Values, completed

GRIDS = {
    "triton": {"rows": (1, 2, 4, 8, 16, 32), "columns": (128, 256, 512, 1024, 2048), "warps": (2, 4, 8, 16)},
    "mosaic_tpu": {"rows": (16, 32, 64, 128, 256, 512, 1024), "columns": (512, 1024, 2048, 4096)},
    "xla": {},
}
MOST_NUMBERS = 64  # of one operand that a thread holds: with a few operands it has 255 registers
_DTYPES = ("float32", "bfloat16", "float16")
_COLUMNS = ("weight", "bias")
_DEFAULTS = {
    "norm_forward": ("x weight", "y scale"),
    "norm_backward": ("total scale weight of_y", "x weight"),
    "activation_forward": ("x up", "y"),
    "activation_backward": ("x up of_y", "x up"),
}


def _tunable(program: str) -> Tunable:
    backward, is_norm = program.endswith("backward"), program.startswith("norm")

    def complete(given: dict[str, Any]) -> dict[str, Any]:
        words = dict(zip(("operands", "results"), _DEFAULTS[program], strict=True))
        made = completed(program, given, ("R", "D"), {"dtype": "float32", **words})
        made |= {n: " ".join(sorted(made[n].split())) for n in words}
        if made["dtype"] not in _DTYPES:
            raise ValueError(f"{program}: dtype is {made['dtype']!r}; choose of {', '.join(_DTYPES)}.")
        return made

    def names(known: Facts) -> tuple[str, ...]:
        """The operands of the op itself."""
        there, results = known["operands"].split(), known["results"].split()
        if not backward:
            return tuple(there)
        if not is_norm:
            return tuple(n for n in there if n != "of_y") + (("bias",) if "bias" in {*results} - {*there} else ())
        more = {"weight": "weight" in there, "bias": "bias" in results, "residual": "of_total" in there}
        return ("x", *(n for n, present in more.items() if present))

    def function(known: Facts, *, oracle: bool) -> Callable[..., Any]:
        if is_norm:
            centred = "mean" in (known["operands"] + " " + known["results"]).split() or "bias" in names(known)
            kinds = (layer_norm_oracle, rms_norm_oracle) if oracle else (norm.layer_norm, norm.rms_norm)
            return kinds[0 if centred else 1]
        if "up" in names(known):
            gated = glu_oracle if oracle else glu.glu
            return lambda x, up: gated(gate=x, up=up)
        return bias_activation_oracle if oracle else glu.bias_activation

    def operands(known: Facts) -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.key(0), 8)
        shape = (known["R"], known["D"])
        arrays = {
            n: jax.random.normal(k, shape[1:] if n in _COLUMNS else shape, jnp.float32).astype(known["dtype"])
            for n, k in zip(names(known), keys, strict=False)
        }
        cotangents = tuple(jax.random.normal(k, shape, jnp.float32).astype(known["dtype"]) for k in keys[6:])
        return arrays, cotangents

    def pull(known: Facts, made: tuple[Any, ...], *, oracle: bool = False) -> tuple[Any, ...]:
        arrays, cotangents = made
        wanted = {n: x for n, x in arrays.items() if n in known["results"].split()}
        fixed = {n: x for n, x in arrays.items() if n not in wanted}
        _, back = jax.vjp(lambda moving: function(known, oracle=oracle)(**moving, **fixed), wanted)
        return back, cotangents if "residual" in arrays else cotangents[0]

    def run(known: Facts) -> Callable[..., Any]:
        if backward:
            return lambda back, cotangent: back(cotangent)
        return lambda arrays, cotangents: function(known, oracle=False)(**arrays)

    def oracle(known: Facts, made: tuple[Any, ...]) -> Any:
        made = jax.tree.map(lambda x: x.astype(jnp.float32), made)
        if backward:
            back, cotangent = pull(known, made, oracle=True)
            return back(cotangent)
        return function(known, oracle=True)(**made[0])

    def facts(*given: Any, **_: Any) -> Facts | None:
        x, *more = given
        there = ("x", *(("up",) if not is_norm else ("weight", "residual"))[: len(more)])
        size = x.shape[-1]
        made = {"R": math.prod(x.shape[:-1]), "D": size, "dtype": x.dtype.name}
        kept = "y scale total" if "residual" in there else "y scale"
        if not backward:
            return complete({**made, "operands": " ".join(there), "results": kept if is_norm else "y"})
        return complete(made)

    def constraint(target: Target, known: Facts, given: Values) -> str:
        if given["implementation"] != "triton":
            return ""
        blocks = fitted(known, given)
        numbers = blocks["rows"] * blocks["columns"] / (32 * given["warps"])
        if numbers > MOST_NUMBERS:
            return f"{numbers:.0f} numbers of each operand a thread, above {MOST_NUMBERS}"
        return "" if numbers >= 1 else f"{32 * given['warps']} threads for fewer numbers"

    def fitted(known: Facts, given: Values) -> dict[str, Any]:
        size, whole = known["D"], is_norm
        if given["implementation"] == "triton":
            columns = rows._power(size) if whole else min(rows._power(size), given["columns"])
            return {**given, "rows": min(rows._power(known["R"]), given["rows"]), "columns": columns}
        return {**given, "rows": min(known["R"], given["rows"]), "columns": size if whole else given["columns"]}

    def resolved(target: Target, known: Facts, given: Values) -> Any:
        return tuple(sorted((fitted(known, given) if "rows" in given else dict(given)).items()))

    def cost(target: Target, known: Facts, given: Values) -> Cost:
        size = jnp.dtype(known["dtype"]).itemsize
        matrices = len([n for n in (known["operands"] + " " + known["results"]).split() if n not in _COLUMNS])
        moved = known["R"] * known["D"] * size * matrices
        if "rows" not in given:
            return Cost(0.0, moved, 1, known["R"])
        blocks = fitted(known, given)
        programs = -(-known["R"] // blocks["rows"]) * -(-known["D"] // blocks["columns"])
        tile = blocks["rows"] * blocks["columns"] * matrices
        onchip = 2 * tile * size + tile * 4 if given["implementation"] == "mosaic_tpu" else 0
        return Cost(0.0, moved, programs, programs, onchip)

    return Tunable(
        op=program,
        sources=("kernels_pallas.rows", "kernels_pallas.norm.front" if is_norm else "kernels_pallas.glu.front"),
        grids=GRIDS,
        sizes=("R", "D"),
        complete=complete,
        facts=facts,
        operands=operands,
        prepare=pull if backward else lambda known, made: made,
        run=run,
        oracle=oracle,
        refusal=refusal,
        constraint=constraint,
        resolved=resolved,
        cost=cost,
        reduction=lambda known: max(known["D"], known["R"] if backward else 1),
    )


def refusal(target: Target, implementation: str, known: Facts) -> str:
    """Returns why an implementation cannot run rows of those sizes there; "" where it can."""
    x = jax.ShapeDtypeStruct((known["R"], known["D"]), known["dtype"])
    whole = "scale" in (known["operands"] + " " + known["results"]).split()
    call = rows.Call(rows.Program("", lambda tile, x: {}, {"x": "row"}, {}, whole), {"x": x})
    refusals = {"triton": rows.triton_refusal, "mosaic_tpu": rows.tpu_refusal}
    return refusals[implementation](target, call) if implementation in refusals else ""


TUNABLES = tuple(_tunable(program) for program in _DEFAULTS)
