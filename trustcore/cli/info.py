"""`trustcore info`: what a checkpoint holds, read from its header alone.

    open_checkpoint -> describe (plain Python values) -> a table for people, or JSON

Everything in a file is untrusted: text is printed without control characters and never as markup.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from trustcore import units
from trustcore.cli import console

_ITEMS = 6  # of a long array that are shown
_CHARACTERS = 100  # of a long text that are shown in the table


def info(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file or folder, a catalogue name, or owner/name.")],
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as one JSON object.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
) -> None:
    """Show architecture, parameters, tensors by encoding, sizes and metadata of a checkpoint."""
    from trustcore.catalogue import resolve
    from trustcore.weights import open_checkpoint

    with console.progress_bar() as progress:
        path = resolve(file, progress=progress)
    with open_checkpoint(path) as checkpoint:
        description = describe(checkpoint, tensors=tensors)
    if as_json:
        print(json.dumps(description, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _print(description)


def describe(checkpoint: Any, *, tensors: bool) -> dict[str, Any]:
    """Returns what `trustcore info --json` prints: values that JSON can hold, long arrays shortened.

    Args:
        checkpoint: an open `Checkpoint`.
        tensors: whether to list every tensor.
    """
    arrays = list(checkpoint.values())
    encodings: dict[str, dict[str, int]] = {}
    for array in arrays:
        row = encodings.setdefault(array.encoding, {"tensors": 0, "parameters": 0, "bytes": 0})
        row["tensors"] += 1
        row["parameters"] += math.prod(array.shape)
        row["bytes"] += array.nbytes
    files = sorted({array.path for array in arrays} | {Path(checkpoint.path)})
    description: dict[str, Any] = {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "architecture": _architecture(checkpoint),
        "files": [{"path": str(path), "bytes": path.stat().st_size} for path in files],
        "parameters": sum(row["parameters"] for row in encodings.values()),
        "tensors": len(arrays),
        "tensor_bytes": sum(row["bytes"] for row in encodings.values()),
        "encodings": dict(sorted(encodings.items(), key=lambda item: -item[1]["bytes"])),
        "metadata": {str(key): _value(value) for key, value in checkpoint.metadata.items()},
    }
    if tensors:
        description["tensor_list"] = [
            {"name": name, "shape": list(array.shape), "encoding": array.encoding, "bytes": array.nbytes}
            for name, array in checkpoint.items()
        ]
    return description


def _architecture(checkpoint: Any) -> str | None:
    """What the file calls its architecture; for safetensors, what config.json beside it does."""
    metadata = checkpoint.metadata
    config = metadata.get("config")
    named = metadata.get("general.architecture", config.get("model_type") if isinstance(config, Mapping) else None)
    return None if named is None else str(named)


def _value(value: Any) -> Any:
    """A metadata value in types that JSON has. An array of more than a few items becomes its length and a start."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, Mapping):
        return {str(key): _value(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        items = [_value(item) for item in value[:_ITEMS]]
        return items if len(value) <= _ITEMS else {"length": len(value), "first": items}
    return str(value)


def _print(description: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = console.out()

    def table(title: str, *columns: tuple[str, str], rows: Sequence[Sequence[str]]) -> None:
        made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False)
        for name, side in columns:
            made.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
        for row in rows:
            made.add_row(*(Text(cell) for cell in row))
        console.print_table(out, made)

    def line(name: str, value: str) -> None:
        out.print(Text(f"{name:14}{console.plain(value)}"), soft_wrap=True)

    files = description["files"]
    line("file", description["path"])
    line("format", f"{description['format']}, {len(files)} file{'s' if len(files) > 1 else ''}, "
         f"{units.size(sum(file['bytes'] for file in files))}")  # fmt: skip
    line("architecture", description["architecture"] or "not told")
    line("parameters", f"{description['parameters']:,} ({units.count(description['parameters'])})")
    total = description["tensor_bytes"]
    bits = 8 * total / description["parameters"] if description["parameters"] else 0
    line("tensors", f"{description['tensors']}, {units.size(total)}, {bits:.2f} bits a weight")
    out.print()
    table(
        "Encodings",
        ("encoding", "left"),
        ("tensors", "right"),
        ("parameters", "right"),
        ("bytes", "right"),
        ("size", "right"),
        ("share", "right"),
        rows=[
            (
                console.plain(name),
                str(row["tensors"]),
                f"{row['parameters']:,}",
                f"{row['bytes']:,}",
                units.size(row["bytes"]),
                f"{100 * row['bytes'] / total:.1f} %" if total else "",
            )
            for name, row in description["encodings"].items()
        ],
    )
    if "tensor_list" in description:
        table(
            "Tensors",
            ("name", "left"),
            ("shape", "right"),
            ("encoding", "left"),
            ("bytes", "right"),
            rows=[
                (
                    console.plain(tensor["name"]),
                    " x ".join(map(str, tensor["shape"])) or "scalar",
                    console.plain(tensor["encoding"]),
                    f"{tensor['bytes']:,}",
                )
                for tensor in description["tensor_list"]
            ],
        )
    table(
        "Metadata",
        ("key", "left"),
        ("value", "left"),
        rows=[(console.plain(key), _shown(value)) for key, value in description["metadata"].items()],
    )


def _shown(value: Any) -> str:
    if isinstance(value, dict) and set(value) == {"length", "first"}:
        shown = f"[{', '.join(map(_shown, value['first']))}, ... {value['length']:,} in all]"
    else:
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = console.plain(shown)
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]}... ({len(text):,} characters)"
