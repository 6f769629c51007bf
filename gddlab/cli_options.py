"""Options of the command line, from the signature and the docstring of a function."""

from __future__ import annotations

import builtins
import collections.abc
import contextlib
import dataclasses
import inspect
import io
import itertools
import pkgutil
import re
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import docstring_parser
import tyro
from tyro.conf import DisallowNone, FlagCreatePairsOff, OmitArgPrefixes

from gddlab.errors import GddlabError, members, unknown
from gddlab.files import path_of


@dataclasses.dataclass(frozen=True)
class Command:
    """A command and where its options come from."""

    run: Callable[..., None]
    sources: tuple[str, ...]
    """Library functions, "module:name". The first gives the options; the others only help that it does not give."""
    omit: tuple[str, ...]
    """Keyword arguments of the library function that the command line does not offer."""
    parts: Mapping[str, Callable[[list[str]], Any]]
    """Parameters whose fields are options: what makes the default, given the words of the line."""

    @property
    def summary(self) -> str:
        """What the command does, in one or two sentences."""
        return docstring_parser.parse(inspect.getdoc(self.run) or "").short_description or ""

    @property
    def description(self) -> str:
        """What the command does, without its options."""
        return docstring_parser.parse(inspect.getdoc(self.run) or "").description or ""

    def parse(self, prog: str, words: list[str]) -> dict[str, Any]:
        """Options by name.

        Raises:
            GddlabError: The line names an option that does not exist, or gives one a value that it does not take.
            SystemExit: After --help.
        """
        options = _options_of(self, words)
        flags: dict[str, Any] = {}
        for name, kind in _named(options, self.parts):  # kinds of a part may have options of one name
            flags[_flag(name)] = kind | flags.get(_flag(name), kind)
        several = {flag for flag, kind in flags.items() if "tuple[" in str(kind)}
        _check_words(prog, words, flags)
        required = [f.name.upper() for f in dataclasses.fields(options) if f.default is dataclasses.MISSING]
        with in_one_line(prog, *required):
            config = (tyro.conf.PositionalMetavarFromFieldName,)
            args = _without_commas(words, several)
            parsed: Any = tyro.cli(options, prog=prog, description=self.description, args=args, config=config)
        # a shell does not expand the ~ of --out=~/x
        return {k: path_of(k, v) if isinstance(v, Path) else v for k, v in vars(parsed).items()}

    def in_shell_words(self, message: str) -> str:
        """A message of the library, with what it says of this command's options as a shell gives them.

        "give overwrite=True" becomes "give --overwrite", and "lr_g=-1.0: ..." "--lr-g -1.0: ...".
        """
        if "\n" in message:  # a traceback
            return message
        names = [name for name, _ in _named(_options_of(self, []), self.parts)]
        flags = {name.rpartition(".")[2]: _flag(name) for name in names} | {name: _flag(name) for name in names}
        if "label" in names:
            flags["class_labels"] = "--label"

        def option(found: re.Match[str]) -> str:
            flag, value = flags[found[1]], found[2] or ""
            if value in ("True", "False"):
                return flag if value == "True" else re.sub(r"([\w-]+)$", r"no-\1", flag)
            words = [word.strip().strip("'\"") for word in value.strip("()[]").split(",")]
            return " ".join([flag, *filter(None, words)])

        value = r"""('[^']*'|"[^"]*"|\([^()]*\)|\[[^][]*\]|[^\s,;:()]+)"""
        message = re.sub(r"\bselect_freeze\(\w+, ([^()]+)\)", r"\1", message)  # a call by its options
        return re.sub(rf"(?<![\w.])({'|'.join(map(re.escape, flags))})={value}?", option, message)


def _flat(kind: Any, parts: Collection[str] = (), prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Options by their dotted names, with their types; `parts` are fields whose fields are options without a prefix."""
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if typing.get_origin(hint) is typing.ClassVar:
            continue
        yield prefix + name, hint
        for member in members(hint):
            if name in parts or hasattr(member, "model_fields"):
                yield from _flat(member, prefix="" if name in parts else f"{prefix}{name}.")


def _named(options: type, parts: Collection[str]) -> Iterator[tuple[str, Any]]:
    """What `_flat` gives, without what a line gives by its place."""
    for name, kind in _flat(options, parts):
        if tyro.conf.Positional not in typing.get_args(kind):
            yield name, kind


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _without_commas(words: list[str], several: set[str]) -> list[str]:
    """The values of options that take several, "80,1" or "80, 1" as "80 1".

    Raises:
        GddlabError: One has no value, which would mean its default or nothing at all.
    """
    out, inside = [], False
    for word, following in itertools.pairwise([*words, "--"]):
        if word in several and following.startswith("--"):
            raise GddlabError(f"{word} without a value: give at least one, or omit it")
        flag, given, value = word.partition("=")
        if word.startswith("--"):
            inside = flag in several
            out += [flag, *_between_commas(value)] if inside and given else [word]
        else:
            out += _between_commas(word) if inside else [word]
    return out


def _between_commas(word: str) -> list[str]:
    if word.startswith("re:"):  # a regular expression of layers
        return [word]
    return [part.strip() for part in word.split(",") if part.strip()] or [word]


@contextlib.contextmanager
def in_one_line(prog: str, *required: str) -> Iterator[None]:
    """Raises what tyro refuses in a box as GddlabError; a refusal by a configuration as it is.

    `required` are the arguments that a line must have.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as e:
        cause: BaseException | None = e
        while cause is not None:
            if isinstance(cause, GddlabError):
                raise cause from None
            cause = cause.__context__
        if e.code:
            said = _unboxed(printed.getvalue())
            if said.startswith("missing from"):  # with the whole help of each
                said = f"arguments are missing: give {prog} {' '.join(required)}"
            raise GddlabError(f"{said}; see {prog} --help") from None
        raise


def _unboxed(box: str) -> str:
    """The first part of a box, with the form of the option, or the first option or all commands that it proposes."""
    inside = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    parts = [" ".join(part.split()) for part in re.split(r"\n[─-]+\n", "\n".join(inside))]
    if "│" not in box:  # where the output is not UTF-8, the first part is the title
        del parts[0]
    said = parts[0].partition(" Got errors:")[0].removesuffix(".")
    for part in parts[1:]:
        if part.startswith("Argument helptext") and "parsing" in said:
            said += "; the form is " + next(line for line in inside if re.match(r"--\w", line))
        if part.startswith("Available"):
            said += f": {part[:1].lower()}{part[1:]}"
        elif part.startswith("Perhaps") and (option := re.search(r"--[\w.-]+", part)):
            said += f": did you mean {option[0]}"
    said = re.sub(r"\{?\[(\w+) \[\w+ \.\.\.\]\]\}?", r"\1 ...", said.replace("{None}|", ""))
    return f"{said[:1].lower()}{said[1:]}"


def _check_words(prog: str, words: list[str], flags: Mapping[str, Any]) -> None:
    """Refuses an option that does not exist, and a value that is not among its choices; the rest is tyro's."""
    choices: list[str] = []
    flag = ""
    for word in words:
        if re.match("--[a-zA-Z]", word):
            name, given, word = word.partition("=")
            flag = name.replace("_", "-")
            plain = re.sub(r"(?<=[-.])no-", "", flag, count=1)
            if not {flag, plain} & {*flags, "--help"} and not flag.endswith(".kind"):
                options = [f for f in flags if not any(other.startswith(f"{f}.") for other in flags)]
                raise GddlabError(f"{unknown('option', flag, [*options, '--help'])} (see {prog} --help)")
            choices = [] if flag.endswith(".kind") else _choices(flags.get(flag))  # its part says which there are
            if not given:
                continue
        for part in _between_commas(word) if choices else ():
            if part not in choices:
                raise unknown(flag, part, choices)
        if "tuple[" not in str(flags.get(flag)):
            choices = []


def _choices(kind: Any) -> list[str]:
    """The names that an option takes; none where it takes anything else too."""
    found: list[str] = []
    for member in members(kind):
        item = typing.get_args(member)[0] if typing.get_origin(member) is tuple else member
        if typing.get_origin(item) is Literal:
            found += map(str, typing.get_args(item))
        elif item is not type(None):
            return []
    return found


def _options_of(command: Command, words: list[str]) -> type:
    """A dataclass for tyro: the parameters of a command, with those of the library function in place of `**options`."""
    functions = [pkgutil.resolve_name(source) for source in command.sources]
    own = inspect.signature(command.run).parameters
    kinds = typing.get_type_hints(command.run, include_extras=True)
    taken = _parameters(functions[0], {*own, *command.omit}) if functions else {}
    helps, names = _argument_helps([command.run, *functions]), {*own, *taken}
    fields: list[Any] = []
    for name, p in own.items():
        if p.kind is p.VAR_KEYWORD:
            fields += [_option(n, kind, d, helps, names, passed=False) for n, (kind, d) in taken.items()]
        elif name not in command.parts:
            fields.append(_option(name, kinds[name], p.default, helps, names))
    for name, make in command.parts.items():
        part = make(words)
        flat = (
            OmitArgPrefixes if dataclasses.is_dataclass(part) else tyro.conf.arg(name="")
        )  # keeps parts of parts apart
        fields.append((name, Annotated[type(part), flat], dataclasses.field(default=part)))
    return dataclasses.make_dataclass("Options", fields, kw_only=True)


def _option(
    name: str, kind: Any, default: Any, helps: Mapping[str, str], names: set[str], passed: bool = True
) -> tuple[str, Any, Any]:
    """A field with its help. With `passed` False its default is only shown, and its value is None if not given."""
    text = re.sub(r"In Python\b.*?\.( |$)", "", " ".join(helps.get(name, "").split())).strip()
    text = re.sub(r"`(\w+)`", lambda m: "--" + m[1].replace("_", "-") if m[1] in names else m[0], text)
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    hint = None if passed else f"(default: {shown})"
    if default is False or default == () or (default is None and "None" not in text):
        hint = ""
    metavar = f"{_metavar(typing.get_args(kind)[0])} ..." if typing.get_origin(kind) is tuple else None
    if default is inspect.Parameter.empty:
        hint = "(required)"
    if kind is bool:
        kind = Annotated[bool, FlagCreatePairsOff]
    elif default is None or not passed:
        kind, default = Annotated[kind if passed else kind | None, DisallowNone], None
    kind = Annotated[kind, tyro.conf.arg(help=text, help_behavior_hint=hint, metavar=metavar)]
    required = default is inspect.Parameter.empty
    return name, kind, dataclasses.field() if required else dataclasses.field(default=default)


def _metavar(kind: Any) -> str:
    choices = typing.get_args(kind)
    return "{" + ",".join(map(str, choices)) + "}" if choices else kind.__name__.upper()


def _parameters(source: Callable[..., Any], omit: set[str]) -> dict[str, tuple[Any, Any]]:
    """Type and default of the keyword arguments that a shell can give, by name."""
    scope = _Scope(vars(builtins) | vars(sys.modules[source.__module__]))
    out = {}
    for name, p in inspect.signature(source).parameters.items():
        annotation = eval(p.annotation, {}, scope) if isinstance(p.annotation, str) else p.annotation
        kind = _shell_type(annotation, p.default)
        if kind is not None and p.default is not p.empty and name not in omit:
            out[name] = kind, p.default
    return out


class _Scope(dict[str, Any]):
    """Names of a module; those that it imports for type checking alone are Any."""

    def __missing__(self, name: str) -> Any:
        return Any


def _shell_type(annotation: Any, default: Any) -> Any:
    """What a shell can give of a union: several values or, where the default is a single number, one; or None."""
    single: list[Any] = []
    several: list[Any] = []
    for member in members(annotation):
        origin, arguments = typing.get_origin(member), typing.get_args(member)
        if member in (str, int, float, bool, Path) or origin is Literal:
            single.append(member)
        elif origin in (tuple, list, collections.abc.Sequence, collections.abc.Iterable):
            item: Any = _shell_type(arguments[0], 0)
            several += [] if item is None else [tuple[item, ...]]
    first = default is None or isinstance(default, tuple) or (str in single and tuple[str, ...] in several)
    found = several + single if first else single + several
    return found[0] if found else None


def _argument_helps(functions: list[Callable[..., Any]]) -> dict[str, str]:
    """What `Args:` sections say, by name; an entry that points to another function ("As for `probe`.") comes last."""
    helps: dict[str, str] = {}
    pointers: dict[str, str] = {}
    for function in functions:
        for p in docstring_parser.parse(inspect.getdoc(function) or "").params:
            text = p.description or ""
            for name in p.arg_name.split(", "):
                (pointers if re.match("As (for|in) ", text) else helps).setdefault(name, text)
    return pointers | helps
