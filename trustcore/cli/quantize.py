"""`trustcore quantize`: a model on disk to a packed GGUF file, tensor by tensor, and a report of what it cost."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from trustcore.cli import console, options
from trustcore.errors import CheckpointError


def quantize(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A file or folder, a catalogue name, or owner/name[:Q4_K_M].")
    ],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The .gguf file to write.")],
    format: Annotated[
        str, typer.Option("--format", "-f", help="A format (q4_0, q6_k, f16) or a recipe of several (q4_k_m).")
    ],
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Tensors that stay as they are: output, embed, or patterns of names; commas between them."),
    ] = None,
    importance: Annotated[
        Path | None, typer.Option(help="An importance matrix, as llama.cpp's llama-imatrix writes it.")
    ] = None,
    search: Annotated[
        bool, typer.Option("--search/--no-search", help="Look for the scales that fit best; --no-search is faster.")
    ] = True,
    pure: Annotated[bool, typer.Option("--pure", help="Every matrix in the one format.")] = False,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Pack again what is packed already, which costs quality.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Write a model as a packed GGUF file. Ctrl-C leaves nothing behind."""
    _check(out, force)
    from trustcore.catalogue import resolve
    from trustcore.convert import quantize_checkpoint
    from trustcore.generation.programs import keep_programs
    from trustcore.weights.imatrix import read_imatrix

    keep_programs()
    with console.progress_bar() as progress:
        path = resolve(source, progress=progress)
        weights = None if importance is None else read_imatrix(importance).importance
        try:
            report = quantize_checkpoint(
                path,
                out,
                format.lower(),
                keep=[word.strip() for words in keep or () for word in words.split(",") if word.strip()],
                importance=weights,
                search=search,
                pure=pure,
                requantize=requantize,
                progress=None if progress is None else functools.partial(progress, "packing"),
            )
        except OSError as error:
            raise CheckpointError(f"cannot be written: {error}", path=out) from error
    if as_json:
        print(json.dumps(report.as_json(), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _print(report)


def _check(out: Path, force: bool) -> None:
    """Refuses an output that cannot be, before anything is read."""
    if out.suffix != ".gguf":
        raise typer.BadParameter(f"{out} does not end in .gguf; GGUF files are what is written", param_hint="'--out'")
    if out.is_dir() or not out.absolute().parent.is_dir():
        what = "is a folder" if out.is_dir() else "lies in a folder that does not exist"
        raise typer.BadParameter(f"{out} {what}", param_hint="'--out'")
    if out.exists() and not force:
        raise typer.BadParameter(
            f"{out} exists; write over it with --force, or choose another name", param_hint="'--out'"
        )


def _print(report: Any) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = console.out()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("tensor", "shape", "was", "format", "bits", "SQNR dB", "note"):
        table.add_column(name, justify="right" if name in ("shape", "bits", "SQNR dB") else "left", overflow="fold")
    for tensor in report.tensors:
        table.add_row(
            Text(console.plain(tensor.name)),
            " x ".join(map(str, tensor.shape)) or "scalar",
            console.plain(tensor.source),
            tensor.format,
            f"{tensor.bits_per_weight:.2f}",
            "exact" if tensor.sqnr_db is None else f"{tensor.sqnr_db:.1f}",
            tensor.note,
        )
    console.print_table(out, table)
    counts = Counter(tensor.format for tensor in report.tensors)
    formats = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    out.print(Text(f"{console.plain(report.path)}: {len(report.tensors)} tensors ({formats})"), soft_wrap=True)
    out.print(
        f"{console.size(report.source_bytes)} -> {console.size(report.nbytes)}, {report.bits_per_weight:.2f} bits a "
        f"weight, {report.seconds:.1f} s",
        soft_wrap=True,
    )
