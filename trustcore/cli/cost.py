"""`trustcore cost`: FLOPs and bytes of a forward pass, or a step of training, by module, operation or line."""

from __future__ import annotations

import enum
import json
from typing import Annotated, Any

import typer

from trustcore.cli import console, options
from trustcore.cli.model import load_model
from trustcore.cli.step import next_token_step


class By(enum.StrEnum):
    """What rows have in common; see `trustcore.graph.cost`."""

    module = "module"
    operation = "operation"
    line = "line"
    stage = "stage"


def cost(
    model: options.Model,
    *,
    batch: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 1,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 512,
    train: Annotated[bool, typer.Option("--train", help="A gradient of all float weights.")] = False,
    by: Annotated[By, typer.Option(help="What is added up.")] = By.module,
    depth: Annotated[int, typer.Option(min=1, help="Names of a module's path that are told apart.")] = 3,
    roofline: Annotated[bool, typer.Option("--roofline", help="Measure this device and bound the time.")] = False,
    fusions: Annotated[bool, typer.Option("--fusions", help="Compile it, and show what XLA fused.")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Run each module, beside what is possible.")] = False,
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
) -> None:
    """Tell what a forward pass or a step of training costs, and where; nothing is run without --measure."""
    from trustcore.graph import cost as costs
    from trustcore.graph import fusion, timing

    loaded = load_model(model, options.FloatType.FLOAT32 if train and dtype is None else dtype)
    step, tokens = next_token_step(model, loaded, batch, length, train=train)
    found = costs.cost(step, loaded, tokens)
    bound: dict[str, Any] = {}
    if roofline:
        limits = costs.peaks()
        rows = costs.roofline(found, limits)
        bound = {
            "flops_per_second": limits.flops,
            "bytes_per_second": limits.bandwidth,
            "seconds_unfused": sum(seconds for _, seconds, _ in rows),
            "seconds_compute": found.flops / limits.flops,
        }
    kernels = fusion.fusions(step, loaded, tokens) if fusions else None
    timed = None
    if measure:
        import jax.numpy as jnp

        timed = timing.pieces(step, loaded, jnp.zeros(tokens.shape, tokens.dtype), depth=depth)
    if kernels is not None:
        bound |= {"kernels": len(kernels.kernels), "kernel_bytes": kernels.nbytes, "avoidable_bytes": kernels.avoidable}
    if timed is not None:
        bound |= {"seconds": timed.whole, "modules": timed.by_module()}
    if as_json:
        table = [{by.value: name, "flops": f, "bytes": b} for name, (f, b) in found.by(by.value, depth).items()]
        told = {"flops": found.flops, "bytes": found.nbytes, "unknown": len(found.unknown), **bound, "rows": table}
        print(json.dumps(told, indent=2))
        return
    console.out().print(found.table(by.value, depth=depth), soft_wrap=True, markup=False)
    for more in (kernels, timed):
        if more is not None:
            console.out().print(f"\n{more}", soft_wrap=True, markup=False)
    if roofline:
        told = (
            f"\nat {bound['flops_per_second'] / 1e9:.0f} GFLOP/s and {bound['bytes_per_second'] / 1e9:.1f} GB/s, both "
            f"measured: at least {bound['seconds_compute']:.4f} s for the products, {bound['seconds_unfused']:.4f} s "
            "were nothing fused"
        )
        console.out().print(told, soft_wrap=True, markup=False)
