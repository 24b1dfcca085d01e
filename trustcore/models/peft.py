"""Adapters of a model in PEFT's files: `adapter_config.json` beside `adapter_model.safetensors`.

    base_model.model.NAME.lora_A.weight          [r, in]         down, turned
    base_model.model.NAME.lora_B.weight          [out, r]        up, turned
    base_model.model.NAME.lora_magnitude_vector  [out]           magnitude

NAME is that of the matrix in the family's files, without `.weight`. Where those files hold several matrices as one, the
outputs of `lora_B` are split and all share `lora_A`; on the way out, different `down` stand side by side, and `up` in
blocks. The scale of a matrix is `alpha / r`, or `alpha / sqrt(r)` with `use_rslora`; patterns name those that differ.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import ModelError
from trustcore.models.hugging_face import half_order
from trustcore.models.model import Model, parameters_of
from trustcore.models.name_map import Rule
from trustcore.models.packed_outputs import places
from trustcore.models.registry import family_named
from trustcore.models.values import Values
from trustcore.nn.adapters import Adapter, Adapters, adapters_of
from trustcore.weights import Checkpoint, open_checkpoint
from trustcore.weights.config_file import MAX_CONFIG_BYTES
from trustcore.weights.folder import appearing, refuse_occupied
from trustcore.weights.json_file import read_object
from trustcore.weights.safetensors_writer import Planned, write_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {"down": ".lora_A.weight", "up": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.]+")

# What PEFT can do to an adapter that changes what it computes, and that is not done here: field -> what it is when off.
_OFF: Mapping[str, Any] = {
    "modules_to_save": None,
    "lora_bias": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "use_qalora": False,
    "use_bdlora": None,
    "kasa_config": None,
    "velora_config": None,
    "monteclora_config": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
}


def load_adapters(model: Model, folder: str | os.PathLike[str], *, dtype: Any = jnp.float32) -> Adapters:
    """Returns the adapters that PEFT saved, for `trustcore.nn.with_adapters(model, adapters)`.

    Args:
        model: the one they were made for; its matrices may be packed, and from another file format.
        folder: with adapter_config.json and adapter_model.safetensors (or .bin).
        dtype: of the adapters.

    Raises:
        CheckpointError: a file is not there or broken.
        ModelError: they are no LoRA or DoRA, use an option that is not supported, or do not fit the model: all tensors
            at fault in one message.

    The base is not compared: that it is the one they were trained beside is for the caller to know.
    """
    folder = Path(folder)
    path = folder / WEIGHTS
    path = path if path.exists() or not path.with_suffix(".bin").exists() else path.with_suffix(".bin")
    scales = _Scales.read(folder / CONFIG)
    with open_checkpoint(path) as checkpoint:
        return _read(model, checkpoint, scales, dtype)


def save_adapters(model: Model, folder: str | os.PathLike[str], *, base: str | None = None) -> Path:
    """Writes a model's adapters as PEFT reads them, and returns the folder.

    Args:
        model: that has adapters.
        folder: one that is not there yet, or is empty.
        base: name or path of the model they belong to, for `base_model_name_or_path`.

    Raises:
        ModelError: there are none, or PEFT's files have no place for one of them: all of them in one message.
        CheckpointError: the folder is not empty.
        OSError: the disk refuses.
    """
    folder = Path(folder)
    refuse_occupied(folder)
    modules = _modules(model)
    ranks = collections.Counter(adapter.rank for adapter in modules.values())
    rank = ranks.most_common(1)[0][0]
    alphas = {name: adapter.scale * adapter.rank for name, adapter in modules.items()}
    alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": model.config.family == "gpt2",
        "use_dora": any(adapter.magnitude is not None for adapter in modules.values()),
        "use_rslora": False,
        "target_modules": sorted(modules),
        "rank_pattern": {name: a.rank for name, a in modules.items() if a.rank != rank},
        "alpha_pattern": {name: _number(a) for name, a in alphas.items() if a != alpha},
    }
    tensors = {}
    for name, adapter in modules.items():
        parts = {"down": np.asarray(adapter.down).T, "up": np.asarray(adapter.up).T, "magnitude": adapter.magnitude}
        for part, array in parts.items():
            if array is not None:
                tensors[f"{_PREFIX}{name}{_PARTS[part]}"] = Planned.of(array)
    with appearing(folder) as partial:
        write_safetensors(partial / WEIGHTS, tensors, {"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


@dataclasses.dataclass(frozen=True)
class _Scales:
    """What adapter_config.json says of scales."""

    alpha: float
    patterns: Mapping[str, float]
    stabilized: bool

    @classmethod
    def read(cls, path: Path) -> _Scales:
        values = Values(read_object(path, "config", MAX_CONFIG_BYTES, unique=False), CONFIG)
        if values.get("peft_type") != "LORA":
            raise ModelError(f"{path}: peft_type is {str(values.get('peft_type'))[:64]!r}; supported: LORA, DoRA too.")
        if values.get("bias", "none") != "none":
            raise ModelError(f"{path}: bias is {str(values.get('bias'))[:64]!r}; trained biases are not supported.")
        for field, off in _OFF.items():
            if values.get(field) not in (off, None, [], {}):
                raise ModelError(f"{path}: {field} is {str(values.get(field))[:64]!r}; supported: {json.dumps(off)}.")
        patterns = values.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise ModelError(f"{path}: alpha_pattern is {str(patterns)[:64]!r}; expected names and numbers.")
        for name in patterns:
            if not _PLAIN_NAME.fullmatch(name):
                raise ModelError(f"{path}: alpha_pattern has {name[:64]!r}; names of modules are supported.")
        read = Values(patterns, f"{path}: alpha_pattern")
        alpha = values.number("lora_alpha", 8.0)
        return cls(alpha, {name: read.number(name) for name in patterns}, values.flag("use_rslora", False))

    def of(self, module: str, rank: int) -> float:
        named = (a for name, a in self.patterns.items() if module == name or module.endswith(f".{name}"))
        return next(named, self.alpha) / (rank**0.5 if self.stabilized else rank)


def _rules(model: Model, prefix: str | None) -> dict[str, Rule]:
    """The rules of the model's matrices by the names of their modules, which begin with `prefix` (None: the usual)."""
    rules = family_named(model.config.family).names(model.config).rules(model.config, prefix)
    kept = (rule for rule in rules if rule.is_matrix and not rule.is_table and not rule.pieces)
    return {rule.stored.removesuffix(".weight"): rule for rule in kept}


def _rules_in(model: Model, modules: Collection[str]) -> dict[str, Rule]:
    """The rules under that prefix of the family's under which the most of these modules are known."""
    names = family_named(model.config.family).names(model.config)
    choices = [_rules(model, prefix) for prefix in (names.prefix, *names.prefixes)]
    return max(choices, key=lambda rules: len(rules.keys() & modules))


def _read(model: Model, checkpoint: Checkpoint, scales: _Scales, dtype: Any) -> Adapters:
    parameters = parameters_of(model)
    found: dict[str, dict[str, Any]] = {}
    faults: list[str] = []
    for name, tensor in checkpoint.items():
        part = next((p for p, suffix in _PARTS.items() if name.removesuffix(".weight").endswith(_stem(suffix))), None)
        if part is None or not name.startswith(_PREFIX):
            faults.append(f"{name} is unexpected")
            continue
        module = name.removesuffix(".weight").removesuffix(_stem(_PARTS[part])).removeprefix(_PREFIX)
        found.setdefault(module, {})[part] = tensor
    adapters: Adapters = {}
    rules = _rules_in(model, found)
    for module, parts in found.items():
        rule = rules.get(module)
        if rule is None or any(path not in parameters for path in rule.paths):
            faults.append(f"{module} is no matrix of a {model.config.family} model that can have an adapter")
            continue
        shapes = [tuple(parameters[path].get_value().shape) for path in rule.paths]
        inputs, widths = shapes[0][0], [shape[-1] for shape in shapes]
        fault = _fault(parts, inputs, sum(widths))
        if fault:
            faults.append(f"{module} {fault}")
            continue
        arrays = {part: jnp.asarray(tensor.numpy().astype(np.float32), dtype) for part, tensor in parts.items()}
        rank = arrays["down"].shape[0]
        own = places(widths, int(rule.groups)) if len(widths) > 1 else [np.arange(widths[0])]
        for path, place in zip(rule.paths, own, strict=True):
            order = half_order(model.config, path)
            place = place if order is None else place[np.argsort(order)]
            magnitude = arrays.get("magnitude")
            adapters[path] = Adapter(
                arrays["down"].T,
                arrays["up"].T[:, place],
                None if magnitude is None else magnitude[place],
                scales.of(module, rank),
            )
    if not found and not faults:
        faults.append("it holds no adapter")
    _raise(f"{checkpoint.path}", faults)
    return adapters


def _stem(suffix: str) -> str:
    return suffix.removesuffix(".weight")


def _fault(parts: Mapping[str, Any], inputs: int, outputs: int) -> str:
    """What is wrong with the tensors of a module; empty: nothing."""
    if missing := [_PARTS[part] for part in ("down", "up") if part not in parts]:
        return f"has no {missing[0][1:]}"
    rank = parts["down"].shape[0] if parts["down"].shape else 0
    expected = {"down": (rank, inputs), "up": (outputs, rank), "magnitude": (outputs,)}
    for part, tensor in parts.items():
        if tuple(tensor.shape) != expected[part] or not rank:
            wanted = f"[r, {inputs}]" if part == "down" else list(expected[part])
            return f"has {_PARTS[part][1:]} {list(tensor.shape)}, expected {wanted}"
        if tensor.encoding not in ("f16", "bf16", "f32", "f64"):
            return f"has {_PARTS[part][1:]} as {tensor.encoding}; expected floats"
    return ""


def _modules(model: Model) -> dict[str, Adapter]:
    """Adapters by the names of PEFT's modules, outputs in the order of the files."""
    adapters = adapters_of(model)
    faults: list[str] = []
    modules: dict[str, Adapter] = {}
    left = set(adapters)
    for module, rule in _rules(model, model.prefix).items():
        have = [path for path in rule.paths if path in adapters]
        if not have:
            continue
        left -= set(have)
        if len(have) < len(rule.paths):
            lacks = next(path for path in rule.paths if path not in adapters)
            faults.append(f"{module} is {' and '.join(rule.paths)} in one, and {lacks} has no adapter")
            continue
        parts = [_turned(adapters[path], half_order(model.config, path)) for path in rule.paths]
        if len({part.magnitude is None for part in parts}) > 1:
            faults.append(f"{module} is {' and '.join(rule.paths)} in one, and some of them have a magnitude")
            continue
        modules[module] = parts[0] if len(parts) == 1 else _fused(parts, rule)
    faults += [f"{path} has no place in these files" for path in sorted(left)]
    if not adapters:
        faults.append("the model has no adapters; add_adapters makes them")
    if len({adapter.magnitude is None for adapter in modules.values()}) > 1:
        faults.append("some adapters have a magnitude and some have none; a file holds one kind")
    _raise("save_adapters", faults)
    return modules


def _turned(adapter: Adapter, order: np.ndarray | None) -> Adapter:
    if order is None:
        return adapter
    magnitude = None if adapter.magnitude is None else adapter.magnitude[order]
    return dataclasses.replace(adapter, up=adapter.up[:, order], magnitude=magnitude)


def _fused(parts: list[Adapter], rule: Rule) -> Adapter:
    """One adapter of matrices whose outputs are one tensor."""
    order = np.argsort(np.concatenate(places([part.up.shape[1] for part in parts], int(rule.groups))))
    first = parts[0]
    same = all(p.scale == first.scale and np.array_equal(p.down, first.down) for p in parts[1:])
    if same:
        up = jnp.concatenate([part.up for part in parts], axis=1)
        down, scale = first.down, first.scale
    else:
        up = jax.scipy.linalg.block_diag(*(part.up * part.scale for part in parts))
        down, scale = jnp.concatenate([part.down for part in parts], axis=1), 1.0
    magnitude = None
    if first.magnitude is not None:
        magnitude = jnp.concatenate([jnp.asarray(part.magnitude) for part in parts])[order]
    return Adapter(down, up[:, order], magnitude, scale)


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _raise(where: str, faults: list[str]) -> None:
    if faults:
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ModelError(f"{where}: {'; '.join(faults[:20])}{more}.")
