"""What was found, as JSON: one file a device in the cache folder, and read-only ones that come with the package.

    {"version": 1, "device": {"platform", "architecture", "cores"}, "entries": [{...}, ...]}

An entry holds for an op, the hash of its sources, a release of jaxlib, the facts that are no sizes, and a bucket of
sizes: each rounded to a power of two. A table of the package is read by the op's `revision`, whatever the hash and the
release.

Invariants: a file is whole at all times (written beside and moved into place); of several processes that write, each
one's entries stay (read, merged and written under a lock); a file that is broken is set aside with one warning; what
has another version, or values that the declaration does not know, is not read. Files are untrusted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from kernels_pallas.tuning import Facts, Tunable, Values
from trustcore.cache import cache_folder
from trustcore.errors import TuningError
from trustcore.tune.device import Device
from trustcore.tune.registry import source_hash

VERSION = 1
REACH = 3.0  # powers of two, as the length of a vector of all sizes, up to which an entry serves another bucket
MOST = 4096  # entries of a file; the oldest go first
LOCK_SECONDS = 30
PACKAGED = Path(__file__).parent / "tables"


@dataclasses.dataclass(frozen=True)
class Entry:
    """The best values of a call on a device.

    Attributes:
        op, source, revision, jaxlib: of the declaration, and with what it was measured.
        exact: facts that are no sizes.
        sizes: those of the call that was measured.
        values: the fastest; {} are the op's defaults.
        seconds: of a call with them.
        default_seconds: with the defaults.
        implementations: the fastest values of each implementation, and their seconds.
        wrong: candidates whose results were wrong, and how.
        date: of the measurement, YYYY-MM-DD.
    """

    op: str
    source: str
    revision: int
    jaxlib: str
    exact: Mapping[str, Any]
    sizes: Mapping[str, int]
    values: Values
    seconds: float
    default_seconds: float
    implementations: Mapping[str, Mapping[str, Any]]
    wrong: Sequence[Mapping[str, Any]]
    date: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What no two entries of a file have in common."""
        return (
            self.op, self.source, self.revision, self.jaxlib, tuple(sorted(self.exact.items())), _buckets(self.sizes)
        )  # fmt: skip


def split(tunable: Tunable, facts: Facts) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns the facts that must agree, and the sizes that may differ."""
    sizes = {n: facts[n] for n in tunable.sizes}
    return {n: x for n, x in facts.items() if n not in sizes}, sizes


def bucket(size: int) -> int:
    """Returns the power of two nearest to a size; 0 for 0."""
    return 1 << round(math.log2(size)) if size > 0 else 0


def distance(a: Mapping[str, int], b: Mapping[str, int]) -> float:
    """Returns how many powers of two lie between sizes, `|log2 a - log2 b|`; infinity where one of two is 0."""
    if a.keys() != b.keys():
        return math.inf
    return math.hypot(*(0.0 if a[n] == b[n] else math.log2(a[n] / b[n]) if a[n] and b[n] else math.inf for n in a))


def jaxlib_version() -> str:
    """Returns the release of jaxlib that results belong to."""
    return metadata.version("jaxlib")


@dataclasses.dataclass(frozen=True)
class Found:
    """An entry that serves a call: of which table, whether of the same bucket, and how far off it is."""

    entry: Entry
    packaged: bool
    same_bucket: bool
    distance: float


def find(tunable: Tunable, device: Device, facts: Facts) -> Found | None:
    """Returns the entry that serves a call best: the cache's before the package's, its bucket's before neighbours'."""
    exact, sizes = split(tunable, facts)
    for packaged in (False, True):
        tables = _packaged(device) if packaged else [read(path_of(device))] if device.cores else _others(device)
        able = [e for entries in tables for e in entries if _serves(e, tunable, exact, packaged=packaged)]
        ranked = sorted(
            ((_buckets(e.sizes) != _buckets(sizes), distance(e.sizes, sizes)), i) for i, e in enumerate(able)
        )
        for (other, far), place in ranked:
            if far <= REACH or not other:
                return Found(able[place], packaged, not other, far)
    return None


def record(device: Device, entry: Entry) -> Path:
    """Puts an entry into the device's file, in place of one with the same key; returns the file.

    Raises:
        TuningError: the cache folder cannot be written, or another process holds its lock.
    """
    import filelock

    path = path_of(device)
    try:
        with filelock.FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
            entries = {e.key: e for e in _read_now(path, locked=True)}
            entries.pop(entry.key, None)
            entries[entry.key] = entry
            write(path, device, sorted(entries.values(), key=lambda e: e.date)[-MOST:])
    except filelock.Timeout as error:
        raise TuningError(f"{path}: another process holds its lock for more than {LOCK_SECONDS} seconds.") from error
    except OSError as error:
        raise TuningError(f"{path}: the table cannot be written: {error}") from error
    return path


def write(path: Path, device: Device, entries: Iterable[Entry]) -> None:
    """Writes a table: beside its place, and then into it."""
    told = {"version": VERSION, "device": dataclasses.asdict(device), "entries": [vars(e) for e in entries]}
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(told, file, indent=1, default=dict)
            file.write("\n")
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def path_of(device: Device) -> Path:
    """Returns where a device's table lies in the cache folder."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{device.platform}-{device.architecture}-{device.cores}").strip("-").lower()
    return cache_folder("tune") / f"{name}.json"


def stamp(device: Device) -> tuple[int, int]:
    """Returns what changes when a device's table does."""
    try:
        status = path_of(device).stat()
    except OSError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)


_kept: dict[Path, tuple[tuple[int, int], tuple[Entry, ...]]] = {}
_warned: set[Path] = set()
_lock = threading.Lock()


def read(path: Path) -> tuple[Entry, ...]:
    """Returns the entries of a table in the cache folder, none where there is none; again from memory if unchanged."""
    try:
        status = path.stat()
    except OSError:
        return ()
    now = (status.st_mtime_ns, status.st_size)
    with _lock:
        before = _kept.get(path)
    if before is not None and before[0] == now:
        return before[1]
    entries = _read_now(path, locked=False)
    with _lock:
        _kept[path] = (now, entries)
    return entries


def parsed(text: str) -> tuple[Device, tuple[Entry, ...]]:
    """Returns the device and the entries of a table; those that are not of this version, or not whole, are left out.

    Raises:
        ValueError: it is no table.
    """
    told = json.loads(text)
    if not isinstance(told, dict) or not isinstance(told.get("entries"), list) or not isinstance(told["device"], dict):
        raise ValueError("it is no table")
    about = told["device"]
    device = Device(str(about.get("platform")), str(about.get("architecture")), int(about.get("cores", 0)))
    if told.get("version") != VERSION:
        return device, ()
    return device, tuple(e for e in map(_entry, told["entries"]) if e is not None)


def _read_now(path: Path, *, locked: bool) -> tuple[Entry, ...]:
    try:
        return parsed(path.read_text(encoding="utf-8"))[1]
    except FileNotFoundError:
        return ()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if not locked:
            import filelock

            with filelock.FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
                return _read_now(path, locked=True)  # another process may have set it aside meanwhile
        aside = path.with_name(f"{path.name}.broken-{os.getpid()}")
        os.replace(path, aside)
        if path not in _warned:
            _warned.add(path)
            warnings.warn(
                f"the tuner's table {path} is broken ({error}); it was set aside as {aside.name}", stacklevel=3
            )
        return ()


def _entry(told: Any) -> Entry | None:
    """An entry if it has every field with the kind it must have, else None."""
    names = [f.name for f in dataclasses.fields(Entry)]
    if not isinstance(told, dict) or sorted(told) != sorted(names):
        return None
    kinds = {
        "revision": int, "seconds": (int, float), "default_seconds": (int, float), "exact": dict, "sizes": dict,
        "values": dict, "implementations": dict, "wrong": list,
    }  # fmt: skip
    if not all(isinstance(told[n], kinds.get(n, str)) for n in names):
        return None
    if not all(_is_size(x) for x in told["sizes"].values()):
        return None
    if not all(_plain(x) for n in ("exact", "values") for x in told[n].values()):
        return None
    return Entry(**told)


def _is_size(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**62


def _plain(x: Any) -> bool:
    return isinstance(x, str | int | float | bool)


def _buckets(sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((n, bucket(x)) for n, x in sizes.items()))


def _serves(entry: Entry, tunable: Tunable, exact: Mapping[str, Any], *, packaged: bool) -> bool:
    if entry.op != tunable.op or entry.revision != tunable.revision or dict(entry.exact) != dict(exact):
        return False
    return packaged or (entry.source == source_hash(tunable) and entry.jaxlib == jaxlib_version())


def _packaged(device: Device) -> list[tuple[Entry, ...]]:
    """The package's tables of a device; one of as many cores comes first."""
    found = []
    for path in sorted(PACKAGED.glob("*.json")):
        made, entries = _packaged_table(path)
        if (made.platform, made.architecture) == (device.platform, device.architecture):
            found.append((made.cores != device.cores, len(found), entries))
    return [entries for _, _, entries in sorted(found, key=lambda f: f[:2])]


def _packaged_table(path: Path) -> tuple[Device, tuple[Entry, ...]]:
    with _lock:
        if path not in _tables:
            _tables[path] = parsed(path.read_text(encoding="utf-8"))
        return _tables[path]


_tables: dict[Path, tuple[Device, tuple[Entry, ...]]] = {}


def _others(device: Device) -> list[tuple[Entry, ...]]:
    """Tables in the cache folder of chips of an architecture, with any number of cores."""
    like = path_of(dataclasses.replace(device, cores=0)).name.removesuffix("0.json")
    return [read(path) for path in sorted(cache_folder("tune").glob(f"{like}*.json"))] if device.architecture else []
