"""Reads a pickle as data: an interpreter of the opcodes that protocols 2 to 5 write, which imports and calls nothing.

A pickle is a program; Python's reader imports and calls what it names. Here a name is looked up in a table that the
caller gives (`find`), and only the table's own functions can be called. Every opcode is charged to a budget, which
bounds memory and the number of opcodes. A length is compared with the bytes in the file before anything is allocated.
Reading does not recurse. No opcode's work grows with a value made earlier unless it is charged again, since the memo
lets a short pickle use a long value many times.

Python's own `pickletools.genops` followed by a `pickle.Unpickler` with a restricted `find_class` would be shorter, but
was tried and is not safe: the unpickler hashes keys of dicts and sets before anyone can look at them. A key that is a
tuple nested two million deep overflows C's stack; one of shared pairs, 138 bytes, takes seconds, and twice as long for
every four bytes more; colliding integers, 300 kB, take 11 s. To refuse such keys, the first pass would have to follow
the stack, which is this interpreter. It would also copy every weight, and could not say at which byte it refuses.
"""

from __future__ import annotations

import math
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

BUDGET = 96 * 2**20
"""Bytes that the containers, numbers and texts of one file may take; a network of 300 M parameters needs a fifth."""
MAX_TEXT, MAX_NAME, MAX_KEY, MAX_LONG, MAX_ARGS = 16 * 2**20, 256, 1000, 256, 64
ATOM, SMALL, BOX, OBJECT = 24, 64, 160, 640
"""Upper bounds in bytes of a shared value, a number, a small container and an object, with their place on the stack."""


class Refused(Exception):
    """The file cannot be read: at which byte, and why."""

    def __init__(self, offset: int, reason: str):
        super().__init__(f"byte {offset:,}: {reason}")


# What reading gives, besides Python's numbers, texts and containers.


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes of the file, not copied, and where they start; `decoded` ones have the position of the opcode instead."""

    view: memoryview
    base: int
    decoded: bool = False


@dataclass(frozen=True, slots=True)
class Name:
    """A global that the pickle names; `call` and `new` make what a call of it and an instance of it become."""

    module: str
    name: str
    call: Callable[..., Any] | None = None
    new: Callable[..., Any] | None = None

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:80]


@dataclass(slots=True, eq=False)
class Record:
    """An object that was not made: name of its class, constructor arguments, attributes, and the opcode's position."""

    cls: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    at: int = 0

    def build(self, state: Any) -> None:
        """Takes what `__setstate__` would get, a dict or a pair of it and None (no slots). It is not copied."""
        if isinstance(state, tuple) and len(state) == 2 and state[1] is None:
            state = state[0]
        if not isinstance(state, dict):
            raise ValueError(f"{a(state)} as the state of an object")
        if self.state:
            raise ValueError("the state of an object for the second time")
        self.state = state


# Checks. A ValueError becomes a refusal that names the opcode and the byte.


def printable(text: str) -> str:
    """Text from a file for a message: one line, no control characters, at most 600 characters."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 600 else text[:600] + " ..."


def a(value: Any) -> str:
    """The type of a value, with its article."""
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


def need(value: Any, kind: type | tuple[type, ...], what: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {a(value)}")
    return value


def count(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError(f"{what} is no count: {str(value)[:40] if isinstance(value, int) else type(value).__name__}")
    return value


def shape(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > 8:
        raise ValueError(f"{what} is no shape")
    return tuple(count(v, what) for v in value)


@dataclass(slots=True)
class Budget:
    """The memory that one file may still ask for."""

    left: int = BUDGET

    def charge(self, cost: int, offset: int) -> None:
        self.left -= cost
        if self.left < 0:
            raise Refused(offset, f"it asks for more than {BUDGET >> 20} MiB of objects besides its arrays")


class PickleReader:
    """Interprets pickles that follow each other in `blob`.

    Args:
        blob: The bytes.
        find: Gives the `Name` of a global (module, name) or raises ValueError.
        persistent: Called with a persistent id; None refuses them.
        budget: Shared by the pickles nested in one file.
    """

    def __init__(
        self,
        blob: Blob,
        *,
        find: Callable[[str, str], Name],
        persistent: Callable[[Any], Any] | None = None,
        budget: Budget,
    ):
        self.view, self.blob = blob.view, blob
        self.find, self.persistent, self.budget = find, persistent, budget
        self.pos = 0
        self.at = blob.base
        """Position in the file of the opcode that is being run."""
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    @property
    def offset(self) -> int:
        """Position of the reader in the file."""
        return self.blob.base + (0 if self.blob.decoded else self.pos)

    def take(self, n: int) -> memoryview:
        """The next n bytes."""
        if n > (left := len(self.view) - self.pos):
            why = f"it ends too early (an incomplete download?): bytes needed {n:,}, left {left:,}"
            raise Refused(self.offset, why)
        self.pos += n
        return self.view[self.pos - n : self.pos]

    def unpack(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def read(self) -> Any:
        """The value of one pickle; afterwards the reader stands behind it.

        Raises:
            Refused: What is wrong, and at which byte.
        """
        self.stack, self.marks, self.memo = [], [], {}
        start = self.pos
        while True:
            self.at = self.offset
            code = self.take(1)[0]
            if self.pos == start + 1 and code != 0x80:
                raise Refused(self.at, f"no pickle of protocol 2 to 5 starts with the byte {code:#04x}")
            if code == 0x2E:  # STOP
                if len(self.stack) != 1 or self.marks:
                    raise Refused(self.at, f"it stops with {len(self.stack):,} values on the stack in place of one")
                return self.stack.pop()
            if (op := OPS.get(code)) is None:
                raise Refused(self.at, f"the opcode {code:#04x} is not accepted; nothing was run")
            self.budget.charge(op.cost, self.at)
            try:
                op.run(self)
            except MemoryError:
                raise Refused(self.at, f"{op.name}: out of memory") from None
            except (ValueError, TypeError, OverflowError) as e:
                raise Refused(self.at, f"{op.name}: {e}") from None

    # The stack.

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def peek(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("the stack is empty")
        return self.stack[-1]

    def pop(self) -> Any:
        self.peek()
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        """The top of the stack, a container of this kind."""
        top = self.peek()
        if type(top) is not kind:
            raise ValueError(f"{a(top)} in place of a {kind.__name__}")
        return top

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise ValueError("there is no mark on the stack")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    # Numbers, texts, bytes.

    def text(self, n: int, encoding: str = "utf-8") -> None:
        if n > MAX_TEXT:
            raise ValueError(f"a text of {n:,} bytes; accepted are {MAX_TEXT:,}")
        encoded = self.take(n)
        self.budget.charge(n, self.at)
        s = str(encoded, encoding, "surrogatepass")
        self.budget.charge(max(sys.getsizeof(s) - n, 0), self.at)
        self.push(s)

    def bytes(self, n: int) -> None:
        at = self.offset
        self.push(Blob(self.take(n), at, self.blob.decoded))

    def long(self, n: int) -> None:
        if not 0 <= n <= MAX_LONG:
            raise ValueError(f"an integer of {n:,} bytes; accepted are {MAX_LONG}")
        self.push(int.from_bytes(self.take(n), "little", signed=True))

    def proto(self) -> None:
        version = self.unpack("<B")
        if not 2 <= version <= 5:
            raise ValueError(f"protocol {version}; accepted are 2 to 5")

    # Containers.

    def tuple(self, n: int) -> None:
        items = [self.pop() for _ in range(n)]
        self.push(tuple(reversed(items)))

    def append(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def update(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a key without a value")
        top = self.top(dict)
        self.budget.charge(48 * len(items), self.at)
        for i in range(0, len(items), 2):
            top[self.key(items[i])] = items[i + 1]

    def members(self, items: list[Any]) -> list[Any]:
        """The members of a set, checked and charged."""
        self.budget.charge(128 * len(items), self.at)
        return [self.key(v) for v in items]

    def add(self, items: list[Any]) -> None:
        self.top(set).update(self.members(items))

    def key(self, value: Any) -> Any:
        """A key of a dict or member of a set: short text, small number or None, with cheap and rarely equal hashes."""
        if isinstance(value, Blob) and len(value.view) <= MAX_KEY:
            self.budget.charge(OBJECT + len(value.view), self.at)
            value = str(value.view, "latin1")
        if isinstance(value, str) and len(value) > MAX_KEY:
            raise ValueError(f"a key of {len(value):,} characters")
        if not (value is None or isinstance(value, str) or (isinstance(value, int) and abs(value) < 2**31)):
            raise ValueError(f"{a(value)} as a key")
        return value

    def pair(self) -> list[Any]:
        value, k = self.pop(), self.pop()
        return [k, value]

    # The memo.

    def put(self, index: int) -> None:
        self.memo[index] = self.peek()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError(f"entry {index:,} was never stored")
        self.push(self.memo[index])

    # Names and calls, all through the table.

    def global_line(self) -> None:
        names = []
        for _ in range(2):
            line = bytes(self.view[self.pos : self.pos + MAX_NAME + 1])
            end = line.find(b"\n")
            if end < 0:
                raise ValueError(f"a name without an end, or of more than {MAX_NAME} bytes")
            names.append(line[:end].decode("utf-8"))
            self.pos += end + 1
        self.push(self.find(*names))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError("a name that is no text")
        if len(name) > MAX_NAME or len(module) > MAX_NAME:
            raise ValueError(f"a name of more than {MAX_NAME} characters")
        self.push(self.find(module, name))

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(function, Name) or function.call is None:
            raise ValueError(f"a call of {function if isinstance(function, Name) else a(function)}, which is not made")
        if not isinstance(args, tuple) or len(args) > MAX_ARGS:
            raise ValueError("arguments that are no short tuple")
        try:
            self.push(function.call(self, *args))
        except TypeError:
            raise ValueError(f"a call of {function} with {len(args)} arguments") from None

    def new(self, args: Any, kwargs: Any) -> None:
        cls = self.pop()
        if not isinstance(cls, Name) or cls.new is None:
            raise ValueError(f"an object of {cls if isinstance(cls, Name) else a(cls)}, which is not made")
        if not (isinstance(args, tuple) and isinstance(kwargs, dict) and len(args) + len(kwargs) <= MAX_ARGS):
            raise ValueError("arguments that are no short tuple and dict")
        self.push(cls.new(self, args, kwargs))

    def new_ex(self) -> None:
        kwargs, args = self.pop(), self.pop()
        self.new(args, kwargs)

    def build(self) -> None:
        state, top = self.pop(), self.peek()
        if isinstance(top, dict):  # attributes of a dict, such as a state dict's _metadata: not needed
            if not isinstance(state, dict):
                raise ValueError(f"the state of a dict is {a(state)}")
        elif isinstance(top, (Record, DType, Array)):
            top.build(state)
        else:
            raise ValueError(f"{a(top)} has no state")

    def persistent_id(self) -> None:
        pid = self.pop()
        if self.persistent is None:
            raise ValueError("a persistent id outside a torch file")
        self.push(self.persistent(pid))


class Op(NamedTuple):
    name: str
    cost: int
    run: Callable[[PickleReader], None]


OPS: dict[int, Op] = {
    ord(code): Op(name, cost, run)
    for code, name, cost, run in [
        ("\x80", "PROTO", ATOM, PickleReader.proto),
        ("\x95", "FRAME", ATOM, lambda r: r.unpack("<Q")),  # a hint for buffering; lengths are checked where used
        ("(", "MARK", SMALL, lambda r: r.marks.append(len(r.stack))),
        ("0", "POP", ATOM, PickleReader.pop),
        ("1", "POP_MARK", ATOM, PickleReader.pop_mark),
        ("N", "NONE", ATOM, lambda r: r.push(None)),
        ("\x88", "NEWTRUE", ATOM, lambda r: r.push(True)),
        ("\x89", "NEWFALSE", ATOM, lambda r: r.push(False)),
        ("J", "BININT", SMALL, lambda r: r.push(r.unpack("<i"))),
        ("K", "BININT1", ATOM, lambda r: r.push(r.unpack("<B"))),
        ("M", "BININT2", SMALL, lambda r: r.push(r.unpack("<H"))),
        ("\x8a", "LONG1", 6 * SMALL, lambda r: r.long(r.unpack("<B"))),
        ("\x8b", "LONG4", 6 * SMALL, lambda r: r.long(r.unpack("<i"))),
        ("G", "BINFLOAT", SMALL, lambda r: r.push(r.unpack(">d"))),
        ("\x8c", "SHORT_BINUNICODE", ATOM, lambda r: r.text(r.unpack("<B"))),
        ("X", "BINUNICODE", ATOM, lambda r: r.text(r.unpack("<I"))),
        ("\x8d", "BINUNICODE8", ATOM, lambda r: r.text(r.unpack("<Q"))),
        ("U", "SHORT_BINSTRING", ATOM, lambda r: r.text(r.unpack("<B"), "latin1")),  # Python 2's strings, short ones
        ("T", "BINSTRING", OBJECT, lambda r: r.bytes(r.unpack("<I"))),  # and long ones, which hold arrays
        ("C", "SHORT_BINBYTES", OBJECT, lambda r: r.bytes(r.unpack("<B"))),
        ("B", "BINBYTES", OBJECT, lambda r: r.bytes(r.unpack("<I"))),
        ("\x8e", "BINBYTES8", OBJECT, lambda r: r.bytes(r.unpack("<Q"))),
        ("\x96", "BYTEARRAY8", OBJECT, lambda r: r.bytes(r.unpack("<Q"))),
        (")", "EMPTY_TUPLE", ATOM, lambda r: r.push(())),
        ("\x85", "TUPLE1", BOX, lambda r: r.tuple(1)),
        ("\x86", "TUPLE2", BOX, lambda r: r.tuple(2)),
        ("\x87", "TUPLE3", BOX, lambda r: r.tuple(3)),
        ("t", "TUPLE", BOX, lambda r: r.push(tuple(r.pop_mark()))),
        ("]", "EMPTY_LIST", BOX, lambda r: r.push([])),
        ("a", "APPEND", BOX, lambda r: r.append([r.pop()])),
        ("e", "APPENDS", BOX, lambda r: r.append(r.pop_mark())),
        ("}", "EMPTY_DICT", BOX, lambda r: r.push({})),
        ("s", "SETITEM", 2 * BOX, lambda r: r.update(r.pair())),
        ("u", "SETITEMS", 2 * BOX, lambda r: r.update(r.pop_mark())),
        ("\x8f", "EMPTY_SET", 2 * BOX, lambda r: r.push(set())),
        ("\x90", "ADDITEMS", 2 * BOX, lambda r: r.add(r.pop_mark())),
        ("\x91", "FROZENSET", 2 * BOX, lambda r: r.push(frozenset(r.members(r.pop_mark())))),
        ("c", "GLOBAL", OBJECT, PickleReader.global_line),
        ("\x93", "STACK_GLOBAL", OBJECT, PickleReader.stack_global),
        ("R", "REDUCE", OBJECT, PickleReader.reduce),
        ("\x81", "NEWOBJ", OBJECT, lambda r: r.new(r.pop(), {})),
        ("\x92", "NEWOBJ_EX", OBJECT, PickleReader.new_ex),
        ("b", "BUILD", BOX, PickleReader.build),
        ("h", "BINGET", ATOM, lambda r: r.get(r.unpack("<B"))),
        ("j", "LONG_BINGET", ATOM, lambda r: r.get(r.unpack("<I"))),
        ("q", "BINPUT", BOX, lambda r: r.put(r.unpack("<B"))),
        ("r", "LONG_BINPUT", BOX, lambda r: r.put(r.unpack("<I"))),
        ("\x94", "MEMOIZE", BOX, lambda r: r.put(len(r.memo))),
        ("Q", "BINPERSID", OBJECT, PickleReader.persistent_id),
    ]
}


# What the names of builtins and numpy become: containers, bytes and arrays.


@dataclass(slots=True, eq=False)
class DType:
    """A plain numpy dtype."""

    kind: str
    order: str = "<"

    def build(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "|", "="):
            raise ValueError("the state of a dtype, without a byte order")
        self.order = order


@dataclass(slots=True, eq=False)
class Array:
    """A numpy array over the file's bytes; None until its state is read."""

    value: np.ndarray[Any, Any] | None = None

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("the state of an array that is no tuple of five")
        _, size, dtype, fortran, data = state
        self.value = frombuffer(data, dtype, size, "F" if fortran is True else "C")


def frombuffer(data: Any, dtype: Any, size: Any, order: str) -> np.ndarray[Any, Any]:
    """An array over the file's bytes, not copied."""
    view, kind = need(data, Blob, "the data of an array").view, need(dtype, DType, "the dtype of an array")
    number, size = np.dtype(kind.order + kind.kind), shape(size, "an array's size")
    if math.prod(size) * number.itemsize != len(view):
        raise ValueError(f"an array of size {size} in {len(view):,} bytes")
    return np.frombuffer(view, dtype=number).reshape(size, order="F" if order == "F" else "C")


def make_dtype(reader: PickleReader, kind: Any, *rest: Any) -> DType:
    if not isinstance(kind, str) or not re.fullmatch(r"[iuf][1248]|b1|bool", kind) or kind == "f1":
        raise ValueError("a dtype that is no plain number")
    return DType("b1" if kind == "bool" else kind)


def new_dict(reader: PickleReader, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Any, Any]:
    """An empty dict; pickling does not write one with arguments."""
    if args or kwargs:
        raise ValueError("a dict with arguments")
    return {}


def make_set(reader: PickleReader, items: Any = ()) -> set[Any]:
    return set(reader.members(need(items, (list, tuple), "the content of a set")))


def make_bytes(reader: PickleReader, content: Any = "", encoding: Any = "latin1") -> Blob:
    """`_codecs.encode(text, "latin1")` and `bytearray(...)`: how older protocols write bytes."""
    if isinstance(content, Blob):
        return content
    if encoding not in ("latin1", "latin-1"):
        raise ValueError("an encoding other than latin1")
    reader.budget.charge(2 * len(need(content, str, "a text to encode")), reader.at)
    return Blob(memoryview(bytearray(content, "latin1")), reader.at, decoded=True)


PLAIN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): lambda reader, *args: new_dict(reader, args, {}),
    ("numpy", "dtype"): make_dtype,
    ("numpy._core.multiarray", "_reconstruct"): lambda reader, *args: Array(),
    ("numpy._core.multiarray", "scalar"): lambda reader, dtype, data: frombuffer(data, dtype, (), "C").item(),
    ("numpy._core.numeric", "_frombuffer"): lambda reader, *args: Array(frombuffer(*args)),
    ("_codecs", "encode"): make_bytes,
    ("builtins", "bytes"): make_bytes,
    ("builtins", "bytearray"): make_bytes,
    ("builtins", "set"): make_set,
    ("builtins", "frozenset"): make_set,
}


def find_plain(module: str, name: str) -> Name:
    """The allow-list of a pickle of containers and numpy arrays. Nothing is imported, whatever the answer."""
    if module.startswith("numpy.core."):
        module = module.replace("numpy.core.", "numpy._core.", 1)
    elif module == "__builtin__":
        module = "builtins"
    if (module, name) in PLAIN:
        return Name(module, name, call=PLAIN[module, name], new=new_dict if name == "OrderedDict" else None)
    if (module, name) == ("numpy", "ndarray"):
        return Name(module, name)
    raise ValueError(f"it names {module[:60]}.{name[:60]}, which is not accepted; nothing was run")
