"""Findings of `gddlab.doctor()`, as a table, a dictionary, and text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SECTIONS", "Doctor", "Finding"]

SECTIONS = ("devices", "versions", "weights", "data", "folders", "able")


@dataclass(frozen=True)
class Finding:
    """One thing looked for.

    Attributes:
        section: One of `SECTIONS`.
        name: What was looked for.
        found: Whether it is there; of an ability, whether gddlab has it.
        value: What it is, or where.
        remedy: What to do to get it; empty where it is there or cannot be had.
        details: What is behind it, plain values.
    """

    section: str
    name: str
    found: bool
    value: str
    remedy: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def mark(self) -> str:
        """ "+" for what is there, "-" for what could be, a space for what need not be."""
        if self.found:
            return "+"
        return "-" if self.remedy or self.section == "able" else " "


@dataclass(frozen=True)
class Doctor:
    """What a machine has.

    Attributes:
        findings: Everything looked for, in the order of `SECTIONS`.
        problems: A line each: what is wrong, and what to do.
        broken: A package that gddlab needs is missing.
    """

    findings: tuple[Finding, ...]
    problems: tuple[str, ...]
    broken: bool

    def __getitem__(self, name: str) -> Finding:
        """The finding of a name.

        Raises:
            KeyError: Nothing of that name was looked for.
        """
        for f in self.findings:
            if f.name == name:
                return f
        raise KeyError(name)

    def brief(self, section: str) -> list[Finding]:
        """The findings of a section for reading: published teachers that are not here are one line."""
        rows = [f for f in self.findings if f.section == section]
        absent = [f for f in rows if f.details.get("published") and not f.found]
        rows = [f for f in rows if f not in absent]
        if absent:
            places = absent[0].details["places"]
            value, remedy = "not here", f"downloaded when asked for by name, or put NAME.pkl into {places}"
            if absent[0].details["offline"]:
                value, remedy = "not here, and GDDLAB_OFFLINE is set", f"put NAME.pkl into {places}"
            rows.append(Finding(section, f"{len(absent)} published teachers", False, value, remedy))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for strict JSON: a dictionary a section, by name; `problems`; `broken`."""
        out: dict[str, Any] = {s: {} for s in SECTIONS}
        for f in self.findings:
            out[f.section][f.name] = {k: v for k, v in asdict(f).items() if k not in ("section", "name")}
        return out | {"problems": list(self.problems), "broken": self.broken}

    def to_frame(self) -> pd.DataFrame:
        """A row a finding: section, name, found, value, remedy."""
        import pandas as pd

        columns = ["section", "name", "found", "value", "remedy"]
        return pd.DataFrame([[getattr(f, c) for c in columns] for f in self.findings], columns=columns)

    def __str__(self) -> str:
        lines: list[str] = []
        for section in SECTIONS:
            rows = self.brief(section)
            width = max((len(f.name) for f in rows), default=0)
            texts = [f"{f.value}; {f.remedy}" if f.remedy else f.value for f in rows]
            lines += [section, *(f"  {f.mark} {f.name:<{width}}  {t}" for f, t in zip(rows, texts, strict=True))]
        return "\n".join([*lines, "problems", *([f"  ! {p}" for p in self.problems] or ["  none"])])
