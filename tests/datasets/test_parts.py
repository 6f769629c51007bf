"""Both parts of a data set, by name, by path, and of what was opened before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gddlab.datasets import ImageDataset, digits, open_dataset, parts_of
from gddlab.errors import GddlabError


def hashes(parts: tuple[ImageDataset, ImageDataset]) -> list[str]:
    return [p.manifest.sha256 for p in parts]


def test_parts_by_name_and_of_a_part() -> None:
    want = [open_dataset(f"digits:{part}") for part in ("train", "held-out")]
    for data in ("digits", "digits:train", "digits:held-out", digits(), *want):
        found = parts_of(data)
        assert hashes(found) == [p.manifest.sha256 for p in want]
        assert [p.name for p in found] == ["digits:train", "digits:held-out"]
    assert [len(p) for p in want] == [1198, 599]


def test_options_stay() -> None:
    some = open_dataset("digits:train", classes=[3, 8], max_images=20)
    own, other = parts_of(some)
    assert own is some
    assert other.manifest.sha256 == open_dataset("digits:held-out", classes=[3, 8]).manifest.sha256
    part = open_dataset("digits:held-out", max_images=9)
    own, other = parts_of(part)
    assert other is part and own.manifest.sha256 == open_dataset("digits:train").manifest.sha256


def test_a_whole_with_options_is_divided_itself() -> None:
    some = open_dataset("digits", max_images=60)
    first, second = parts_of(some)
    assert len(first) + len(second) == 60 and len(second) == pytest.approx(20, abs=5)
    rows = {x.tobytes() for x in some.uint8}
    assert {x.tobytes() for part in (first, second) for x in part.uint8} == rows


def test_parts_by_path(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    d = digits()
    assert d.class_ids is not None
    np.savez(path, d.uint8[:90], d.class_ids[:90])
    want = hashes(parts_of(path))
    assert hashes(parts_of(f"{path}:held-out")) == hashes(parts_of(open_dataset(f"{path}:train"))) == want
    part = open_dataset(f"{path}:train")
    np.savez(path, d.uint8[1:91], d.class_ids[1:91])
    with pytest.raises(GddlabError, match="'set:train' is a part of a data set that is not found again"):
        parts_of(part)
    assert hashes(parts_of(ImageDataset(d.uint8[:90], d.class_ids[:90], classes=10, name="set", source="x"))) == want
