"""Published results are those of the sources; ours are beside them, never in their column as another metric."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from gddlab.errors import GddlabError
from gddlab.files import data_dir
from gddlab.reporting.published_results import SETTINGS, draw_published, main_table, published
from gddlab.runs import load_runs
from tests.evaluation.test_records import record
from tests.reporting.made import made

# method | CIFAR-10 | CIFAR-10 conditional | AFHQv2 | FFHQ | ImageNet 64 | source
FIDS = """
EDM | 1.97 | 1.79 | 1.96 | 2.39 | 2.44 | EDM, sCM
PD | 8.34 | | | | 15.39 | sCM / SCT tables
CD (LPIPS) | 3.55 | | | | 6.20 | ECT, sCM
CTM | 1.98 | 1.73 | | | 1.92 | SCT, sCM
DMD | 3.77 | | | | 2.62 | sCM
DMD2 | | | | | 1.28 | DMD2
SiD | 1.92 | 1.71 | 1.63 | 1.55 | 1.52 | SiD README
SiDA / SiD2A (best) | 1.50 | 1.40 | 1.28 | 1.04 | 1.11 | SiDA README
Uni-Instruct | 1.46 | 1.38 | | | 1.02 | Uni-Instruct project page
sCD | 3.66 | | | | 2.44 | sCM
sCT | 2.85 | | | | 2.04 | sCM
StyleGAN-XL | | 1.85 | | | 1.52 | sCM
GDD | | | 1.23 | | | arXiv:2405.20750
GDD-I | 1.54 | | | 0.85 | 1.16 | arXiv:2405.20750
"""
# GDD's README: FID / CLIP-FID / million images
README = {
    "cifar10": "EDM 1.98/.53/-, CD 4.10/1.26/100, SiD 1.92/.65/400, GDD-I 1.56/.66/5",
    "ffhq": "EDM 2.39/1.18/-, SiD 1.55/.80/500, GDD-I .83/.81/9",
    "afhqv2": "EDM 1.96/.40/-, SiD 1.62/.32/300, GDD-I 1.24/.18/7",
    "imagenet64": "EDM 2.64/.82/-, CD 6.87/2.93/1000, SiD 1.52/.75/930, GDD-I 1.13/.51/6",
}
Row = tuple[str, str, bool, int, str, float, int | None, str]


def transcribed() -> list[Row]:
    out: list[Row] = []
    for line in FIDS.strip().splitlines():
        method, *values, source = (part.strip() for part in line.split("|"))
        for setting, value in zip(SETTINGS, values, strict=True):
            if value:
                dataset, conditional = setting.removesuffix("_cond"), setting in ("cifar10_cond", "imagenet64")
                nfe = 1 if method != "EDM" else 35 if dataset == "cifar10" else 79
                out.append((method, dataset, conditional, nfe, "fid", float(value), None, source))
    for dataset, text in README.items():
        for entry in text.split(", "):
            method, scores = entry.split()
            fid, clip, images = scores.split("/")
            nfe = 1 if method != "EDM" else 35 if dataset == "cifar10" else 79
            seen = None if images == "-" else int(images) * 1_000_000
            for metric, value in (("fid", fid), ("clip-fid", clip)):
                out.append((method, dataset, dataset == "imagenet64", nfe, metric, float(value), seen, "GDD README"))
    out.append(("GDD", "imagenet64", True, 1, "fid", 1.42, 5_000_000, "GDD README"))  # its figure 1
    out.append(("GDD", "ffhq", False, 1, "fid", 1.08, None, "Neon (arXiv:2510.03597)"))
    return out


def test_the_file_holds_what_the_sources_say() -> None:
    table = published()
    found = [tuple(None if pd.isna(v) else v for v in row[:-1]) for row in table.itertuples(index=False)]
    assert Counter(found) == Counter(transcribed())
    assert Counter(table["dataset"]) == {"cifar10": 25, "afhqv2": 10, "ffhq": 11, "imagenet64": 22}
    assert [str(t) for t in table.dtypes[["conditional", "nfe", "value", "images"]]] == [
        "bool",
        "int64",
        "float64",
        "Int64",
    ]
    notes = table.set_index(["method", "dataset", "source"])["note"]
    assert "0.02" in notes["GDD", "imagenet64", "GDD README"] and notes["PD", "cifar10", "sCM / SCT tables"] == ""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("arXiv:2405.20750", "", "source='': "),
        ("arXiv:2405.20750", " ", "source=' ': "),
        ("1.54", "", "value='': "),
        ("1.54", "nan", "value='nan': "),
        ("1.54", "-1", "value='-1'"),
        ("5000000,", "5e6,", "images='5e6': .*integer"),
        ("GDD-I,cifar10", "GDD-I,cifar", "did you mean 'cifar10'"),
        ("GDD-I,cifar10,false", "GDD-I,cifar10,no", "unknown conditional 'no'"),
        ("method,dataset", "method,data", "has the columns"),
    ],
)
def test_a_file_that_is_not_sound_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (data_dir() / "published.csv").read_text()
    assert old in text
    (tmp_path / "p.csv").write_text(text.replace(old, new))
    with pytest.raises(GddlabError, match=message):
        published(tmp_path / "p.csv")
    with pytest.raises(GddlabError, match="no such file"):
        published(tmp_path / "absent.csv")


def test_a_file_without_rows_is_an_empty_table(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text((data_dir() / "published.csv").read_text().partition("\n")[0] + "\n")
    table = published(tmp_path / "p.csv")
    assert (len(table), list(table.columns)) == (0, list(published().columns))


def test_ours_stand_beside_the_published(tmp_path: Path, tiny_teacher: Path) -> None:
    for seed, value in enumerate((50.0, 60.0, 70.0)):
        made(tmp_path / "digits", tiny_teacher, "gdd-i", seed, {0.048: value})
    fid = {"extractor": "inception-v3-compat", "metric": "fid@50000", "n": 50000}
    made(tmp_path / "cifar10", tiny_teacher, "gdd-i", 0, {0.048: 1.5}, scored=fid)
    made(tmp_path / "ffhq", tiny_teacher, "gdd-i", 0, {0.048: 1.5}, scored=fid | {"metric": "fid@64", "n": 64})
    made(tmp_path / "cifar10", tiny_teacher, "gdd", 0, {0.048: 1.7}, scored=fid)
    runs = {name: load_runs(tmp_path / name) for name in ("digits", "cifar10", "ffhq")}
    table = main_table(published(), runs, rows=("gdd", "gdd-i", "own"))
    digits = "digits, fd-lite2@64"
    assert list(table.columns) == ["network calls", digits, *SETTINGS.values()]
    ours = table.loc[("GDD-I", "here")]
    assert ours[digits] == "60.0 (35.2 to 84.8)" and ours["network calls"] == "1"
    assert ours["CIFAR-10"] == "1.50, one block" and ours["FFHQ 64"] == "fid@64, not comparable"
    assert ours["ImageNet 64"] == "not run"
    # of CIFAR-10: the digits have no such run
    assert table.loc[("GDD (preset's rate)", "here"), "network calls"] == "1"
    assert set(table.loc[("own", "here")].drop("network calls")) == {"not run"}
    assert table.loc[("EDM", "here"), digits] == "50.0" and table.loc[("EDM", "here"), "network calls"] == "35"
    known = table.loc[("GDD-I", "arXiv:2405.20750")]
    assert known[["CIFAR-10", "CIFAR-10 cond", digits]].tolist() == ["1.54*", "", ""]
    assert table.loc[("EDM", "EDM, sCM"), "network calls"] == "35, 79"
    sources = [source for method, source in table.index if method == "GDD-I"]
    assert sources == ["arXiv:2405.20750", "GDD README", "here"]
    with pytest.raises(GddlabError, match="did you mean 'cifar10'"):
        main_table(published(), {"cifar": []})
    with pytest.raises(GddlabError, match="did you mean 'cifar10'"):
        main_table(published(), {}, teachers={"cifar": pd.DataFrame()})


def test_the_least_of_three_blocks_stands_for_a_fid(tmp_path: Path, tiny_teacher: Path) -> None:
    fid = {"extractor": "inception-v3-compat", "metric": "fid@50000", "n": 50000}
    blocks = [record(**fid, value=v, kimg=0.048, seeds=(s, s + 49_999)) for v, s in ((1.6, 50_000), (1.4, 100_000))]
    least = record(**fid | {"metric": "fid-min3@50000"}, value=1.4, kimg=0.048)
    made(tmp_path / "cifar10", tiny_teacher, "gdd-i", 0, {0.048: 1.5}, scored=fid, more=(*blocks, least))
    made(tmp_path / "ffhq", tiny_teacher, "gdd-i", 0, {0.048: 1.5}, scored=fid, more=tuple(blocks))
    runs = {name: load_runs(tmp_path / name) for name in ("cifar10", "ffhq")}
    rows = [(1, 1, "fid@50000", 400.0), (18, 35, "fid@50000", 2.0), (18, 35, "fid-min3@50000", 1.9)]
    study = pd.DataFrame(rows, columns=["steps", "nfe", "metric", "value"])
    table = main_table(published(), runs, rows=("gdd-i",), teachers={"cifar10": study, "ffhq": study[:2]})
    ours, teacher = table.loc[("GDD-I", "here")], table.loc[("EDM", "here")]
    assert (ours["CIFAR-10"], ours["FFHQ 64"]) == ("1.40", "1.50, one block")
    assert (teacher["CIFAR-10"], teacher["FFHQ 64"]) == ("1.90", "2.00, one block")


def test_published_against_images(tmp_path: Path) -> None:
    ax = draw_published(published())
    xs = sorted(float(x) for x, _ in ax.collections[0].get_offsets())
    assert xs == [5.0, 5.0, 6.0, 7.0, 9.0, 100.0, 300.0, 400.0, 500.0, 930.0, 1000.0]
    legend = {t.get_text() for t in ax.get_legend().get_texts()}
    assert {"GDD-I", "SiD", "CD", "CIFAR-10", "ImageNet 64"} <= legend
    assert ax.get_xscale() == ax.get_yscale() == "log"
    plt.close("all")
    with pytest.raises(GddlabError, match="'kid'"):
        draw_published(published(), metric="kid")
