"""`trustcore doctor`: what this machine can run, and for what it cannot, why not.

Each fact is looked up by itself: one that fails is shown with its reason, and the others stay.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from trustcore import units
from trustcore.cli import console
from trustcore.errors import BackendError

_PACKAGES = ("trustcore", "jax", "jaxlib", "flax", "numpy", "tokenizers", "safetensors")
# The parts of a processor that decide which arithmetic is fast, as Linux names them.
_INSTRUCTIONS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="The same as one JSON object.")] = False,
) -> None:
    """Show versions, processor, compiler, cache folder, and every platform with its devices or the reason why not."""
    report = examine()
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _print(report)


def examine() -> dict[str, Any]:
    """Returns what `trustcore doctor --json` prints. Starts each platform in another process; takes seconds."""
    platforms, problem = _platforms()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "processor": {"name": _processor(), "cores": _cores(), "instructions": instructions()},
        "cpu_kernels": _cpu_kernels(),
        "cache": _cache(),
        "platforms": platforms,
        "problem": problem,
    }


def _platforms() -> tuple[list[dict[str, Any]], str | None]:
    from trustcore.backend import find_backends

    try:
        backends = find_backends()
    except BackendError as error:
        return [], str(error)
    return [
        {"backend": backend.name, **dataclasses.asdict(report)} for backend in backends for report in backend.probe()
    ], None


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_kernels() -> dict[str, Any]:
    """Whether the C++ kernels are there. Builds them if they can be built and are not yet: the only true answer."""
    from trustcore.ops.cpu.build import compiler, why_not

    reason = why_not()
    return {"compiler": compiler(), "usable": not reason, "reason": reason}


def _cache() -> dict[str, Any]:
    from trustcore.cache import cache_folder

    try:
        folder = cache_folder()
    except OSError as error:
        return {"folder": None, "bytes": 0, "reason": f"{error}. Set TRUSTCORE_CACHE to a folder that can be written."}
    held = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            held += path.lstat().st_size if path.exists() else 0
    return {"folder": str(folder), "bytes": held, "reason": ""}


def instructions() -> list[str]:
    """Returns the instruction sets of this processor that matter for speed; empty where the system does not tell."""
    features = set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())
    return [name for name in _INSTRUCTIONS if name in features]


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return None


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _print(report: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = console.out()

    def line(name: str, value: str) -> None:
        out.print(Text(f"{name:13}{console.plain(value)}"), soft_wrap=True)

    processor, kernels, cache = report["processor"], report["cpu_kernels"], report["cache"]
    line("python", f"{report['python']} on {report['system']}")
    line("packages", ", ".join(f"{name} {version or 'not installed'}" for name, version in report["packages"].items()))
    line("processor", f"{processor['name']}, {processor['cores']} cores")
    line("instructions", " ".join(processor["instructions"]) or "not told")
    line("compiler", kernels["compiler"] or "none ($CXX, g++, c++, clang++)")
    line("cpu kernels", "usable" if kernels["usable"] else f"not used: {kernels['reason']}")
    line("cache", f"{cache['folder']} ({units.size(cache['bytes'])})" if cache["folder"] else cache["reason"])
    out.print()
    if report["problem"]:
        line("platforms", report["problem"])
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("backend", "platform", "usable", "devices", "memory", "dtypes, or why not"):
        table.add_column(name, overflow="fold")
    for row in report["platforms"]:
        cells = (
            row["backend"],
            row["platform"],
            "yes" if row["usable"] else "no",
            _devices(row["devices"]),
            "" if row["memory_bytes"] is None else units.size(row["memory_bytes"]),
            " ".join(row["dtypes"]) if row["usable"] else row["reason"],
        )
        table.add_row(*(Text(console.plain(cell)) for cell in cells))
    console.print_table(out, table)


def _devices(devices: Sequence[dict[str, Any]]) -> str:
    kinds = [device["kind"] for device in devices]
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
