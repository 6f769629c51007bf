"""Writes what the guide takes from the code: `python notebooks/assets/from_code.py`.

guide/options.md has every field of a configuration: names, types, bounds and defaults as pydantic knows them, and what
each field means from the docstring below it. Models among a field's types get a section of their own.
guide/contributing.md has the packages in their order, from pyproject.toml and their docstrings.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "notebooks" / "guide"
BEGIN, END = "<!-- made by notebooks/assets/from_code.py -->", "<!-- end -->"
WORDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
NAMES = {str: "text", Path: "path", bool: "true or false", int: "integer", float: "number", types.NoneType: "`None`"}


def pages() -> dict[Path, str]:
    """The pages that take something from the code, with that part made anew."""
    from gddlab import TrainConfig

    made = {"options.md": options(TrainConfig), "contributing.md": packages()}
    return {GUIDE / name: filled((GUIDE / name).read_text(), part) for name, part in made.items()}


def filled(page: str, part: str) -> str:
    """The page with what stands between the two marks replaced."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no region from {BEGIN} to {END}")
    return f"{head}{BEGIN}\n\n{part}\n\n{END}{tail}"


def packages() -> str:
    """The packages and modules of gddlab, lowest first, one line each."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["name"] == "stages")
    return "\n".join(package(name.strip()) for layer in reversed(layers) for name in layer.split(":"))


def package(name: str) -> str:
    """One package or module as an item of a list: its name and the first line of its docstring."""
    folder = ROOT / "gddlab" / name
    source = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    about = (ast.get_docstring(ast.parse(source.read_text())) or "").partition("\n\n")[0]
    return item(f"`{name}{'/' if folder.is_dir() else ''}`: {about}")


def item(text: str) -> str:
    """An item of a list, in lines of at most 120 columns."""
    text = " ".join(text.split())
    return textwrap.fill(f"- {text}", 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def options(model: type[BaseModel]) -> str:
    """A section for the model and for each model that its fields may hold, as Markdown."""
    return "\n\n".join(section(m) for m in models(model))


def models(model: type[BaseModel]) -> list[type[BaseModel]]:
    """The model, then those that its fields may hold, each once, in the order of the fields."""
    found = [model]
    for field in model.model_fields.values():
        for part in parts(field.annotation):
            if inspect.isclass(part) and issubclass(part, BaseModel):
                found += [m for m in models(part) if m not in found]
    return found


def parts(annotation: Any) -> Iterator[Any]:
    """The types of a union, or the one type."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from parts(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from parts(part)
    else:
        yield annotation


def section(model: type[BaseModel]) -> str:
    """Heading, first paragraph of the docstring, and one item per field."""
    meanings = docstrings(model)
    first = (inspect.getdoc(model) or "").partition("\n\n")[0].replace("\n", " ")
    kinds = [get_args(f.annotation)[0] for f in model.model_fields.values() if fixed(f)]
    first += "".join(f' In a dict its kind is `"{k}"`.' for k in kinds)
    lines = [f"### {model.__name__}", textwrap.fill(first, 120, break_long_words=False, break_on_hyphens=False)]
    entries = [entry(n, f, meanings.get(n, "")) for n, f in model.model_fields.items() if not fixed(f)]
    return "\n\n".join([*lines, "\n".join(entries)]).rstrip()


def fixed(field: FieldInfo) -> bool:
    """Whether a field has one possible value, as the name of a kind has."""
    return get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1


def entry(name: str, field: FieldInfo, meaning: str) -> str:
    """One field as an item of a list."""
    kinds = [kind(part) for part in parts(field.annotation)]
    bounds = [f"{WORDS[k]} {v:.12g}" for m in field.metadata for k, v in limits(m) if k in WORDS]
    return item(f"`{name}`: {', '.join([' or '.join(kinds), *bounds])}; {default(field)}. {meaning}")


def limits(metadata: Any) -> list[tuple[str, float]]:
    """Bounds among a field's metadata: names and values."""
    return [(k, getattr(metadata, k)) for k in WORDS if isinstance(getattr(metadata, k, None), int | float)]


def kind(annotation: Any) -> str:
    """A type in words."""
    annotation = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(inner[0])
    if origin is Literal:
        return " or ".join(f"`{v!r}`".replace("'", '"') for v in inner)
    if origin in (tuple, list):
        return " or ".join(f"list of {kind(p)}" for x in inner if x is not Ellipsis for p in parts(x))
    if origin is dict:
        return f"table from {kind(inner[0])} to {' or '.join(kind(p) for p in parts(inner[1]))}"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return NAMES.get(annotation, f"`{getattr(annotation, '__name__', annotation)}`")


def default(field: FieldInfo) -> str:
    """The default in words."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    shown = f"{type(value).__name__}()" if isinstance(value, BaseModel) else repr(value)
    return "default " + f"`{shown}`".replace("'", '"')


def docstrings(model: type[BaseModel]) -> dict[str, str]:
    """What stands below each field in the source of the model and of those that it extends."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not (issubclass(cls, BaseModel) and cls is not BaseModel):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                found[field.target.id] = ast.literal_eval(text.value)
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
