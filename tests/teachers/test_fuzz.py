"""Random bytes of many kinds: each file gives a network or one refusal, in little time, with no side effect."""

from __future__ import annotations

import io
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gddlab.teachers import dit
from tests.nets.test_dit import tiny_dit
from tests.teachers.attacks import (
    CALLS,
    FLOAT,
    MAGIC,
    ONE,
    corpus,
    in_bytes,
    legacy,
    load,
    small_edm2,
    small_net,
    tensor,
    u64,
    zipped,
)
from tests.teachers.pickles import name, opcodes, snapshot, snapshot2, text
from tests.teachers.test_dit import checkpoint


def torch_file(content: dict[str, Any], new: bool) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=new)
    return out.getvalue()


SNAPSHOTS = [snapshot(small_net(), protocol=p, zipped=z) for p, z in ((2, False), (3, True), (4, False), (5, True))]
SNAPSHOTS += [snapshot2(small_edm2(label_dim=2)), snapshot2(small_edm2(img_channels=3), protocol=2)]
VIEWS = {"x": torch.arange(6.0).view(2, 3).T, "y": torch.ones(2).half()}
SMALL_DIT = tiny_dit("dit", img_resolution=4, model_channels=4, num_heads=1, num_blocks=1)
TORCH_FILES = [torch_file(VIEWS, new) for new in (False, True)]
TRAINED = [torch_file(checkpoint(SMALL_DIT, model="DiT-XL/2"), new) for new in (False, True)]
ATTACKS = [c for c in corpus().values() if len(c) < 2000]

# A file of opcodes, most of them with arguments that make sense.
NAMES = [
    name("collections", "OrderedDict"),
    name("torch._utils", "_rebuild_tensor_v2"),
    name("dnnlib.util", "EasyDict"),
]
NAMES += [name("torch_utils.persistence", "_reconstruct_persistent_obj"), name("torch.nn.modules.linear", "Linear")]
NAMES += [
    name("torch.storage", "_load_from_bytes"),
    name("numpy.core.multiarray", "_reconstruct"),
    name("numpy", "dtype"),
]
NAMES += [
    name("numpy._core.multiarray", "scalar"),
    name("builtins", "set"),
    name("_codecs", "encode"),
    name("torch", "Size"),
]
NAMES += [name("torch", "FloatStorage"), name("os", "system"), name("numpy", "ndarray"), name("builtins", "bytearray")]
TEXTS = [
    "ema",
    "type",
    "class",
    "class_name",
    "state",
    "EDMPrecond",
    "Precond",
    "encoder",
    "StabilityVAEEncoder",
    "scale",
    "_modules",
    "_parameters",
    "model",
    "latin1",
    "f4",
    "<",
]
number = st.one_of(st.integers(0, 3), st.integers(-(2**31), 2**31 - 1))
opcode = st.one_of(
    st.sampled_from(list(b"(01N\x88\x89)]}\x8f\x85\x86\x87taesub\x90\x91R\x81\x92\x93\x94Q.")).map(
        lambda c: bytes([c])
    ),
    st.sampled_from(NAMES),
    st.sampled_from(TEXTS).map(text),
    st.sampled_from([ONE, FLOAT + b"K\1NtQ", tensor(ONE), b"C\4" + bytes(4), *CALLS.values()]),
    st.integers(0, 9).flatmap(lambda i: st.sampled_from([b"h" + bytes([i]), b"q" + bytes([i])])),
    number.map(lambda n: b"J" + struct.pack("<i", n)),
    st.floats().map(lambda x: b"G" + struct.pack(">d", x)),
    st.binary(max_size=20).map(lambda b: b"C" + bytes([len(b)]) + b),
    st.binary(max_size=20).map(lambda b: b"\x8a" + bytes([len(b)]) + b),
    st.tuples(st.sampled_from(b"XB\x8d\x8e\x96\x95\x8bcjr"), st.binary(max_size=12)).map(
        lambda t: bytes([t[0]]) + t[1]
    ),
)
programs = st.lists(opcode, max_size=60).map(b"".join)
structured = st.one_of(
    programs.map(opcodes),
    programs.map(lambda p: opcodes(in_bytes(legacy(p, tail=u64(1) + bytes(4))))),
    programs.map(lambda p: opcodes(in_bytes(zipped(p, **{"0": bytes(4)})))),
    programs.map(lambda p: legacy(FLOAT + b"K\1NtQ", keys=p, tail=bytes(12))),
    programs.map(zipped),
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid file or an attack, cut, spliced, doubled or with other numbers in it, at a few places."""
    content = bytearray(draw(st.one_of(*map(st.sampled_from, (SNAPSHOTS, TORCH_FILES, TRAINED, ATTACKS)))))
    for _ in range(draw(st.integers(1, 6))):
        if not content:
            break
        at, n = draw(st.integers(0, len(content) - 1)), draw(st.integers(1, 64))
        change = draw(st.sampled_from(["flip", "delete", "double", "length", "splice", "end"]))
        if change == "flip":
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "delete":
            del content[at : at + n]
        elif change == "double":
            content[at:at] = content[at : at + n]
        elif change == "length":
            wide = draw(st.sampled_from([1, 4, 8]))
            new = draw(st.sampled_from([0, 1, 255, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]))
            content[at : at + wide] = (new % 256**wide).to_bytes(wide, "little")
        elif change == "splice":
            other = draw(st.sampled_from(ATTACKS + TORCH_FILES))
            content[at:at] = other[2:-1][: draw(st.integers(1, 500))]
        else:
            del content[at:]
    return bytes(content)


heads = [
    b"\x80\2",
    b"\x80\3",
    b"\x80\4\x95",
    b"\x80\5",
    b"PK\3\4",
    TORCH_FILES[1][:600],
    MAGIC,
    SNAPSHOTS[2][:700],
    b'@\0\0\0\0\0\0\0{"',
]
headed = st.tuples(st.sampled_from(heads), st.binary(max_size=400), st.sampled_from([b"", TORCH_FILES[1][-700:]])).map(
    b"".join
)


def check(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    start = time.perf_counter()
    net, message = load(path)  # raises what is no GddlabError, and where anything is imported, run or opened
    assert time.perf_counter() - start < 10
    if net is None:
        assert message.isprintable() and len(message) < 900
    else:
        assert all(torch.isfinite(t).all() for t in net.state_dict().values())


FILES = {"opcodes": structured, "changed files": mutated(), "random bytes": headed}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "x.pkl"


@pytest.fixture(autouse=True)
def heads_of_the_small_dit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dit.HEADS, 4, 1)


@pytest.mark.parametrize("kind", FILES)
def test_fuzz(kind: str, path: Path) -> None:
    n = {"opcodes": 1500, "changed files": 400, "random bytes": 1000}[kind]
    fuzz = settings(
        max_examples=n, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    fuzz(given(FILES[kind])(lambda content: check(path, content)))()


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_fuzz_long(kind: str, path: Path) -> None:
    """Other files at every run."""
    fuzz = settings(max_examples=30_000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    fuzz(given(FILES[kind])(lambda content: check(path, content)))()
