"""Which platforms PJRT reaches from here: each installed one is tried in a process of its own.

    installed? (no import) -> python -m trustcore_xla.tryout PLATFORM (time-out) -> JSON line -> PlatformReport

A process each, because a driver may hang, print, take all memory or abort the process, because jax caches its failures,
and because the calling process must not start a device. The outcome is one of: not installed, no device, does not
start (and why), does not answer in time, usable.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from trustcore import backend
from trustcore.backend import DeviceInfo, PlatformReport

# Platforms that jax itself knows, with what to install for each.
INSTALL: dict[str, str] = {
    "cpu": "jaxlib",
    "cuda": 'pip install "jax[cuda13]" (Linux, NVIDIA driver 580 or newer; "jax[cuda12]" for older ones)',
    "rocm": "the jax-rocm plugin that AMD builds for this release of ROCm",
    "tpu": 'pip install "jax[tpu]" (on a machine with a TPU)',
    "metal": "pip install jax-metal (macOS on Apple silicon)",
}
# What drivers say when they are in order and no hardware answers.
_NO_DEVICE = re.compile(
    r"NO_DEVICE|no CUDA-capable device|no \S+ devices? (?:were |was )?found|no supported devices|no visible|"
    r"No TPU|no devices? available|hipErrorNoDevice|Failed to open /dev|No such device",
    re.IGNORECASE,
)


def probe(*, timeout: float, platforms: Iterable[str] | None = None) -> list[PlatformReport]:
    """Returns what each platform can do here.

    Args:
        timeout: seconds for one platform.
        platforms: names; None for the five that jax knows and every installed plugin.
    """
    plugins = installed_plugins()
    if platforms is None:
        others = [platform for platform in plugins.values() if platform not in INSTALL]
        platforms = dict.fromkeys([*INSTALL, *sorted(others)])
    return [_probe_one(platform, plugins, timeout) for platform in platforms]


def installed_plugins() -> dict[str, str]:
    """Returns every installed PJRT plugin and the platform that it serves. Imports none of them.

    Plugins come as entry points of the group `jax_plugins` or as modules of the namespace package of that name.
    """
    names = [point.name for point in metadata.entry_points(group="jax_plugins")]
    namespace = importlib.util.find_spec("jax_plugins")
    if namespace is not None and namespace.submodule_search_locations is not None:
        names += [module.name for module in pkgutil.iter_modules(namespace.submodule_search_locations)]
    plugins = {name: _platform_of(name) for name in names}
    if importlib.util.find_spec("libtpu") is not None:
        plugins["libtpu"] = "tpu"
    return plugins


def _platform_of(plugin: str) -> str:
    """ "xla_cuda13" serves cuda, "jax_rocm7" rocm, "metal_plugin" metal; any other is a platform by its own name."""
    for platform in ("cuda", "rocm", "metal"):
        if platform in plugin.lower():
            return platform
    return plugin


def _probe_one(platform: str, plugins: dict[str, str], timeout: float) -> PlatformReport:
    if platform != "cpu" and platform not in plugins.values():
        return _unusable(platform, f"not installed: {INSTALL.get(platform, 'no plugin of this name')}")
    command = [sys.executable, "-m", "trustcore_xla.tryout", platform]
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=_environment(platform),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _unusable(platform, f"does not answer: nothing after {timeout:g} s")
    except OSError as error:
        return _unusable(platform, f"does not start: {error}")
    answer = _answer(result.stdout)
    if answer is None:
        return _unusable(platform, f"does not start: {_died(result.returncode, result.stderr)}")
    if "error" in answer:
        return _unusable(platform, _why(str(answer["error"]), result.stderr))
    devices = tuple(DeviceInfo(id=d["id"], kind=d["kind"], memory_bytes=d["memory_bytes"]) for d in answer["devices"])
    known = [device.memory_bytes for device in devices if device.memory_bytes is not None]
    return PlatformReport(
        platform=platform,
        usable=True,
        devices=devices,
        memory_bytes=min(known) if known else None,
        dtypes=tuple(answer["dtypes"]),
    )


def _unusable(platform: str, reason: str) -> PlatformReport:
    return PlatformReport(platform=platform, usable=False, reason=reason)


def _environment(platform: str) -> dict[str, str]:
    """This process's, so that proxies and device filters hold, without what would choose or reserve for us."""
    environment = dict(os.environ)
    environment["JAX_PLATFORMS"] = platform
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # other programs use the device now
    roots = [str(Path(__file__).parents[1]), str(Path(backend.__file__).parents[1])]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*roots, environment.get("PYTHONPATH")]))
    return environment


def _answer(stdout: str) -> dict[str, Any] | None:
    """The last line that is ours; drivers print to the same stream."""
    for line in reversed(stdout.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    return None


def _why(error: str, stderr: str) -> str:
    """jax's own words, and the exception of the plugin, which jax only logs."""
    raised = [line.strip() for line in stderr.splitlines() if re.match(r"[\w.]*(Error|Exception)\b.*:", line)]
    text = _short("; ".join([*raised[-1:], error]))
    if _NO_DEVICE.search(f"{error}\n{stderr}"):
        return f"no device: {text}"
    return f"does not start: {text}"


def _died(code: int, stderr: str) -> str:
    how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return f"{how}{': ' + _short(lines[-1]) if lines else ''}"


def _short(text: str) -> str:
    return " ".join(text.split())[:300]
