"""Parameters and the tensors that hold them: paired by the rules of a family, or every disagreement told at once.

What a tensor is made of is a `LazyArray`, or `Packed` where another package spells a matrix as several tensors; see
`trustcore.models.schemes`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from trustcore.errors import ModelError
from trustcore.models.name_map import Rule, Shape
from trustcore.models.names import Names
from trustcore.models.schemes import Packed, Scheme
from trustcore.models.schemes.float4 import GptOss
from trustcore.models.schemes.own import Own
from trustcore.quant.formats import BLOCK_FORMATS
from trustcore.weights import Checkpoint, LazyArray

PLAIN = ("f32", "f64")  # encodings that are read as arrays; those of BLOCK_FORMATS stay packed

# Beside packed matrices in files, and not needed: scales of a cache of keys and values in 8-bit floats.
_CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale", ".kv_scale")

# What packed matrices of other packages are called, for the hint that config.json does not tell of them.
_PACKED_NAMES = (
    ".qweight",
    ".weight_packed",
    ".SCB",
    ".weight.absmax",
    ".weight_scale",
    ".weight_scale_inv",
    "_blocks",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Match:
    """A rule that a model and a checkpoint agree on: shapes of its parameters, and what holds each of its tensors."""

    rule: Rule
    shapes: tuple[Shape, ...]
    sources: tuple[LazyArray | Packed, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(source.nbytes for source in self.sources)


class Matching:
    """The pairs of a model and a checkpoint.

    Attributes:
        matches: one for each rule whose parameters the model has.
        prefix: of the names in the checkpoint.
    """

    def __init__(
        self,
        names: Names,
        config: Any,
        shapes: Mapping[str, Shape],
        checkpoint: Checkpoint,
        *,
        scheme: Scheme | None = None,
    ):
        """Pairs the parameters, given as {path: shape}, with the tensors of a checkpoint.

        Raises:
            ModelError: tensors are missing, unexpected, mis-shaped or of an unknown encoding: all in one message.
        """
        self._checkpoint, self._scheme = checkpoint, scheme
        self._faults: list[str] = []
        self._used: set[str] = set()
        self._packed: dict[str, bool] = {}  # modules that are packed; True: as they should be
        self.matches: list[Match] = []
        rules, self.prefix = names.in_file(config, checkpoint)
        placed = 0
        for rule in rules:
            self._used.update(rule.others)  # a second copy of a tensor is not read
            found = tuple(shapes[path] for path in rule.paths if path in shapes)
            if not found:
                if rule.paths == ("output.kernel",):
                    self._used.update(rule.names)  # a tied table may stand twice
                continue
            assert len(found) == len(rule.paths), f"{rule.stored}: the model has only some of {rule.paths}"
            placed += len(found)
            sources = [self._source(name, rule, found) for name in rule.names]
            self.matches.append(Match(rule, found, tuple(s for s in sources if s is not None)))
        assert placed == len(shapes), f"names of {config.family} cover {placed} of {len(shapes)} parameters"
        left = [checkpoint[n] for n in checkpoint if n not in self._used and not names.ignores(n, self.prefix)]
        self._faults += [f"{tensor.name} is unexpected" for tensor in left if not self._explained(tensor)]
        if self._faults:
            self._raise(config.family)

    def _raise(self, family: str) -> None:
        faults = self._faults
        if self._scheme is None and any(given.endswith(_PACKED_NAMES) for given in self._checkpoint):
            faults.insert(0, "matrices are packed as another package does, but config.json has no quantization_config")
        shown = "; ".join(faults[:20]) + (f"; and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise ModelError(f"{self._checkpoint.path}: the tensors do not fit a {family} model: {shown}.")

    def _source(self, name: str, rule: Rule, shapes: tuple[Shape, ...]) -> LazyArray | Packed | None:
        """What holds one tensor of a rule; None, and a fault, where nothing does."""
        expected, checkpoint = rule.shape(shapes), self._checkpoint
        module = name.removesuffix(".weight")
        whole = module == name and name in checkpoint  # no package packs a tensor that is not its module's weight
        if self._scheme is not None and rule.is_matrix and len(expected) >= 2 and not whole:
            *lead, k, n = expected
            if rule.rows_first or rule.is_table:
                k, n = n, k
            try:
                packed = _find_packed(self._scheme, checkpoint, module, tuple(lead), k, n)
            except ModelError as error:
                if any(other.startswith(module) for other in checkpoint):
                    self._faults.append(str(error))
                    self._packed[module] = False
                    return None
                packed = None
            if packed is not None:
                self._used.update(part.name for part in (*packed.tensors, *packed.extras))
                self._packed[module] = True
                return packed
        tensor = checkpoint.get(name)
        if tensor is None:
            near = difflib.get_close_matches(name, list(checkpoint), n=1)
            self._faults.append(f"{name} is missing" + (f" (nearest: {near[0]})" if near else ""))
            return None
        self._used.add(name)
        if tuple(tensor.shape) != expected:
            self._faults.append(f"{name} has shape {list(tensor.shape)}, expected {list(expected)}")
        elif tensor.encoding not in BLOCK_FORMATS and tensor.encoding not in PLAIN:
            known = ", ".join((*PLAIN, *BLOCK_FORMATS))
            self._faults.append(f"{name} is stored as {tensor.encoding}; readable encodings: {known}")
        return tensor

    def _explained(self, tensor: LazyArray) -> bool:
        """Whether a tensor that no parameter takes may stand in a file with packed matrices."""
        if self._scheme is not None and tensor.name.endswith(_CACHE_SCALES):
            return True
        module, _, suffix = tensor.name.rpartition(".")
        if self._packed.get(module) and suffix == "bias":  # AutoGPTQ's layers have a bias whether the model has or not
            return tensor.encoding in ("f16", "bf16", "f32") and not tensor.numpy().any()
        parts = tensor.name.split(".")
        owners = (".".join(parts[:end]) for end in range(1, len(parts)))
        return any(self._packed.get(owner) is False for owner in owners)  # its fault has been told


def _find_packed(
    scheme: Scheme, checkpoint: Mapping[str, LazyArray], module: str, lead: tuple[int, ...], k: int, n: int
) -> Packed | None:
    """What a matrix, or a stack of them, is made of in the scheme; None: it is a plain tensor."""
    if not lead:
        return scheme.find(checkpoint, module, k, n)
    return scheme.find_stack(checkpoint, module, lead, k, n) if isinstance(scheme, GptOss | Own) else None
