"""What wins a search: never what is wrong or broken, never what is slower; and what is not tried, with its reason."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.tuning import Cost
from trustcore import tune
from trustcore.errors import TuningError
from trustcore.tune import listing, measure, searching, unfinished
from trustcore.tune.device import Device, limits

SMALL = {"R": 64, "D": 64}


def forms(result):
    return {t.values.get("form", "defaults"): t for t in result.trials if "turns" in t.values or not t.values}


def test_the_fastest_right_candidate_wins(own_tables, toy):
    result = tune.search(toy(), SMALL, seconds=0.2)
    assert result.values == {"implementation": "plain", "form": "fast", "turns": 100}
    trials = forms(result)
    assert trials["fast"].summary.seconds < trials["slow"].summary.seconds  # the planted slow one loses
    assert result.gain > 2
    assert tune.best("toy", SMALL).values == result.values


def test_a_wrong_candidate_is_told_and_never_timed(own_tables, toy):
    result = tune.search(toy(), SMALL, seconds=0.1)
    trials = forms(result)
    assert "its result is wrong: 0.0" in trials["wrong"].refused and trials["wrong"].summary is None
    assert "its result is wrong: inf" in trials["nan"].refused and trials["nan"].summary is None
    assert "it is not traced: ValueError: this form cannot be traced" in trials["broken"].refused
    assert [told["values"]["form"] for told in result.entry.wrong] == ["wrong", "nan"]
    assert "out: plain: form wrong, turns 100: its result is wrong" in str(result)


def test_wrong_defaults_do_not_win(own_tables, toy):
    """A declaration whose oracle is another: the defaults and every form but the "wrong" one are then wrong."""
    shifted = toy(oracle=lambda known, made: jnp.matmul(*made, precision="highest") + 0.1)
    result = tune.search(shifted, SMALL, seconds=0.1)
    assert result.values["form"] == "wrong"
    assert "its result is wrong" in result.trials[0].refused


def test_no_right_candidate_is_an_error(own_tables, toy):
    nothing = toy(oracle=lambda known, made: jnp.zeros((known["R"], known["D"])))
    with pytest.raises(TuningError, match=r"no candidate is right: .*its result is wrong"):
        tune.search(nothing, SMALL, seconds=0.1)
    assert tune.best("toy", SMALL).source == "defaults"


def test_the_defaults_keep_their_place_where_nothing_is_faster(own_tables, toy):
    slow = toy(grids={"plain": {"form": ("slow",), "turns": (600,)}})
    result = tune.search(slow, SMALL, seconds=0.1)
    assert (result.values, result.gain) == ({}, 1.0)
    choice = tune.best("toy", SMALL)
    assert (choice.values, choice.source) == ({}, "cache")
    # Asked by the implementation that the defaults are, the answer is theirs as well.
    assert result.entry.implementations["plain"]["values"] == {"implementation": "plain"}


def test_a_program_that_is_another_one_is_compiled_once(own_tables, toy):
    result = tune.search(toy(grids={"plain": {"form": ("fast", "quick"), "turns": (200,)}}), SMALL, seconds=0.1)
    assert [t.same_as for t in result.trials] == [None, 0, None, 0]  # "plain" and "quick" are what the defaults are


def test_cuts_keep_their_reasons(toy):
    chip = Device("cuda", "8.6", 72)
    assert limits(chip).onchip == 99 * 1024
    turns = {"plain": {"form": ("fast", "slow"), "turns": (1, 2, 4, 200_000)}, "other": {}}
    declared = toy(grids=turns, constraint=lambda t, f, v: "four is forbidden" if v["turns"] == 4 else "")
    listed = tune.candidates(declared, chip, SMALL, most=2)
    assert [dict(v) for v in listed.tried] == [
        {"implementation": "plain"},
        {"implementation": "plain", "form": "fast", "turns": 1},
        {"implementation": "plain", "form": "fast", "turns": 2},
    ]
    reasons = {tuple(sorted(c.values.items())): c.reason for c in listed.cut}
    assert reasons[(("implementation", "other"),)] == "it runs elsewhere."
    told = sorted(c.reason for c in listed.cut if c.values["implementation"] == "plain")
    assert told == [
        "four is forbidden", "four is forbidden",
        "it holds 200000 bytes of shared memory, and 8.6 has 101376",
        "it holds 200000 bytes of shared memory, and 8.6 has 101376",
        "ranked 3 of 4 by cost", "ranked 4 of 4 by cost",
    ]  # fmt: skip


def test_values_that_come_to_the_same_are_one(toy):
    declared = toy(resolved=lambda target, facts, values: values.get("form", "slow"))
    listed = tune.candidates(declared, tune.this_device(), SMALL)
    assert "slow" not in {v.get("form") for v in listed.tried}
    assert any(c.reason == "the same as plain's defaults" for c in listed.cut)


def test_the_cost_model_orders():
    cpu = limits(Device("cpu", "x", 2))
    few, many = Cost(1e9, 1e6, 10), Cost(1e9, 1e6, 100_000)
    assert listing.estimate(few, cpu) < listing.estimate(many, cpu)
    kept, spilled = Cost(1e6, 1e6, 10, tile=1 << 19), Cost(1e6, 1e6, 10, tile=1 << 22)
    assert listing.estimate(kept, cpu) < listing.estimate(spilled, cpu)
    gpu = limits(Device("cuda", "9.0", 132))
    full, idle = Cost(1e12, 1e6, 1, programs=132), Cost(1e12, 1e6, 1, programs=133)  # one more round for one program
    assert listing.estimate(idle, gpu) > 1.5 * listing.estimate(full, gpu)


def test_outliers_are_dropped():
    found = measure.summary([1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0, 50.0])
    assert (found.samples, found.dropped) == (8, 1)
    assert found.seconds == pytest.approx(1.0)
    assert measure.summary([2.0, 2.0, 2.0]).dropped == 0


def test_programs_take_turns_and_what_is_far_behind_leaves():
    """A clock that each program moves by its own time: samples are exact."""
    now, order = [0.0], []

    def program(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds

        return run

    programs = [program("a", 1.0), program("b", 1.25), program("c", 2.0), program("d", 9.0)]
    samples = measure.raced(programs, seconds=50.0, check=lambda: None, fewest=3, clock=lambda: now[0])
    assert [set(times) for times in samples] == [{1.0}, {1.25}, {2.0}, {9.0}]
    assert len(samples[3]) == 1  # hopeless after its warm-up
    assert len(samples[2]) == 3 and len(samples[0]) == len(samples[1]) > 10
    timed = "".join(order[4 * measure.WARM_UP :])
    assert timed.startswith("abc" + "bca" + "cab")  # each begins in its turn


def stopped_after(checks):
    """A check that ends a search at that one of its calls."""
    count = itertools.count()

    def check():
        if next(count) == checks:
            raise KeyboardInterrupt

    return check


def stopped(own_tables):
    """What the one file of a search that was stopped tells of candidates, by their form."""
    (path,) = (own_tables / "unfinished").glob("*.json")
    told = json.loads(path.read_text())
    return path, {t["values"].get("form", "plain" if t["values"] else "defaults"): t for t in told["trials"]}


@pytest.fixture
def comparisons(monkeypatch):
    """Forms whose results were compared with the oracle's, in order."""
    made, real = [], measure.checked

    def counted(tunable, facts, program, expected, trial):
        made.append(trial.values.get("form", "defaults"))
        return real(tunable, facts, program, expected, trial)

    monkeypatch.setattr(measure, "checked", counted)
    return made


def test_a_search_that_was_stopped_goes_on(own_tables, toy, comparisons):
    oracles = []
    declared = toy(oracle=lambda known, made: oracles.append(1) or jnp.matmul(*made, precision="highest"))
    with pytest.raises(KeyboardInterrupt):
        tune.search(declared, SMALL, seconds=5, check=stopped_after(60))
    assert tune.best("toy", SMALL).source == "defaults"  # nothing has won yet
    path, told = stopped(own_tables)
    assert "it is not traced" in told["broken"]["refused"] and "is wrong" in told["wrong"]["refused"]
    before = len(told["fast"]["samples"])
    assert before >= 2 and not told["wrong"]["samples"]
    assert sorted(comparisons) == ["defaults", "fast", "nan", "slow", "wrong"]
    comparisons.clear()
    result = tune.search(declared, SMALL, seconds=0.05)
    assert comparisons == [] and len(oracles) == 1  # no program that was confirmed, or was wrong, is asked again
    assert result.values["form"] == "fast" and {t["values"]["form"] for t in result.entry.wrong} == {"wrong", "nan"}
    assert forms(result)["fast"].summary.samples >= measure.FINAL
    assert not path.exists()  # it is over


def test_samples_of_a_search_that_was_stopped_count(own_tables, toy, monkeypatch):
    monkeypatch.setattr(measure, "BEHIND", 1e6)  # nothing leaves, however busy the machine is
    monkeypatch.setattr(measure, "HOPELESS", 1e6)
    monkeypatch.setattr(searching._Race, "defaults_stand", lambda *_: True)  # the last measurement is always anew
    quick = toy(grids={"plain": {"form": ("slow",), "turns": (190, 210)}})
    with pytest.raises(KeyboardInterrupt):
        tune.search(quick, SMALL, seconds=60, check=stopped_after(70))
    path, told = stopped(own_tables)
    before = len(told["defaults"]["samples"])
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"spent": 60.0}))  # all of its time was used
    result = tune.search(quick, SMALL, seconds=60)
    assert result.trials[0].summary.samples == before >= measure.FEWEST


@pytest.mark.parametrize("stop", [0, 4, 9])
def test_a_search_can_be_stopped_anywhere(own_tables, toy, stop):
    with pytest.raises(KeyboardInterrupt):
        tune.search(toy(), SMALL, seconds=5, check=stopped_after(stop))
    assert tune.search("toy", SMALL, seconds=0.05).values["form"] == "fast"


def test_what_was_found_is_written_while_a_search_runs(own_tables, toy, monkeypatch):
    """A process that is killed loses what came after the last writing."""
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    seen = []

    def check():
        files = list((own_tables / "unfinished").glob("*.json"))
        seen.append(sum(len(t["samples"]) for t in json.loads(files[0].read_text())["trials"]) if files else 0)

    tune.search(toy(), SMALL, seconds=0.1, check=check)
    assert seen[0] == 0 and max(seen) >= 4


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1}', "other call", "samples", "negative"])
def test_a_broken_file_of_a_stopped_search_is_as_none(own_tables, toy, comparisons, text):
    with pytest.raises(KeyboardInterrupt):
        tune.search(toy(), SMALL, seconds=5, check=stopped_after(60))
    path, _ = stopped(own_tables)
    told = json.loads(path.read_text())
    changed = {"other call": {**told, "call": ["x"]}, "negative": {**told, "spent": -1}}
    changed["samples"] = {**told, "trials": [{**told["trials"][0], "samples": ["quick"]}]}
    path.write_text(json.dumps(changed[text]) if text in changed else text)
    comparisons.clear()
    tune.search("toy", SMALL, seconds=0.05)
    assert len(comparisons) == 5  # all of them anew


def test_another_call_has_nothing_of_it(own_tables, toy, comparisons):
    with pytest.raises(KeyboardInterrupt):
        tune.search(toy(), SMALL, seconds=5, check=stopped_after(60))
    comparisons.clear()
    tune.search("toy", {"R": 32, "D": 64}, seconds=0.02)
    assert len(comparisons) == 5 and len(list((own_tables / "unfinished").glob("*.json"))) == 1


def test_never_inside_of_a_trace(own_tables, toy):
    toy()

    @jax.jit
    def traced(x):
        tune.search("toy", SMALL, seconds=0.1)
        return x

    with pytest.raises(TuningError, match="nothing is tuned inside of a trace; call it outside of jit, grad and vmap"):
        traced(jnp.ones(3))
    with pytest.raises(TuningError, match="inside of a trace"):
        jax.grad(lambda x: tune.search("toy", x, x, seconds=0.1).gain * x.sum())(jnp.ones((4, 4)))


def test_facts_come_as_operands_as_words_and_by_name(toy):
    toy()
    x, w = jax.ShapeDtypeStruct((64, 32), jnp.float32), jax.ShapeDtypeStruct((32, 32), jnp.float32)
    wanted = {"R": 64, "D": 32, "dtype": "float32"}
    assert tune.best("toy", x, w).facts == wanted
    assert tune.best("toy", "R=64, D=32").facts == wanted == tune.best("toy", R=64, D=32).facts


@pytest.mark.parametrize(
    ("op", "facts", "complaint"),
    [
        ("toys", "R=1", r"'toys' is no op that can be tuned; choose of attention_forward, .*packed_product, .*toy\."),
        ("toy", "R=1", "toy: it needs D; it takes R, D, dtype"),
        ("toy", "R=1,D=2,Z=3", "toy: it does not know Z"),
        ("toy", "R=0,D=2", "toy: R is 0 and must be a number of at least 1"),
        ("toy", "R=two,D=2", "toy: R is 'two' and must be a number"),
        ("toy", "R 2", "'R 2' is no fact; write them as B=1,T=2048"),
        ("attention_forward", "B=1,T=8,N=3,K=2,H=8", "attention: K=2 does not divide N=3"),
        ("attention_forward", "B=1,T=8,N=2,H=8,dtype=int8", "dtype is 'int8'; choose of float32, bfloat16"),
        ("attention_forward", "B=1,T=8,N=2,H=8,more=beads", "beads is nothing that attention takes more"),
        ("packed_product", "R=1,K=64,N=64,format=q99", "'q99' is no format"),
    ],
)
def test_refusals_say_what_is_allowed(toy, op, facts, complaint):
    toy()
    with pytest.raises(TuningError, match=complaint):
        tune.best(op, facts)


def test_names_of_trustcore_are_not_taken(toy):
    with pytest.raises(TuningError, match=r"names that begin with attention, .* belong to trustcore"):
        tune.register(dataclasses.replace(toy(), op="attention_mine"))
