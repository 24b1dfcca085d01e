"""From tensors on disk to devices: read ahead, cast on the way, each device its slice and nothing more.

    checkpoint -> prefetch (the system reads ahead) -> place (slice, cast, put) -> jax.Array with its sharding

Invariant: beside what lies on devices, the host holds the slice of one device and `PIECE` bytes of the file. Pages of
the file are handed back piece by piece, so a tensor is never in memory twice. On CPU devices the slice is the array.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import Any

import jax
import numpy as np

from trustcore.errors import CheckpointError
from trustcore.weights.checkpoint import LazyArray

PIECE = 2**23  # bytes of a file that are copied at a time
AHEAD = 2**26  # bytes that are read ahead of the consumer
ALIGNMENT = 64  # what XLA's CPU client asks of memory that it takes over without a copy

Shardings = jax.sharding.Sharding | Mapping[str, jax.sharding.Sharding] | Callable[[LazyArray], Any] | None


def place(
    array: LazyArray,
    sharding: jax.sharding.Sharding | None = None,
    dtype: Any = None,
    *,
    transposed: bool = False,
) -> jax.Array:
    """Returns the tensor on the devices of `sharding`, each of which is given its slice alone.

    Args:
        array: of a plain encoding.
        sharding: of the result; None: the default device. Several processes each place their own devices' slices.
        dtype: to cast to, slice by slice; None keeps that of the file. Without `jax_enable_x64`, 64 bits become 32.
        transposed: whether the result has the last two axes of the tensor swapped, as a kernel `[K, N]` of weights
            that files hold as `[N, K]`.

    Returns:
        The array, of the tensor's shape, or of that with its last two axes swapped.

    Raises:
        CheckpointError: the encoding is packed, or there are no two axes to swap.
        ValueError: the sharding does not divide the shape (from jax).

    Host memory beyond the devices': the largest slice of one device, and 8 MB.

    Example:
        >>> place(checkpoint["w"], NamedSharding(mesh, PartitionSpec("model")), "bfloat16")  # doctest: +SKIP
    """
    target = _dtype(array, dtype)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if transposed and len(array.shape) < 2:
        raise CheckpointError(
            f"the shape {list(array.shape)} has no two axes to swap", path=array.path, field=f"tensor {array.name!r}"
        )
    shape = (*array.shape[:-2], array.shape[-1], array.shape[-2]) if transposed else array.shape
    wanted = sharding.addressable_devices_indices_map(shape)
    shards: list[jax.Array] = []
    last: tuple[Any, np.ndarray] | None = None
    # What several devices hold is read once: their slices are put in turn.
    for device, index in sorted(wanted.items(), key=lambda item: str(item[1])):
        index = index or ()
        if last is None or last[0] != index:
            last = None  # drops the slice before
            last = index, _slice(array, index, target, transposed)
        # Not copied on CPUs, where the memory is the array's from here on; nobody writes to it.
        shards.append(jax.device_put(last[1], device, may_alias=True))
        if device.platform != "cpu":
            shards[-1].block_until_ready()
    return jax.make_array_from_single_device_arrays(shape, sharding, shards, dtype=target)


def copied(array: LazyArray, dtype: Any = None) -> np.ndarray:
    """Returns the numbers of a tensor in memory of their own, cast, read as `place` reads them: 8 MB at a time.

    Raises:
        CheckpointError: the encoding is packed.
    """
    numbers = array.numpy()
    return _slice(array, (...,), numbers.dtype if dtype is None else np.dtype(dtype), False)


def load_arrays(
    arrays: Mapping[str, LazyArray], sharding: Shardings = None, dtype: Any = None, *, ahead: int = AHEAD
) -> dict[str, jax.Array]:
    """Returns tensors on devices, under their names: read ahead, cast, placed one after the other.

    Args:
        arrays: an open checkpoint, or those of its tensors that are wanted. Others are not read.
        sharding: of all of them; or by name; or a function from a tensor to its sharding. None: the default device.
        dtype: to cast to; None keeps each as it is stored.
        ahead: bytes that are read ahead of the tensor that is being placed.

    Raises:
        CheckpointError: an encoding is packed, or a name has no sharding.

    Example:
        >>> load_arrays(checkpoint, lambda array: NamedSharding(mesh, specs[array.name]))  # doctest: +SKIP
    """
    if isinstance(sharding, Mapping):
        missing = [name for name in arrays if name not in sharding]
        if missing:
            raise CheckpointError(f"no sharding for {', '.join(missing[:6])}: give one for each name")
    found: dict[str, jax.Array] = {}
    for name, array in zip(arrays, prefetch(arrays.values(), ahead=ahead), strict=True):
        found[name] = place(array, _sharding_of(array, name, sharding), dtype)
        array.release()
    return found


def prefetch(arrays: Iterable[LazyArray], *, ahead: int = AHEAD) -> Iterator[LazyArray]:
    """Yields tensors in order, while a thread has the bytes of those that follow brought near.

    Stored bytes are read into the system's cache, which is not memory of this process; compressed ones are unpacked.

    Args:
        arrays: in the order in which they will be used.
        ahead: bytes that may be near and not used yet; at least one tensor is.

    Raises:
        CheckpointError: a tensor that is made ahead is broken; raised when its turn has come.
    """
    coming: queue.SimpleQueue[LazyArray | Exception | None] = queue.SimpleQueue()
    room = threading.Condition()
    near, stopped = 0, False

    def read_ahead() -> None:
        nonlocal near
        try:
            for array in arrays:
                with room:
                    room.wait_for(lambda: stopped or near == 0 or near + array.nbytes <= ahead)  # noqa: B023
                    if stopped:
                        return
                    near += array.nbytes
                array.prefetch()
                coming.put(array)
            coming.put(None)
        except Exception as error:
            coming.put(error)

    thread = threading.Thread(target=read_ahead, name="trustcore-prefetch", daemon=True)
    thread.start()
    try:
        while (item := coming.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
            with room:
                near -= item.nbytes
                room.notify()
    finally:
        with room:
            stopped = True
            room.notify()
        thread.join()


def _sharding_of(array: LazyArray, name: str, sharding: Shardings) -> Any:
    if isinstance(sharding, Mapping):
        return sharding[name]
    return sharding(array) if callable(sharding) else sharding


def _dtype(array: LazyArray, dtype: Any) -> np.dtype:
    if array.dtype is None:
        raise CheckpointError(
            f"{array.encoding} is packed and has no numbers to place. Load the model, or decode with trustcore.quant",
            path=array.path,
            field=f"tensor {array.name!r}",
        )
    target = array.dtype if dtype is None else np.dtype(jax.numpy.dtype(dtype))
    return np.dtype(jax.dtypes.canonicalize_dtype(target))


def _slice(array: LazyArray, index: tuple[Any, ...], dtype: np.dtype, transposed: bool) -> np.ndarray:
    """One device's numbers, in memory of their own, copied piece by piece in the order of the file."""
    stored = array.numpy()
    view = np.swapaxes(np.swapaxes(stored, -1, -2)[index], -1, -2) if transposed else stored[index]
    made = _empty((*view.shape[:-2], view.shape[-1], view.shape[-2]) if transposed else view.shape, dtype)
    into = np.swapaxes(made, -1, -2) if transposed else made
    if view.ndim == 0 or not view.size:
        into[...] = view
        return made
    rows = max(PIECE // max(view[:1].nbytes, 1), 1)
    for start in range(0, len(view), rows):
        into[start : start + rows] = view[start : start + rows]
        if view.nbytes > PIECE:
            array.release()
    return made


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nbytes = prod(shape) * dtype.itemsize
    room = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + nbytes].view(dtype).reshape(shape)
