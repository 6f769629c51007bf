"""Reads a pickle as data. It is a small interpreter of the opcodes that protocols 2 to 5 write, and of nothing else.

A pickle is a program; Python's reader imports and calls what it names. Here a name is looked up in the table that the caller gives (`find`), never
imported, and only what the table holds can be called. Reading is iterative, so nesting costs no stack; every opcode is charged to a budget of
memory, and a length is compared with the bytes that are there before anything is made of it. No opcode's work grows with a value that was made
before, since the memo lets a short pickle use a long value again and again.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["BUDGET", "Blob", "Budget", "Name", "Node", "Reader", "Record", "Refused", "key"]

BUDGET = 96 * 2**20
"""Bytes that the containers, numbers and texts of one file may take; a network of 300 M parameters needs a tenth of it."""
MAX_TEXT = 16 * 2**20
MAX_ARGS = 64


class Refused(Exception):
    """The pickle cannot be read: at which byte of the file, and why."""

    def __init__(self, offset: int, reason: str):
        reason = "".join(c if c.isprintable() else "?" for c in reason)  # names in a pickle may hold control characters
        super().__init__(f"byte {offset:,}: {reason}")


class Blob(NamedTuple):
    """Bytes inside the file, not copied, and where they start."""

    view: memoryview
    base: int


@dataclass(frozen=True, slots=True)
class Name:
    """A global that the pickle names; `call` and `new` say what a call of it and a new instance become, None that there is none."""

    module: str
    name: str
    call: Callable[..., Any] | None = None
    new: Callable[..., Any] | None = None

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:80]


class Node:
    """Something that takes the state of a BUILD opcode."""

    __slots__ = ()

    def build(self, state: Any) -> None:
        raise AssertionError("a node defines what its state does")


@dataclass(slots=True, eq=False)
class Record(Node):
    """An object that was never made: the name of its class, the arguments of its constructor, its attributes."""

    cls: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    def build(self, state: Any) -> None:
        """What `__setstate__` would have got: a dict, perhaps in a pair with the empty state of slots. It is not copied."""
        if isinstance(state, tuple) and len(state) == 2 and state[1] is None:
            state = state[0]
        if not isinstance(state, dict) or self.state:
            raise ValueError(f"a {type(state).__name__} as the state of an object")
        self.state = state


@dataclass(slots=True)
class Budget:
    """What is left of the memory that one file may ask for."""

    left: int = BUDGET

    def charge(self, cost: int, offset: int) -> None:
        self.left -= cost
        if self.left < 0:
            raise Refused(offset, f"it asks for more than {BUDGET >> 20} MiB of objects besides its arrays")


def key(value: Any) -> Any:
    """A key of a dict or member of a set: a text, a small number, None, or a short flat tuple of them, whose hashes are cheap and seldom equal."""
    parts = value if isinstance(value, tuple) and len(value) <= 8 else (value,)
    for part in parts:
        if not (part is None or isinstance(part, str) or (isinstance(part, int) and abs(part) < 2**31)):
            raise ValueError(f"a {type(part).__name__} as a key")
    return value


class Reader:
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
        self.view, self.base = blob
        self.find, self.persistent, self.budget = find, persistent, budget
        self.pos = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    @property
    def offset(self) -> int:
        """Where the reader stands in the file."""
        return self.base + self.pos

    def take(self, n: int) -> memoryview:
        """The next n bytes."""
        left = len(self.view) - self.pos
        if n > left:
            raise Refused(self.offset, f"it ends too early: {n:,} bytes are announced, {left:,} are there")
        self.pos += n
        return self.view[self.pos - n : self.pos]

    def unpack(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def read(self) -> Any:
        """The value of one pickle; the reader stands behind it afterwards."""
        self.stack, self.marks, self.memo = [], [], {}
        first = True
        while True:
            at = self.offset
            code = self.take(1)[0]
            if first and code != 0x80:
                raise Refused(at, f"no pickle of protocol 2 or newer starts with the byte {code:#04x}")
            first = False
            if code == 0x2E:  # STOP
                if len(self.stack) != 1 or self.marks:
                    raise Refused(at, f"it stops with {len(self.stack)} values on the stack")
                return self.stack.pop()
            op = OPS.get(code)
            if op is None:
                raise Refused(at, f"opcode {code:#04x} is not among those that protocols 2 to 5 write")
            self.budget.charge(op.cost, at)
            try:
                op.run(self)
            except Refused:
                raise
            except IndexError:
                raise Refused(at, f"{op.name}: the stack is empty") from None
            except MemoryError:
                raise Refused(at, f"{op.name}: out of memory") from None
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError, struct.error) as e:
                text = " ".join(str(e).split())
                raise Refused(at, f"{op.name}: {text[:200] if text else type(e).__name__}") from None

    # The stack.

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise IndexError
        return self.stack.pop()

    def peek(self, kind: type | tuple[type, ...]) -> Any:
        """The top of the stack, which must be of a kind."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise IndexError
        top = self.stack[-1]
        if not isinstance(top, kind):
            raise ValueError(f"a {type(top).__name__} cannot take it")
        return top

    def pop_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    # Atoms.

    def text(self, n: int) -> None:
        if n > MAX_TEXT:
            raise ValueError(f"a text of {n:,} bytes; a network holds none above {MAX_TEXT:,}")
        s = str(self.take(n), "utf-8", "surrogatepass")
        self.budget.charge(sys.getsizeof(s), self.offset)
        self.push(s)

    def bytes(self, n: int) -> None:
        at = self.offset
        self.push(Blob(self.take(n), at))

    def long(self, n: int) -> None:
        if not 0 <= n <= 256:
            raise ValueError(f"an integer of {n:,} bytes; a network holds none above 256")
        self.push(int.from_bytes(self.take(n), "little", signed=True))

    def proto(self) -> None:
        version = self.take(1)[0]
        if not 2 <= version <= 5:
            raise ValueError(f"protocol {version}; read are 2 to 5")

    # Containers.

    def tuple(self, n: int) -> None:
        items = [self.pop() for _ in range(n)]
        self.push(tuple(reversed(items)))

    def append(self, items: list[Any]) -> None:
        self.peek(list).extend(items)

    def update(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a key without a value")
        top = self.peek(dict)
        self.budget.charge(48 * len(items), self.offset)
        for k, v in zip(items[::2], items[1::2], strict=True):
            top[key(k)] = v

    def add(self, items: list[Any]) -> None:
        self.budget.charge(96 * len(items), self.offset)
        self.peek(set).update(map(key, items))

    def frozen(self, items: list[Any]) -> None:
        self.budget.charge(96 * len(items), self.offset)
        self.push(frozenset(map(key, items)))

    def pair(self) -> list[Any]:
        value, k = self.pop(), self.pop()
        return [k, value]

    # Memory.

    def put(self, index: int) -> None:
        self.memo[index] = self.peek(object)

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError(f"entry {index} was never stored")
        self.push(self.memo[index])

    # Names and calls, all through the table.

    def global_line(self) -> None:
        names = []
        for _ in range(2):
            line = bytes(self.view[self.pos : self.pos + 256])
            end = line.find(b"\n")
            if end < 0:
                raise ValueError("a name of more than 256 bytes")
            names.append(line[:end].decode("utf-8"))
            self.pos += end + 1
        self.push(self.find(*names))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError("a name that is no text")
        self.push(self.find(module, name))

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(function, Name) or function.call is None:
            what = str(function) if isinstance(function, Name) else f"a {type(function).__name__}"
            raise ValueError(f"a call of {what}, which gddlab does not make")
        if not isinstance(args, tuple) or len(args) > MAX_ARGS:
            raise ValueError("arguments that are no short tuple")
        self.push(function.call(self, *args))

    def new(self, args: Any, kwargs: Any) -> None:
        cls = self.pop()
        if not isinstance(cls, Name) or cls.new is None:
            what = str(cls) if isinstance(cls, Name) else f"a {type(cls).__name__}"
            raise ValueError(f"an object of {what}, which gddlab does not make")
        if not (isinstance(args, tuple) and isinstance(kwargs, dict) and len(args) + len(kwargs) <= MAX_ARGS):
            raise ValueError("arguments that are no short tuple and dict")
        if not all(isinstance(k, str) for k in kwargs):
            raise ValueError("the name of an argument that is no text")
        self.push(cls.new(self, *args, **kwargs))

    def new_ex(self) -> None:
        kwargs, args = self.pop(), self.pop()
        self.new(args, kwargs)

    def build(self) -> None:
        state = self.pop()
        top = self.peek(object)
        if isinstance(top, dict):  # attributes of a dict, such as a state dict's _metadata: nothing that we need
            if not isinstance(state, dict):
                raise ValueError(f"the state of a dict is a {type(state).__name__}")
            return
        if not isinstance(top, Node):
            raise ValueError(f"a {type(top).__name__} has no state")
        top.build(state)

    def persistent_id(self) -> None:
        pid = self.pop()
        if self.persistent is None:
            raise ValueError("a persistent id outside a torch file")
        self.push(self.persistent(pid))


class Op(NamedTuple):
    name: str
    cost: int
    run: Callable[[Reader], None]


SMALL, BOX, OBJECT = (
    48,
    128,
    640,
)  # bytes that a value, a small container and an object of ours take at most, with their place on the stack

OPS: dict[int, Op] = {
    ord(code): Op(name, cost, run)
    for code, name, cost, run in [
        ("\x80", "PROTO", 1, lambda r: r.proto()),
        (
            "\x95",
            "FRAME",
            1,
            lambda r: r.unpack("<Q"),
        ),  # framing is a hint for buffering; lengths are checked where they are used
        ("(", "MARK", SMALL, lambda r: r.marks.append(len(r.stack))),
        ("0", "POP", 1, lambda r: r.pop()),
        ("1", "POP_MARK", 1, lambda r: r.pop_mark()),
        ("N", "NONE", 16, lambda r: r.push(None)),
        ("\x88", "NEWTRUE", 16, lambda r: r.push(True)),
        ("\x89", "NEWFALSE", 16, lambda r: r.push(False)),
        ("J", "BININT", SMALL, lambda r: r.push(r.unpack("<i"))),
        ("K", "BININT1", 16, lambda r: r.push(r.unpack("<B"))),
        ("M", "BININT2", SMALL, lambda r: r.push(r.unpack("<H"))),
        ("\x8a", "LONG1", 320, lambda r: r.long(r.unpack("<B"))),
        ("\x8b", "LONG4", 320, lambda r: r.long(r.unpack("<i"))),
        ("G", "BINFLOAT", SMALL, lambda r: r.push(r.unpack(">d"))),
        ("\x8c", "SHORT_BINUNICODE", 16, lambda r: r.text(r.unpack("<B"))),
        ("X", "BINUNICODE", 16, lambda r: r.text(r.unpack("<I"))),
        ("\x8d", "BINUNICODE8", 16, lambda r: r.text(r.unpack("<Q"))),
        ("C", "SHORT_BINBYTES", 400, lambda r: r.bytes(r.unpack("<B"))),
        ("B", "BINBYTES", 400, lambda r: r.bytes(r.unpack("<I"))),
        ("\x8e", "BINBYTES8", 400, lambda r: r.bytes(r.unpack("<Q"))),
        ("\x96", "BYTEARRAY8", 400, lambda r: r.bytes(r.unpack("<Q"))),
        (")", "EMPTY_TUPLE", 16, lambda r: r.push(())),
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
        ("\x90", "ADDITEMS", BOX, lambda r: r.add(r.pop_mark())),
        ("\x91", "FROZENSET", 2 * BOX, lambda r: r.frozen(r.pop_mark())),
        ("c", "GLOBAL", OBJECT, lambda r: r.global_line()),
        ("\x93", "STACK_GLOBAL", OBJECT, lambda r: r.stack_global()),
        ("R", "REDUCE", OBJECT, lambda r: r.reduce()),
        ("\x81", "NEWOBJ", OBJECT, lambda r: r.new(r.pop(), {})),
        ("\x92", "NEWOBJ_EX", OBJECT, lambda r: r.new_ex()),
        ("b", "BUILD", BOX, lambda r: r.build()),
        ("h", "BINGET", 16, lambda r: r.get(r.unpack("<B"))),
        ("j", "LONG_BINGET", 16, lambda r: r.get(r.unpack("<I"))),
        ("q", "BINPUT", BOX, lambda r: r.put(r.unpack("<B"))),
        ("r", "LONG_BINPUT", BOX, lambda r: r.put(r.unpack("<I"))),
        ("\x94", "MEMOIZE", BOX, lambda r: r.put(len(r.memo))),
        ("Q", "BINPERSID", BOX, lambda r: r.persistent_id()),
    ]
}
