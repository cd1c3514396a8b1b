"""Pickles that try to run code or to exhaust memory are refused unrun; others are inert values."""

import builtins
import collections
import io
import os
import pickle
import pickletools
import random
import struct
import subprocess
import time
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

from dinogen.formats import pickles
from dinogen.formats.pickles import PickleError, Record, read_pickle
from tests.formats import nvlabs


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def saved(tmp_path, data, name="file.pkl"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def refused(path):
    """The message, which is one line that names the file."""
    with pytest.raises(PickleError) as error:
        read_pickle(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert len(text) < 400 + len(str(path))
    return text


def nested(payload):
    """A storage whose bytes are a pickle of their own."""
    return Calls(torch.storage._load_from_bytes, payload)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {mark}",), "system"),
        (builtins.eval, ("open({mark!r}, 'w')",), "eval"),
        (builtins.exec, ("open({mark!r}, 'w')",), "exec"),
        (builtins.__import__, ("os",), "__import__"),
        (builtins.getattr, ("x", "upper"), "getattr"),
        (subprocess.check_output, (("touch", "{mark}"),), "output"),
        (torch.load, ("{mark}",), "torch.serialization.load"),
        (torch.hub.load, ("{mark}", "x"), "torch.hub.load"),
        (collections.Counter, ("{mark}",), "collections.Counter"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_tries_to_run_code_is_refused_unrun(
    tmp_path, function, arguments, name, deep, protocol
):
    mark = tmp_path / "it ran"
    filled = tuple(
        one.format(mark=mark)
        if isinstance(one, str)
        else tuple(part.format(mark=str(mark)) for part in one)
        for one in arguments
    )
    attack = Calls(function, *filled)
    if deep:
        attack = nvlabs.snapshot(8) | {"training_set_kwargs": {"path": [attack]}}
    text = refused(saved(tmp_path, nvlabs.dumps(attack, protocol)))
    if protocol == 2 and deep:
        return  # its bytes are made by a function of `_codecs`, which is refused first
    assert "nothing of it was run: it asks for" in text
    assert name in text
    assert not mark.exists()


def test_the_attacks_of_this_file_do_run_where_pickle_reads_them(tmp_path):
    mark = tmp_path / "it ran"
    pickle.loads(pickle.dumps(Calls(os.system, f"touch '{mark}'")))
    assert mark.exists()


def test_a_storage_cannot_carry_a_pickle_that_runs(tmp_path):
    mark = tmp_path / "it ran"
    own = pickle.dumps(Calls(os.system, f"touch '{mark}'"))
    legacy = io.BytesIO()
    torch.save(Calls(os.system, f"touch '{mark}'"), legacy, _use_new_zipfile_serialization=False)
    other = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, other, _use_new_zipfile_serialization=False)
    archive = io.BytesIO()
    torch.save(torch.zeros(2).untyped_storage(), archive)
    for payload, message in (
        (own, "torch did not write"),
        (archive.getvalue(), "torch did not write"),
        (legacy.getvalue(), "torch.load refuses the bytes"),
        (other.getvalue(), "where a storage belongs"),
        ("text", "torch did not write"),
    ):
        assert message in refused(saved(tmp_path, pickle.dumps(nested(payload))))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\x80\x02cos\nsystem\n(S'x'\ntR.", "os.system"),
        (b"\x80\x02(S'x'\nios\nsystem\n.", "STRING"),
        (b"\x80\x02(ios\nsystem\n.", "INST"),
        (b"\x80\x02(cos\nsystem\no.", "os.system"),
        (b"\x80\x02PK\n.", "PERSID"),
        (b"\x80\x02K\x01Q.", "BINPERSID"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x04K\x012.", "DUP"),
        (b"\x80\x04)\x8c\x00\x92.", "NEWOBJ_EX"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x02cdnnlib.tflib.network\nNetwork\n.", "legacy.py"),
        (b"\x80\x02c" + b"m" * 5000 + b"\nx\n.", "mmm"),
        ("\x80\x02cm\u202e\nx\n.".encode("latin1", "ignore"), "m.x"),
    ],
)
def test_opcodes_and_names_beyond_the_list_are_refused(tmp_path, data, name):
    assert name in refused(saved(tmp_path, data))


def test_allowed_names_make_no_more_than_their_own_values(tmp_path):
    """REDUCE calls our functions alone, BUILD sets nothing, and classes make no objects."""
    for data in (
        pickle.dumps(Calls(collections.OrderedDict, [("a", 1)])),
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02tR.",
        b"\x80\x02K\x01)R.",
        b"\x80\x02K\x01K\x02\x86b.",
        b"\x80\x02K\x01K\x02b.",
        b"\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\n}\x85R.",
        b"\x80\x02cnumpy.core.multiarray\nscalar\n(K\x01K\x02tR.",
        b"\x80\x02cbuiltins\nset\nK\x05\x85R.",
        b"\x80\x02cbuiltins\nset\n" + b"(" + b"K\x01" * 17 + b"t\x85R.",
    ):
        assert "no whole pickle" in refused(saved(tmp_path, data))


def test_truncated_and_foreign_files_get_one_clear_line(tmp_path):
    whole = nvlabs.dumps({"G_ema": nvlabs.snapshot(4 * 2)["G_ema"]})
    rng = random.Random(0)
    for end in [2, 3, 10, *(rng.randrange(len(whole)) for _ in range(40)), len(whole) - 1]:
        assert "no whole pickle" in refused(saved(tmp_path, whole[:end]))
    for data in (b"", b"PK\x03\x04", b"\x89PNG\r\n", b"<html>", b"version https://git-lfs\n"):
        assert "is no pickle" in refused(saved(tmp_path, data))
    assert "no such file" in refused(tmp_path / "missing.pkl")
    assert "no such file" in refused(tmp_path)


def test_damaged_files_never_fail_otherwise(tmp_path):
    whole = nvlabs.dumps(nvlabs.snapshot(8))
    rng = random.Random(1)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 3, 20])):
            data[rng.randrange(2, min(len(data), 4000))] = rng.randrange(256)
        try:
            read_pickle(saved(tmp_path, bytes(data)))
        except PickleError as error:
            assert "\n" not in str(error)


# ---- bounds --------------------------------------------------------------------------------------


def storage_of(num):
    file = io.BytesIO()
    torch.save(torch.zeros(num)._typed_storage(), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def tensor(num, offset, size, stride):
    arguments = (nested(storage_of(num)), offset, size, stride, False, collections.OrderedDict())
    return pickle.dumps(Calls(torch._utils._rebuild_tensor_v2, *arguments))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (2**40,), (0,)),
        (0, (2, 3), (3, 1)),
        (3, (2,), (1,)),
        (0, (2,), (2**62,)),
        (0, (-2,), (1,)),
        (-1, (2,), (1,)),
        (0, (2,), (1, 1)),
        (0, (1,) * 9, (1,) * 9),
        (0, (2.0,), (1,)),
        (0, ("a",), (1,)),
    ],
)
def test_tensors_hold_no_more_than_their_storage(tmp_path, offset, size, stride):
    assert "no whole pickle" in refused(saved(tmp_path, tensor(4, offset, size, stride)))


def test_tensors_within_their_storage_are_read(tmp_path):
    assert read_pickle(saved(tmp_path, tensor(4, 1, (3,), (1,)))).shape == (3,)
    assert read_pickle(saved(tmp_path, tensor(4, 0, (), ()))).shape == ()
    assert read_pickle(saved(tmp_path, tensor(4, 0, (0, 2**30), (1, 1)))).numel() == 0


def test_one_storage_many_times_is_refused(tmp_path):
    """A few bytes would become gigabytes otherwise."""
    payload = storage_of(100_000)
    once = b"h\x00h\x01\x85R"
    data = (
        b"\x80\x02(ctorch.storage\n_load_from_bytes\nq\x00"
        + b"B" + struct.pack("<I", len(payload)) + payload + b"q\x01" + once * 50_000 + b"t."
    )  # fmt: skip
    assert "larger than the file" in refused(saved(tmp_path, data))


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02" + b"]" * 60_000 + b".",
        b"\x80\x02" + b"(" * 60_000 + b".",
        b"\x80\x02" + b"]" + b"]a" * 30_000 + b".",
        b"\x80\x02N" + b"\x85" * 40_000 + b".",
        b"\x80\x02}N" + b"\x85" * 40_000 + b"K\x01s.",
        b"\x80\x04\x8fN" + b"\x85" * 40_000 + b"\x90.",
        b"\x80\x02Nr\xff\xff\xff\x7f.",
        b"\x80\x02j\xff\xff\xff\x7f.",
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b"x.",
        b"\x80\x04\x8d" + b"\xff" * 7 + b"\x00" + b"x.",
        b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
        b"\x80\x02\x8b\xff\xff\xff\x7f1.",
        b"\x80\x02]q\x00" + b"h\x00a" * 40_000 + b".",
    ],
    ids=lambda data: f"{data[2:6]!r}",
)
def test_memory_and_depth_are_bounded(tmp_path, data, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_OPCODES", 50_000)
    path = saved(tmp_path, data)
    tracemalloc.start()
    before = time.monotonic()
    try:
        read_pickle(path)
    except PickleError:
        pass
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < 20 << 20
    assert time.monotonic() - before < 20


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "large.pkl"
    with path.open("wb") as file:
        file.truncate(pickles.MAX_BYTES + 1)
    assert "MiB" in refused(path)


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_values_and_tensors_are_what_pickle_wrote(tmp_path, protocol):
    value = {
        "numbers": [0, -1, 255, 70_000, 2**40, -(2**70), 1.5, True, False, None],
        "text": ("", "ä" * 300, b"bytes", b"b" * 300),
        "sets": [set(), {1, 2}],
        "order": collections.OrderedDict(b=1, a=2),
        "numpy": [np.float64(2.5), np.float32(0.25), np.int64(7), np.bool_(True)],
        "nested": {"x": {"y": ({}, [], ())}},
    }
    shared = [1]
    value["twice"] = [shared, shared]
    found = read_pickle(saved(tmp_path, pickle.dumps(value, protocol)))
    assert found == value
    assert found["twice"][0] is found["twice"][1]
    tensors = {
        "parameter": nn.Parameter(torch.randn(3, 2)),
        "turned": torch.arange(6.0).view(2, 3).t(),
        "half": torch.randn(4).half(),
        "whole": torch.arange(3),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0),
        "expanded": torch.randn(4)[1:3],
    }
    found = read_pickle(saved(tmp_path, pickle.dumps(tensors, protocol)))
    for name, one in tensors.items():
        assert found[name].dtype == one.dtype
        assert torch.equal(found[name], one.detach())


def test_layers_of_torch_are_records(tmp_path):
    found = read_pickle(saved(tmp_path, pickle.dumps(nn.Sequential(nn.Linear(2, 3)))))
    assert isinstance(found, Record)
    assert found.name == "torch.nn.modules.container.Sequential"
    linear = found.state["_modules"]["0"]
    assert linear.state["_parameters"]["weight"].shape == (3, 2)


def test_the_bounds_leave_room_for_the_largest_networks():
    """1024x1024 with 8 mapping layers has as many modules per block as any size has."""
    opcodes = sum(1 for _ in pickletools.genops(nvlabs.dumps(nvlabs.snapshot(256))))
    assert opcodes * 10 < pickles.MAX_OPCODES
