"""The commands put together, and what every one of them shares: the version, one-line errors, the exit status."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from trustcore.cli import (
    chat,
    convert,
    cost,
    doctor,
    embed,
    generate,
    info,
    inspect_step,
    interrupts,
    memory,
    perplexity,
    pull,
    quantize,
    tune,
)
from trustcore.errors import TrustcoreError

app = typer.Typer(
    name="trustcore",
    help="From any checkpoint to any chip: open, inspect and run language models with JAX.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("embed")(embed.embed)
app.command("info")(info.info)
app.command("pull")(pull.pull)
app.command("convert")(convert.convert)
app.command("quantize")(quantize.quantize)
app.command("perplexity")(perplexity.perplexity)
app.command("compare")(perplexity.compare)
app.command("cost")(cost.cost)
app.command("memory")(memory.memory)
app.command("inspect-step")(inspect_step.inspect_step)
app.command("tune")(tune.tune)
app.command("doctor")(doctor.doctor)


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. May stand anywhere.")] = False,
) -> None:
    """From any checkpoint to any chip: open, inspect and run language models with JAX."""
    del debug  # taken out by main(), wherever it stands; named here for the help page


def run(words: list[str], *, debug: bool) -> int:
    """Returns the exit status of one command line; with `debug`, errors pass through."""
    if words == ["--version"]:
        print(version())
        return 0
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a stream that a test put there may have none
        if reconfigure is not None:
            reconfigure(errors="replace")  # a terminal without Unicode shows "?" instead of failing
    usage_error: Any = typer.BadParameter.__base__  # of typer's own click or of the package, by release
    try:
        with interrupts.remembered():
            status = app(words or ["--help"], prog_name="trustcore", standalone_mode=False)
    except usage_error as error:
        command = "trustcore" if error.ctx is None else error.ctx.command_path
        return _fail(f"{error.format_message()} (`{command} --help` shows what is allowed)")
    except typer.Abort:
        return _fail("stopped", status=130)
    except TrustcoreError as error:
        if debug:
            raise
        return _fail(str(error))
    except Exception as error:
        if debug:
            raise
        what = f"{type(error).__name__}: {error}"
        return _fail(f"internal error: {what} (run again with --debug for the traceback, and report it)", status=1)
    return status if isinstance(status, int) else 0


def version() -> str:
    """Returns "trustcore 0.1.0", or says that this is a checkout that was not installed."""
    from importlib import metadata

    try:
        return f"trustcore {metadata.version('trustcore')}"
    except metadata.PackageNotFoundError:
        return "trustcore (a checkout that is not installed)"


def _fail(message: str, *, status: int = 2) -> int:
    sys.stdout.flush()
    print(f"trustcore: {' '.join(message.split())}", file=sys.stderr)
    return status
