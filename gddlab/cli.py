"""The command line: every command is a call of the public API with the same configuration."""

from __future__ import annotations

import contextlib
import functools
import io
import operator
import sys
from typing import Annotated, Any

import tyro

from gddlab.commands.data import Prepare
from gddlab.commands.doctor import Doctor
from gddlab.commands.experiments import Reproduce
from gddlab.commands.freezing import Freeze, Mask
from gddlab.commands.images import Evaluate, Reference, Sample
from gddlab.commands.probing import Ablate, Probe
from gddlab.commands.reporting import Report
from gddlab.commands.teachers import Convert, Export, Teacher
from gddlab.commands.training import Configured, Demo, Preflight, Runs, Train
from gddlab.errors import GddlabError

__all__ = ["main"]

COMMANDS: dict[str, type] = {
    "demo": Demo,
    "teacher": Teacher,
    "convert": Convert,
    "export": Export,
    "prepare": Prepare,
    "probe": Probe,
    "ablate": Ablate,
    "freeze": Freeze,
    "mask": Mask,
    "train": Train,
    "runs": Runs,
    "preflight": Preflight,
    "sample": Sample,
    "evaluate": Evaluate,
    "reference": Reference,
    "reproduce": Reproduce,
    "report": Report,
    "doctor": Doctor,
}


def _preset(words: list[str]) -> str:
    """The preset that a line of `gddlab train` or `gddlab preflight` begins with."""
    return words[1] if len(words) > 1 and not words[1].startswith("-") else "digits"


def _parts(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Parts whose kind a line chooses, by `--discriminator.kind lpips` or an option of augment; and the rest of the line.

    "none" leaves a part out. tyro sees the options of the chosen kinds only.
    """
    words = [w for word in words for w in (word.split("=", 1) if word.startswith("--") else [word])]
    parts: dict[str, Any] = {"augment": {}} if any(w.startswith("--augment.") for w in words) else {}
    for name in ("discriminator", "instance"):
        if (flag := f"--{name}.kind") in words[:-1]:
            at = words.index(flag)
            kind = words[at + 1]
            parts[name] = None if kind == "none" else {"kind": kind}
            del words[at : at + 2]
    return words, parts


def _command(name: str, words: list[str], parts: dict[str, Any]) -> Any:
    """A subcommand; a preset's fields are its defaults, so the preset is read before the rest of the line."""
    kind = COMMANDS[name]
    if words[:1] == [name] and issubclass(kind, Configured):
        return Annotated[kind, tyro.conf.subcommand(name, default=kind.of_preset(_preset(words), parts))]
    return Annotated[kind, tyro.conf.subcommand(name)]


def _parsed(kinds: Any, argv: list[str]) -> Any:
    """The command of a line. What a configuration refuses is raised as it is; tyro would put it into a box of its own."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kinds, prog="gddlab", args=argv, description=__doc__)
    except SystemExit as e:
        cause: BaseException | None = e
        while cause is not None:
            if isinstance(cause, GddlabError):
                raise cause from None
            cause = cause.__context__
        sys.stderr.write(said.getvalue())
        raise


def main(argv: list[str] | None = None) -> None:
    """Entry point: exit code 2 and one line on bad input."""
    try:
        words = sys.argv[1:] if argv is None else argv
        parts: dict[str, Any] = {}
        if words and issubclass(COMMANDS.get(words[0], object), Configured):
            words, parts = _parts(words)
        kinds = functools.reduce(operator.or_, [_command(name, words, parts) for name in COMMANDS])
        command = _parsed(kinds, words)
        if isinstance(command, Configured) and command.preset != _preset(words):
            raise GddlabError(
                f"preset {command.preset!r} after other arguments: give it first, gddlab {words[0]} {command.preset} ..."
            )
        command.run()
    except GddlabError as e:
        sys.stderr.write(f"gddlab: {e}\n")
        sys.exit(2)
    except OSError as e:  # a path that cannot be read or written: a folder where a file belongs, a full disk
        sys.stderr.write(f"gddlab: {e.filename or 'file system'}: {e.strerror or e}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
