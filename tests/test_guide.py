"""The Python on the guide's pages runs, from top to bottom, and what they take from the code is up to date."""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from pydantic import BaseModel, Field

from gddlab.experiments import LISTS

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
PAGES = sorted((NOTEBOOKS / "guide").glob("*.md"))


@pytest.fixture
def lists() -> Iterator[None]:
    """Lists of experiments that a page declares are forgotten afterwards."""
    kept = dict(LISTS)
    yield
    LISTS.clear()
    LISTS.update(kept)


@pytest.fixture(scope="module")
def from_code() -> Any:
    """The script that writes parts of pages."""
    path = NOTEBOOKS / "assets" / "from_code.py"
    spec = importlib.util.spec_from_file_location("from_code", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize("page", PAGES, ids=[p.stem for p in PAGES])
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict[str, object] = {"__name__": "guide"}
    for block in blocks:
        code = compile(block, f"{page.name}: {block[:40]!r}", "exec", dont_inherit=True)  # as in a notebook
        exec(code, names)


def test_parts_of_pages_are_as_the_code_is(from_code: Any) -> None:
    for path, text in from_code.pages().items():
        assert path.read_text() == text, f"{path.name} is out of date: run python notebooks/assets/from_code.py"


class Round(BaseModel):
    """Has no corners."""

    kind: Literal["round"] = "round"
    radius: float = Field(default=1.5, gt=0)
    """From the centre
    to the border."""


class Square(BaseModel):
    """Has four corners."""

    side: tuple[int, ...] = ()
    """Each of them."""


class Sheet(BaseModel):
    """A sheet of paper.

    With more to say.
    """

    name: str
    """What it is called."""
    shape: Round | Square | None = Field(default=Round())
    """What is cut out."""
    paper: Literal["thin", "thick"] = "thin"
    """How it feels."""


def test_options_are_listed_with_bounds_defaults_and_parts(from_code: Any) -> None:
    assert from_code.options(Sheet).split("\n\n") == [
        "### Sheet",
        "A sheet of paper.",
        "- `name`: text; required. What it is called.\n"
        "- `shape`: [Round](#round) or [Square](#square) or `None`; default `Round()`. What is cut out.\n"
        '- `paper`: `"thin"` or `"thick"`; default `"thin"`. How it feels.',
        "### Round",
        'Has no corners. In a dict its kind is `"round"`.',
        "- `radius`: number, above 0; default `1.5`. From the centre to the border.",
        "### Square",
        "Has four corners.",
        "- `side`: list of integer; default `()`. Each of them.",
    ]


FAMILIES = re.findall(
    r"^\| ([^|]+) \| `(gddlab\.wrap\((\w+), .*\))` \| (\w+) \| ([\w, ]+) \| ([\w, ]+) \|$",
    (NOTEBOOKS / "guide" / "your_model.md").read_text(),
    re.MULTILINE,
)


@pytest.mark.parametrize(
    ("line", "name", "path", "streams", "branches"), [f[1:] for f in FAMILIES], ids=[f[2] for f in FAMILIES]
)
def test_a_family_is_probed_as_its_line_says(line: str, name: str, path: str, streams: str, branches: str) -> None:
    import diffusers

    import gddlab
    from tests.models import network, pipeline

    given: dict[str, Any] = {"gddlab": gddlab, "scheduler": diffusers.DDPMScheduler()}
    if name == "unet":
        given[name] = network("unet2d")
    else:
        given[name], call = pipeline(name, **({"num_embeds_ada_norm": 1000} if name == "dit" else {}))
        given["prompts"] = gddlab.Conditioning.record(given[name], **call)
    net = eval(line, given)
    asked = {"states": "prior", "layers": "block", "branch": "all", "stream": "all", "stats": "rms"}
    frame = gddlab.probe(net, [10.0, 1.0], n=2, progress=False, **asked).frame
    assert net.path.kind == path
    assert net.branches == tuple(branches.split(", "))
    assert {*frame["branch"]} == {*net.branches}
    assert {*frame["stream"]} == {"" if s == "one" else s for s in streams.split(", ")}
    assert frame["value"].notna().all()


FILES = re.findall(
    r'^\| ([^|]+) \| `(gddlab\.load_teacher\("(.+)"\))` \| ([^|]+) \|',
    (NOTEBOOKS / "guide" / "your_model.md").read_text(),
    re.MULTILINE,
)


@pytest.mark.parametrize(("line", "name", "path"), [f[1:] for f in FILES], ids=[f[2] for f in FILES])
def test_a_file_is_loaded_and_probed_as_its_line_says(
    line: str, name: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    import gddlab
    from tests.models import pipeline
    from tests.nets.test_dit import tiny_dit
    from tests.teachers.attacks import small_edm2
    from tests.teachers.pickles import snapshot2

    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {}
    if name.endswith(".pt"):
        torch.save(tiny_dit("dit").model.state_dict(), name)
        options = {"heads": 2}  # that of no published width
    elif name.endswith(".pkl"):
        Path(name).write_bytes(snapshot2(small_edm2(img_channels=3)))
    else:
        pipeline("dit")[0].save_pretrained(name)
    net = eval(line.removesuffix(")") + ", **options)", {"gddlab": gddlab, "options": options})
    assert path == "its own" or net.path.kind in path.split(", ")
    frame = gddlab.probe(net, [10.0, 1.0], states="prior", layers="block", stats="rms", n=2, progress=False).frame
    assert frame["value"].notna().all()


def test_every_family_has_a_line() -> None:
    from tests.models import NEWER, PIPELINES

    assert [f[2] for f in FAMILIES] == [*PIPELINES, *NEWER, "unet"]
    assert len(FILES) == 3


def test_blocks_of_ones_own_are_measured_guided_and_frozen_as_the_page_says() -> None:
    from torch import Tensor, nn

    import gddlab

    class Own(nn.Module):
        """Predicts noise - image of 1x8x8 pixels, told a class of ten, 10 for none."""

        def __init__(self) -> None:
            super().__init__()
            self.patch, self.out, self.classes = nn.Linear(4, 12), nn.Linear(12, 4), nn.Embedding(11, 12)
            mlps = [nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12)) for _ in range(2)]
            self.layers = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(12), "mlp": mlp}) for mlp in mlps)

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            h = self.patch(nn.functional.unfold(x, 2, stride=2).mT) + (self.classes(y) + t[:, None])[:, None]
            for layer in self.layers:
                h = h + layer["mlp"](layer["norm"](h))
            return nn.functional.fold(self.out(h).mT, x.shape[-2:], 2, stride=2)

    text = (NOTEBOOKS / "guide" / "your_model.md").read_text()
    made = re.findall(r"```py\n(call = .*?)```", text, re.DOTALL)[0].replace("...", "img_channels=1, img_resolution=8")
    given: dict[str, Any] = {"gddlab": gddlab, "network": Own()}
    exec(made, given)
    net = given["net"]
    assert net.branches == ("uncond", "cond") and net.guidance == 4.0
    asked: dict[str, Any] = {"states": "prior", "n": 2, "progress": False}
    blocks = gddlab.probe(net, [10.0, 1.0], layers="layers.?.mlp", branch="all", stats="rms", **asked)
    assert {*blocks.frame["layer"]} == {f"layers.{i}.mlp{b}" for i in (0, 1) for b in ("", ":uncond")}
    assert len(gddlab.ablate(net, [10.0], layers="layers.?.mlp", **asked).frame["layer"].unique()) == 2
    given["result"] = gddlab.probe(net, [10.0, 1.0], layers="linear", stats="rms", **asked)
    whole = {"layers": "layers.?.mlp", "progress": False}
    assert "correlation" in gddlab.probe(net, [10.0, 1.0], n=4, states="prior", **whole).stats
    assert len(gddlab.trace(net, 2, n=2, **whole).frame["layer"].unique()) == 2
    pictures = [np.full((8, 8, 1), 10 * i, np.uint8) for i in range(12)]
    read = gddlab.decode(net, [1.0], "image", data=pictures, n=8, held_out=4, dims=3, **whole)
    assert "layers.0.mlp" in {*read.frame["layer"]}
    assert gddlab.lens(net, [1.0], data=pictures, n=2, **whole).to_frame()["layer"].str.contains("layers.0.mlp").any()
    by_name, by_score = re.findall(r"^mask = (gddlab\.select_freeze\(.*\))$", text, re.MULTILINE)
    frozen = eval(by_name, given).frozen
    assert {*frozen} == {n for n, _ in Own().named_parameters() if ".mlp." in n}
    assert 0 < eval(by_score, given).fraction <= 0.5


def test_the_function_for_z_image_is_what_its_pipeline_does() -> None:
    import diffusers
    import torch

    import gddlab
    from tests.models import CHANNELS, SIDE, vae, zimage

    text = (NOTEBOOKS / "guide" / "your_model.md").read_text()
    code = re.findall(r"```py\n(def denoise.*?)```", text, re.DOTALL)[0]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.ZImagePipeline(
        scheduler=scheduler, vae=vae(), text_encoder=None, tokenizer=None, transformer=zimage().eval()
    )
    pipe.set_progress_bar_config(disable=True)
    embeds = [torch.randn(6, 12), torch.randn(6, 12)]
    given: dict[str, Any] = {"gddlab": gddlab, "torch": torch, "pipe": pipe, "embeds": embeds}
    exec(code.replace("img_resolution=128", f"img_resolution={SIDE}"), given)
    net, seen = given["net"], []
    pipe.transformer.register_forward_pre_hook(lambda m, a: seen.append((a[0][0][:, 0].clone(), a[1][0].item())))
    how = {"height": 2 * SIDE, "width": 2 * SIDE, "num_inference_steps": 4, "guidance_scale": 0.0}
    with torch.no_grad():
        wanted = pipe(prompt_embeds=embeds[:1], output_type="latent", **how).images
        times, x = [t for _, t in seen], seen[0][0][None].double() * 1e6
        assert x.shape[1] == CHANNELS and times[0] == pytest.approx(0, abs=1e-6)
        sigmas = [1e6, *((1 - t) / t for t in times[1:]), 0.0]
        for sigma, lower in itertools.pairwise(sigmas):
            image = net(x, sigma, given["cond"][0])
            x = image + lower / sigma * (x if sigma == 1e6 else x - image)
    assert ((x - wanted).abs().max() / wanted.abs().max()).item() < 1e-4
    frame = gddlab.probe(net, [5.0, 1.0], states="prior", layers="block", n=2, stats="rms", progress=False).frame
    assert frame["value"].notna().all()
    with pytest.raises(gddlab.GddlabError, match='as under "Z-Image" on the page "Your model"'):
        gddlab.wrap(pipe, cond=given["cond"])
