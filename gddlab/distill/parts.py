"""Base classes of a configuration's parts: refusals in one line, and what a run asks of every discriminator."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from torch import Tensor, nn

from gddlab.errors import GddlabError, check_no_bool, refusal_of, shown, unknown
from gddlab.files import located
from gddlab.nets import Precond

FileName = Annotated[str, BeforeValidator(lambda value: located(value, ("auto", "random")))]
"""A file, by an absolute path; of weights also "auto" or "random"."""
PLAIN = (str, int, float, bool, type(None), Path, list, tuple, dict)


class Settings(BaseModel):
    """A frozen set of fields, checked when it is made; what does not fit is refused in one line."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    noun: ClassVar[str] = ""
    """What a field is called in a refusal; "field of NAME" by default."""

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as e:
            raise _refusal(type(self), e) from None

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """As pydantic's, with refusals in one line."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as e:
            raise _refusal(cls, e) from None

    @model_validator(mode="before")
    @classmethod
    def _no_bool(cls, values: Any) -> Any:
        if isinstance(values, dict):
            check_no_bool(values, {name: field.annotation for name, field in cls.model_fields.items()})
        return values

    def __setattr__(self, name: str, value: Any) -> None:
        raise GddlabError(f"{type(self).__name__} is frozen: make another with model_copy(update={{{name!r}: ...}})")

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other values in place of some; they are checked as all are. Values are frozen: `deep` is moot."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**(values | dict(update or {})))

    # Without this mark, pydantic would call __init__ for a part given as a dict, and lose its place in the whole.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def parts_of(annotation: Any) -> dict[str, type[Settings]]:
    """The parts that a field accepts, by kind; a part that comes in one kind only has the kind ""."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        kind = annotation.model_fields.get("kind")
        return {"" if kind is None else kind.default: annotation}
    return {k: v for a in typing.get_args(annotation) for k, v in parts_of(a).items()}


def _refusal(owner: type[Settings], error: ValidationError) -> GddlabError:
    """The first thing that pydantic found wrong, in one line with the whole path of the field."""
    first = error.errors()[0]
    refusal = first.get("ctx", {}).get("error")
    if isinstance(refusal, GddlabError):
        return type(refusal)(str(refusal))
    noun = owner.noun or f"field of {owner.__name__}"
    loc, part, before = [str(x) for x in first["loc"]], owner, ""
    if loc[0] in owner.model_fields and (parts := parts_of(owner.model_fields[loc[0]].annotation)):
        kind = loc.pop(1) if len(loc) > 1 and loc[1] in parts else ""
        if len(loc) == 1:
            return _no_part(loc[0], first["input"], [k for k in parts if k])
        part, before = parts[kind], f"{loc[0]}."
    field = ".".join(loc)
    if first["type"] == "extra_forbidden":
        names = _paths(owner)
        if not before and (inner := [n for n in names if n.endswith(f".{field}")]):
            return GddlabError(f"unknown {noun} {field!r}: it belongs to a part, give {' or '.join(inner)}")
        return unknown(noun, field, [f"{before}{n}" for n in part.model_fields] if before else names)
    if first["type"] == "missing":
        return GddlabError(f"{field} is missing: give it")
    if not isinstance(first["input"], PLAIN):
        return GddlabError(not_plain(field, first["input"]))
    described = part.model_fields.get(loc[1] if before else loc[0])
    return refusal_of(field, first["input"], first["msg"], None if described is None else described.annotation)


def _paths(owner: type[Settings]) -> list[str]:
    """Names of the fields, those of parts with a dot."""
    names: dict[str, None] = {}
    for name, field in owner.model_fields.items():
        names[name] = None
        for part in parts_of(field.annotation).values():
            names |= dict.fromkeys(f"{name}.{n}" for n in part.model_fields)
    return list(names)


def _no_part(field: str, value: Any, kinds: list[str]) -> GddlabError:
    """The refusal of something that is no part, or that does not say which kind of part it is."""
    if not isinstance(value, (*PLAIN, Settings)):
        return GddlabError(not_plain(field, value))
    if not kinds:
        return GddlabError(f"{field}={shown(value)}: give a part, such as gddlab.Augment(), a dict of fields, or None")
    if isinstance(value, dict) and "kind" in value:
        return unknown(f"kind of {field}", value["kind"], kinds)
    accepted = ", ".join(kinds)
    return GddlabError(f"{field}={shown(value)}: give a part, a dict with its kind ({accepted}) and fields, or None")


FILES = {
    "teacher": "save it with gddlab.nets.save_network",
    "data": "write its images to a folder or a zip with gddlab.prepare",
    "mask": "choose it with gddlab.select_freeze, or save it",
}


def not_plain(field: str, value: Any) -> str:
    """Why an object cannot stand in a configuration, and what can."""
    kind = type(value) if not hasattr(value, "__qualname__") else value
    what = f"{field} is an object of this process ({kind.__module__}.{kind.__qualname__})"
    advice = f"{FILES[field]} and give the path" if field in FILES else "give a name, a number or a path"
    return f"{what}, which the processes of a run do not see: {advice}"


class Discriminator(nn.Module):
    """What losses and steps ask of a discriminator; a network that is trained whole defines `logits` only."""

    coupled: ClassVar[bool] = False
    """Whether the logits of an image depend on others of its batch beyond groups of consecutive ones (BatchNorm)."""

    def features(self, images: Tensor) -> list[Tensor]:
        """Everything before the first trained parameter, from images in [-1, 1], (B, C, H, W)."""
        return [images]

    def logits(self, features: Sequence[Tensor], labels: Tensor | None = None) -> list[Tensor]:
        """Tensors (B, L) that count the same in the losses; labels are one-hot, (B, classes)."""
        raise NotImplementedError

    def forward(self, images: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        return self.logits(self.features(images), labels)


class Part(Settings):
    """A part of a configuration that comes in kinds; a subclass per kind, in the file of what it configures."""

    kind: str

    def find(self) -> str:
        """Says which weights are used and where they are.

        Raises:
            GddlabError: They are not there, or do not fit.
        """
        return self.kind

    def describe(self) -> str:
        """A few words for a report."""
        return self.kind

    def stand_in(self) -> Part:
        """The same with random weights wherever some would have to be found, for measurements without a download."""
        return self


class DiscriminatorPart(Part):
    """The part of a configuration that chooses a discriminator."""

    def build(self, teacher: Precond, *, exact: bool = False) -> Discriminator:
        """The discriminator of a teacher's images and classes; `exact` omits what changes the rounding."""
        raise NotImplementedError

    def check(self, teacher: Precond, *, batch: int, held: int) -> None:
        """Refuses what does not fit the teacher, the batch, or the `held` images that a process takes at once."""

    def networks(self) -> dict[str, str]:
        """Frozen feature networks by name, each with where its weights are looked for."""
        return {}

    def caches(self) -> bool:
        """Whether the features of the real images are kept in memory."""
        return False

    def world_size_matters(self) -> str:
        """What depends on how many processes share a batch, beyond rounding; empty if nothing does."""
        return ""
