"""Pickles of dicts, lists, numbers, strings and uint8 arrays, parsed without an unpickler: nothing is imported or called."""

from __future__ import annotations

import pickletools
from typing import Any

import numpy as np

__all__ = ["Array", "parse"]

_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): "array",
    ("numpy._core.multiarray", "_reconstruct"): "array",
    ("numpy", "ndarray"): "type",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(
    {
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "UNICODE",
    }
    | {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
)
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_MARK = object()


class _Global(str):
    """A name the pickle mentions; it stays a name."""


class _DType:
    def __init__(self, kind: Any):
        self.kind = kind


class Array:
    """An array of a pickle: its pickled state, of which nothing is believed."""

    state: Any = None

    def matrix(self, columns: int) -> np.ndarray:
        """The array as uint8 (n, columns).

        Raises:
            ValueError: It is anything else.
        """
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise ValueError("an array has no state")
        _, shape, dtype, fortran, raw = self.state
        raw = raw.encode("latin-1") if isinstance(raw, str) else raw
        if not isinstance(dtype, _DType) or dtype.kind not in ("u1", "|u1", b"u1", b"|u1"):
            raise ValueError("an array holds other numbers than uint8")
        if not isinstance(shape, tuple) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"an array has another shape than (n, {columns})")
        if shape[1] != columns or not isinstance(raw, bytes) or len(raw) != shape[0] * shape[1]:
            raise ValueError(f"an array has another shape or length than (n, {columns}) uint8")
        return np.frombuffer(raw, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")


def parse(content: bytes) -> dict[Any, Any]:
    """The dict that a pickle describes, protocols 0 to 5; text of Python 2 comes as str, decoded as latin-1.

    Raises:
        ValueError, IndexError, KeyError, TypeError, OverflowError: The pickle is damaged or wants anything else.
    """
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for opcode, arg, position in pickletools.genops(content):
        name = opcode.name
        if name in _LITERALS:
            stack.append(arg)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name in ("APPEND", "APPENDS"):
            items = _marked(stack) if name == "APPENDS" else [stack.pop()]
            _of(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = _marked(stack) if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _of(stack[-1], dict).update(_dict(items))
        elif name in ("TUPLE", "LIST", "DICT"):
            items = _marked(stack)
            stack.append(tuple(items) if name == "TUPLE" else items if name == "LIST" else _dict(items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(name[-1])
            stack[-n:] = [tuple(stack[-n:])]
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            names = str(arg).split(" ", 1) if name == "GLOBAL" else [stack.pop(-2), stack.pop()]
            module, attribute = (_of(n, str) for n in names)
            if (module, attribute) not in _GLOBALS:
                raise ValueError(f"it names {f'{module}.{attribute}'[:60]!r} at byte {position}")
            stack.append(_Global(_GLOBALS[module, attribute]))
        elif name == "REDUCE":
            args = _of(stack.pop(), tuple)
            stack.append(_reduce(stack.pop(), args))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Array):
                stack[-1].state = state
            else:
                _of(stack[-1], _DType)  # byte order and alignment mean nothing for u1
        elif name == "STOP":
            return _of(stack.pop(), dict)
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it has opcode {name} at byte {position}")
    raise ValueError("it has no end")


def _marked(stack: list[Any]) -> list[Any]:
    """Takes everything above the last mark, and the mark."""
    at = len(stack) - 1
    while stack[at] is not _MARK:
        at -= 1
        if at < 0:
            raise ValueError("it has no mark")
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _dict(items: list[Any]) -> dict[Any, Any]:
    keys = items[::2]
    if not all(type(k) in (str, bytes, int) for k in keys):  # hashing a deeply nested tuple would end the process
        raise TypeError("a key of a dict is neither text nor a number")
    return dict(zip(keys, items[1::2], strict=True))


def _of(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} stands where {kind.__name__} should")
    return value


def _reduce(function: Any, args: tuple[Any, ...]) -> Any:
    called = _of(function, _Global)
    if called == "array":
        return Array()
    if called == "dtype":
        return _DType(args[0])
    if called == "encode" and len(args) == 2 and args[1] in ("latin1", "latin-1"):
        return _of(args[0], str).encode("latin-1")
    raise ValueError(f"it calls {called} with {len(args)} arguments")
