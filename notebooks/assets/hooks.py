"""What mkdocs adds to the site: the pictures of data/, the page of commands, one style sheet for notebooks."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ("readme.png", "readme-layers.png", "readme-editing.png")
COMMANDS_PAGE, NOTEBOOK_CSS = "api/cli.md", "assets/notebook.css"
COLUMNS = "96"
"""Width of the help, characters."""


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Adds what is in no folder of pages."""
    for name in PICTURES:
        files.append(File.generated(config, f"assets/{name}", abs_src_path=str(ROOT / "data" / name)))
    files.append(File.generated(config, COMMANDS_PAGE, content=commands_page()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Pictures of data/, which a clone finds there, are copied into the site."""
    return re.sub(r"\]\(((?:\.\./)*)\.\./data/", r"](\1assets/", markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Moves the styles of JupyterLab, half a megabyte, out of each notebook into one file; mends links between files.

    The scripts that a notebook would fetch go with them.
    """
    begin = '<div class="jupyter-wrapper">'
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    head, wrapper, body = html.partition(begin)
    if not wrapper:
        raise ValueError(f"{page.file.src_uri}: a notebook without {begin}; mkdocs-jupyter has changed")
    styles = re.findall(r"<style[^>]*>(.*?)</style>", head, re.DOTALL)
    target = Path(config.site_dir) / NOTEBOOK_CSS
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(styles))
    body = re.sub(
        r'href="([\w./-]+)\.(?:ipynb|md)(#[^"]*)?"', r'href="\1.html\2"', body
    )  # links between files, as Jupyter has them
    link = get_relative_url(NOTEBOOK_CSS, page.url)
    return f'<link rel="stylesheet" href="{link}">{wrapper}{body}'


@functools.cache
def commands_page() -> str:
    """Every command with its help, as Markdown."""
    from gddlab.cli import COMMANDS

    parts = ["# Command line", "Every command is a call of the Python API with the same configuration."]
    for name in COMMANDS:
        parts += [f"## gddlab {name}", f"```text\n{_help(*name.split())}\n```"]
    return "\n\n".join(parts) + "\n"


def _help(*words: str) -> str:
    """What `gddlab WORDS --help` prints, without the frames."""
    from gddlab.cli import main

    kept = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = COLUMNS
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
            main([*words, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if kept is not None:
            os.environ["COLUMNS"] = kept
    plain = re.sub(r"\x1b\[[0-9;]*m| +$", "", printed.getvalue(), flags=re.MULTILINE)
    titled = re.sub(
        r"^ (\S.*)\n -+$", r"\1:", plain, flags=re.MULTILINE
    )  # tyro underlines titles where it cannot draw frames
    return re.sub(r"^ +-{9,}\n", "", titled, flags=re.MULTILINE).strip()
