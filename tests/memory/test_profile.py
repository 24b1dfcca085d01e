"""Pictures and tables of memory: flame graphs, traces, differences, donation, peaks of steps, scattered memory."""

from __future__ import annotations

import json
import re
import sys
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.memory.test_account import WS, X, chain
from trustcore._jax import Frame
from trustcore.errors import ProgramError
from trustcore.memory import (
    StepPeaks,
    account,
    census,
    difference,
    donations,
    flame_graph,
    fragmentation,
    remat_blocks,
    trace_events,
)
from trustcore.memory.live import Census, Held

SVG = "{http://www.w3.org/2000/svg}"


def frame(name: str, line: int, file: str = "/home/u/train.py") -> Frame:
    return Frame(file, line, 0, name)


def test_a_flame_graph_is_as_wide_as_its_bytes() -> None:
    main, step, library = frame("main", 3), frame("<step>", 9), frame("jit", 1, jax.__file__)
    held = (
        Held(300, 3, "buffer", "cpu", (library, step, main)),
        Held(100, 1, "buffer", "cpu", (frame("data", 20), main)),
        Held(0, 1, "buffer", "cpu", (main,)),
        Held(10**9, 1, "executable", "cpu", (main,)),
    )
    for library_shown, names in ((False, 3), (True, 4)):
        root = ElementTree.fromstring(flame_graph(Census(held), library=library_shown))
        boxes = {group.find(f"{SVG}title").text: group.find(f"{SVG}rect") for group in root.iter(f"{SVG}g")}
        assert len(boxes) == names
        widths = {title.split(" ")[0]: float(box.get("width")) for title, box in boxes.items()}
        assert widths["main"] == pytest.approx(1200, abs=1) and widths["<step>"] == pytest.approx(900, abs=1)
        assert widths["data"] == pytest.approx(300, abs=1)
    assert any("300 B in 3 arrays, 75.0%" in title for title in boxes)
    kept = jnp.ones((512, 512))
    assert f"{sys._getframe().f_code.co_name}" in flame_graph(census()) and kept.size
    ElementTree.fromstring(flame_graph(Census(())))
    cell = Census((Held(300, 3, "buffer", "cpu", (frame("<module>", 3, "/tmp/ipykernel_77/1234.py"),)),))
    assert "cell:3" in flame_graph(cell) and "ipykernel" not in flame_graph(cell)


def test_a_trace_keeps_to_the_format() -> None:
    found = account(jax.grad(chain, 1), X, WS)
    trace = json.loads(json.dumps(trace_events(found, buffers=20)))
    events = trace["traceEvents"]
    for event in events:
        assert {"name", "ph", "ts", "pid", "tid", "args"} <= set(event) and event["ph"] in "MCX"
        assert all(isinstance(event[key], int) for key in ("ts", "pid", "tid")) and event["ts"] >= 0
        assert (event["ph"] == "X") == ("dur" in event) and event.get("dur", 1) > 0
    curve = {event["ts"]: event["args"]["bytes"] for event in events if event["ph"] == "C"}
    assert max(curve.values()) == found.peak and min(t for t, b in curve.items() if b == found.peak) == found.peak_step
    for track in {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"}:  # slices lie within each other or apart
        open_until: list[int] = []
        for event in sorted(
            (e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == track), key=lambda e: (e["ts"], -e["dur"])
        ):
            while open_until and open_until[-1] <= event["ts"]:
                open_until.pop()
            end = event["ts"] + event["dur"]
            assert not open_until or end <= open_until[-1]
            open_until.append(end)
    names = {event["name"] for event in events if event["pid"] == 1 and event["ph"] == "X"}
    assert any(name.startswith("layer") for name in names) and {"forward", "backward"} <= names
    assert any(re.fullmatch(r"tanh \(test_account\.py:\d+\)", name) for name in names)
    drawn = [event for event in events if event["pid"] == 2 and event["ph"] == "X"]
    assert len(drawn) == 20 and {e["args"]["bytes"] for e in drawn} <= {b.nbytes for b in found.buffers}
    assert trace["otherData"]["peak"] == found.peak


def test_accounts_are_compared_by_owner() -> None:
    wide = jnp.ones((2048, 256))
    plain, again = (account(jax.grad(fn, 1), wide, WS) for fn in (chain, chain))
    same = difference(plain, again)
    assert same.changes == () and "the same buffers" in str(same)
    half = account(jax.grad(chain, 1), wide[:1024], WS)
    found = difference(plain, half)
    assert found.after["peak"] < found.before["peak"]
    sizes = sum(change.nbytes for change in found.changes)
    assert sizes == half.peak - plain.peak  # everything that is live at the peaks is told
    assert abs(found.changes[0].nbytes) == max(abs(change.nbytes) for change in found.changes)
    assert (
        "float32[1024,256]" in str(found) and "->" in str(found) and json.loads(json.dumps(found.as_json()))["changes"]
    )


def test_donation_is_audited() -> None:
    def step(params, state, batch, unused):
        new = {"w": params["w"] - batch.sum() * state["m"], "half": params["half"].astype(jnp.float32)}
        return new, {"m": state["m"] * 2}, jnp.sum(batch)

    w = jnp.ones((64, 8))
    args = ({"w": w, "half": jnp.ones((5, 7), jnp.bfloat16)}, {"m": w + 1}, jnp.ones((3,)), jnp.ones((1000,)))
    found = donations(step, *args, donate_argnums=(0, 1, 2, 3))
    by_name = {d.name: d for d in found.found}
    assert {by_name["args[0]['w']"].result, by_name["args[1]['m']"].result} == {"result[0]['w']", "result[1]['m']"}
    assert found.saved == 2 * w.nbytes and found.wasted[0].name == "args[3]"
    assert "does not use it" in by_name["args[3]"].why
    assert "the result of that shape is float32" in by_name["args[0]['half']"].why
    assert "no result is float32[3]" in by_name["args[2]"].why
    assert str(found).startswith("4.1 kB of 8.2 kB donated are reused")
    jitted = donations(jax.jit(step, donate_argnums=1), *args)
    assert [d.name for d in jitted.found] == ["args[1]['m']"] and jitted.saved == w.nbytes
    (two,) = donations(lambda a, b: a + b, w, w, donate_argnums=(0, 1)).wasted
    assert "has taken the place of another" in two.why
    with pytest.raises(ProgramError, match="nothing is donated"):
        donations(step, *args)


@pytest.mark.skipif(sys.platform != "linux", reason="sizes are read from /proc")
def test_each_step_has_its_peak() -> None:
    def made() -> jax.Array:
        return jnp.full((1 << 25,), 2.0).block_until_ready()  # 134 MB, given back to the system when it goes

    made()
    log, kept = StepPeaks(), []
    with log.step("nothing"):
        pass
    with log.step("for a while"):
        made()
    with log.step():
        kept.append(jnp.ones((1 << 24,)))
    nothing, passing, leak = log.steps
    assert log.source == "process" and leak.name == "step 2"
    assert passing.peak - passing.before > 120e6 > nothing.peak - nothing.before and passing.left < 60e6
    assert leak.left > 60e6 and "peaks of 3 steps" in str(log) and "for a while" in str(log)


class Counted:
    """A device that counts its bytes."""

    platform = "gpu"

    def __init__(self) -> None:
        self.stats = {"bytes_in_use": 600, "peak_bytes_in_use": 700, "bytes_limit": 1000, "pool_bytes": 900}
        self.stats["largest_free_block_bytes"] = 100

    def memory_stats(self) -> dict[str, int]:
        return self.stats


def test_devices_that_count_are_asked() -> None:
    device = Counted()
    log = StepPeaks(device)
    with log.step():
        device.stats = {**device.stats, "bytes_in_use": 650, "peak_bytes_in_use": 950}
    assert log.source == "device" and (log.steps[0].peak, log.steps[0].left) == (950, 50)
    with log.step():  # the device's peak is older than this step
        device.stats = {**device.stats, "bytes_in_use": 600}
    assert 600 <= log.steps[1].peak <= 650
    told = fragmentation(device)
    assert told is not None and told.share == 0.75 and "75% scattered" in str(told)
    assert fragmentation() is None  # CPUs do not tell


def test_remat_shows_in_a_difference() -> None:
    ws, wide = 0.1 * jnp.ones((6, 128, 128)), jnp.ones((1024, 128))

    def scanned(ws, x):
        return jnp.mean(jax.lax.scan(lambda x, w: (x + jnp.sin(jnp.tanh(x @ w)), None), x, ws)[0] ** 2)

    found = difference(account(jax.grad(scanned), ws, wide), account(jax.grad(remat_blocks(scanned)), ws, wide))
    gone = [change for change in found.changes if change.nbytes < 0]
    assert gone and gone[0].kind == "temporary" and np.sign(found.after["peak"] - found.before["peak"]) == -1
