"""Pickles and archives that lie, or try to run something: each is one CheckpointError, and nothing has happened."""

from __future__ import annotations

import os
import pickle
import resource
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.weights.torch_files import (
    archive,
    group,
    integer,
    legacy,
    name,
    recorded,
    sizes,
    state,
    storage,
    tensor,
    text,
)
from trustcore.errors import CheckpointError
from trustcore.weights import open_checkpoint
from trustcore.weights.pickle_machine import MAX_OPCODES, MAX_STACK
from trustcore.weights.tree import MAX_DEPTH


class Calls:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


TOUCH = "touch executed"
CODE = "open('executed', 'w').close()"


def call(dotted, *arguments):
    return name(dotted) + group(*arguments) + b"R"


CHAIN = call("builtins.getattr", call("builtins.__import__", text("os")), text("system")) + group(text(TOUCH)) + b"R"

# Pickles that run something under Python's unpickler; and the name that is refused.
EXECUTING = {
    "os.system": (pickle.dumps(Calls(os.system, TOUCH), 2), "posix.system"),
    "eval": (pickle.dumps(Calls(eval, CODE), 2), "__builtin__.eval"),
    "exec": (pickle.dumps(Calls(exec, CODE), 4), "builtins.exec"),
    "getattr chain": (b"\x80\x02" + CHAIN + b".", "builtins.getattr"),
    "import": (b"\x80\x02" + call("builtins.__import__", text("os")) + b".", "builtins.__import__"),
    "subprocess": (b"\x80\x02" + call("subprocess.Popen", text(TOUCH)) + b".", "subprocess.Popen"),
    "in a state dict": (state(w=tensor(), bad=call("os.system", text(TOUCH))), "os.system"),
    "as a key": (b"\x80\x02}" + call("os.system", text(TOUCH)) + b"K\1s.", "os.system"),
    "in the arguments of a tensor": (state(w=tensor(of=call("os.system", text(TOUCH)))), "os.system"),
    "nested reduce": (state(w=call("collections.OrderedDict", call("os.system", text(TOUCH)))), "os.system"),
    "stack global": (b"\x80\x04" + text("os") + text("system") + b"\x93" + group(text(TOUCH)) + b"R.", "os.system"),
    "a name with dots": (
        b"\x80\x04" + text("torch") + text("FloatStorage.__init__.__globals__") + b"\x93.",
        "torch.FloatStorage.__init__.__globals__",
    ),
    "a name with a space": (b"\x80\x02ctorch\nSize os\n.", "torch.Size os"),
    "inst": (b"\x80\x02(" + text(TOUCH) + b"ios\nsystem\n.", "INST makes an object of a class"),
    "obj": (b"\x80\x02(" + name("torch.Tensor") + text(TOUCH) + b"o.", "OBJ makes an object of a class"),
    "newobj": (b"\x80\x02" + name("collections.OrderedDict") + b")\x81.", "NEWOBJ makes an object of a class"),
    "newobj ex": (b"\x80\x04" + name("collections.OrderedDict") + b")}\x92.", "NEWOBJ_EX makes an object of a class"),
    "extension": (b"\x80\x02\x82\x01.", "EXT1 reaches for a registry"),
    "buffer": (b"\x80\x05\x97.", "NEXT_BUFFER is not used by weights"),
    "build with __setstate__": (
        state(w=tensor() + b"}" + text("__setstate__") + name("collections.OrderedDict") + b"sb"),
        "has a tensor where what BUILD changes goes",
    ),
    "build of slots": (b"\x80\x02" + call("collections.OrderedDict") + group(b"N", b"}") + b"b.", "sets the state of"),
    "build of a dict": (b"\x80\x02}}" + text("a") + b"K\1sb.", "sets the state of a dict"),
    "build of a function": (b"\x80\x02" + name("torch.Size") + b"}b.", "where what BUILD changes goes"),
    "call of a memo": (b"\x80\x02" + text(TOUCH) + b"q\0h\0" + group(text(TOUCH)) + b"R.", "nothing is called here"),
    "call of a result": (b"\x80\x02" + call("torch.Size", sizes([1])) + b")R.", "nothing is called here"),
    "call of a class": (b"\x80\x02" + name("torch.Tensor") + b")R.", "calls a class with a tuple"),
    "call with a list": (b"\x80\x02" + name("torch.Size") + b"]R.", "calls torch.Size with a list"),
    "persistent text": (b"\x80\x02P0\n.", "PERSID refers to an object outside"),
    "rebuild by another function": (
        state(w=call("torch._tensor._rebuild_from_type_v2", name("torch.Size"), name("torch.Tensor"), b")", b"N")),
        "a parameter is made of a tuple",
    ),
    "rebuild by a text": (
        state(w=call("torch._tensor._rebuild_from_type_v2", text("os.system"), name("torch.Tensor"), b")", b"N")),
        "a tensor is made by 'os.system'",
    ),
    "sparse": (state(w=name("torch._utils._rebuild_sparse_tensor") + b")R"), "torch._utils._rebuild_sparse_tensor"),
    "joblib": (b"\x80\x02" + name("joblib.numpy_pickle.NumpyArrayWrapper") + b")\x81.", "joblib.numpy_pickle"),
}


@pytest.mark.parametrize("case", EXECUTING)
@pytest.mark.parametrize("form", [archive, legacy])
def test_nothing_is_executed(folder, monkeypatch, case, form):
    monkeypatch.chdir(folder.path)
    program, words = EXECUTING[case]
    path = folder.write(form(program), "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert words in str(caught.value) and str(path) in str(caught.value) and caught.value.offset is not None
    assert os.listdir(folder.path) == ["pytorch_model.bin"]


@pytest.mark.parametrize("case", ["os.system", "eval", "exec", "getattr chain"])
def test_pythons_own_unpickler_would_have(tmp_path, monkeypatch, case):
    """What shows that the corpus bites."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(EXECUTING[case][0])
    assert (tmp_path / "executed").exists()


def test_the_refusal_says_what_to_do(folder):
    path = folder.write(archive(EXECUTING["in a state dict"][0]), "m.bin")
    with pytest.raises(
        CheckpointError, match=r"Nothing was run\. Where you trust the file, .* as safetensors"
    ) as caught:
        open_checkpoint(path)
    assert caught.value.field == "data.pkl"


def laughs(levels):
    """A list of two references to a list of two references to ..."""
    program = b"\x80\x02]q\0K\1a"
    for level in range(levels):
        program += b"](h" + bytes([level]) + b"h" + bytes([level]) + b"eq" + bytes([level + 1])
    return program + b"."


def tuples(levels):
    program = b"\x80\x02K\1K\1\x86q\0"
    for level in range(levels):
        program += b"h" + bytes([level]) + b"h" + bytes([level]) + b"\x86q" + bytes([level + 1])
    return program


MALFORMED = {
    "billion laughs": (laughs(40), "the containers hold more than"),
    "a deeper billion": (laughs(200), f"containers are nested more than {MAX_DEPTH} deep|hold more than"),
    "a key that takes for ever": (tuples(200) + b"}h\x80K\1s.", "a key of a dict is a tuple"),
    "the same as a size": (tuples(200) + call("torch.Size", b"h\x80") + b".", "no tensor|hold more than|nested"),
    "a list in itself": (b"\x80\x02]q\0h\0a.", "nested more than"),
    "a dict in itself": (b"\x80\x02}q\0" + text("a") + b"h\0s.", "nested more than"),
    "deep": (b"\x80\x02" + b"]" * 100 + b"a" * 99 + b".", "nested more than"),
    "stack": (b"\x80\x02" + b"N" * (MAX_STACK + 2) + b".", "stack has more than"),
    "opcodes": (b"\x80\x02" + b"N0" * (MAX_OPCODES // 2 + 1) + b".", "more than 4194304 opcodes"),
    "copies": (
        b"\x80\x02](" + b"N" * 4000 + b"eq\0" + (name("torch.Size") + b"h\0\x85R0") * 2000 + b".",
        "more than 4194304 opcodes",
    ),
    "an unknown memo": (b"\x80\x02h\5.", "takes value 5 back"),
    "an empty memo": (b"\x80\x02q\5.", "keeps a value of an empty stack"),
    "an empty stack": (b"\x80\x02.", "takes a value from an empty stack"),
    "a pop of nothing": (b"\x80\x020.", "takes a value from an empty stack"),
    "no mark": (b"\x80\x02]e.", "a mark that is not there"),
    "a mark as a value": (b"\x80\x02(.", "from an empty stack"),
    "odd items": (b"\x80\x02}(Nu.", "a key without a value"),
    "append to a text": (b"\x80\x02" + text("a") + b"Na.", "has 'a' where a list goes"),
    "items of a list": (b"\x80\x02]NNs.", "has a list where a dict goes"),
    "no end": (b"\x80\x02N", "cut short or broken"),
    "an unknown opcode": (b"\x80\x02\xff.", "cut short or broken"),
    "a long text": (b"\x80\x02X\xff\xff\xff\x7fabc.", "cut short or broken"),
    "a longer text": (b"\x80\x04\x8d" + b"\xff" * 8 + b".", "cut short or broken"),
    "text that is none": (b"\x80\x02X\2\0\0\0\xff\xff.", "cut short or broken"),
    "a line without end": (b"\x80\x02c" + b"a" * 100_000, "cut short or broken"),
    "an integer of many digits": (b"I" + b"9" * 10_000 + b"\n.", "cut short or broken"),
    "an integer of many bytes": (b"\x80\x02\x8b\0\1\0\0" + b"\x7f" * 256 + b".", "an integer of 2047 bits"),
    "names that are no text": (b"\x80\x04NN\x93.", "a name of the pickle is no text"),
    "no dict": (b"\x80\x02K\1.", "holds no tensor"),
    "a dict of numbers": (state(a=b"K\1"), "holds no tensor"),
    "overlapping names": (state(**{"a.b": tensor(), "a": state(b=tensor())[2:-1]}), "two tensors have the name 'a.b'"),
    "a long key": (state(**{"a" * 2000: tensor()}), "a key has 2000 characters"),
    "a tensor of a text": (state(w=tensor(of=text("0"))), "made of '0'; expected a storage"),
    "an id that is none": (state(w=tensor(of=group(text("module"), b"N") + b"Q")), "a persistent id is a tuple"),
    "an id of a text": (state(w=tensor(of=text("0") + b"Q")), "a persistent id is '0'"),
    "a storage of no type": (
        state(w=tensor(of=group(text("storage"), name("torch.Tensor"), text("0"), text("cpu"), b"K\4") + b"Q")),
        "expected (type, key, numbers)",
    ),
    "negative numbers": (state(w=tensor(of=storage(numbers=-4))), "expected (type, key, numbers)"),
    "too few arguments": (state(w=name("torch._utils._rebuild_tensor_v2") + b")R"), "does not take these 0 values"),
    "past the storage": (state(w=tensor(1, (4,), (1,))), "ends at number 5 of its storage '0', which has 4"),
    "strides past the storage": (state(w=tensor(0, (2, 2), (3, 1))), "ends at number 5"),
    "a negative stride": (state(w=tensor(3, (4,), (-1,))), "sizes or strides"),
    "a negative size": (state(w=tensor(0, (-1,), (1,))), "sizes or strides"),
    "a negative offset": (state(w=tensor(-1, (1,), (1,))), "offset -1"),
    "a size that is no number": (
        state(w=call("torch._utils._rebuild_tensor", storage(), b"K\0", group(text("4")), sizes([1]))),
        "sizes or strides",
    ),
    "unequal axes": (state(w=tensor(0, (2, 2), (1,))), "2 sizes, 1 strides"),
    "many axes": (state(w=tensor(0, (1,) * 65, (1,) * 65)), "sizes or strides"),
    "absurd sizes": (state(w=tensor(0, (2**40, 2**40), (0, 0))), "2**63 bytes or more"),
    "sizes that overflow": (state(w=tensor(0, (2**62, 8, 0), (0, 0, 0))), "2**63 bytes or more"),
    "repeated numbers": (state(w=tensor(0, (2**30,), (0,))), "repeats the 4 numbers of its storage"),
    "an overflowing stride": (state(w=tensor(0, (2,), (2**62,))), "ends at number"),
    "a storage that is not there": (state(w=tensor(of=storage("7"))), "storage '7' is"),
    "a storage that is shorter": (state(w=tensor(0, (5,), (1,), of=storage("0", 5))), "has 16 bytes; the pickle says"),
    "a path as a key": (state(w=tensor(of=storage("../../etc/passwd"))), "storage '../../etc/passwd' is"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_pickle_is_one_error(folder, case):
    import re

    program, words = MALFORMED[case]
    pattern = words if "|" in words else re.escape(words)
    path = folder.write(archive(program), "m.bin")
    with pytest.raises(CheckpointError, match=pattern):
        open_checkpoint(path)


def test_pairs_of_an_older_python_are_taken_and_others_refused(folder):
    pairs = b"](](" + text("w") + tensor() + b"ee"
    made = archive(b"\x80\x02" + name("collections.OrderedDict") + b"(" + pairs + b"tR.")
    assert list(open_checkpoint(folder.write(made, "m.bin"))) == ["w"]
    made = archive(b"\x80\x02" + name("collections.OrderedDict") + b"(](NNetR.")
    with pytest.raises(CheckpointError, match="OrderedDict does not take these 1 values"):
        open_checkpoint(folder.write(made, "m.bin"))


LEGACY = {
    "another version": (legacy(state()).replace(b"M\xe9\x03", b"M\xe8\x03"), "the version of the file is 1000"),
    "keys that are none": (
        legacy(state(w=tensor()))[:-24].replace(b"](X", b"((X").replace(b"e.", b"t."), "list of storages is a tuple"
    ),
    "a key without a tensor": (legacy(state(w=tensor()), ["0", "1"]), "storage '1' is listed, and used by no tensor"),
    "a key twice": (legacy(state(w=tensor()), ["0", "0"]), "listed twice"),
    "no key": (legacy(state(w=tensor()), []), "storage '0' is not in the file"),
    "two widths": (
        legacy(state(a=tensor(), b=tensor(of=storage("0", 2, "torch.DoubleStorage"), shape=(2,)))),
        "has numbers of 4 and of 8 bytes",
    ),
    "a storage cut short": (legacy(state(w=tensor()))[:-1], "past the file's end"),
    "no room for its length": (legacy(state(w=tensor()))[:-20], "past the file's end"),
    "a negative length": (legacy(state(w=tensor()), storages=struct.pack("<q", -1)), "has -1 numbers"),
    "an absurd length": (legacy(state(w=tensor()), storages=struct.pack("<q", 2**62)), "past the file's end"),
    "a shorter storage": (
        legacy(state(w=tensor()), storages=struct.pack("<q", 1) + bytes(4)), "has 4 bytes; the pickle says 16"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEGACY)
def test_a_broken_older_file_is_one_error(folder, case):
    data, words = LEGACY[case]
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder.write(data, "m.bin"))


# Archives.


def spoiled(data, offset, replacement):
    return data[:offset] + replacement + data[offset + len(replacement) :]


def end_of(data):
    return data.rfind(b"PK\x05\x06")


GOOD = archive(state(w=tensor()))
CENTRAL = GOOD.find(b"PK\x01\x02")
LAST = GOOD.rfind(b"PK\x01\x02")  # of data/0
ARCHIVES = {
    "no pickle": (archive(b"").replace(b"data.pkl", b"data.pkk"), "a zip archive with"),
    "two pickles": (archive(state(w=tensor()), **{"x/data.pkl": b"."}), "2 entries data.pkl"),
    "TorchScript": (archive(state(w=tensor()), **{"constants.pkl": b"."}), "archive of TorchScript, a program"),
    "a compressed storage": (archive(state(w=tensor()), method=zipfile.ZIP_DEFLATED), "compressed, which torch.save"),
    "another byte order": (archive(state(w=tensor()), byteorder=b"middle"), "byteorder is b'middle'"),
    "a damaged pickle": (GOOD.replace(b"storage", b"stOrage"), "the checksum of entry 'm/data.pkl' is wrong"),
    "no end": (GOOD[:-30], "no end record: it is cut short"),
    "no storage": (archive(state(w=tensor()), {}), "storage '0' is not in the archive"),
    "entries on disks": (spoiled(GOOD, end_of(GOOD) + 4, b"\1\0"), "several disks"),
    "more entries than there are": (
        spoiled(GOOD, end_of(GOOD) + 8, struct.pack("<HH", 9, 9)), "does not lie in the file|ends after 3 of 9"
    ),
    "a directory past the end": (spoiled(GOOD, end_of(GOOD) + 16, struct.pack("<L", 10**6)), "does not lie in the"),
    "a directory elsewhere": (spoiled(GOOD, end_of(GOOD) + 16, struct.pack("<L", 0)), "the directory is broken"),
    "an entry past the directory": (spoiled(GOOD, LAST + 42, struct.pack("<L", len(GOOD))), "past the directory"),
    "an entry of others' bytes": (
        spoiled(GOOD, LAST + 20, struct.pack("<LL", 5000, 5000)), "past the directory"
    ),
    "headers that disagree": (spoiled(GOOD, LAST + 42, struct.pack("<L", 0)), "and the directory do not agree"),
    "sizes that disagree": (spoiled(GOOD, LAST + 24, struct.pack("<L", 2**31)), "makes 2147483648 bytes of 16"),
    "an unknown method": (spoiled(GOOD, LAST + 10, struct.pack("<H", 12)), "compressed by method 12"),
    "encrypted": (spoiled(GOOD, LAST + 8, struct.pack("<H", 1)), "is encrypted"),
    "a name twice": (archive(state(w=tensor()), {"0": b"", "1": b""}).replace(b"data/1", b"data/0"), "twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARCHIVES)
def test_a_broken_archive_is_one_error(folder, case):
    data, words = ARCHIVES[case]
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder.write(data, "m.bin"))


def test_entries_that_share_bytes_are_refused(folder):
    """Two entries over the same bytes: the trick of zip bombs that are small and not nested."""
    inner = b"PK\x03\x04" + struct.pack("<5H3L2H", 20, 0, 0, 0, 0, 0, 16, 16, 8, 0) + b"m/data/1" + bytes(16)
    data = archive(state(w=tensor()), {"0": inner, "1": bytes(16)})
    last = data.rfind(b"PK\x01\x02")
    inside = data.find(b"m/data/1") - 30
    with pytest.raises(CheckpointError, match="share bytes"):
        open_checkpoint(folder.write(spoiled(data, last + 42, struct.pack("<L", inside)), "m.bin"))


def test_a_bomb_is_refused_before_it_goes_off(folder):
    """A gigabyte of zeros in a megabyte: as a pickle of torch's it is compressed, as an array it is not unpacked."""
    bomb = b"\0" * 2**26
    made = archive(state(w=tensor()), {"0": bomb}, method=zipfile.ZIP_DEFLATED)
    assert len(made) < 2**18
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="is compressed"):
        open_checkpoint(folder.write(made, "m.bin"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**14  # kB


@pytest.mark.parametrize("case", ["zip", "legacy", "training"])
def test_every_truncation_is_one_error(folder, case):
    data = recorded(case)
    for size in {*range(1, 64), *range(64, len(data), max(len(data) // 120, 1)), len(data) - 1}:
        with pytest.raises(CheckpointError):
            open_checkpoint(folder.write(data[:size], "m.bin"))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_give_a_checkpoint_or_one_error(shared_folder, touch_all, data):
    case = data.draw(st.sampled_from(["module", "legacy_protocol4", "parameters"]))
    whole = bytearray(recorded(case))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        with open_checkpoint(shared_folder.write(bytes(whole), "m.bin")) as checkpoint:
            touch_all(checkpoint)
    except CheckpointError:
        pass


OPCODES = [bytes([code]) for code in range(256)]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.sampled_from(OPCODES),
            st.sampled_from(
                [
                    text("a"),
                    integer(3),
                    storage(),
                    tensor(),
                    name("torch.Size"),
                    name("collections.OrderedDict"),
                    sizes([4]),
                ]
            ),
        ),
        max_size=60,
    )
)
def test_any_program_gives_a_checkpoint_or_one_error(shared_folder, touch_all, opcodes):
    try:
        made = archive(b"\x80\x02" + b"".join(opcodes) + b".")
        with open_checkpoint(shared_folder.write(made, "m.bin")) as checkpoint:
            touch_all(checkpoint)
    except CheckpointError:
        pass


def test_numbers_of_a_boolean_are_checked(folder):
    made = archive(state(w=tensor(of=storage("0", 4, "torch.BoolStorage"))), {"0": bytes([0, 1, 2, 0])})
    with (
        open_checkpoint(folder.write(made, "m.bin")) as checkpoint,
        pytest.raises(CheckpointError, match="other than 0 or 1"),
    ):
        checkpoint["w"].numpy()


def test_an_archive_of_thousands_of_entries_opens_in_time_and_memory_linear_in_it(folder):
    held = {str(index): np.float32([index]).tobytes() for index in range(3000)}
    parts = {f"w{key}": tensor(0, (1,), (1,), of=storage(key, 1)) for key in held}
    with open_checkpoint(folder.write(archive(state(**parts), held), "m.bin")) as checkpoint:
        assert len(checkpoint) == 3000 and checkpoint["w2999"].numpy()[0] == 2999
