"""Name maps: how the parameters of a model stand in files, as rules that are read in either direction.

A rule joins one or more parameters to one tensor of a file (or to one for each piece of a stack). Its kind is named by
the function that makes it:

    plain       the tensor is the parameter: norms, biases, tables, and kernels that files hold [in, out]
    kernel      a matrix that files hold [out, in] and layers [in, out]
    window      the weights of a convolution: files hold [O, I, *window], layers [*window, I, O]
    shifted     a vector that files hold less a number (Gemma's norms multiply by 1 + what is stored)
    fused       several parameters are one tensor, their outputs side by side in groups: one group is "one after the
                other" (Phi-3's qkv), a group for each key head has that head's queries, key and value (GPT-NeoX, BLOOM,
                Falcon), a group for each output alternates (gpt-oss' gate and up)
    stacked     each piece of a parameter along its first axis is a tensor of its own (experts; norms of heads)
    headed      a matrix that files hold as a stack of one for each head (GGUF's two halves of DeepSeek's latents)
    column      a matrix of one output that files hold as a vector (GGUF's gate of a shared expert)

`linear`, `norm`, `conv` and `batch_norm` give the rules of a layer. A parameter's last axis is its outputs. Rows of
outputs are only moved, so packed matrices stay packed:

    stored[..., order[i], :] = parameter_i                    order = `places(widths, groups)`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from trustcore.errors import ModelError
from trustcore.models.packed_outputs import outputs_in, places, side_by_side, stack_packed
from trustcore.quant import QuantizedArray

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How some parameters stand in a file; made by the functions below.

    Attributes:
        paths: of the parameters in the model; `{}` is the layer.
        stored: name of the tensor; `{}` is the layer, `{e}` the piece.
        rows_first: whether the tensor's rows are outputs: it is `[..., out, in]`.
        convolved: whether it is a convolution's: `[O, I, *window]`.
        groups: in which the outputs of several parameters alternate: a number, or the name of a field of the
            configuration ("kv_heads").
        pieces: how many tensors there are, one for each piece of the first axis: a number, or the name of a field; 0:
            one tensor for all.
        shift: what is added to the stored numbers.
        others: further names that files give the tensor.
        heads: for how many heads the tensor has a matrix of its own along its first axis: a number, or the name of a
            field; 0: it has no such axis.
        column: whether the tensor lacks the axis of the one output.
    """

    paths: tuple[str, ...]
    stored: str
    rows_first: bool = False
    convolved: bool = False
    groups: int | str = 1
    pieces: int | str = 0
    shift: float = 0.0
    others: tuple[str, ...] = ()
    heads: int | str = 0
    column: bool = False

    @property
    def kind(self) -> str:
        """Names of what the rule does, for people."""
        if self.shift:
            return "shifted"
        if self.convolved:
            return "window"
        if self.heads or self.column:
            return "headed" if self.heads else "column"
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
        return self.paths[0].endswith(("kernel", "table")) and not self.convolved

    @property
    def moves_nothing(self) -> bool:
        """Whether the parameter is the tensor, but for its orientation."""
        moved = self.pieces or self.shift or self.convolved or self.heads or self.column
        return len(self.paths) == 1 and not moved

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
        fused = first if len(shapes) == 1 else (*first[:-1], sum(shape[-1] for shape in shapes))
        if self.column:
            return fused[:-1]
        if self.heads:
            rows, width = fused[0], fused[-1] // self._heads
            return (self._heads, width, rows) if self.rows_first else (self._heads, rows, width)
        fused = fused[1:] if self.pieces else fused
        if self.convolved:
            return (fused[-1], fused[-2], *fused[:-2])
        return (*fused[:-2], fused[-1], fused[-2]) if self.rows_first else fused

    def split(self, tensors: Sequence[np.ndarray], shapes: Sequence[Shape]) -> list[np.ndarray]:
        """Returns the parameters, in the order of their paths, from the arrays of the tensors."""
        whole = np.stack(tensors) if self.pieces else tensors[0]
        whole = whole[:, None] if self.column else self.rows(whole) if self.heads else whole
        whole = np.swapaxes(whole, -1, -2) if self.rows_first else whole
        whole = np.moveaxis(whole, (0, 1), (-1, -2)) if self.convolved else whole
        if self.shift:
            whole = whole + whole.dtype.type(self.shift)
        if len(shapes) == 1:
            return [whole]
        return [whole[..., place] for place in places([shape[-1] for shape in shapes], self._count)]

    def rows(self, tensor: np.ndarray) -> np.ndarray:
        """Returns the numbers, or the bytes, of a tensor with an axis of heads as those of one matrix, row by row."""
        if self.rows_first:
            return tensor.reshape(-1, tensor.shape[-1])
        return np.moveaxis(tensor, 0, 1).reshape(tensor.shape[1], -1)

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
        if self.column:
            return [whole[:, 0]]
        whole = np.swapaxes(whole, -1, -2) if self.rows_first else whole
        whole = np.moveaxis(whole, (-1, -2), (0, 1)) if self.convolved else whole
        if self.heads:
            rows, n = whole.shape[0], self._heads
            whole = whole.reshape(n, -1, whole.shape[1]) if self.rows_first else whole.reshape(rows, n, -1)
            whole = whole if self.rows_first else np.moveaxis(whole, 1, 0)
        return list(whole) if self.pieces else [whole]

    def join_packed(self, parameters: Sequence[QuantizedArray]) -> list[QuantizedArray]:
        """Returns a packed matrix `[..., in, out]` for each tensor: the inverse of `split_packed`.

        Raises:
            ModelError: the parameters differ in format, or have a scale for all their outputs at once.
        """
        whole = parameters[0]
        if len(parameters) > 1:
            order = np.concatenate(places([p.shape[-1] for p in parameters], self._count))
            whole = outputs_in(side_by_side(parameters), np.argsort(order))
        if not self.pieces:
            return [whole]
        return [jax.tree.map(lambda field, e=e: field[e], whole) for e in range(len(self.names))]

    @property
    def _heads(self) -> int:
        assert isinstance(self.heads, int), f"{self.stored}: heads are to be read off a configuration first"
        return self.heads

    @property
    def _count(self) -> int:
        assert isinstance(self.groups, int), f"{self.stored}: groups are to be read off a configuration first"
        return self.groups


def plain(path: str, stored: str, *, others: Sequence[str] = ()) -> Rule:
    """Returns the rule for a tensor that is the parameter as it stands; `others` are further names that it has."""
    return Rule((path,), stored, others=tuple(others))


def kernel(path: str, stored: str) -> Rule:
    """Returns the rule for a matrix `[in, out]` that files hold `[out, in]`."""
    return Rule((path,), stored, rows_first=True)


def window(path: str, stored: str) -> Rule:
    """Returns the rule for the weights `[*window, I, O]` of a convolution, which files hold `[O, I, *window]`."""
    return Rule((path,), stored, convolved=True)


def linear(path: str, stored: str) -> tuple[Rule, Rule]:
    """Returns the rules of a `Linear`."""
    return kernel(f"{path}.kernel", f"{stored}.weight"), plain(f"{path}.bias", f"{stored}.bias")


def joined(paths: Sequence[str], stored: str, **options: Any) -> tuple[Rule, Rule]:
    """Returns the rules of several `Linear` layers of one input that are one in files; `options` as in `fused`."""
    kernels, biases = ([f"{path}.{part}" for path in paths] for part in ("kernel", "bias"))
    return fused(kernels, f"{stored}.weight", **options), fused(biases, f"{stored}.bias", **options)


def norm(path: str, stored: str) -> tuple[Rule, Rule]:
    """Returns the rules of a `LayerNorm` or `RMSNorm`."""
    return plain(f"{path}.weight", f"{stored}.weight"), plain(f"{path}.bias", f"{stored}.bias")


def conv(path: str, stored: str) -> tuple[Rule, Rule]:
    """Returns the rules of a `flax.nnx.Conv`."""
    return window(f"{path}.kernel", f"{stored}.weight"), plain(f"{path}.bias", f"{stored}.bias")


def batch_norm(path: str, stored: str) -> tuple[Rule, ...]:
    """Returns the rules of a `flax.nnx.BatchNorm`."""
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return tuple(plain(f"{path}.{ours}", f"{stored}.{theirs}") for ours, theirs in names.items())


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


def headed(path: str, stored: str, heads: int | str, *, rows_first: bool) -> Rule:
    """Returns the rule for a kernel `[in, heads * H]` that files hold as `[heads, H, in]`, or as `[heads, in, H]`."""
    return Rule((path,), stored, rows_first=rows_first, heads=heads)


def column(path: str, stored: str) -> Rule:
    """Returns the rule for a kernel `[in, 1]` that files hold as `[in]`."""
    return Rule((path,), stored, column=True)


def numbered(count: int, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Returns the rules of each of `count` layers in turn, the number in place of `{}`."""
    held = tuple(rules)

    def one(rule: Rule, layer: str) -> Rule:
        paths = tuple(path.replace("{}", layer) for path in rule.paths)
        return dataclasses.replace(rule, paths=paths, stored=rule.stored.replace("{}", layer))

    return tuple(one(rule, str(i)) for i in range(count) for rule in held)


def expand(rules: Iterable[Rule], config: Any) -> tuple[Rule, ...]:
    """Returns the rules with the numbers that a configuration has in the fields that their counts name."""

    def numbers(rule: Rule) -> dict[str, int]:
        named = {name: getattr(rule, name) for name in ("groups", "pieces", "heads")}
        return {name: getattr(config, given) if isinstance(given, str) else given for name, given in named.items()}

    return tuple(dataclasses.replace(rule, **numbers(rule)) for rule in rules)
