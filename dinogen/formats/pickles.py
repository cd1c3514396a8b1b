"""Reads pickles of networks without unpickling: a small machine that builds inert values alone.

A pickle is a program: it names functions of any installed module and says what to call them with,
so Python's own ``pickle`` runs whatever its author chose. Here nothing is imported and nothing that
the file names is called. ``pickletools`` splits the bytes into opcodes, and those that build plain
values are carried out: numbers, text, bytes, lists, tuples, sets and dicts. A name that a file asks
for is looked up in :data:`ALLOWED`, which says what *we* make in its place: mostly a
:class:`Record`, which only holds what the pickle says of the object. Any other name, and any other
opcode, ends the reading with an error that names it.

Bounded for hostile files: the size of the file, the number of opcodes (and so of values), the bytes
of all tensors together by those of the file, keys of dicts and sets to plain kinds. No value is
compared, hashed, printed or walked to any depth, so neither nesting nor cycles cost anything.
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from dinogen.errors import UserError

MAX_BYTES = 4 << 30
MAX_OPCODES = 2_000_000
# torch writes sets with few elements alone
MAX_SET = 16
_KEYS = (str, bytes, int, float, bool, type(None))
# torch.save's older layout, which storages pickle themselves in: the pickle of its magic number
_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_NUMBER = re.compile(r"[<>=|]?([fiub])([1248])")
_FORMATS = {
    "f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q",
    "u1": "B", "u2": "H", "u4": "I", "u8": "Q", "b1": "?",
}  # fmt: skip


class PickleError(UserError):
    """A file that is no pickle of networks, or asks for what is not allowed."""


@dataclass
class Record:
    """What a pickle says of an object that is not built.

    Attributes:
        name: of its class or function, such as ``Generator`` or ``torch.nn.modules.linear.Linear``.
        arguments: what it would have been called with.
        state: what its attributes would have become.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None


def read_pickle(path: Path) -> Any:
    """The value in a pickle, of plain values, tensors and records.

    Args:
        path: the file.

    Returns:
        Whatever the file holds, unchecked. Classes of the networks are :class:`Record`, with a dict
        in ``state``; tensors are on the CPU and may share memory.

    Raises:
        PickleError: the file cannot be read, is no whole pickle, asks for a name that is not in
            :data:`ALLOWED`, or is larger than bounds allow; nothing of it was run.
    """
    try:
        if not path.is_file():
            raise PickleError(f"{path}: there is no such file: name a pickle of networks")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise PickleError(f"{path}: has {size >> 20} MiB: no pickle of networks is as large")
        data = path.read_bytes()
        if not data.startswith(b"\x80"):
            raise PickleError(
                f"{path}: is no pickle (of protocol 2 or later): name the .pkl itself, not an "
                "archive, a page or a state dict"
            )
    except OSError as error:
        raise PickleError(f"{path}: cannot be read: {error.strerror or error}") from None
    return _Machine(path).run(data)


class _Mark:
    """What the opcode MARK puts on the stack."""


_MARK = _Mark()


@dataclass(frozen=True)
class _Name:
    """A name that the pickle asked for, and what we make when it is called."""

    name: str
    make: Callable[[str, tuple[Any, ...]], Any]


class _Malformed(Exception):
    """What is wrong with a pickle."""


class _Machine:
    """The stack and the memo of one pickle.

    Args:
        path: named in errors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.num_bytes = 0
        self.num_made: dict[Callable[[str, tuple[Any, ...]], Any], int] = {_storage: 0, _tensor: 0}

    def run(self, data: bytes) -> Any:
        """Carry out the opcodes up to STOP."""
        self.num_bytes = len(data)
        try:
            for number, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
                if number > MAX_OPCODES:
                    raise _Malformed(f"it has more than {MAX_OPCODES:,} opcodes")
                if opcode.name == "STOP":
                    return self._pop()
                self._step(opcode.name, argument)
        except PickleError:
            raise
        except (_Malformed, ValueError, IndexError, OverflowError, MemoryError) as error:
            # ValueError and IndexError are those of pickletools and of a stack that is too short
            raise PickleError(
                f"{self.path}: is no whole pickle of networks ({str(error) or 'out of memory'}): "
                "download it again"
            ) from None
        raise AssertionError("pickletools ends with STOP or an error")

    def _step(self, name: str, argument: Any) -> None:
        if name in _IGNORED:
            return
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _OPERATIONS:
            _OPERATIONS[name](self, argument)
        else:
            raise PickleError(
                f"{self.path}: refused, and nothing of it was run: it holds the opcode {name}, "
                "which no pickle of networks needs"
            )

    # ---- the stack -------------------------------------------------------------------------------

    def _pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise _Malformed("a mark stands where a value belongs")
        return value

    def _pop_to_mark(self) -> list[Any]:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _top(self, kind: type | tuple[type, ...]) -> Any:
        top = self.stack[-1]
        if not isinstance(top, kind):
            raise _Malformed(f"a value is added to a {type(top).__name__}")
        return top

    # ---- opcodes ---------------------------------------------------------------------------------

    def put(self, argument: int) -> None:
        self.memo[argument] = self.stack[-1]

    def memoize(self, argument: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, argument: int) -> None:
        if argument not in self.memo:
            raise _Malformed(f"there is no value number {argument}")
        self.stack.append(self.memo[argument])

    def pop(self, argument: None) -> None:
        self.stack.pop()

    def pop_mark(self, argument: None) -> None:
        self._pop_to_mark()

    def tuple_of_mark(self, argument: None) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def tuple_of(self, num: int) -> None:
        values = [self._pop() for _ in range(num)]
        self.stack.append(tuple(values[::-1]))

    def list_of_mark(self, argument: None) -> None:
        self.stack.append(self._pop_to_mark())

    def dict_of_mark(self, argument: None) -> None:
        values = self._pop_to_mark()
        self.stack.append({})
        self._set(values)

    def frozenset_of_mark(self, argument: None) -> None:
        self.stack.append(frozenset(_key(one) for one in self._pop_to_mark()))

    def append(self, argument: None) -> None:
        value = self._pop()
        self._top(list).append(value)

    def appends(self, argument: None) -> None:
        values = self._pop_to_mark()
        self._top(list).extend(values)

    def add_items(self, argument: None) -> None:
        values = self._pop_to_mark()
        self._top(set).update(_key(one) for one in values)

    def set_item(self, argument: None) -> None:
        value = self._pop()
        self._set([self._pop(), value])

    def set_items(self, argument: None) -> None:
        self._set(self._pop_to_mark())

    def _set(self, values: list[Any]) -> None:
        if len(values) % 2:
            raise _Malformed("a key without a value")
        target = self._top(dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_key(key)] = value

    def global_name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._find(module, name)

    def stack_global(self, argument: None) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise _Malformed("a name is not text")
        self._find(module, name)

    def _find(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        make = ALLOWED.get(full)
        if make is None and _LAYER.fullmatch(full):
            make = _record
        if make is None:
            self._refuse(full)
        self.stack.append(_Name(full, make))

    def _refuse(self, full: str) -> NoReturn:
        shown = full if len(full) <= 100 and full.isprintable() else ascii(full[:100])
        if full == "dnnlib.tflib.network.Network":
            raise PickleError(
                f"{self.path}: is of the TensorFlow version of StyleGAN2: convert it with legacy.py"
                " of stylegan2-ada-pytorch first"
            )
        raise PickleError(
            f"{self.path}: refused, and nothing of it was run: it asks for {shown}, which no "
            "pickle of these networks needs: trust neither the file nor its source, unless you "
            "know why that is in it"
        )

    def call(self, argument: None) -> None:
        """REDUCE and NEWOBJ: a function or class, and a tuple of arguments."""
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise _Malformed("something is called that is no function")
        try:
            made = function.make(function.name, arguments)
        except (TypeError, ValueError, KeyError, struct.error, RuntimeError) as error:
            text = str(error).split("\n", 1)[0]
            raise _Malformed(f"{function.name}: {text}") from None
        if function.make in self.num_made:
            # Each value of the file is one of one storage and of one tensor.
            self.num_made[function.make] += made.numel() * made.element_size()
            if self.num_made[function.make] > self.num_bytes:
                raise _Malformed("its tensors are larger than the file")
        self.stack.append(made)

    def build(self, argument: None) -> None:
        """BUILD: the state of an object, which is noted and not set."""
        state = self._pop()
        top = self.stack[-1]
        if isinstance(top, Record):
            top.state = state
        elif not isinstance(top, dict):
            raise _Malformed(f"a {type(top).__name__} is given a state")


def _key(value: Any) -> Any:
    """A key of a dict or an element of a set: to hash deep tuples would need a deep stack."""
    if not isinstance(value, _KEYS):
        raise _Malformed(f"a {type(value).__name__} is a key")
    return value


# ---- what is made in place of what a pickle names ------------------------------------------------


def _record(name: str, arguments: tuple[Any, ...]) -> Record:
    return Record(name, arguments)


def _empty_dict(name: str, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise ValueError("a dict with arguments")
    return {}


def _set_of(name: str, arguments: tuple[Any, ...]) -> set[Any]:
    (values,) = arguments or ((),)
    if not isinstance(values, (list, tuple)) or len(values) > MAX_SET:
        raise ValueError("a set of no short list")
    return {_key(one) for one in values}


def _persistent(name: str, arguments: tuple[Any, ...]) -> Record:
    """An object of NVlabs' ``persistence``: its class by name, and its attributes.

    The source code of the class, which its own reader runs, is left unread.
    """
    (meta,) = arguments
    if not isinstance(meta, dict) or meta.get("type") != "class":
        raise ValueError("no description of a class")
    if not isinstance(meta.get("class_name"), str) or not isinstance(meta.get("state"), dict):
        raise ValueError("no name or no state")
    return Record(meta["class_name"], (), meta["state"])


def _storage(name: str, arguments: tuple[Any, ...]) -> Tensor:
    """The values of a storage, (N,): the bytes are those of torch.save, read without pickle."""
    (payload,) = arguments
    if not isinstance(payload, bytes) or not payload.startswith(_MAGIC):
        raise ValueError("a storage that torch did not write")
    try:
        found = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle's own errors, which are not imported here
        said = str(error).strip().split("\n", 1)[0]
        raise ValueError(f"torch.load refuses a storage: {said or type(error).__name__}") from None
    if not isinstance(found, torch.storage.TypedStorage):
        raise ValueError(f"a {type(found).__name__} where a storage belongs")
    values = torch.empty(0, dtype=found.dtype).set_(found._untyped_storage)  # type: ignore[call-overload]
    if values.numel() * values.element_size() > len(payload):
        raise ValueError("a storage larger than its bytes")
    return values


def _tensor(name: str, arguments: tuple[Any, ...]) -> Tensor:
    """A tensor of a storage; only as large as that is, however its strides are."""
    storage, offset, size, stride = arguments[:4]
    if not isinstance(storage, Tensor) or storage.dim() != 1:
        raise ValueError("a tensor of no storage")
    numbers = (offset, *size, *stride)
    if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in numbers):
        raise ValueError("sizes that are no numbers")
    if len(size) != len(stride) or len(size) > 8:
        raise ValueError("sizes that do not fit strides")
    num, last = 1, offset
    for length, step in zip(size, stride, strict=True):
        num *= length
        last += (length - 1) * step
    if num > storage.numel() or (num and last >= storage.numel()):
        raise ValueError("a tensor larger than its storage")
    return storage.as_strided(size, stride, offset)


def _parameter(name: str, arguments: tuple[Any, ...]) -> Tensor:
    if not arguments or not isinstance(arguments[0], Tensor):
        raise ValueError("a parameter of no tensor")
    return arguments[0]


def _number(name: str, arguments: tuple[Any, ...]) -> Any:
    """A number of numpy's, as a Python number."""
    dtype, data = arguments
    code = dtype.arguments[0] if isinstance(dtype, Record) and dtype.arguments else None
    found = _NUMBER.fullmatch(code) if isinstance(code, str) else None
    if found is None or not isinstance(data, bytes):
        raise ValueError("a number of an unknown kind")
    state = dtype.state
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else "<"
    return struct.unpack((">" if order == ">" else "<") + _FORMATS["".join(found.groups())], data)[
        0
    ]


# Layers of torch itself, which hold nothing but what their state says.
_LAYER = re.compile(r"torch\.nn\.modules\.[a-z_]+\.[A-Za-z0-9]+")
ALLOWED: dict[str, Callable[[str, tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.storage._load_from_bytes": _storage,
    "collections.OrderedDict": _empty_dict,
    "dnnlib.util.EasyDict": _empty_dict,
    "dnnlib.EasyDict": _empty_dict,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "builtins.set": _set_of,
    "builtins.frozenset": _set_of,
    "__builtin__.set": _set_of,
    "numpy.dtype": _record,
    "numpy.ndarray": _record,
    "numpy.core.multiarray._reconstruct": _record,
    "numpy._core.multiarray._reconstruct": _record,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
}

_IGNORED = {"PROTO", "FRAME"}
_VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT",
    "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "TUPLE": _Machine.tuple_of_mark,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "LIST": _Machine.list_of_mark,
    "DICT": _Machine.dict_of_mark,
    "FROZENSET": _Machine.frozenset_of_mark,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.add_items,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.global_name,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
}
