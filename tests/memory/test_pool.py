"""Buffers that are used again: who owns them, who loses them, what is counted, and what generation takes of them."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.generation.characters import byte_model
from trustcore.errors import PoolError
from trustcore.generation import Sampling, generate_tokens
from trustcore.memory import Fixed, HitRate, Pool, Predictive, Pressure
from trustcore.memory.eviction import POLICIES, policy_named
from trustcore.memory.limits import Usage, memory_left

add = jax.jit(lambda x: x + 1, donate_argnums=0)


def place(x: jax.Array) -> int:
    return x.unsafe_buffer_pointer()


def test_a_buffer_comes_back_cleared_and_in_the_same_place() -> None:
    pool = Pool()
    first = add(pool.get((64, 128), jnp.float32))
    at = place(first)
    pool.give_back({"cache": [first]})
    again = pool.get((64, 128), "float32")
    assert place(again) == at and not again.any() and again.dtype == jnp.float32
    assert pool.get((64, 128), jnp.bfloat16).dtype == jnp.bfloat16  # another kind is another buffer
    stats = pool.stats
    assert (stats.hits, stats.misses, stats.returned) == (1, 2, 1) and stats.hit_rate == 1 / 3
    assert stats.lent == stats.peak == 64 * 128 * 6 and stats.free == 0 and stats.utilization == 1.0
    assert "3 requests, 33% found a buffer" in str(stats) and stats.as_json()["evictions"] == {}


def test_what_was_given_back_cannot_be_used_again() -> None:
    pool = Pool()
    x = pool.get((8,), jnp.float32)
    piece, forwarded = x.addressable_shards[0].data, jax.jit(lambda x: (x, x + 1))(x)[0]
    pool.give_back(x)
    for use in (lambda: x + 1, lambda: np.asarray(x), lambda: np.asarray(piece)):
        with pytest.raises(RuntimeError, match="Array has been deleted"):
            use()
    with pytest.raises(RuntimeError, match="Array has been deleted"):
        jax.block_until_ready(x * 2)
    with pytest.raises(PoolError, match=r"float32\[8\]: gone already.*give back what that program returned"):
        pool.give_back(x)
    add(pool.get((8,), jnp.float32))
    assert not forwarded.any()  # a copy, whatever happens to the buffer


def test_memory_that_is_looked_at_from_outside_stays_the_onlookers() -> None:
    pool = Pool()
    x = pool.get((1024,), jnp.float32)
    view = np.asarray(x)
    pool.give_back(x)
    other = add(pool.get((1024,), jnp.float32))
    assert view.sum() == 0 and other.sum() == 1024 and pool.stats.viewed == 1 and pool.stats.hits == 0


def test_a_scope_gives_everything_back() -> None:
    pool = Pool()
    with pool.scope():
        x, y = pool.get((16,), jnp.float32), pool.get((16,), jnp.float32)
        with pool.scope():
            z = pool.get((4,), jnp.int32)
        assert z.is_deleted() and not x.is_deleted()
        pool.give_back(add(x))  # early, and donated on the way
        taken = add(y)  # what a program took over is not followed
    assert pool.stats.lent == 0 and pool.stats.free == 16 * 4 + 4 * 4 and taken.sum() == 16
    with pytest.raises(ZeroDivisionError), pool.scope():
        pool.get((4,), jnp.int32)
        raise ZeroDivisionError
    assert pool.stats.lent == 0


def test_threads_never_share_a_buffer() -> None:
    pool, faults = Pool(limit=1 << 16), []

    def work(i: int) -> None:
        for turn in range(30):
            x = pool.get((32, 4 + i % 2), jnp.float32)
            x = add(x)
            if float(x.sum()) != x.size:
                faults.append((i, turn))
            pool.give_back(x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = pool.stats
    assert not faults and stats.hits + stats.misses == 120 and stats.lent == 0 and stats.misses <= 8


def test_too_many_free_buffers_are_let_go_by_the_policy() -> None:
    def left(policy: str) -> set[int]:
        pool = Pool(policy=policy, limit=1100)
        for elements, times in ((100, 4), (20, 1), (130, 1)):  # the first most often, the last most recently
            for _ in range(times):
                pool.give_back(pool.get((elements,), jnp.float32))
        last = pool.get((10,), jnp.float32)  # 400 + 80 + 520 + 40 bytes, then one more
        pool.give_back([pool.get((90,), jnp.float32), last])
        assert sum(pool.stats.evictions.values()) > 0 and set(pool.stats.evictions) == {policy}
        assert pool.stats.free <= 1100
        return {kind.shape[0] for kind in pool._free}

    assert 100 not in left("lru") and 20 in left("lru")
    assert 100 in left("lfu") and 20 not in left("lfu")
    assert left("size") == {100, 20, 10, 90}
    assert 100 in left("arc")
    assert 130 not in left("hybrid") and 10 in left("hybrid")


@given(st.data())
def test_every_policy_picks_one_that_is_there(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(POLICIES)))
    policy, free = policy_named(name), {}
    for kind in data.draw(st.lists(st.integers(1, 12), max_size=60)):
        policy.requested(kind, kind)
        free[kind] = kind
        if len(free) > 4:
            gone = policy.victim(dict(free))
            assert gone in free
            del free[gone]
    if name == "arc":
        assert policy.target >= 0 and not set(policy.once) & set(policy.again)


def test_arc_learns_which_half_needs_the_room() -> None:
    policy = policy_named("arc")
    for kind in ("often", "often", "a", "b"):
        policy.requested(kind, 1)
    assert policy.victim({"often": 1, "a": 1, "b": 1}) == "a"  # a scan goes before what is asked for again
    assert policy.target == 0
    policy.requested("a", 1)  # it was wanted after all: kinds seen once get more room
    assert policy.target == 1 and "a" in policy.again
    assert policy.victim({"often": 1, "a": 1, "b": 1}) == "often"


def test_limits_follow_what_happens() -> None:
    none = Usage(0, 0, 0, 0, 0, 0)
    assert Fixed(7)(none) == 7
    rate = HitRate(100, 1000, target=0.5, window=10)
    assert rate(none) == 100
    assert rate(Usage(1, 9, 5, 0, 0, 0)) == 150 and rate(Usage(2, 10, 9, 0, 0, 0)) == 150  # too early for the next look
    for i in range(1, 20):
        grown = rate(Usage(1, 9 + 10 * i, 5 + i, 0, 0, 0))
    assert grown == 1000
    assert rate(Usage(100, 200, 30, 0, 0, 0)) == 1000 - 125
    pressure = Pressure(10, 1000, share=0.5, left=lambda: 100)
    assert pressure(none._replace(free=60)) == 80 and Pressure(90, 95, left=lambda: 0)(none) == 90
    assert Predictive(10, 1000, margin=2)(none._replace(predicted=40)) == 80
    assert memory_left() > 1 << 20
    pool = Pool(limit=HitRate(100, 1000))
    pool.give_back(pool.get((200,), jnp.float32))
    assert pool.stats.free == 0 and pool.stats.evictions == {"lru": 1} and pool.stats.limit == 100


def test_a_loop_is_foreseen_after_one_turn() -> None:
    pool = Pool(prefetch=1)
    sizes = (3, 5, 5, 7)
    for _ in range(2):
        for n in sizes:
            pool.get((n,), jnp.float32)  # never given back: every hit was made ahead
    for n in sizes:
        assert pool.predicted()[0].shape == (n,)
        pool.get((n,), jnp.float32)
    stats = pool.stats
    assert stats.foreseen == stats.hits >= 7 and stats.prefetched >= stats.foreseen
    assert Pool(limit=1, prefetch=3).prefetch(2) == 0


def test_batches_are_staged_in_buffers_that_come_back() -> None:
    pool, host = Pool(), np.zeros((32, 8), np.float32)
    places = set()
    for i in range(4):
        host[:] = i
        batch = pool.stage({"x": host, "n": np.arange(3), "is": np.array([True, False])})
        host[:] = -1  # the producer goes on at once
        assert float(batch["x"].mean()) == i and batch["n"].tolist() == [0, 1, 2]
        assert batch["is"].tolist() == [True, False]
        places.add(place(batch["x"]))
        pool.give_back(batch)
    assert len(places) == 1 and pool.stats.misses == 3


def test_a_buffer_that_a_program_still_reads_is_not_written_to() -> None:
    pool, slow = Pool(), jax.jit(lambda x: jnp.sum(jax.lax.fori_loop(0, 30, lambda i, y: jnp.sin(y) + x, x * 0)))
    host = np.zeros(1 << 18, np.float32)
    for i in range(6):
        host[:] = i % 2
        batch = pool.stage(host)
        told = slow(batch)  # goes on while the next batch is staged in the same buffer
        pool.give_back(batch)
        before = pool.stage(np.full_like(host, 9.0))
        pool.give_back(before)
        assert float(told) == float(slow(jnp.full(1 << 18, np.float32(i % 2))))
    assert pool.stats.misses == 1


def test_what_cannot_be_done_is_said() -> None:
    for call, text in (
        (lambda: Pool(policy="mru"), "'mru' is none of lru, lfu, size, arc, hybrid"),
        (lambda: Pool(limit=-1), "from -1 to -1 bytes"),
        (lambda: Pool(prefetch=-1), "prefetch is -1"),
        (lambda: Pool().get((2, -1), jnp.float32), "negative size"),
        (lambda: Pool().get((2,), "float33"), "those of no array"),
        (lambda: HitRate(0, 1, target=2.0), "expected 0 to 1"),
        (lambda: Pressure(0, 1, share=0), "expected more than 0"),
    ):
        with pytest.raises(PoolError, match=text):
            call()


def test_answers_share_a_cache_and_are_the_same() -> None:
    model, pool = byte_model(), Pool()

    def tokens(prompt: list[int], **options) -> list[int]:
        steps = list(generate_tokens(model, [prompt], max_tokens=8, **options))
        return np.concatenate([step.tokens for step in steps], axis=1)[0].tolist()

    for prompt in ([5, 80, 3], [7] * 20, [5, 80, 3]):
        for sampling in (Sampling(), Sampling(temperature=1.0)):
            assert tokens(prompt, sampling=sampling, pool=pool) == tokens(prompt, sampling=sampling)
    stats = pool.stats
    leaves = stats.misses
    assert stats.hits == 5 * leaves and stats.lent == 0 and stats.free == stats.peak > 0
    steps = generate_tokens(model, [[1, 2]], max_tokens=8, pool=pool)
    next(steps)
    assert pool.stats.lent == stats.free
    steps.close()  # a caller that goes away
    assert pool.stats.lent == 0


def test_sharded_buffers_keep_their_sharding(fresh_python) -> None:
    source = """
        import jax, jax.numpy as jnp
        from trustcore.memory import Pool
        mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        where = jax.NamedSharding(mesh, jax.P("d"))
        pool = Pool()
        x = pool.get((8, 2), jnp.float32, where)
        places = [s.data.unsafe_buffer_pointer() for s in x.addressable_shards]
        pool.give_back(jax.jit(lambda x: x + 1, donate_argnums=0)(x))
        y = pool.get((8, 2), jnp.float32, where)
        assert y.sharding == where and not y.any() and pool.stats.hits == 1
        assert [s.data.unsafe_buffer_pointer() for s in y.addressable_shards] == places
        assert pool.get((8, 2), jnp.float32).sharding != where and pool.stats.misses == 2
        print("fine")
    """
    assert fresh_python(source, devices=4).strip() == "fine"
