"""`GddlabError`, the base of all refusals, each of one line, and the check of arguments that raises it."""

from __future__ import annotations

import collections.abc
import difflib
import functools
import inspect
import math
import operator
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

LONGEST = 600
"""Characters of a message."""

F = TypeVar("F", bound=Callable[..., Any])


class GddlabError(ValueError):
    """Bad input or a refused action: what was wrong, its value, what is accepted, what to do.

    A message of more than three lines becomes one, which keeps its ends where it would be longer than `LONGEST`.
    """

    whole: ClassVar[bool] = False
    """Whether messages may be as long as they are: those that hold a traceback."""

    def __init__(self, message: object = ""):
        text = str(message)
        if text.count("\n") > 2 and not self.whole:  # the repr of a network
            text = " ".join(text.split())
        if len(text) > LONGEST and "\n" not in text:
            text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
        super().__init__(text)


class NotFound(GddlabError, FileNotFoundError):
    """A path that does not exist."""


class Unwritable(GddlabError, OSError):
    """A path that the system does not let be written."""


def shown(value: object) -> str:
    """A value for a message: the start of a long text, the type of what is long otherwise."""
    text = repr(value)
    if isinstance(value, str):
        return text if len(text) <= 120 else f"{value[:60]!r}... ({len(value):,} characters)"
    return text if len(text) <= 80 and "\n" not in text else f"<{type(value).__qualname__}>"


def unknown(kind: str, value: object, accepted: Iterable[str]) -> GddlabError:
    """The refusal of a name: `value` is not among `accepted`; near matches, whatever their case, come first."""
    names = list(dict.fromkeys(accepted))
    folded = {str(name).lstrip("-").casefold(): name for name in names}
    given = str(value).lstrip("-").casefold()
    same = [folded[given]] if given in folded else []
    # fp16 is like float16, list not like stop
    near = same or [folded[n] for n in difflib.get_close_matches(given, folded, n=3, cutoff=0.54)]
    if near:
        hint = "did you mean " + " or ".join(repr(n) for n in near) + "?"
        if len(names) <= 12:
            hint += " Accepted: " + ", ".join(names)
    elif len(listed := ", ".join(names)) <= LONGEST // 2:
        hint = f"accepted: {listed}"
    else:
        hint = f"accepted: {', '.join(names[:8])} ... ({len(names)} in all)"
    return GddlabError(f"unknown {kind} {shown(value)}: {hint}")


def integer(name: str, value: Any) -> int:
    """`value` as an integer, no truth value; `name` is for the message."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise GddlabError(f"{name}={shown(value)}: give an integer")


def numbers_in(values: Any) -> list[Any]:
    """The members of a sequence of numbers.

    Raises:
        TypeError: No sequence; or text or bytes, which Python takes for one; or text or a truth value is in it.
    """
    text = isinstance(values, str | bytes | bytearray | memoryview)
    listed = [] if text else list(values)
    if text or any(isinstance(x, str | bytes | bool) for x in listed):
        raise TypeError
    return listed


def check_takes(name: str, function: Callable[..., Any], *arguments: str) -> None:
    """Refuses a function that cannot be called with these arguments; `name` is for the message."""
    try:
        inspect.signature(getattr(function, "forward", function)).bind(*arguments)  # a network's own takes anything
    except TypeError:
        given = getattr(function, "__name__", type(function).__name__)
        raise GddlabError(f"{name}={given}: give a function of {', '.join(arguments)}") from None
    except ValueError:  # one that is built in, without a signature
        pass


def check_no_bool(values: Mapping[str, object], annotations: Mapping[str, Any]) -> None:
    """Refuses a truth value where an annotation accepts numbers, which Python would take for 0 or 1."""
    for name, value in values.items():
        kinds = set(members(annotations[name])) if isinstance(value, bool) and name in annotations else set()
        if kinds & {int, float} and bool not in kinds:
            raise GddlabError(f"{name}={value}: give a number")


def positive(name: str, value: Any, what: str = "") -> int:
    """`value` as an integer of at least 1; `name` and `what` are for the message."""
    if integer(name, value) < 1:
        raise GddlabError(f"{name}={value}{' ' + what if what else ''}: give at least 1")
    return int(value)


def seconds(name: str, value: Any) -> float:
    """`value` as a time to wait, above 0 and finite; `name` is for the message."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return value
    raise GddlabError(f"{name}={shown(value)}: give seconds, more than 0")


def validated(function: F) -> F:
    """Checks the arguments of a call, or of making an object, against the annotations; a refusal is one line.

    Annotations are read at the first call, so they must be importable at run time, not under TYPE_CHECKING alone. A
    misspelt name of a `Literal` gets near matches, as does an argument that does not exist.

    Raises:
        GddlabError: An argument does not fit its annotation.
        TypeError: An argument is missing, as for any function.
    """
    if isinstance(function, type):
        type.__setattr__(function, "__init__", validated(vars(function)["__init__"]))
        return function
    called = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]

    @functools.cache
    def checked() -> tuple[Callable[..., Any], dict[str, Any]]:
        import pydantic

        config = pydantic.ConfigDict(arbitrary_types_allowed=True)
        wrap: Any = pydantic.validate_call(config=config)
        return wrap(function), typing.get_type_hints(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        import pydantic

        call_checked, hints = checked()
        if any(isinstance(value, bool) for value in (*args, *kwargs.values())):
            names = list(inspect.signature(function).parameters)
            check_no_bool(dict(zip(names, args, strict=False)) | kwargs, hints)
        try:
            return call_checked(*args, **kwargs)
        except pydantic.ValidationError as e:
            if e.title != function.__qualname__:  # another validation, inside the function
                raise
            error = max(e.errors(), key=lambda e: e["type"] == "unexpected_keyword_argument")  # it comes before a value
            if error["type"].startswith("missing_"):
                raise TypeError(f"{called}() lacks the argument {error['loc'][0]!r}") from None
            names = list(inspect.signature(function).parameters)
            place = error["loc"][0]
            name = names[place] if isinstance(place, int) else str(place)
            if error["type"] == "unexpected_keyword_argument":
                raise unknown(f"argument of {called}", name, names) from None
            given = inspect.signature(function).bind_partial(*args, **kwargs).arguments.get(name, error["input"])
            for kind in members(hints.get(name)) if isinstance(given, dict) else ():
                if hasattr(kind, "model_fields"):  # a configuration, which says itself what does not fit
                    kind(**given)
            raise refusal_of(name, given, error["msg"], hints.get(name)) from None

    return call  # type: ignore[return-value]


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the user's line, the nearest that is not gddlab's."""
    frame, level = sys._getframe(), 1
    inside = ("gddlab", "pydantic", "jaxtyping", "contextlib")  # all but the first wrap our functions
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in inside:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)


def refusal_of(name: str, value: object, message: str, annotation: Any = None) -> GddlabError:
    """The refusal of one argument or field, from pydantic's message and the annotation."""
    inside = name.rpartition(".")[2].isdigit()  # an item of the sequence
    if not inside and any(_is_one_of(value, member) for member in members(annotation)):
        return GddlabError(f"{name}={shown(value)}: give a sequence, such as ({value!r},)")
    accepted = list(_literals(annotation))
    if isinstance(value, str) and accepted:
        return unknown(name, value, [str(a) for a in accepted])
    return GddlabError(f"{name}={shown(value)}: {message[:1].lower()}{message[1:]}")


def _is_one_of(value: object, annotation: Any) -> bool:
    """Whether a value is what a sequence, as annotated, holds."""
    if typing.get_origin(annotation) not in (tuple, list, collections.abc.Sequence):
        return False
    kinds = set(members(typing.get_args(annotation)[0]))
    return type(value) in kinds or (isinstance(value, int) and float in kinds) or value in _literals(annotation)


def members(annotation: Any) -> Iterator[Any]:
    """The members of a union of unions, without what `Annotated` adds."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, Annotated):
        for member in typing.get_args(annotation)[: 1 if origin is Annotated else None]:
            yield from members(member)
    else:
        yield annotation


def _literals(annotation: Any) -> Iterator[Any]:
    """What the `Literal`s in an annotation accept."""
    if typing.get_origin(annotation) is typing.Literal:
        yield from typing.get_args(annotation)
    else:
        for part in typing.get_args(annotation):
            yield from _literals(part)
