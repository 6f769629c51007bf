"""Zips in parts: whole or absent, in order, equal bytes."""

from __future__ import annotations

import io
import itertools
import json
import tempfile
import threading
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gddlab.datasets.packing import Entry, assemble, image_name, missing_parts, open_parts, read_part, write_part
from gddlab.errors import GddlabError


def entries(k: int, *, labels: bool = True) -> list[Entry]:
    return [Entry(image_name(2 * k + i), b"png %d" % (2 * k + i), i if labels else None) for i in range(2)]


def test_parts_make_one_zip_in_order_whatever_the_order_of_writing(tmp_path: Path) -> None:
    whole = []
    for order in ([0, 1, 2], [2, 0, 1]):
        out = tmp_path / str(order[0]) / "out.zip"
        folder = open_parts(out, {"seed": 1})
        for left, k in zip((3, 2, 1), order, strict=True):
            assert len(missing_parts(folder, 3)) == left
            write_part(folder, k, entries(k))
        assert missing_parts(folder, 3) == []
        assert list(read_part(folder, 1)) == entries(1)
        assemble(folder, 3, out, lambda z: {"files": len(zipfile.ZipFile(z).namelist())})
        assert [p.name for p in out.parent.iterdir()] == ["out.zip"]
        whole.append(out.read_bytes())
    assert whole[0] == whole[1]
    with zipfile.ZipFile(tmp_path / "0" / "out.zip") as z:
        images = [image_name(i) for i in range(6)]
        assert z.namelist() == [*images, "dataset.json", "manifest.json"]
        assert all(i.compress_type == zipfile.ZIP_STORED for i in z.infolist())
        assert [z.read(n) for n in images] == [b"png %d" % i for i in range(6)]
        assert json.loads(z.read("dataset.json")) == {"labels": [[n, i % 2] for i, n in enumerate(images)]}
        assert json.loads(z.read("manifest.json")) == {"files": 7}


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    images=st.lists(st.tuples(st.binary(max_size=40), st.integers(0, 9)), min_size=1, max_size=12),
    labelled=st.booleans(),
    cuts=st.sets(st.integers(1, 11)),
    seed=st.randoms(use_true_random=False),
)
def test_the_zip_does_not_depend_on_its_parts(images, labelled, cuts, seed) -> None:  # type: ignore[no-untyped-def]
    """Any division into parts, written in any order, gives the same bytes; the zip gives the entries back."""
    whole = [Entry(image_name(i), png, label if labelled else None) for i, (png, label) in enumerate(images)]
    borders = [0, *sorted(c for c in cuts if c < len(whole)), len(whole)]
    zips = []
    with tempfile.TemporaryDirectory() as tmp:
        for name, edges in (("one.zip", [0, len(whole)]), ("many.zip", borders)):
            folder, parts = open_parts(Path(tmp) / name, {}), list(itertools.pairwise(edges))
            for k in seed.sample(range(len(parts)), len(parts)):
                write_part(folder, k, whole[slice(*parts[k])])
            assert [e for k in range(len(parts)) for e in read_part(folder, k)] == whole
            assemble(folder, len(parts), Path(tmp) / name, lambda _: {"count": len(whole)})
            zips.append((Path(tmp) / name).read_bytes())
    assert zips[0] == zips[1]
    with zipfile.ZipFile(io.BytesIO(zips[0])) as z:
        assert [z.read(e.name) for e in whole] == [e.png for e in whole]
        pairs = json.loads(z.read("dataset.json"))["labels"]
        assert pairs == ([[e.name, e.label] for e in whole] if labelled else None)


def test_without_labels_dataset_json_says_null(tmp_path: Path) -> None:
    folder = open_parts(tmp_path / "out.zip", {})
    write_part(folder, 0, entries(0, labels=False))
    assemble(folder, 1, tmp_path / "out.zip", lambda _: {})
    assert json.loads(zipfile.ZipFile(tmp_path / "out.zip").read("dataset.json")) == {"labels": None}


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "out.zip"
    folder = open_parts(out, {"steps": 18, "sizes": (1, 2)})
    assert open_parts(out, {"steps": 18, "sizes": [1, 2]}) == folder
    with pytest.raises(GddlabError, match=r"started with steps=18, now it is 5: continue with the former, or delete"):
        open_parts(out, {"steps": 5, "sizes": [1, 2]})
    with pytest.raises(GddlabError, match=r"started with sizes=\[1, 2\], now it is None"):
        open_parts(out, {"steps": 18})


def test_refusals_leave_the_old_zip(tmp_path: Path) -> None:
    out = tmp_path / "out.zip"
    out.write_bytes(b"old")
    folder = open_parts(out, {})
    write_part(folder, 0, entries(0))
    with pytest.raises(GddlabError, match=r"lacks 2 of 3 parts \(first: 1\)"):
        assemble(folder, 3, out, lambda _: {})
    write_part(folder, 1, entries(0))
    with pytest.raises(GddlabError, match=r"two files of the zip are named '00000/img00000000\.png'"):
        assemble(folder, 2, out, lambda _: {})
    write_part(folder, 1, entries(1, labels=False))
    with pytest.raises(GddlabError, match=r"'00000/img00000002\.png' has no label, 2 other images have one"):
        assemble(folder, 2, out, lambda _: {})
    (folder / "part-000001.zip").write_bytes(b"PK")
    with pytest.raises(GddlabError, match=r"part-000001\.zip is damaged .*: delete it and run"):
        assemble(folder, 2, out, lambda _: {})
    write_part(folder, 1, entries(1))

    def fails(_: Path) -> dict[str, int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assemble(folder, 2, out, fails)
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["out.zip"]
    assemble(folder, 2, out, lambda _: {})
    assert len(zipfile.ZipFile(out).namelist()) == 6


def test_a_part_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = open_parts(tmp_path / "out.zip", {})
    mixed = [Entry("a.png", b"1", 0), Entry("b.png", b"2")]
    with pytest.raises(GddlabError, match=r"'b\.png' has no label"):
        write_part(folder, 0, mixed)
    assert [p.name for p in folder.iterdir()] == ["settings.json"]
    threads = [threading.Thread(target=write_part, args=(folder, 0, entries(0))) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert list(read_part(folder, 0)) == entries(0)
    assert sorted(p.name for p in folder.iterdir()) == ["part-000000.zip", "settings.json"]
