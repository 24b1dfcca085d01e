"""`trustcore quantize`: a model on disk to a packed one, and a report of what it cost.

A GGUF file is written tensor by tensor, of a decoder. A folder takes a model of any family in the layout of `--scheme`,
tensor by tensor as well; with a calibration text the model is held in memory.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
import re
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from trustcore import units
from trustcore.cli import console, options
from trustcore.cli.perplexity import read_text
from trustcore.errors import CheckpointError


class Method(enum.StrEnum):
    """Names of `trustcore.convert.METHODS`, which read a text, and what folders take without one."""

    imatrix = "imatrix"
    gptq = "gptq"
    awq = "awq"
    hqq = "hqq"


class Scheme(enum.StrEnum):
    """Names of `trustcore.models.schemes.write.WRITERS`."""

    trustcore = "trustcore"
    gptq = "gptq"
    awq = "awq"
    compressed_tensors = "compressed-tensors"


def quantize(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A file or folder, a catalogue name, or owner/name[:Q4_K_M].")
    ],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The .gguf file to write, or a folder.")],
    format: Annotated[
        str | None, typer.Option("--format", "-f", help="A format (q4_0, q6_k, f16) or a recipe of several (q4_k_m).")
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(
            help="What --calib is used for: to weigh inputs (imatrix), choose codes (gptq), scale (awq). Without a "
            "text, to a folder: float zero points (hqq)."
        ),
    ] = None,
    calib: Annotated[
        Path | None,
        typer.Option(help="A text like those that the model will read. The model is then held in memory."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="3.5bpw", help="Bits a weight of the whole file: formats are chosen matrix by matrix."),
    ] = None,
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
    scheme: Annotated[
        Scheme | None, typer.Option(help="How a folder spells packed matrices; trustcore's own layout holds all.")
    ] = None,
    pure: Annotated[bool, typer.Option("--pure", help="Every matrix in the one format.")] = False,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Pack again what is packed already, which costs quality.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Write a model packed: as a GGUF file, or as a folder of safetensors. Ctrl-C leaves nothing behind."""
    _check(out, force)
    bits = _check_calibration(format, method, calib, budget, importance)
    _check_kind(out, method, scheme, budget, pure)
    kept = [word.strip() for words in keep or () for word in words.split(",") if word.strip()]
    if out.suffix != ".gguf":
        assert format is not None  # a folder takes no budget
        _to_folder(
            source,
            out,
            format,
            keep=kept,
            method=method,
            calib=calib,
            importance=importance,
            search=search,
            requantize=requantize,
            scheme=(scheme or Scheme.trustcore).value,
            as_json=as_json,
        )
        return
    import trustcore
    from trustcore.catalogue import resolve
    from trustcore.convert import Prepared, prepare, quantize_checkpoint
    from trustcore.generation.programs import keep_programs
    from trustcore.weights.imatrix import read_imatrix

    keep_programs()
    with console.progress_bar() as progress:
        path = resolve(source, progress=progress)
        name = None if format is None else format.lower()
        if calib is None:
            prepared = Prepared(name, {} if importance is None else read_imatrix(importance).importance)
        else:
            text = read_text(calib)
            model = trustcore.load(path, dtype="float32")
            prepared = prepare(
                path, model, name, text, method=method or "imatrix", bits_per_weight=bits, pure=pure, progress=progress
            )
            del model
        try:
            report = quantize_checkpoint(
                path,
                out,
                prepared.format,
                keep=kept,
                importance=prepared.importance,
                tensors=prepared.tensors,
                search=search,
                pure=pure,
                requantize=requantize,
                progress=functools.partial(progress, "packing"),
            )
        except OSError as error:
            raise CheckpointError(f"cannot be written: {error}", path=out) from error
    if as_json:
        print(json.dumps(report.as_json(), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _print(report)


_OTHER_FILES = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".msgpack")


def _to_folder(
    source: str,
    out: Path,
    format: str,
    *,
    keep: list[str],
    method: Method | None,
    calib: Path | None,
    importance: Path | None,
    search: bool,
    requantize: bool,
    scheme: str,
    as_json: bool,
) -> None:
    """Packs the matrices of a model of any family and saves it; `keep` are patterns of paths."""
    from trustcore.catalogue import resolve
    from trustcore.convert import quantize_to_folder
    from trustcore.weights.folder import refuse_occupied
    from trustcore.weights.imatrix import read_imatrix

    refuse_occupied(out)
    begin = time.perf_counter()
    with console.progress_bar() as progress:
        path = resolve(source, progress=progress)
        try:
            if calib is not None:
                text = read_text(calib)
                found = _by_text(path, out, format, text, (method or Method.imatrix).value, keep, scheme, progress)
            else:
                found = quantize_to_folder(
                    path,
                    out,
                    format,
                    keep=keep,
                    method="hqq" if method is Method.hqq else "search" if search else "nearest",
                    importance=None if importance is None else read_imatrix(importance).importance,
                    requantize=requantize,
                    scheme=scheme,
                    progress=functools.partial(progress, "packing"),
                )
        except OSError as error:
            raise CheckpointError(f"cannot be written: {error}", path=out) from error
    if not as_json:
        console.out().print(f"{found}\n{console.plain(str(out))}: {time.perf_counter() - begin:.1f} s", soft_wrap=True)
        return
    tensors = [
        {name: value if not isinstance(value, float) or math.isfinite(value) else None for name, value in leaf.items()}
        for leaf in map(dataclasses.asdict, found.leaves)
    ]
    totals = {"path": str(out), "format": format, "bits_per_weight": found.bits_per_weight}
    print(json.dumps({**totals, "tensors": tensors}, indent=2, allow_nan=False))


def _by_text(
    path: Path, out: Path, format: str, text: str, method: str, keep: list[str], scheme: str, progress: Any
) -> Any:
    """Packs a model that is held in memory by what a text says, saves it, and returns the report."""
    import trustcore
    from trustcore.convert.calibrated import pack_by_text
    from trustcore.convert.folder import with_kept
    from trustcore.models.model import parameters_of
    from trustcore.quant import report
    from trustcore.saving import check_scheme

    check_scheme(scheme)
    model = trustcore.load(path, dtype="float32", progress=functools.partial(progress, "reading"))
    formats = with_kept(format, keep, list(parameters_of(model)))
    packed = pack_by_text(model, formats, text, method=method, progress=progress)
    trustcore.save(packed, out, scheme=scheme)
    return report(model, packed)


def _check(out: Path, force: bool) -> None:
    """Refuses an output that cannot be, before anything is read."""
    if out.suffix in _OTHER_FILES:
        raise typer.BadParameter(
            f"{out} is no .gguf file; give one, or a folder for a model in safetensors", param_hint="'--out'"
        )
    if out.suffix != ".gguf" and out.absolute().parent.is_dir():
        return  # a folder, which is refused where it holds something
    if out.is_dir() or not out.absolute().parent.is_dir():
        what = "is a folder" if out.is_dir() else "lies in a folder that does not exist"
        raise typer.BadParameter(f"{out} {what}", param_hint="'--out'")
    if out.exists() and not force:
        raise typer.BadParameter(
            f"{out} exists; write over it with --force, or choose another name", param_hint="'--out'"
        )


def _check_kind(out: Path, method: Method | None, scheme: Scheme | None, budget: str | None, pure: bool) -> None:
    """Refuses options of the other kind of output."""
    is_file = out.suffix == ".gguf"
    of_folders = {"--scheme": scheme is not None, "--method": method is Method.hqq}
    of_files = {"--budget": budget is not None, "--pure": pure}
    unfit = next((name for name, given in (of_folders if is_file else of_files).items() if given), None)
    if unfit is not None:
        what = "a folder" if is_file else "a .gguf file; a folder takes one format"
        raise typer.BadParameter(f"it goes with {what}", param_hint=f"'{unfit}'")


def _check_calibration(
    format: str | None, method: Method | None, calib: Path | None, budget: str | None, importance: Path | None
) -> float | None:
    """Returns the budget in bits a weight; refuses options that do not go together."""
    if format is None and budget is None:
        raise typer.BadParameter("give a format such as q4_k_m, or a --budget", param_hint="'--format'")
    if method is Method.hqq:
        if calib is not None or importance is not None:
            unused = "--calib" if calib is not None else "--importance"
            raise typer.BadParameter("hqq looks at the weights alone; leave it out", param_hint=f"'{unused}'")
        method = None
    if calib is None and (method is not None or budget is not None):
        name = "--budget" if method is None else "--method"
        raise typer.BadParameter("it needs a text to measure by: add --calib FILE", param_hint=f"'{name}'")
    if calib is not None and importance is not None:
        raise typer.BadParameter(
            "it takes the place of --calib, which makes an importance matrix of its own; give one of them",
            param_hint="'--importance'",
        )
    if budget is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:bpw)?", budget.strip().lower())
    if found is None or not 1 <= float(found[1]) <= 32:
        raise typer.BadParameter(f"{budget!r} is no number of bits; write 3.5bpw, for example", param_hint="'--budget'")
    return float(found[1])


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
        f"{units.size(report.source_bytes)} -> {units.size(report.nbytes)}, {report.bits_per_weight:.2f} bits a "
        f"weight, {report.seconds:.1f} s",
        soft_wrap=True,
    )
