"""The site builds without a warning, is whole, leads nowhere else, and names everything public."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import gddlab
from gddlab.cli import COMMANDS
from gddlab.distill.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "notebooks"
NOTEBOOKS = [
    "00_quickstart",
    "01_atlas",
    "02_choosing_a_mask",
    "03_known_and_needed",
    "04_architectures",
    "10_fid_over_images",
    "11_samples",
    "12_main_results",
    "13_second_extractor",
    "14_local_minima",
    "15_activations",
    "16_moved_parameters",
    "17_freezing",
    "18_discriminators",
    "19_augmentation_r1",
    "20_initialisation",
    "21_data_efficiency",
    "22_frequencies",
    "23_cost",
    "24_editing",
    "25_second_step",
    "26_emoji",
]
GENERATED = "api/cli.md"
RESOURCES = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


class Reader(HTMLParser):
    """Anchors, links and resources of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {k: v or "" for k, v in attrs}
        self.ids |= {found[k] for k in ("id", "name") if k in found}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if (name := RESOURCES.get(tag)) and found.get(name):
            self.resources.append(found[name])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with warnings as errors."""
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ".mkdocs.yml", "-d", str(out)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "COLUMNS": "40"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Reader]:
    """Every page, by its path."""
    found = sorted(site.rglob("*.html"))
    return {p.relative_to(site).as_posix(): Reader(p.read_text()) for p in found}


def nav_files(nav: list[object]) -> Iterator[str]:
    for entry in nav:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            if isinstance(value, list):
                yield from nav_files(value)
            else:
                yield str(value)


def test_navigation_names_every_page_in_the_order_of_use() -> None:
    nav = list(nav_files(yaml.safe_load((ROOT / ".mkdocs.yml").read_text())["nav"]))
    assert [n for n in nav if n.endswith(".ipynb") and "/" not in n] == [f"{n}.ipynb" for n in NOTEBOOKS]
    there = {p.relative_to(PAGES).as_posix() for end in ("md", "ipynb") for p in PAGES.rglob(f"*.{end}")}
    hidden = {p for p in there if any(part.startswith(".") for part in Path(p).parts)}
    assert sorted(nav) == sorted((there - hidden) | {GENERATED})


def test_every_page_is_there(site: Path) -> None:
    nav = nav_files(yaml.safe_load((ROOT / ".mkdocs.yml").read_text())["nav"])
    for name in nav:
        page = (site / name).with_suffix(".html")
        assert page.is_file(), name
        if name.endswith(".ipynb"):
            assert "jp-Notebook" in page.read_text(), name
    for picture in ("readme.png", "readme-layers.png", "readme-editing.png"):
        assert (site / "assets" / picture).read_bytes() == (ROOT / "data" / picture).read_bytes()
    assert list(site.rglob("*.py*")) == []


def test_links_lead_somewhere(site: Path, pages: dict[str, Reader]) -> None:
    broken = []
    for name, page in pages.items():
        if name == "404.html":  # its links begin at the root of wherever the site is put
            continue
        for link in [*page.links, *page.resources]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (site / name).parent / unquote(parts.path) if parts.path else site / name
            file = target.resolve()
            if not file.is_file():
                broken.append(f"{name}: {link}")
            elif parts.fragment and file.suffix == ".html":
                ids = pages[file.relative_to(site.resolve()).as_posix()].ids
                if unquote(parts.fragment) not in ids:
                    broken.append(f"{name}: {link}")
    assert not broken


def test_nothing_is_fetched_from_elsewhere(site: Path, pages: dict[str, Reader]) -> None:
    outside = {
        f"{name}: {resource}"
        for name, page in pages.items()
        for resource in page.resources
        if urlsplit(resource).netloc or urlsplit(resource).scheme not in ("", "data")
    }
    assert not outside
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text()), style.name


def test_no_page_tells_where_it_was_made(site: Path) -> None:
    own = {str(ROOT), str(Path.home()), str(Path(sys.prefix))}
    for page in [*site.rglob("*.html"), *site.rglob("*.json")]:
        text = page.read_text()
        found = [p for p in own if len(p) > 1 and p in text]
        found += re.findall(r"(?:/tmp|/work|/home|/root|/Users)/[\w.-]+|ipykernel_\d+", text)
        assert not found, f"{page.name}: {found[:3]}"


def test_every_public_name_is_in_the_reference(pages: dict[str, Reader]) -> None:
    reference = set().union(*(page.ids for name, page in pages.items() if name.startswith("api/")))
    assert {f"gddlab.{name}" for name in gddlab.__all__} <= reference
    fields = {f"gddlab.TrainConfig.{name}" for name in TrainConfig.model_fields}
    assert fields <= reference
    presets = {f"gddlab.presets.{name}" for name in gddlab.presets.PRESETS}
    assert presets <= reference


def test_what_notebooks_draw_with_is_in_the_reference(pages: dict[str, Reader]) -> None:
    used = set()
    for notebook in PAGES.glob("*.ipynb"):
        for cell in json.loads(notebook.read_text())["cells"]:
            source = "".join(cell["source"]) if cell["cell_type"] == "code" else ""
            used |= {("gddlab.reporting", name) for name in re.findall(r"\br\.(\w+)\(", source)}
            if "gddlab.reporting" in source:
                imports = [n for n in ast.parse(source).body if isinstance(n, ast.ImportFrom)]
                used |= {(n.module, a.name) for n in imports if "reporting" in str(n.module) for a in n.names}
    assert used
    for module, name in used:
        value = getattr(importlib.import_module(module), name)
        if inspect.isfunction(value):  # the reference has it where it is imported from, or where it is defined
            names = {f"{module}.{name}", f"{value.__module__}.{name}"}
            assert names & pages["api/reporting.html"].ids, name


def test_commands_are_told_as_they_tell_themselves(site: Path) -> None:
    text = (site / "api" / "cli.html").read_text()
    for name, command in COMMANDS.items():
        assert f'id="gddlab-{name.replace(" ", "-")}"' in text
        assert command.summary[:50] in re.sub(r"\s+", " ", text), name
    assert "--total-kimg FLOAT" in text
    assert "\x1b" not in text and "╭" not in text


def test_docstrings_name_arguments_that_exist() -> None:
    """What mkdocstrings would warn of, had we not groups such as "a, b: ..."."""
    griffe = pytest.importorskip("griffe")
    wrong = []
    for name in gddlab.__all__:
        value = getattr(gddlab, name)
        if not inspect.isfunction(value):
            continue
        doc = griffe.Docstring(inspect.getdoc(value) or "", parser="google")
        sections = doc.parse("google", warnings=False)
        named = [x.name for s in sections if s.kind.value == "parameters" for x in s.value]
        known = set(inspect.signature(value).parameters)
        wrong += [f"{name}: {x}" for group in named for x in group.replace("*", "").split(", ") if x not in known]
    assert not wrong
