"""What a backend is: a way to compile programs for some platforms that can say what it can do here, and why not.

A backend is a package of its own, found through the entry-point group `trustcore.backends`; the entry point names an
object that has the attributes of `Backend`.

Invariants: finding backends starts no device. `probe` may take seconds, touches no state of the calling process, and
answers for what is missing or broken with a reason, never with an exception.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import Protocol, runtime_checkable

from trustcore.errors import BackendError

GROUP = "trustcore.backends"


@dataclass(frozen=True)
class DeviceInfo:
    """One device.

    Attributes:
        id: as the platform numbers it.
        kind: the hardware's name, "NVIDIA H200"; "cpu" where the platform does not tell.
        memory_bytes: what a program may use of its memory; None when the platform does not tell.
    """

    id: int
    kind: str
    memory_bytes: int | None = None


@dataclass(frozen=True)
class PlatformReport:
    """What one platform can do on this machine.

    Attributes:
        platform: "cpu", "cuda", "rocm", "tpu", "metal", or the name a plugin gives itself.
        usable: programs run there.
        reason: why not, and what to do; "" when usable.
        devices: those that answer.
        memory_bytes: of one device, the smallest where they differ; None when the platform does not tell.
        dtypes: names of the dtypes in which a small program gave the right answer on the first device.
    """

    platform: str
    usable: bool
    reason: str = ""
    devices: tuple[DeviceInfo, ...] = ()
    memory_bytes: int | None = None
    dtypes: tuple[str, ...] = ()


@runtime_checkable
class Backend(Protocol):
    """A compiler for some platforms."""

    @property
    def name(self) -> str:
        """Short and unique: "xla"."""
        ...

    def probe(self) -> list[PlatformReport]:
        """Returns one report for each platform that this backend can compile for, usable or not."""
        ...


@dataclass(frozen=True)
class BrokenBackend:
    """Stands for an installed backend that cannot be imported, so that the others still answer."""

    name: str
    reason: str

    def probe(self) -> list[PlatformReport]:
        """Returns one report that says why the backend cannot be used."""
        return [PlatformReport(platform=self.name, usable=False, reason=self.reason)]


def find_backends() -> tuple[Backend, ...]:
    """Returns every installed backend, sorted by name. Starts no device.

    Raises:
        BackendError: none is installed.
    """
    points = sorted(metadata.entry_points(group=GROUP), key=lambda point: point.name)
    if not points:
        raise BackendError(
            f'no backend is registered in the entry-point group "{GROUP}". trustcore runs from a checkout that is not '
            "installed: run `pip install -e .` in it, which registers trustcore_xla."
        )
    return tuple(_load(point) for point in points)


def _load(point: metadata.EntryPoint) -> Backend:
    try:
        backend = point.load()
    except Exception as error:  # a broken package may raise anything, and must not hide the others
        return BrokenBackend(point.name, f"importing {point.value} failed: {type(error).__name__}: {error}")
    if not isinstance(backend, Backend):
        return BrokenBackend(point.name, f"{point.value} is a {type(backend).__name__} without `name` and `probe`")
    return backend
