"""`GddlabError`, the base of all refusals, each of one line, and the check of arguments that raises it."""

from __future__ import annotations

import difflib
import functools
import inspect
import operator
import sys
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


LONGEST = 1000
"""Characters of a refusal that are shown: a value in it may be a list of a million numbers."""


class GddlabError(ValueError):
    """Bad input or a refused action: what was wrong, its value, what is accepted, what to do.

    Of a long message the beginning and the end are shown, on one line.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) <= LONGEST:
            return text
        return " ".join(f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}".split())


class NotFound(GddlabError, FileNotFoundError):
    """A path that does not exist."""


def unknown(kind: str, value: object, accepted: Iterable[str]) -> GddlabError:
    """The refusal of a name: `value` is not among `accepted`; near matches, whatever their case, come first."""
    names = list(dict.fromkeys(accepted))
    folded = {str(name).casefold(): name for name in names}
    given = str(value).casefold()
    same = [folded[given]] if given in folded else []
    near = same or [folded[n] for n in difflib.get_close_matches(given, folded, n=3, cutoff=0.5)]
    if near:
        hint = "did you mean " + " or ".join(repr(n) for n in near) + "?"
        if len(names) <= 12:
            hint += " Accepted: " + ", ".join(names)
    elif len(names) <= 20:
        hint = "accepted: " + ", ".join(names)
    else:
        hint = f"accepted: {', '.join(names[:8])} ... ({len(names)} in all)"
    return GddlabError(f"unknown {kind} {shown(value)}: {hint}")


def shown(value: object) -> str:
    """`value` as a refusal names it: its repr, the start of a long text, or the type of what is long otherwise."""
    text = repr(value)
    if isinstance(value, str):
        return text if len(text) <= 120 else f"{value[:60]!r}... ({len(value):,} characters)"
    return text if len(text) <= 80 and "\n" not in text else f"<{type(value).__qualname__}>"


def integer(name: str, value: Any) -> int:
    """`value` as an integer; `name` is for the message."""
    try:
        return operator.index(value)
    except TypeError:
        raise GddlabError(f"{name}={shown(value)}: give an integer") from None


def positive(name: str, value: Any, what: str = "") -> int:
    """`value` as an integer of at least 1; `name` and `what` are for the message."""
    if integer(name, value) < 1:
        raise GddlabError(f"{name}={value}{' ' + what if what else ''}: give at least 1")
    return int(value)


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
        try:
            return call_checked(*args, **kwargs)
        except pydantic.ValidationError as e:
            if e.title != function.__qualname__:  # another validation, inside the function
                raise
            error = max(e.errors(), key=lambda e: e["type"] == "unexpected_keyword_argument")  # it comes before a value
            if error["type"].startswith("missing"):
                raise TypeError(f"{called}() lacks the argument {error['loc'][0]!r}") from None
            names = list(inspect.signature(function).parameters)
            place = error["loc"][0]
            name = names[place] if isinstance(place, int) else str(place)
            if error["type"] == "unexpected_keyword_argument":
                raise unknown(f"argument of {called}", name, names) from None
            given = inspect.signature(function).bind_partial(*args, **kwargs).arguments.get(name, error["input"])
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
    accepted = list(_literals(annotation))
    if isinstance(value, str) and accepted:
        return unknown(name, value, [str(a) for a in accepted])
    return GddlabError(f"{name}={shown(value)}: {message[:1].lower()}{message[1:]}")


def _literals(annotation: Any) -> Iterator[Any]:
    """What the `Literal`s in an annotation accept."""
    if typing.get_origin(annotation) is typing.Literal:
        yield from typing.get_args(annotation)
    else:
        for part in typing.get_args(annotation):
            yield from _literals(part)
