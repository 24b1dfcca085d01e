"""`trustcore convert`: a checkpoint of any kind to safetensors, GGUF or Orbax, tensor by tensor."""

from __future__ import annotations

import enum
import functools
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from trustcore import units
from trustcore.cli import console, options
from trustcore.errors import CheckpointError


class Kind(enum.StrEnum):
    """Names of `trustcore.convert.convert.KINDS`."""

    safetensors = "safetensors"
    gguf = "gguf"
    orbax = "orbax"


class TargetType(enum.StrEnum):
    """Names of `trustcore.convert.convert.DTYPES`."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A file or folder, a catalogue name, or owner/name[:Q4_K_M].")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="DST", help="A folder, a .safetensors file (written alone), or a .gguf file.")
    ],
    *,
    to: Annotated[Kind | None, typer.Option("--to", help="The format, where DST does not say it.")] = None,
    dtype: Annotated[
        TargetType | None, typer.Option(help="Cast floats to this, and decode packed ones; else they stay as stored.")
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option(metavar="5GB", help="How large a file of a folder of safetensors may be.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Load both and compare their logits before DST appears.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Write a checkpoint in another format, with its configuration and tokenizer. Ctrl-C leaves nothing behind."""
    if out.is_file() and out.suffix in (".gguf", ".safetensors") and not force:
        raise typer.BadParameter(
            f"{out} exists; write over it with --force, or choose another name", param_hint="'DST'"
        )
    if not out.absolute().parent.is_dir():
        raise typer.BadParameter(f"{out} lies in a folder that does not exist", param_hint="'DST'")
    from trustcore.catalogue import resolve
    from trustcore.convert import convert_checkpoint

    with console.progress_bar() as progress:
        path = resolve(source, progress=progress)
        try:
            report = convert_checkpoint(
                path,
                out,
                kind=None if to is None else to.value,
                dtype=None if dtype is None else dtype.value,
                shard_size=shard_size,
                verify=verify,
                progress=functools.partial(progress, "converting"),
            )
        except OSError as error:
            raise CheckpointError(f"cannot be written: {error}", path=out) from error
    if as_json:
        print(json.dumps(report.as_json(), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _print(report)


def _print(report: Any) -> None:
    from rich.text import Text

    out = console.out()

    def line(text: str) -> None:
        out.print(Text(console.plain(text)), soft_wrap=True)

    line(f"{report.path}: {report.kind} from {report.source_kind}, {report.tensors} tensors")
    line(f"{units.size(report.source_bytes)} -> {units.size(report.nbytes)}, {report.seconds:.1f} s")
    if report.files:
        line(f"beside them: {', '.join(report.files)}")
    checked = report.verification
    if checked is not None:
        line(
            f"verified on {checked.tokens} tokens: logits differ by at most {checked.max_difference:.3g} (the largest "
            f"is {checked.max_logit:.3g}), {100 * checked.agreement:.0f}% of likeliest tokens agree"
        )
