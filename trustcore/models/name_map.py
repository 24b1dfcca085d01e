"""Name maps: how the parameters of a model stand in files, as rules that are read in either direction.

A rule joins one or more parameters to one tensor of a file (or to one for each piece of a stack). Its kind is named by
the function that makes it:

    plain       the tensor is the parameter: norms, biases, tables, and kernels that files hold [in, out]
    kernel      a matrix that files hold [out, in] and layers [in, out]
    shifted     a vector that files hold less a number (Gemma's norms multiply by 1 + what is stored)
    fused       several parameters are one tensor, their outputs side by side in groups: one group is "one after the
                other" (Phi-3's qkv), a group for each key head has that head's queries, key and value (GPT-NeoX, BLOOM,
                Falcon), a group for each output alternates (gpt-oss' gate and up)
    stacked     each piece of a parameter along its first axis is a tensor of its own (experts; norms of heads)

A parameter's last axis is its outputs. Rows of outputs are only moved, so packed matrices stay packed:

    stored[..., order[i], :] = parameter_i                    order = `places(widths, groups)`
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import ModelError
from trustcore.quant import QuantizedArray

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How some parameters stand in a file; made by the functions below.

    Attributes:
        paths: of the parameters in the model; `{}` is the layer.
        stored: name of the tensor; `{}` is the layer, `{e}` the piece.
        rows_first: whether the tensor's rows are outputs: it is `[..., out, in]`.
        groups: in which the outputs of several parameters alternate: a number, or the name of a field of the
            configuration ("kv_heads").
        pieces: how many tensors there are, one for each piece of the first axis: a number, or the name of a field; 0:
            one tensor for all.
        shift: what is added to the stored numbers.
    """

    paths: tuple[str, ...]
    stored: str
    rows_first: bool = False
    groups: int | str = 1
    pieces: int | str = 0
    shift: float = 0.0

    @property
    def kind(self) -> str:
        """Names of what the rule does, for people."""
        if self.shift:
            return "shifted"
        parts = ["stacked"] if self.pieces else []
        parts += ["fused"] if len(self.paths) > 1 else []
        return " and ".join(parts) or ("kernel" if self.rows_first else "plain")

    @property
    def is_table(self) -> bool:
        """Whether the parameter is a matrix whose rows are looked up."""
        return self.paths[0].endswith("table")

    @property
    def is_matrix(self) -> bool:
        """Whether the parameters may be packed."""
        return self.paths[0].endswith(("kernel", "table"))

    @property
    def moves_nothing(self) -> bool:
        """Whether the parameter is the tensor, but for its orientation."""
        return len(self.paths) == 1 and not self.pieces and not self.shift

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""
        assert isinstance(self.pieces, int), f"{self.stored}: the number of pieces is to be read off a configuration"
        return tuple(self.stored.replace("{e}", str(e)) for e in range(self.pieces)) if self.pieces else (self.stored,)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Returns the shape of each tensor, given those of the parameters.

        Raises:
            ModelError: the parameters do not fit each other.
        """
        first = shapes[0]
        if any(shape[:-1] != first[:-1] for shape in shapes):
            raise ModelError(f"{self.stored}: parameters of shapes {[list(s) for s in shapes]} are no one tensor.")
        fused = (*first[:-1], sum(shape[-1] for shape in shapes))
        fused = fused[1:] if self.pieces else fused
        return (*fused[:-2], fused[-1], fused[-2]) if self.rows_first else fused

    def split(self, tensors: Sequence[np.ndarray], shapes: Sequence[Shape]) -> list[np.ndarray]:
        """Returns the parameters, in the order of their paths, from the arrays of the tensors."""
        whole = np.stack(tensors) if self.pieces else tensors[0]
        whole = np.swapaxes(whole, -1, -2) if self.rows_first else whole
        if self.shift:
            whole = whole + whole.dtype.type(self.shift)
        if len(shapes) == 1:
            return [whole]
        return [whole[..., place] for place in places([shape[-1] for shape in shapes], self._count)]

    def split_packed(self, tensors: Sequence[QuantizedArray], shapes: Sequence[Shape]) -> list[QuantizedArray]:
        """Returns the parameters from packed matrices `[..., in, out]`, one for each tensor.

        Raises:
            ModelError: outputs that share a scale would no longer stand together, or pieces differ in format.
        """
        whole = stack_packed(tensors) if self.pieces else tensors[0]
        if len(shapes) == 1:
            return [whole]
        return [outputs_in(whole, place) for place in places([shape[-1] for shape in shapes], self._count)]

    def join(self, parameters: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the arrays of the tensors: the inverse of `split`."""
        whole = parameters[0]
        if len(parameters) > 1:
            order = np.concatenate(places([p.shape[-1] for p in parameters], self._count))
            whole = np.concatenate(parameters, axis=-1)[..., np.argsort(order)]
        if self.shift:
            whole = whole - whole.dtype.type(self.shift)
        whole = np.swapaxes(whole, -1, -2) if self.rows_first else whole
        return list(whole) if self.pieces else [whole]

    def join_packed(self, parameters: Sequence[QuantizedArray]) -> list[QuantizedArray]:
        """Returns a packed matrix `[..., in, out]` for each tensor: the inverse of `split_packed`.

        Raises:
            ModelError: the parameters differ in format, or have a scale for all their outputs at once.
        """
        whole = parameters[0]
        if len(parameters) > 1:
            order = np.concatenate(places([p.shape[-1] for p in parameters], self._count))
            whole = outputs_in(_side_by_side(parameters), np.argsort(order))
        if not self.pieces:
            return [whole]
        return [jax.tree.map(lambda field, e=e: field[e], whole) for e in range(len(self.names))]

    @property
    def _count(self) -> int:
        assert isinstance(self.groups, int), f"{self.stored}: groups are to be read off a configuration first"
        return self.groups


def plain(path: str, stored: str) -> Rule:
    """Returns the rule for a tensor that is the parameter as it stands."""
    return Rule((path,), stored)


def kernel(path: str, stored: str) -> Rule:
    """Returns the rule for a matrix `[in, out]` that files hold `[out, in]`."""
    return Rule((path,), stored, rows_first=True)


def shifted(path: str, stored: str, shift: float = 1.0) -> Rule:
    """Returns the rule for a vector that files hold less `shift`."""
    return Rule((path,), stored, shift=shift)


def fused(paths: Sequence[str], stored: str, *, groups: int | str = 1, rows_first: bool = True) -> Rule:
    """Returns the rule for several matrices or biases that are one tensor; see the header for `groups`.

    `rows_first` says how files hold matrices; biases have one axis, which is that of the outputs.
    """
    return Rule(tuple(paths), stored, rows_first=rows_first and paths[0].endswith("kernel"), groups=groups)


def stacked(path: str, stored: str, pieces: int | str = "expert_count") -> Rule:
    """Returns the rule for a stack of which files hold each piece, `{e}`: kernels `[out, in]`, vectors as they are."""
    return Rule((path,), stored, rows_first=path.endswith("kernel"), pieces=pieces)


def expand(rules: Sequence[Rule], *, layers: Sequence[int] | None, config: Any) -> tuple[Rule, ...]:
    """Returns the rules of each layer in turn, with numbers in place of `{}` and of names of fields.

    Args:
        rules: of one layer, or with `layers=None` of the whole model.
        layers: numbers of the layers.
        config: whose fields `groups` and `pieces` name.
    """

    def one(rule: Rule, layer: int | None) -> Rule:
        groups, pieces = (getattr(config, x) if isinstance(x, str) else x for x in (rule.groups, rule.pieces))
        put = (lambda text: text) if layer is None else (lambda text: text.replace("{}", str(layer)))
        return dataclasses.replace(
            rule, paths=tuple(map(put, rule.paths)), stored=put(rule.stored), groups=groups, pieces=pieces
        )

    return tuple(one(rule, layer) for layer, rule in itertools.product(layers or (None,), rules))


def places(widths: Sequence[int], groups: int) -> list[np.ndarray]:
    """Returns for each of the parameters which outputs of the fused tensor are its own.

    Raises:
        ModelError: the outputs fall into no such groups.
    """
    if groups < 1 or any(width % groups for width in widths):
        raise ModelError(f"outputs of {list(widths)} matrices fall into no {groups} groups.")
    whole = np.arange(sum(widths)).reshape(groups, -1)
    ends = np.cumsum([width // groups for width in widths])[:-1]
    return [part.reshape(-1) for part in np.split(whole, ends, axis=1)]


def outputs_in(weight: QuantizedArray, order: np.ndarray) -> QuantizedArray:
    """Returns the outputs `order` of a packed `[..., K, N]` matrix, in that order; codes and scales stay as they are.

    Raises:
        ModelError: outputs that share a scale would no longer stand together.
    """
    fields = {}
    for name, span in weight.spec.spans(weight.fields).items():
        if span == 0:
            fields[name] = weight.fields[name]
            continue
        shared = order[::span] // span
        if not np.array_equal(order // span, np.repeat(shared, span)[: order.size]):
            raise ModelError(f"has outputs that share their {name} and are to be put apart; quantize it anew")
        fields[name] = jnp.take(weight.fields[name], shared, axis=-1)
    return QuantizedArray(weight.format, fields)


def stack_packed(weights: Sequence[QuantizedArray]) -> QuantizedArray:
    """Returns packed matrices of one form as one stack `[E, ...]`.

    Raises:
        ModelError: they are not of one form.
    """
    forms = {(jax.tree.structure(w), tuple(f.shape for f in w.fields.values())) for w in weights}
    if len(forms) > 1:
        raise ModelError(f"are packed in different ways: {', '.join(sorted({repr(w) for w in weights})[:3])}")
    return jax.tree.map(lambda *fields: jnp.stack(fields), *weights)


def _side_by_side(weights: Sequence[QuantizedArray]) -> QuantizedArray:
    first = weights[0]
    for other in weights[1:]:
        if other.description != first.description or set(other.fields) != set(first.fields):
            raise ModelError(f"is to be one tensor of {first!r} and {other!r}, which differ in format")
    fields = {}
    for name, span in first.spec.spans(first.fields).items():
        parts = [weight.fields[name] for weight in weights]
        if span == 0:
            if any(not np.array_equal(np.asarray(part), np.asarray(parts[0])) for part in parts[1:]):
                raise ModelError(f"is to be one tensor of several that have a {name} for all their outputs at once")
            fields[name] = parts[0]
        else:
            fields[name] = jnp.concatenate(parts, axis=-1)
    return QuantizedArray(first.format, fields)
