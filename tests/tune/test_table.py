"""The tables on disk: whole at all times, shared by processes, read by bucket, source and version, never trusted."""

from __future__ import annotations

import dataclasses
import json
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from trustcore import tune
from trustcore.tune import registry, table
from trustcore.tune.device import Device

DEVICE = Device("cpu", "a chip", 4)
WON = {"implementation": "plain", "form": "fast", "turns": 100}


def entry(tunable, **changes):
    made = table.Entry(
        op=tunable.op,
        source=registry.source_hash(tunable),
        revision=tunable.revision,
        jaxlib=table.jaxlib_version(),
        exact={"dtype": "float32"},
        sizes={"R": 64, "D": 64},
        values=WON,
        seconds=1e-3,
        default_seconds=2e-3,
        implementations={"plain": {"values": WON, "seconds": 1e-3}},
        wrong=[],
        date="2026-11-21",
    )
    return dataclasses.replace(made, **changes)


def choice(**sizes):
    return tune.best("toy", sizes or {"R": 64, "D": 64}, device=DEVICE)


def test_an_entry_comes_back(own_tables, toy):
    tunable = toy()
    path = table.record(DEVICE, entry(tunable))
    assert path.parent == own_tables and path.name == "cpu-a-chip-4.json"
    told = json.loads(path.read_text())
    assert told["version"] == table.VERSION and told["device"]["cores"] == 4
    assert table.read(path) == (entry(tunable),)
    assert (choice().values, choice().source) == (WON, "cache")
    assert "1 ms, the defaults 2 ms (2.00), 2026-11-21" in choice().why


def test_the_newer_entry_of_a_key_stays(own_tables, toy):
    tunable = toy()
    table.record(DEVICE, entry(tunable))
    path = table.record(DEVICE, entry(tunable, sizes={"R": 70, "D": 60}, values={}))  # the same buckets
    assert [e.sizes for e in table.read(path)] == [{"R": 70, "D": 60}]
    assert choice().values == {}


def test_buckets_and_the_nearest_of_them(own_tables, toy):
    assert [table.bucket(n) for n in (0, 1, 3, 90, 91, 512)] == [0, 1, 4, 64, 128, 512]
    tunable = toy()
    far = {"implementation": "plain", "form": "slow", "turns": 100}
    table.record(DEVICE, entry(tunable))
    table.record(DEVICE, entry(tunable, sizes={"R": 512, "D": 64}, values=far))
    assert (choice(R=80, D=50).source, choice(R=80, D=50).values) == ("cache", WON)
    assert (choice(R=128, D=64).source, choice(R=128, D=64).values) == ("nearest", WON)
    assert choice(R=256, D=64).values == far
    assert choice(R=2048, D=64).values == far
    assert choice(R=8192, D=64).source == "defaults"  # four powers of two away
    assert choice(R=4096, D=128).source == "defaults"  # the square root of ten
    assert "the nearest" not in choice().why and "nearest of what was measured" in choice(R=128, D=64).why


@pytest.mark.parametrize(
    "changes",
    [{"source": "another"}, {"jaxlib": "0.0.1"}, {"revision": 7}, {"exact": {"dtype": "bfloat16"}}, {"op": "other"}],
    ids=lambda changes: next(iter(changes)),
)
def test_entries_of_something_else_are_not_taken(own_tables, toy, changes):
    table.record(DEVICE, entry(toy(), **changes))
    assert choice().source == "defaults"


def test_another_device_does_not_count(own_tables, toy):
    table.record(dataclasses.replace(DEVICE, cores=8), entry(toy()))
    assert choice().source == "defaults"
    chip = Device("cuda", "9.0", 132)
    table.record(chip, entry(toy()))
    absent = Device("cuda", "9.0", 0)  # what a program is lowered for where the chip is not
    assert tune.best("toy", R=64, D=64, device=absent).values == WON
    assert tune.best("toy", R=64, D=64, device=dataclasses.replace(absent, architecture="8.0")).values == {}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"entries": 3, "device": {}}', '{"entries": []}', "\x00", "[" * 5000])
def test_a_broken_file_is_set_aside_with_one_warning(own_tables, toy, text):
    tunable = toy()
    path = table.path_of(DEVICE)
    path.write_text(text)
    with pytest.warns(UserWarning, match=r"is broken .*it was set aside as .*\.broken-"):
        assert choice().source == "defaults"
    assert [p.read_text() for p in own_tables.glob("*.broken-*")] == [text]
    path.write_text("{ again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        table.record(DEVICE, entry(tunable))
    assert choice().values == WON


def test_another_version_is_not_read(own_tables, toy):
    path = table.record(DEVICE, entry(toy()))
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "version": table.VERSION + 1}))
    assert choice().source == "defaults"
    assert not list(own_tables.glob("*.broken-*"))


@pytest.mark.parametrize(
    "damage",
    [
        {"values": "fast"}, {"values": {"form": ["fast"]}}, {"seconds": "1"}, {"sizes": {"R": -1, "D": 64}},
        {"sizes": {"R": 1e400, "D": 64}}, {"more": 1}, {"exact": None},
    ],
    ids=str,
)  # fmt: skip
def test_an_entry_that_is_none_is_left_out(own_tables, toy, damage):
    path = table.record(DEVICE, entry(toy()))
    told = json.loads(path.read_text())
    told["entries"][0] |= damage
    path.write_text(json.dumps(told))
    assert choice().source == "defaults"


@pytest.mark.parametrize(
    "values",
    [
        {"implementation": "magic"},
        {"implementation": ["plain"]},
        {"implementation": "plain", "form": "fast", "turns": 101},
        {"implementation": "plain", "form": "fast"},
        {"implementation": "plain", "form": "fast", "turns": 100, "more": 1},
    ],
    ids=str,
)
def test_values_that_are_not_declared_are_not_taken(own_tables, toy, values):
    tunable = toy()
    path = table.record(DEVICE, entry(tunable))
    told = json.loads(path.read_text())
    told["entries"][0]["values"] = values
    path.write_text(json.dumps(told))
    assert choice().values == {} and choice().source == "defaults"


def test_a_constraint_holds_for_neighbours(own_tables, toy):
    tunable = toy(constraint=lambda target, facts, values: "too many rows" if facts["R"] > 100 else "")
    table.record(DEVICE, entry(tunable))
    assert choice().values == WON
    assert choice(R=128, D=64).why.endswith("does not serve this call: too many rows")


def test_a_table_of_the_package_serves_by_revision(own_tables, toy, tmp_path, monkeypatch):
    tunable = toy()
    monkeypatch.setattr(table, "PACKAGED", tmp_path)
    table.write(tmp_path / "a.json", DEVICE, [entry(tunable, source="earlier", jaxlib="0.1")])
    assert (choice().source, choice().values) == ("package", WON)
    assert choice().why.startswith("table of the package for a chip: ")
    found = tune.best("toy", R=64, D=64, device=dataclasses.replace(DEVICE, cores=64))  # as many cores or others
    assert found.values == WON
    table.record(DEVICE, entry(tunable, values={}))
    assert (choice().source, choice().values) == ("cache", {})  # what was measured here comes first
    toy(revision=2)
    assert choice().source == "defaults"


def test_tables_of_the_package_can_be_read():
    paths = sorted(table.PACKAGED.glob("*.json"))
    assert paths
    for path in paths:
        device, entries = table.parsed(path.read_text())
        assert entries and len(entries) == len(json.loads(path.read_text())["entries"])
        for e in entries:
            tunable = registry.declared(e.op)
            known = tunable.complete({**e.exact, **e.sizes})
            assert tune.best(e.op, known, device=device).source in ("package", "cache")


def test_threads_share_a_table(own_tables, toy):
    tunable = toy()
    sizes = [{"R": 1 << i, "D": 1 << j} for i in range(4) for j in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda s: table.record(DEVICE, entry(tunable, sizes=s)), sizes))
    assert len(table.read(table.path_of(DEVICE))) == len(sizes)


def test_processes_share_a_table(own_tables, fresh_python):
    """Three processes write twenty entries each at once, and read whole files all the while."""
    source = """
        import subprocess, sys
        worker = '''
        import sys
        from trustcore.tune import table
        from trustcore.tune.device import Device
        device, number = Device("cpu", "a chip", 4), int(sys.argv[1])
        for i in range(20):
            sizes = {"R": 1 << number, "D": 1 << i}
            table.record(device, table.Entry("toy", "s", 1, "j", {}, sizes, {}, 1.0, 1.0, {}, [], "2026-11-21"))
            assert any(e.sizes == sizes for e in table.read(table.path_of(device)))
        '''
        import textwrap
        workers = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(worker), str(n)]) for n in range(3)]
        assert [w.wait() for w in workers] == [0] * 3
    """
    fresh_python(source)
    entries = table.read(table.path_of(DEVICE))
    assert len({tuple(e.sizes.items()) for e in entries}) == 60
    assert not list(own_tables.glob("*.part")) and not list(own_tables.glob("*.broken-*"))


def test_a_folder_that_cannot_be_written_is_one_sentence(own_tables, toy, monkeypatch):
    def refused(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(table.tempfile, "mkstemp", refused)
    with pytest.raises(tune.searching.TuningError, match="the table cannot be written: read-only"):
        table.record(DEVICE, entry(toy()))
