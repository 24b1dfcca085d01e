"""The comparison of what oracles say with what is recorded: every script has its place, and differences are found."""

import json
import re
import sys

import numpy as np
import pytest

from tests.oracles import run as oracles


def test_every_script_is_run_and_every_pattern_has_files():
    scripts = {path.stem.removeprefix("record_") for path in oracles.HERE.glob("record_*.py")}
    assert scripts == {*oracles.RECORDS, *oracles.BY_HAND}
    told = (oracles.HERE / "README.md").read_text()
    assert all(f"`record_{name}.py`" in told for name in scripts)
    for name, record in oracles.RECORDS.items():
        for pattern in record.files:
            assert list(oracles.DATA.glob(pattern)), (name, pattern)


RECORD = oracles.Record(("a.npz", "b.json"), (), tolerance=1e-3)
NUMBERS = {"x": np.linspace(-5, 5, 7, dtype=np.float32), "n": np.arange(3), "config": np.array("text")}
TEXT = {"about": "version 1", "rows": [[1, 2], [3.5, 100.0]], "said": {"word": "yes", "none": None}}


def written(folder, numbers=NUMBERS, text=TEXT):
    folder.mkdir(exist_ok=True)
    if numbers is not None:
        np.savez(folder / "a.npz", **numbers)
    (folder / "b.json").write_text(json.dumps(text))
    return folder


def compared(tmp_path, *changed):
    return oracles.compare(RECORD, written(tmp_path / "out", *changed), written(tmp_path / "data"))


def test_what_is_the_same(tmp_path):
    found = compared(tmp_path, {**NUMBERS, "x": NUMBERS["x"] * np.float32(1 + 1e-5)}, {**TEXT, "about": "version 2"})
    assert not found.differs and found.said == "the same"
    assert found.values == 18 and 0 < found.largest < 2e-5


@pytest.mark.parametrize(
    ("numbers", "text", "said"),
    [
        ({"x": NUMBERS["x"] + np.float32(0.01)}, {}, "a.npz: x differs by 0.01"),
        ({"x": NUMBERS["x"] * np.float32(np.nan)}, {}, "a.npz: x differs by nan"),
        ({"x": NUMBERS["x"][:3]}, {}, r"a.npz: x was float32\[7\], is float32\[3\]"),
        ({"n": np.array([0, 1, 3])}, {}, "a.npz: n: 1 of 3 values differ"),
        ({"config": np.array("other")}, {}, "a.npz: config was 'text', is 'other'"),
        ({"new": np.zeros(2)}, {}, "a.npz: new is in one of the two"),
        ({}, {"rows": [[1, 2], [3.5, 100.2]]}, "b.json: /rows/1 differs by 0.002"),
        ({}, {"rows": [[1, 2]]}, "b.json: /rows/1 is in one of the two"),
        ({}, {"said": {"word": "no", "none": None}}, "b.json: /said/word was 'yes', is 'no'"),
    ],
)
def test_what_differs(tmp_path, numbers, text, said):
    found = compared(tmp_path, {**NUMBERS, **numbers}, {**TEXT, **text})
    assert found.differs and re.fullmatch(said, found.said), found.said


def test_a_file_that_is_no_longer_written(tmp_path):
    found = compared(tmp_path, None)
    assert found.differs and found.said == "a.npz is no longer written"


def test_what_is_not_there_is_not_run():
    record = oracles.Record(("a.npz",), ("a_module_that_nobody_has",))
    found = oracles.run(record, "decoders", sys.executable)
    assert found.missing and not found.differs and found.said == "not run: no module a_module_that_nobody_has"
