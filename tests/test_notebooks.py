"""Notebooks of figures and tables: thin over the library, run with quiet outputs, and their parameter is checked."""

from __future__ import annotations

import ast
import base64
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from PIL import Image

from gddlab.evaluation import load_records
from gddlab.files import data_dir
from gddlab.runs import load_run

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
RESULTS = [p for p in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")) if int(p.name[:2]) >= 10]
MACHINE = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users|var|mnt|opt|usr)/")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=RESULTS, ids=[p.stem for p in RESULTS])
def notebook(request: pytest.FixtureRequest) -> nbformat.NotebookNode:
    return nbformat.read(request.param, 4)


PROSE = [*NOTEBOOKS.rglob("*.md"), NOTEBOOKS.parent / "README.md"]
ALL = [p for p in NOTEBOOKS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]


@pytest.mark.parametrize("path", [*PROSE, *ALL], ids=lambda p: p.name)
def test_text_has_lines_of_at_most_120_columns(path: Path) -> None:
    if path.suffix == ".md":
        lines = path.read_text().splitlines()
    else:
        cells = nbformat.read(path, 4).cells
        lines = [line for c in cells if c.cell_type == "markdown" for line in c.source.splitlines()]
    assert [line for line in lines if len(line) > 120] == []


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [c for c in notebook.cells if c.cell_type == "code"]


def test_pictures_are_made_lighter_where_nobody_sees_it(tmp_path: Path) -> None:
    """A figure loses most of its bytes; noise and transparency stay, and so does what surrounds a picture."""
    rng = np.random.default_rng(0)
    figure, ax = plt.subplots(figsize=(8, 4))
    ax.plot(rng.normal(size=(50, 4)).cumsum(0), marker="o")
    drawn, noise = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn)
    plt.close(figure)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(noise, "png")
    clear = io.BytesIO()
    shown = Image.open(drawn).convert("RGBA")
    shown.putalpha(128)
    shown.save(clear, "png")
    pictures = [drawn.getvalue(), noise.getvalue(), clear.getvalue()]
    outputs = [
        nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(p).decode(), "text/plain": "a figure"})
        for p in pictures
    ]
    path = tmp_path / "a.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("draw()", outputs=outputs)]), path)
    subprocess.run([sys.executable, NOTEBOOKS / "assets" / "lighten.py", path], check=True, capture_output=True)
    after = [o.data for o in nbformat.read(path, 4).cells[0].outputs]
    light, same, half = (base64.b64decode(data["image/png"]) for data in after)
    assert len(light) < len(pictures[0]) / 2 and [same, half] == pictures[1:] and after[0]["text/plain"] == "a figure"
    change = [np.asarray(Image.open(io.BytesIO(p)).convert("RGB"), int) for p in (light, pictures[0])]
    assert np.abs(change[0] - change[1]).mean() < 0.4


def test_there_is_a_notebook_for_each_figure_and_table() -> None:
    assert [int(p.name[:2]) for p in RESULTS] == list(range(10, 27))


def test_it_asks_shows_and_concludes(notebook: nbformat.NotebookNode) -> None:
    nbformat.validate(notebook)
    texts = [c.source for c in notebook.cells if c.cell_type == "markdown"]
    assert texts[0].startswith("# ") and "?" in texts[0]
    assert texts[-1].startswith("## What this says about the paper's claim\n")
    assert not any("TODO" in t for t in texts)


def test_its_parameter_is_checked_in_the_next_cell(notebook: nbformat.NotebookNode) -> None:
    tagged = [i for i, c in enumerate(code(notebook)) if "parameters" in c.metadata.get("tags", ())]
    assert len(tagged) == 1
    cells = code(notebook)[tagged[0] :]
    assert [ast.unparse(s) for s in ast.parse(cells[0].source).body] == ["runs = ''"]
    assert "runs_folder(globals())" in cells[1].source


def test_it_is_thin(notebook: nbformat.NotebookNode) -> None:
    source = "\n".join(re.sub(r"^[%!].*$", "", c.source, flags=re.MULTILINE) for c in code(notebook))
    lines = [line for line in source.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(lines) < 60
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assert not [n for n in ast.walk(ast.parse(source)) if isinstance(n, kinds)]


def test_its_outputs_are_stored_quiet_and_small(
    notebook: nbformat.NotebookNode, request: pytest.FixtureRequest
) -> None:
    path: Path = request.node.callspec.params["notebook"]
    assert path.stat().st_size < 300_000
    assert all(c.execution_count for c in code(notebook))
    outputs = [o for c in code(notebook) for o in c.outputs]
    assert outputs
    for output in outputs:
        assert output.output_type in ("stream", "display_data", "execute_result")
        assert output.get("name", "stdout") == "stdout"
        for text in [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]:
            assert not re.search(r"\d+%\||it/s\b|\r", text), "a progress bar"
            assert not re.search(r"\bat 0x[0-9a-f]{6}", text) or "<Figure" in text, "an address in memory"
    whole = re.sub(r'"image/png": "[^"]*"', "", path.read_text())
    assert not MACHINE.search(whole)


def test_what_is_compared_can_be(notebook: nbformat.NotebookNode) -> None:
    """nbval compares text; an image would differ between machines."""
    for cell in code(notebook):
        if "NBVAL_CHECK_OUTPUT" in cell.source:
            assert cell.outputs
            assert not any("image/png" in o.get("data", {}) for o in cell.outputs)


def execute(name: str, tmp_path: Path, **parameters: str) -> nbformat.NotebookNode:
    import papermill

    path = next(NOTEBOOKS.glob(f"{name}_*.ipynb"))
    return papermill.execute_notebook(
        path, tmp_path / "out.ipynb", parameters=parameters, progress_bar=False, cwd=tmp_path
    )


def test_papermill_runs_it_on_other_runs(tmp_path: Path) -> None:
    shipped = load_run(data_dir() / "runs" / "first" / "gdd" / "seed-1").run_dir
    shutil.copytree(shipped, tmp_path / "first" / "gdd" / "seed-1")
    out = execute("20", tmp_path, runs=str(tmp_path))
    table = next(o for c in code(out) for o in c.outputs if "text/plain" in o.get("data", {}) and "mean" in str(o.data))
    lines = {line.split()[0]: line for line in table.data["text/plain"].splitlines() if line.strip()}
    value = next(r.value for r in load_records(tmp_path / "first" / "gdd" / "seed-1") if r.kimg == 12)
    assert lines["gdd"].split()[1:4] == ["0.0%", "1", f"{value:.1f}"]
    assert "not run" in lines["gdd-i"] and "not run" in lines["scratch"]


def test_papermill_with_a_misspelt_parameter_is_refused_in_one_line(tmp_path: Path) -> None:
    import papermill

    with pytest.raises(papermill.PapermillExecutionError) as refused:
        execute("23", tmp_path, run=str(tmp_path))
    said = re.sub(r"\x1b\[[0-9;]*m", "", str(refused.value)).strip().splitlines()[-1]
    assert said.startswith("GddlabError: unknown parameter 'run': did you mean 'runs'?")
