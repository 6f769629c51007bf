"""Files that attack the reader of pickles: each is refused in one line, with bounded memory and no side effect.

`refusals.txt` holds every reason; `python -m tests.teachers.test_attacks` writes it again, to be read by eye.
"""

from __future__ import annotations

import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from gddlab.nets import Precond
from tests.conftest import tiny_net
from tests.teachers.attacks import (
    AMPLIFIERS,
    BOMBS,
    CALLS,
    MARK,
    MB,
    ONE,
    PLACES,
    SYSTEM,
    corpus,
    legacy,
    load,
    measure,
    small_net,
    watched,
    zipped,
)
from tests.teachers.pickles import call, name, opcodes, snapshot, text

REFUSALS = Path(__file__).with_name("refusals.txt")
CORPUS = corpus()
EXPECTED = dict(line.split(" | ", 1) for line in REFUSALS.read_text().splitlines()) if REFUSALS.exists() else {}


@pytest.fixture(autouse=True)
def _nothing_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / MARK).exists()


def reason(path: Path, content: bytes) -> str:
    """Why `path` is refused, the form of the message checked; "" if it is not."""
    path.write_bytes(content)
    net, message = load(path)
    if net is not None:
        assert all(torch.isfinite(t).all() for t in net.state_dict().values())
        return ""
    assert message.isprintable() and len(message) < 900, message
    if " is refused at " not in message:
        return message.removeprefix(f"{path} ")  # it is no pickle at all
    found = re.fullmatch(re.escape(str(path)) + r" is refused at byte ([\d,]+): (.{12,})", message)
    assert found, message
    assert int(found[1].replace(",", "")) <= len(content), message
    return re.sub("(from its arguments|BINUNICODE): .*", r"\1", found[2])  # the rest is Python's and torch's wording


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """Python's own reader does what they ask for."""
    for attack in (SYSTEM, CALLS["eval"], CALLS["open"]):
        pickle.loads(opcodes(attack))
        (tmp_path / MARK).unlink()


def test_the_watch_sees(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    with watched(tmp_path / "x"):
        (tmp_path / "x").read_bytes()
    with pytest.raises(AssertionError, match="open"), watched(tmp_path / "x"):
        (tmp_path / "y").write_bytes(b"")
    with pytest.raises(AssertionError, match="compile"), watched(tmp_path / "x"):
        eval("1")
    with pytest.raises(AssertionError, match=r"os\.system"), watched(tmp_path / "x"):
        os.system("true")


@pytest.mark.parametrize("attack", CORPUS)
def test_every_attack_is_refused(attack: str, tmp_path: Path) -> None:
    assert reason(tmp_path / "x.pkl", CORPUS[attack]) == EXPECTED[attack]


def test_every_call_is_refused_at_every_place(tmp_path: Path) -> None:
    calls = ["eval", "a dotted name", "an INST", "a name with a newline"]
    for where, hide in PLACES.items():
        for what in calls:
            assert reason(tmp_path / "x.pkl", hide(small_net(), CALLS[what])), (where, what)


def test_the_offset_is_exact(tmp_path: Path) -> None:
    """Also inside storages: the byte in the file, where the opcode stands that names the function."""
    for where, hide in PLACES.items():
        content = hide(small_net(), SYSTEM)
        (tmp_path / "x.pkl").write_bytes(content)
        assert f"at byte {content.index(SYSTEM):,}: " in load(tmp_path / "x.pkl")[1], where


def test_what_follows_the_pickle_is_not_read(tmp_path: Path) -> None:
    assert reason(tmp_path / "x.pkl", snapshot(small_net()) + opcodes(SYSTEM)) == ""


def test_source_in_a_pickle_is_text(tmp_path: Path) -> None:
    """Every module of a snapshot carries source that would end the process."""
    content = snapshot(tiny_net())
    assert content.count(b"raise SystemExit") and reason(tmp_path / "x.pkl", content) == ""


@pytest.mark.parametrize(("protocol", "net"), [(2, small_net), (4, tiny_net)])
def test_cut_off_files(protocol: int, net: Callable[[], Precond], tmp_path: Path) -> None:
    content = snapshot(net(), protocol=protocol)
    for end in (0, 1, 2, *range(1000, len(content), 1000), len(content) - 1):
        assert reason(tmp_path / "x.pkl", content[:end]), end


def test_tiny_files_cut_off_at_every_byte(tmp_path: Path) -> None:
    tensor = call(name("torch._utils", "_rebuild_tensor_v2"), ONE, b"K\0", b"(K\1t", b"(K\1t", b"\x89", b"}")
    for content in (opcodes("}", text("ema"), tensor, "s"), legacy(tensor), zipped(tensor)):
        for end in range(len(content)):
            assert reason(tmp_path / "x.pkl", content[:end]), end


def test_flipped_bits(tmp_path: Path) -> None:
    content, rng = bytearray(snapshot(small_net())), np.random.default_rng(0)
    loaded = 0
    for at in rng.integers(0, 8 * len(content), 150):
        content[at // 8] ^= 1 << at % 8
        loaded += reason(tmp_path / "x.pkl", bytes(content)) == ""
        content[at // 8] ^= 1 << at % 8
    assert 30 < loaded < 150  # bits of weights, of text that says nothing; and bits that matter


def test_zips_that_mislead(tmp_path: Path) -> None:
    """A directory twice, outside, or larger than it says; entries that overlap or are compressed."""
    valid = zipped(b"N")
    end = valid.rindex(b"PK\5\6")
    for at, field in ((12, b"\xff" * 4), (16, b"\xff" * 4), (10, b"\xff\xff"), (16, bytes(4))):
        broken = bytearray(valid)
        broken[end + at : end + at + len(field)] = field
        assert reason(tmp_path / "x.pt", bytes(broken)), at
    first = valid.index(b"PK\1\2")
    for at, field in (
        (10, b"\x08\0"),
        (8, b"\1\0"),
        (24, b"\xff" * 4),
        (42, b"\xff" * 4),
        (28, b"\xff\xff"),
        (20, b"\0"),
    ):
        broken = bytearray(valid)
        broken[first + at : first + at + len(field)] = field
        assert reason(tmp_path / "x.pt", bytes(broken)), at
    assert "damaged zip" in reason(tmp_path / "x.pt", valid[:end])


def _measure(folder: Path, n: int) -> None:
    for attack, write in AMPLIFIERS.items():
        (folder / f"{attack}.pkl").write_bytes(write(n))
    files = [folder / f"{attack}.pkl" for attack in AMPLIFIERS]
    for path, taken in zip(files, measure(files), strict=True):
        size = path.stat().st_size / MB
        assert taken["mib"] < 3 * size + 200, (path.name, size, taken)
        assert taken["s"] < 20 * max(1.0, size / 10), (path.name, size, taken)
        assert re.match(rf"{re.escape(str(path))} is |\d+ parameters", taken["end"]), (path.name, taken)


def test_little_memory_and_time(tmp_path: Path) -> None:
    """Peak memory below three times the file's size plus 200 MiB."""
    _measure(tmp_path, MB // 8)


def test_small_files_that_ask_for_terabytes(tmp_path: Path) -> None:
    bombs = {
        attack: opcodes(bomb) for attack, bomb in BOMBS.items() if re.search("terabytes|2\\*\\*|gigabytes", attack)
    }
    files = [tmp_path / f"{i}.pkl" for i in range(len(bombs))]
    for path, bomb in zip(files, bombs.values(), strict=True):
        path.write_bytes(bomb)
        assert len(bomb) < 600
    for attack, taken in zip(bombs, measure(files), strict=True):
        assert taken["mib"] < 10 and taken["s"] < 5 and "refused" in taken["end"], (attack, taken)


@pytest.mark.slow
def test_little_memory_and_time_at_size(tmp_path: Path) -> None:
    _measure(tmp_path, 30 * MB)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        lines = [f"{attack} | {reason(Path('x.pkl'), content)}\n" for attack, content in CORPUS.items()]
    REFUSALS.write_text("".join(lines))
