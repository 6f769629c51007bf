"""Images as arrays, .npz, .npy and lists of Pillow images: what is read, and what is refused in one line."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gddlab.datasets import ImageDataset, digits, open_dataset, prepare, readers
from gddlab.errors import GddlabError
from tests.datasets.conftest import picture

RGB = np.stack([np.asarray(picture(seed=i)) for i in range(5)])
GREY = RGB[..., :1]


def npy(path: Path, images: np.ndarray) -> Path:
    np.save(path / "set.npy", images)
    return path / "set.npy"


def npz(path: Path, images: np.ndarray) -> Path:
    np.savez(path / "set.npz", images)
    return path / "set.npz"


def compressed(path: Path, images: np.ndarray) -> Path:
    np.savez_compressed(path / "set.npz", images=images)
    return path / "set.npz"


def pillow(path: Path, images: np.ndarray) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x) for x in images]


FORMS = {"array": lambda path, x: x, "npy": npy, "npz": npz, "compressed": compressed, "pillow": pillow}
FORMS |= {"read only": lambda path, x: np.frombuffer(x.tobytes(), np.uint8).reshape(x.shape)}
FORMS |= {"arrays": lambda path, x: list(x), "tuple": lambda path, x: tuple(pillow(path, x))}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("images", [RGB, GREY], ids=["rgb", "grey"])
@pytest.mark.parametrize("form", FORMS)
def test_all_forms_hold_the_same_images(
    form: str, images: np.ndarray, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(readers, "usable_memory", lambda: (0, 0))
    given = FORMS[form](tmp_path, images)
    data = open_dataset(given, memory="ram")
    assert np.array_equal(data.uint8, images)
    assert data.manifest.sha256 == open_dataset(images).manifest.sha256
    if form in ("npy", "npz"):
        assert isinstance(data.uint8.base, np.memmap) == large
        assert data.manifest.source == str(given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of arrays that cannot be written
        assert torch.equal(data.images(slice(2)), open_dataset(images).images(slice(2)))
    made = prepare(given, tmp_path / "out.zip", workers=1, progress=False)
    assert made.sha256 == data.manifest.sha256


def test_grey_images_need_no_channel() -> None:
    assert np.array_equal(open_dataset(GREY[..., 0]).uint8, GREY)
    assert np.array_equal(open_dataset(list(GREY[..., 0])).uint8, GREY)


def test_class_ids_of_adm(tmp_path: Path) -> None:
    np.savez(tmp_path / "samples_5x8x8x3.npz", RGB, np.array([2, 0, 1, 2, 2]))
    data = open_dataset(tmp_path / "samples_5x8x8x3.npz")
    assert data.class_ids is not None
    assert (data.class_ids.tolist(), data.classes) == ([2, 0, 1, 2, 2], 3)
    assert len(open_dataset(tmp_path / "samples_5x8x8x3.npz", classes=[2], xflip=True)) == 6


def test_images_that_are_not_square_are_prepared(tmp_path: Path) -> None:
    wide = np.stack([np.asarray(picture(8, 12, seed=i)) for i in range(3)])
    for given in (wide, list(wide), npz(tmp_path, wide)):
        with pytest.raises(GddlabError, match=r"not square \(12x8\)"):
            open_dataset(given)
        out = tmp_path / "out.zip"
        prepare(given, out, crop="center", overwrite=True, workers=1, progress=False)
        assert np.array_equal(open_dataset(out).uint8, wide[:, :, 2:10])


def test_pillow_images_are_held_to_what_files_are() -> None:
    with pytest.raises(GddlabError, match="00000001: alpha channel"):
        open_dataset([picture(), picture().convert("RGBA")])
    with pytest.raises(GddlabError, match=r"00000001: colours differ \(mode 1, the first has RGB\)"):
        open_dataset([picture(), picture().convert("1")])
    with pytest.raises(GddlabError, match=r"gddlab.prepare\(images, dry_run=True\) lists all"):
        open_dataset([picture().convert("RGBA")] * 5)


def write(make: Callable[..., Any], **arrays: Any) -> Callable[[Path], Path]:
    def written(path: Path) -> Path:
        make(path / "x.npz", **arrays)
        return path / "x.npz"

    return written


def text(path: Path) -> Path:
    (path / "x.npz").write_text("hello")
    return path / "x.npz"


def cut(path: Path) -> Path:
    whole = npy(path, RGB)
    whole.write_bytes(whole.read_bytes()[:-9])
    return whole


OBJECTS = np.array([{"a": 1}], dtype=object)
REFUSED: dict[str, tuple[Any, str]] = {
    "float": (RGB / 127.5 - 1, r"float64 \(5, 8, 8, 3\): give uint8 \(N, H, W, 1 or 3\); of x in \[-1, 1\]"),
    "int64": (RGB.astype(np.int64), r"int64 \(5, 8, 8, 3\): give uint8"),
    "nchw": (RGB.transpose(0, 3, 1, 2), r"as x.transpose\(0, 2, 3, 1\) is"),
    "one image": (RGB[0], r"uint8 \(8, 8, 3\): give uint8 \(N"),
    "alpha": (np.zeros((2, 8, 8, 4), np.uint8), r"\(2, 8, 8, 4\): give uint8"),
    "none": (RGB[:0], "at least one image"),
    "empty list": ([], "at least one image"),
    "lists": (RGB.tolist(), "image 0 of the list is a list: give Pillow images, or arrays"),
    "paths": (["a.png"], "image 0 of the list is a str: give Pillow images"),
    "floats": ([RGB[0], RGB[1] / 255], r"image 1 of the list is float64 \(8, 8, 3\): give Pillow images"),
    "tensor": (torch.zeros(2, 3, 8, 8), "data=<Tensor>: give a name, a path"),
    "number": (3, "data=3: give a name, a path"),
    "nothing": (None, "data=None: give a name, a path"),
    "statistics": (write(np.savez, mu=np.zeros(3), sigma=np.eye(3)), "statistics, no images: .* evaluate as data="),
    "two arrays": (write(np.savez, x=RGB, y=RGB), "holds x, y: give the images as arr_0, and class ids as arr_1"),
    "no array": (write(np.savez), "holds nothing: give the images as arr_0"),
    "labels": (write(np.savez, arr_0=RGB, arr_1=np.zeros(4)), r"labels are float64 \(4,\): give integers from 0 up, "),
    "negative": (write(np.savez, arr_0=RGB, arr_1=np.full(5, -1)), "labels are int64"),
    "classes": (write(np.savez, arr_0=RGB, arr_1=np.full(5, 10**9)), "label is 1000000000, accepted are 0..99999"),
    "objects": (write(np.savez, arr_0=OBJECTS), "cannot be read as arrays .*allow_pickle=False"),
    "text": (text, "plain text .*a dataset is an EDM zip, a folder of images, a .npz or .npy of them"),
    "cut off": (cut, "set.npy cannot be read as arrays"),
}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_no_images_is_refused(
    name: str, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(readers, "usable_memory", lambda: (0, 0))
    given, message = REFUSED[name]
    with pytest.raises(GddlabError, match=message) as refused:
        open_dataset(given(tmp_path) if callable(given) and not isinstance(given, torch.Tensor) else given)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("codec", "lossy"),
    [
        ("png", []),
        ("jpg", ["JPEG"]),
        ("jfif+jpeg+png", ["JPEG"]),
        ("jpe to png by Pillow 12.0", ["JPEG"]),
        ("webp", ["WebP"]),
        ("png by Pillow 12.0", []),
        ("none", None),
        ("unknown", None),
        ("unknown to png by Pillow 12.0", None),
    ],
)
def test_a_manifest_knows_whether_images_were_compressed_with_loss(codec: str, lossy: list[str] | None) -> None:
    found = ImageDataset(digits().uint8[:2], name="some", source="digits", codec=codec).manifest.lossy
    assert found == (None if lossy is None else frozenset(lossy))
