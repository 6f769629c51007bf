"""CIFAR-10's archive: read as published, without unpickling; anything else is refused."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gddlab.datasets import open_dataset
from gddlab.errors import GddlabError, NotFound
from gddlab.pickles import Blob, Budget, PickleReader, Refused, find_plain

ROWS = 4


def batch(k: int) -> tuple[np.ndarray, list[int]]:
    data = np.random.default_rng(k).integers(0, 256, (ROWS, 3072), dtype=np.uint8)
    return data, [(k + i) % 10 for i in range(ROWS)]


def python2_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    """The opcodes of Python 2's cPickle, protocol 2, as the published batches have them."""

    def text(s: bytes) -> bytes:
        return b"U" + bytes([len(s)]) + s

    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85q\tU\x01bq\n\x87q\x0bRq\x0c("
    array += b"K\x01" + b"K" + bytes([len(data)]) + b"M" + struct.pack("<H", 3072) + b"\x86q\r"
    array += b"cnumpy\ndtype\nq\x0eU\x02u1q\x0fK\x00K\x01\x87q\x10Rq\x11(K\x03U\x01|q\x12NNN"
    array += (
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x13b\x89T"
        + struct.pack("<I", data.size)
        + data.tobytes()
        + b"tq\x14b"
    )
    numbers = b"](" + b"".join(b"K" + bytes([y]) for y in labels) + b"e"
    names = b"](" + b"".join(text(b"cat_s_%06d.png" % i) for i in range(len(labels))) + b"e"
    pairs = (b"batch_label", text(b"training batch")), (b"labels", numbers), (b"data", array), (b"filenames", names)
    return b"\x80\x02}q\x01(" + b"".join(text(key) + value for key, value in pairs) + b"u."


def python3_pickle(data: np.ndarray, labels: list[int], protocol: int = 4) -> bytes:
    return pickle.dumps({b"labels": labels, b"data": data, b"filenames": ["a"] * len(labels)}, protocol=protocol)


def archive(path: Path, batches: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in {"batches.meta": b"", **batches, "readme.html": b""}.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def batches(make: Callable[..., bytes] = python2_pickle) -> dict[str, bytes]:
    return {f"data_batch_{k}": make(*batch(k)) for k in range(1, 6)}


@pytest.mark.parametrize("make", [python2_pickle, python3_pickle, lambda *a: python3_pickle(*a, protocol=2)])
def test_archive_gives_images_and_labels_in_order(tmp_path: Path, make: Callable[..., bytes]) -> None:
    data = open_dataset(archive(tmp_path / "cifar-10-python.tar.gz", batches(make)))
    rows = np.concatenate([batch(k)[0] for k in range(1, 6)])
    assert np.array_equal(data.uint8, rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    assert data.class_ids is not None
    assert data.class_ids.tolist() == [y for k in range(1, 6) for y in batch(k)[1]]
    assert data.classes == 10
    assert data.manifest.extra["class_names"][:3] == ["airplane", "automobile", "bird"]


def test_column_order_is_honoured(tmp_path: Path) -> None:
    def fortran(data: np.ndarray, labels: list[int]) -> bytes:
        return python3_pickle(np.asfortranarray(data), labels)

    c, f = (open_dataset(archive(tmp_path / f"{m.__name__}.tar.gz", batches(m))) for m in (python2_pickle, fortran))
    assert np.array_equal(c.uint8, f.uint8)


def test_the_places_are_searched_in_order(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home, work, cache):
        folder.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("GDDLAB_HOME", str(home))
    with pytest.raises(NotFound, match=r"put https://.*cifar-10-python.* in \$GDDLAB_HOME, or give download=True") as e:
        open_dataset("cifar10")
    assert str(cache / "datasets" / "cifar-10-python.tar.gz") in str(e.value)
    for k, folder in enumerate((cache, cache / "datasets", home, work), 20):  # each goes before the last
        unpacked = folder / "cifar-10-batches-py"
        unpacked.mkdir(parents=True)
        first = batches() | {"data_batch_1": python2_pickle(*batch(k))}
        for name, content in first.items():
            (unpacked / name).write_bytes(content)
        expected = batch(k)[0][0].reshape(3, 32, 32).transpose(1, 2, 0)
        assert np.array_equal(open_dataset("cifar10").uint8[0], expected)
        assert np.array_equal(open_dataset(folder).uint8[0], expected)


def test_a_download_is_checked_by_its_hash(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def retrieve(url: str, known_hash: str, fname: str, path: Path, downloader: Any) -> None:
        asked.append((url, known_hash))
        archive(path / fname, batches())

    monkeypatch.setattr("pooch.retrieve", retrieve)
    monkeypatch.chdir(tmp_path)
    assert len(open_dataset("cifar10", download=True)) == 5 * ROWS
    assert asked == [
        ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "md5:c58f30108f718f92721af3b95e74349a")
    ]
    (cache / "datasets" / "cifar-10-python.tar.gz").unlink()

    def fails(*args: object, **kwargs: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("pooch.retrieve", fails)
    with pytest.raises(GddlabError, match=r"CIFAR-10 \(Network is unreachable\): put https://.* \(170 MB\)"):
        open_dataset("cifar10", download=True)
    monkeypatch.setenv("GDDLAB_OFFLINE", "1")
    with pytest.raises(GddlabError, match="GDDLAB_OFFLINE is set"):
        open_dataset("cifar10", download=True)


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def wrong(content: bytes, tmp_path: Path) -> str:
    path = archive(tmp_path / "cifar-10-python.tar.gz", batches() | {"data_batch_3": content})
    with pytest.raises(GddlabError) as e:
        open_dataset(path)
    text = str(e.value)
    assert "data_batch_3" in text
    assert "\n" not in text
    return text


def test_wrong_batches_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, labels = batch(3)
    assert "it names posix.system, which is not accepted" in wrong(pickle.dumps({"data": Runs()}), tmp_path)
    assert not (tmp_path / "pwned").exists()
    for content in (
        python3_pickle(data.astype(np.int16), labels),
        python3_pickle(data[:, :3000], labels),
        python3_pickle(data.reshape(-1), labels),
        python3_pickle(data, labels[:-1]),
        python3_pickle(data, [10, *labels[1:]]),
        python3_pickle(data, [True, *labels[1:]]),
        python3_pickle(data, ["0", *labels[1:]]),
        pickle.dumps({"data": data}),
        pickle.dumps({"data": [1], "labels": labels}),
        pickle.dumps([1]),
        pickle.dumps({"labels": labels, "data": np.array([object()])}),
        python2_pickle(data, labels)[:-2000],
        b"",
        b"<html>",
        b"\x80\x02}U\x04data" + b"T" + struct.pack("<I", 2**32 - 1) + b"x",  # four gigabytes are promised
        b"\x80\x02" + b"r" + struct.pack("<I", 2**32 - 1) + b".",  # a memo of four thousand million places
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
        b"\x80\x02}(" + b"(" * 100_000 + b"t" * 100_000 + b"K\x00u.",  # a key nested 100,000 deep
        b"\x80\x02(cnumpy\nndarray\no.",
        b"\x80\x02cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R.",  # ndarray(2**31)
    ):
        assert "no batch of CIFAR-10" in wrong(content, tmp_path)


def test_every_cut_and_change_is_refused_or_harmless() -> None:
    content = python3_pickle(np.zeros((1, 3072), dtype=np.uint8), [0])
    head = len(content) - 3072
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(3000):
        broken = bytearray(content)
        for at in rng.integers(0, len(content), 3):
            broken[at if at < head // 2 else -1 - at % (head // 2)] = rng.integers(0, 256)
        cut = bytes(broken[: rng.integers(1, len(broken))] if rng.random() < 0.3 else broken)
        try:
            PickleReader(Blob(memoryview(cut), 0), find=find_plain, budget=Budget()).read()
        except Refused:
            refused += 1
    assert 1000 < refused < 3000


def test_wrong_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    four = batches()
    del four["data_batch_2"]
    with pytest.raises(GddlabError, match="has no cifar-10-batches-py/data_batch_2"):
        open_dataset(archive(path, four))
    path.write_bytes(archive(path, batches()).read_bytes()[:20_000])
    with pytest.raises(GddlabError, match=r"cannot be read as a tar archive .*: fetch it again"):
        open_dataset(path)
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        info.size = 80 << 20
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    with pytest.raises(GddlabError, match=r"data_batch_1 has 83,886,080 bytes, accepted are 67,108,864"):
        open_dataset(path)
