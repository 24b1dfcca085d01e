"""`trustcore generate`: streams the continuation of a prompt, or with `--chat` the answer to it."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from trustcore import units
from trustcore.cli import console, interrupts, options
from trustcore.cli.model import load_model
from trustcore.errors import GenerationError


def generate(
    model: options.Model,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text; - or nothing reads it from stdin.")
    ] = None,
    *,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Answer it, by the model's chat template, or continue it as it is.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="What the model is told first; with --chat.")] = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = False,
    context: options.Context = None,
    cache_dtype: options.CacheDtype = None,
    dtype: options.Dtype = None,
    stats: Annotated[
        bool | None, typer.Option("--stats/--no-stats", help="Speed and memory at the end; on a terminal by default.")
    ] = None,
) -> None:
    """Stream what a model writes after a prompt. Ctrl-C stops it and keeps what is there (exit status 130)."""
    sampling = options.sampling(locals())
    import trustcore

    if system is not None and not chat:
        raise typer.BadParameter("a system message needs the chat template: add --chat", param_hint="'--system'")
    text = read_prompt(prompt)
    loaded = load_model(model, dtype)
    if chat:
        told = [{"role": "system", "content": system}] if system else []
        stream = trustcore.chat(loaded, [*told, {"role": "user", "content": text}], stream=True, **sampling)
    else:
        stream = trustcore.generate(loaded, text, stream=True, **sampling)
    stopped = show(stream)
    if stats or (stats is None and sys.stdout.isatty()):
        console.err().print(figures(stream), style="dim", soft_wrap=True)
    if stopped:
        raise typer.Exit(130)


def read_prompt(prompt: str | None) -> str:
    """Returns the prompt, from stdin where it is "-" or where none is given and stdin is no terminal.

    One line feed at the end of stdin is not part of the prompt: `echo` and editors put it there.
    """
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("no prompt: write it after the model, or pipe it in", param_hint="'PROMPT'")
    data = sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise GenerationError(
            f"the prompt on stdin is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}. Convert it, "
            "for example with `iconv -f latin1 -t utf-8`."
        ) from error
    return text.removesuffix("\n").removesuffix("\r")


def show(stream: Any) -> bool:
    """Writes a stream to stdout piece by piece, ends the line, and returns whether Ctrl-C stopped it."""
    stopped = False
    try:
        for piece in stream:
            console.write(piece)
            interrupts.check()
    except KeyboardInterrupt:
        stopped = True
    finally:
        stream.close()
    console.write("\n")
    return stopped


def figures(stream: Any) -> str:
    """Returns the last line: speeds, time to the first token, peak memory of the process."""
    stats = stream.stats
    parts = [
        f"prompt {stats.prompt_tokens} tokens, {_speed(stats.prefill_tokens_per_second)}",
        f"generated {stats.generated_tokens} tokens, {_speed(stats.decode_tokens_per_second)}",
    ]
    if stats.first_token_seconds is not None:
        parts.append(f"first token after {stats.first_token_seconds:.2f} s")
    peak = peak_memory()
    if peak is not None:
        parts.append(f"peak memory {units.size(peak)}")
    return " | ".join(parts)


def _speed(tokens_per_second: float | None) -> str:
    return "-" if not tokens_per_second else f"{tokens_per_second:.1f} tokens/s"


def peak_memory() -> int | None:
    """Returns the largest resident size of this process so far in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes everywhere but on macOS
