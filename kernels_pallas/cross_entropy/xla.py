"""Cross-entropy in plain XLA by chunks of the vocabulary, forward and backward. Runs on every platform.

    forward   through the chunks with the running maximum and sum of exponentials (Milakov and Gimelshein, arXiv
              1805.02867, algorithm 3); the label's logit is picked where its chunk comes by
    one pass  where the table is frozen: the forward pass sums exp(z) table' as well, as attention does, from which the
              gradient of hidden follows for any cotangents. Two products, as many as the plain form's
    backward  each chunk of logits again; with p = exp(z - lse), g and h the cotangents of loss and lse,
                  dz = p (g + h + 2 z_loss lse g) - g ((1 - s) [v = label] + s / V)
              adds dz @ table_c' to the gradient of hidden and writes that of the chunk's columns once

One chunk of logits `[R, C]` is alive at a time: O(R * C) memory beyond operands and results. Four products
instead of the plain form's three where the table's gradient is wanted. Logits and sums are float32 (float64 for
float64). Chunks are of one size: the last one ends with V, and the columns that it shares with the one before it count
once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import _compat, tuning
from kernels_pallas.dispatch import Target

NOTHING = -1e30  # below every maximum, and finite
# Numbers in a chunk of logits, and its fewest and most columns. On the CPU 1024 to 8192 columns of 2048 rows take the
# same time within 15%, forward and backward (D=576, V=49152, 2 cores, 2026-11).
CHUNK = {"cpu": 2**21, "other": 2**25}
FEWEST, MOST = 512, 16384


def facts(call: Any) -> tuning.Facts | None:
    """Returns what the speed of a call depends on; None where a size is symbolic or 0, and for packed tables."""
    hidden = call.arrays["hidden"]
    sizes = {"R": hidden.shape[0], "D": hidden.shape[1], "V": call.vocabulary}
    if call.take is not None or not all(isinstance(n, int) and n > 0 for n in sizes.values()):
        return None
    return {**sizes, "dtype": hidden.dtype.name, "transposed": call.spec.transposed}


def chunk_of(call: Any, platform: str, direction: str = "forward") -> int:
    """Returns C, the columns of a chunk: all of V, or a multiple of 128 that covers V with little to spare.

    The caller's number counts, then one that was found for such calls.
    """
    vocabulary, rows = call.vocabulary, call.arrays["hidden"].shape[0]
    most = call.spec.chunk
    if most is None:
        target = Target(platform, _compat.device_kind(platform))
        most = tuning.values(f"cross_entropy_{direction}", target, lambda: facts(call), "xla").get("chunk")
    if most is None:
        size = CHUNK.get(platform, CHUNK["other"])
        most = min(MOST, max(FEWEST, size // max(rows, 1))) if isinstance(rows, int) else FEWEST
    if vocabulary <= most:
        return vocabulary
    even = -(-vocabulary // -(-vocabulary // most))
    return min(vocabulary, -(-even // 128) * 128) if most >= 128 else most


def forward(call: Any, platform: str) -> list[jax.Array]:
    """Returns the losses and the log-sum-exp, `[R]` each; of a part of a table the target in the place of losses."""
    return _forward(call, platform, mean=False)


def one_pass(call: Any, platform: str) -> list[jax.Array]:
    """Returns losses, log-sum-exp, and two parts `[R, D]` of the gradient of hidden: that of lse, and the target's.

    `d loss / d hidden = (1 + 2 z_loss lse) of_lse - target`. No label smoothing together with a soft cap.
    """
    return _forward(call, platform, mean=True)


def _forward(call: Any, platform: str, *, mean: bool) -> list[jax.Array]:
    made = _Made(call, platform, "one_pass" if mean else "forward")
    spec, labels, rows = call.spec, call.arrays["labels"], call.arrays["hidden"].shape[0]
    smooth, size = spec.label_smoothing, call.arrays["hidden"].shape[1]

    def step(i: Any, carry: Any) -> Any:
        top, total, picked, sums, mixed, whole = carry
        start, _, fresh = made.where(i)
        part = made.columns(start)
        logits = made.logits(part, start)
        shown = logits if fresh is None else jnp.where(fresh, logits, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(shown, axis=1))
        weights, less = jnp.exp(shown - higher[:, None]), jnp.exp(top - higher)
        total = total * less + jnp.sum(weights, axis=1)
        here = labels - start
        inside = (here >= 0) & (here < made.chunk)
        found = jnp.take_along_axis(logits, jnp.clip(here, 0, made.chunk - 1)[:, None], axis=1)[:, 0]
        picked = jnp.where(inside, found, picked)
        if smooth:
            sums = sums + jnp.sum(logits if fresh is None else jnp.where(fresh, logits, 0), axis=1)
        if mean:
            weights = weights if spec.soft_cap is None else weights * (1 - jnp.square(logits / spec.soft_cap))
            mixed = mixed * less[:, None] + made.dot(weights.astype(made.narrow), part, (1, 0 if made.by_rows else 1))
            if smooth:
                counted = jnp.ones((1, made.chunk), made.narrow) if fresh is None else fresh.astype(made.narrow)
                whole = whole + made.dot(counted, part, (1, 0 if made.by_rows else 1))
        return higher, total, picked, sums, mixed, whole

    zero = jnp.zeros(rows, made.wide)
    mixed, whole = (jnp.zeros((n, size) if mean else (), made.wide) for n in (rows, 1))
    start = jnp.full(rows, NOTHING, made.wide), zero, zero, zero, mixed, whole
    top, total, picked, sums, mixed, whole = made.through(step, start)
    lse = top + jnp.log(total)
    target = (1 - smooth) * picked + spec.spread * sums
    if spec.whole is None:
        losses = lse - target + spec.z_loss * lse**2
        losses = jnp.where((labels >= 0) & (labels < call.vocabulary), losses, jnp.nan)
        losses = jnp.where(labels == spec.ignore_index, zero, losses)
    else:
        losses = target
    if not mean:
        return [losses, lse]
    slope = jnp.ones_like(picked) if spec.soft_cap is None else 1 - jnp.square(picked / spec.soft_cap)
    here = (1 - smooth) * slope
    if spec.whole is not None:
        here = jnp.where((labels >= 0) & (labels < call.vocabulary), here, zero)
    target = here[:, None] * made.rows(labels)
    if smooth:
        target = target + jnp.broadcast_to(spec.spread * whole, target.shape)
    return [losses, lse, spec.scale * mixed / total[:, None], spec.scale * target]


def backward(call: Any, platform: str) -> list[jax.Array]:
    """Returns the gradients that are wanted, each as its operand."""
    made = _Made(call, platform, "backward")
    spec, given, wanted = call.spec, call.arrays, call.wanted
    labels, lse = given["labels"], given["lse"]
    counts = labels != spec.ignore_index
    known = (labels >= 0) & (labels < call.vocabulary) if spec.whole is None else jnp.ones_like(counts)
    zero = jnp.zeros((), made.wide)
    of_loss = jnp.where(counts, jnp.where(known, given["of_loss"], jnp.nan), zero)
    of_weights = of_loss * (1 + 2 * spec.z_loss * lse) + given["of_lse"]
    of_label, of_all = (1 - spec.label_smoothing) * of_loss, spec.spread * of_loss
    turned = made.hidden.T if "table" in wanted else None  # [D, R]

    def step(i: Any, found: Any) -> Any:
        start, columns, fresh = made.where(i)
        part = made.columns(start)
        logits = made.logits(part, start)
        weights = jnp.exp(logits - lse[:, None])
        dz = weights * of_weights[:, None] - jnp.where(columns == labels[:, None], of_label[:, None], zero)
        if spec.label_smoothing:
            dz = dz - of_all[:, None]
        if spec.soft_cap is not None:
            dz = dz * (1 - jnp.square(logits / spec.soft_cap))
        dz = dz * spec.scale
        dz = dz if fresh is None else jnp.where(fresh, dz, zero)
        if "bias" in wanted:
            found["bias"] = put(found["bias"], jnp.sum(dz, axis=0), start, 0)
        dz = dz.astype(made.narrow)
        if "hidden" in wanted:
            found["hidden"] = found["hidden"] + made.dot(dz, part, (1, 0 if made.by_rows else 1))
        if turned is not None:
            dw = made.dot(turned, dz, (1, 0))  # [D, C]: dz as the second factor, which need not be turned around
            found["table"] = put(found["table"], dw.T if call.spec.transposed else dw, start, made.axis)
        return found

    def put(whole: jax.Array, part: jax.Array, start: Any, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, axis)

    dtypes = {"hidden": made.wide}
    found = {n: jnp.zeros(given[n].shape, dtypes.get(n, given[n].dtype)) for n in wanted}
    # From the end: what the last chunk leaves zero of the one before is then written over.
    found = made.through(step, found, backwards=True)
    return [found[n].astype(given[n].dtype) for n in wanted]


class _Made:
    """The chunks of a call: where they begin, their columns, their logits."""

    def __init__(self, call: Any, platform: str, direction: str) -> None:
        self.call = call
        self.chunk, self.vocabulary = chunk_of(call, platform, direction), call.vocabulary
        self.count = -(-self.vocabulary // self.chunk)
        hidden = call.arrays["hidden"]
        self.wide = jnp.float64 if hidden.dtype == jnp.float64 else jnp.float32
        self.narrow = self.wide if platform == "cpu" else hidden.dtype  # the CPU's narrow products are slower
        self.hidden = hidden.astype(self.narrow)
        self.by_rows = call.take is not None or call.spec.transposed  # a chunk of columns is [C, D]
        self.axis = 0 if call.spec.transposed else 1

    def through(self, step: Any, carry: Any, *, backwards: bool = False) -> Any:
        if self.count == 1:
            return step(0, carry)
        last = self.count - 1
        return jax.lax.fori_loop(0, self.count, lambda i, c: step(last - i if backwards else i, c), carry)

    def where(self, i: Any) -> tuple[Any, jax.Array, jax.Array | None]:
        """The first column of a chunk, the columns `[1, C]`, and which no chunk before it has (None: all)."""
        start = jnp.minimum(jnp.int32(i) * self.chunk, self.vocabulary - self.chunk)
        columns = start + jax.lax.broadcasted_iota(jnp.int32, (1, self.chunk), 1)
        return start, columns, None if self.vocabulary % self.chunk == 0 else columns >= i * self.chunk

    def columns(self, start: Any) -> jax.Array:
        if self.call.take is not None:
            return self.call.take(start + jnp.arange(self.chunk, dtype=jnp.int32)).astype(self.narrow)
        part = jax.lax.dynamic_slice_in_dim(self.call.arrays["table"], start, self.chunk, self.axis)
        return part.astype(self.narrow)

    def rows(self, indices: jax.Array) -> jax.Array:
        """The columns of these indices as rows `[R, D]`, wide; the nearest of one that lies outside."""
        indices = jnp.clip(indices, 0, self.vocabulary - 1)
        if self.call.take is not None:
            return self.call.take(indices).astype(self.wide)
        picked = jnp.take(self.call.arrays["table"], indices, axis=self.axis)
        return (picked if self.axis == 0 else picked.T).astype(self.wide)

    def logits(self, part: jax.Array, start: Any) -> jax.Array:
        spec = self.call.spec
        logits = self.dot(self.hidden, part, (1, 1 if self.by_rows else 0))
        if "bias" in self.call.arrays:
            bias = jax.lax.dynamic_slice_in_dim(self.call.arrays["bias"], start, self.chunk, 0)
            logits = logits + bias.astype(self.wide)[None, :]
        logits = logits if spec.scale == 1.0 else logits * spec.scale
        return logits if spec.soft_cap is None else spec.soft_cap * jnp.tanh(logits / spec.soft_cap)

    def dot(self, a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
        """The wide product of two matrices, summed over an axis of each."""
        dims = ((over[0],), (over[1],)), ((), ())
        return jax.lax.dot_general(a, b, dims, preferred_element_type=self.wide)
