"""The command line: every command is a call of the public API with the same configuration."""

from __future__ import annotations

import sys
from typing import Annotated

import tyro

from gddlab.commands.data import Prepare
from gddlab.commands.experiments import Reproduce
from gddlab.commands.freezing import Freeze, Mask
from gddlab.commands.images import Evaluate, Sample
from gddlab.commands.probing import Ablate, Probe
from gddlab.commands.teachers import Convert, Export, Teacher
from gddlab.commands.training import Demo, Train
from gddlab.errors import GddlabError

__all__ = ["main"]

Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Teacher, tyro.conf.subcommand("teacher")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Prepare, tyro.conf.subcommand("prepare")]
    | Annotated[Probe, tyro.conf.subcommand("probe")]
    | Annotated[Ablate, tyro.conf.subcommand("ablate")]
    | Annotated[Freeze, tyro.conf.subcommand("freeze")]
    | Annotated[Mask, tyro.conf.subcommand("mask")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
)


def main(argv: list[str] | None = None) -> None:
    """Entry point: exit code 2 and one line on bad input."""
    try:
        command = tyro.cli(Command, prog="gddlab", args=argv, description=__doc__)
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
