"""Records small files as torch.save writes them, and what torch loads from them.

    python tests/oracles/record_pytorch_files.py        (needs torch)

Writes tests/data/pytorch_files.npz: under `NAME/file` the bytes of a file, under `NAME/tensor/KEY` what torch.load
gives for a tensor. Numbers that NumPy lacks (bfloat16, 8-bit floats) are recorded as their bytes, uint8, with the dtype
under `NAME/dtype/KEY`.
"""

from __future__ import annotations

import argparse
import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

KEEP = torch.nn.Parameter


def state() -> OrderedDict[str, torch.Tensor]:
    """Tensors of every dtype, shared, strided, offset, empty and of no axes."""
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    found: OrderedDict[str, torch.Tensor] = OrderedDict(
        base=base,
        turned=base.t(),
        row=base[2],
        block=base[1:4, 2:6],
        column=base[:, 3],
        steps=base[::2, ::3],
        tied=base,
        repeated=torch.arange(5).expand(3, 5),
        empty=torch.zeros(0, 4),
        scalar=torch.tensor(2.5),
        parameter=KEEP(torch.randn(3, 2)),
        f64=torch.randn(3, dtype=torch.float64),
        f16=torch.randn(7).half(),
        bf16=torch.randn(2, 5).bfloat16(),
        i64=torch.tensor([-(2**40), 0, 7]),
        i32=torch.tensor([[1, -2]], dtype=torch.int32),
        i16=torch.tensor([-300, 300], dtype=torch.int16),
        i8=torch.tensor([-128, 127], dtype=torch.int8),
        u8=torch.tensor([0, 255], dtype=torch.uint8),
        bool=torch.tensor([[True, False, True]]),
        c64=torch.randn(2, dtype=torch.complex64),
        c128=torch.randn(2, dtype=torch.complex128),
    )
    return found


def newer(found: OrderedDict[str, torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
    """With the dtypes that torch stores without a storage class of their own."""
    found["f8_e4m3fn"] = torch.randn(6).to(torch.float8_e4m3fn)
    found["f8_e5m2"] = torch.randn(2, 3).to(torch.float8_e5m2)[:, 1:]
    found["u16"] = torch.tensor([65535, 1], dtype=torch.uint16)
    found["u32"] = torch.tensor([2**32 - 1], dtype=torch.uint32)
    return found


def cases() -> dict[str, tuple[Any, dict[str, Any]]]:
    """What is saved, and the options of torch.save."""
    torch.manual_seed(1)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    marked = torch.nn.Parameter(torch.ones(2))
    marked.note = "kept beside the tensor"  # type: ignore[attr-defined]
    return {
        "zip": (newer(state()), {}),
        "legacy": (state(), {"_use_new_zipfile_serialization": False}),
        "protocol4": (state(), {"pickle_protocol": 4}),
        "protocol5": (state(), {"pickle_protocol": 5}),
        "legacy_protocol4": (state(), {"_use_new_zipfile_serialization": False, "pickle_protocol": 4}),
        "module": (module.state_dict(), {}),
        "parameters": ({"weight": marked, "plain": KEEP(torch.zeros(2))}, {}),
        "training": (
            {
                "epoch": 3, "lr": 1e-3, "name": "run", "best": None, "flags": [True, (1, 2)],
                "shape": torch.Size([2, 3]), "dtype": torch.bfloat16, "device": torch.device("cpu"),
                "model": module.state_dict(),
                "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1.0, "params": [0]}]},
            },
            {},
        ),
        "nested": (
            {"encoder": {"w": torch.ones(2), "list": [torch.zeros(1), torch.ones(1)]}, "head": torch.zeros(2)},
            {},
        ),
    }  # fmt: skip


def tensors_of(value: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in a tree, by its path with dots."""
    if isinstance(value, torch.Tensor):
        return {prefix: value.detach()}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    found: dict[str, torch.Tensor] = {}
    for key, item in items:
        found.update(tensors_of(item, f"{prefix}.{key}" if prefix else str(key)))
    return found


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "data", help="folder of the file")
    out = parser.parse_args().out
    recorded: dict[str, np.ndarray] = {"version": np.array(torch.__version__)}
    for name, (value, options) in cases().items():
        buffer = io.BytesIO()
        torch.save(value, buffer, **options)
        recorded[f"{name}/file"] = np.frombuffer(buffer.getvalue(), np.uint8)
        loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        loaded = loaded["model"] if name == "training" else loaded
        for key, tensor in tensors_of(loaded).items():
            whole = tensor.contiguous()
            try:
                recorded[f"{name}/tensor/{key}"] = whole.numpy()
            except TypeError:
                raw = np.frombuffer(bytes(whole.flatten().view(torch.uint8).tolist()), np.uint8)
                recorded[f"{name}/tensor/{key}"] = raw.reshape(*whole.shape[:-1], -1)
                recorded[f"{name}/dtype/{key}"] = np.array(str(whole.dtype).removeprefix("torch."))
    np.savez_compressed(out / "pytorch_files.npz", **recorded)


if __name__ == "__main__":
    main()
