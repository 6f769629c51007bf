"""Networks from pickles: what EDM, GDD, D2O and SiD publish loads, equal to the last bit, with none of their code."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import textwrap
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gddlab.errors import GddlabError
from gddlab.nets import Precond, from_edm, load_network
from gddlab.nets.io import make_student
from gddlab.teachers import edm, load_teacher
from gddlab.teachers.edm import read_edm, read_pickle
from gddlab.teachers.torchfiles import Storage, TensorData
from tests.conftest import tiny_net
from tests.teachers.attacks import ROOT, changed, load, small_net
from tests.teachers.pickles import dumps, easy, network, snapshot

SONG: dict[str, Any] = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
ADM: dict[str, Any] = {"model_type": "DhariwalUNet", "model_channels": 64, "channel_mult": [1], "num_blocks": 1}
NCSNPP = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
NETWORKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "EDM, DDPM++": ("EDMPrecond", "EDMPrecond", SONG),
    "EDM, NCSN++, classes, augmentation": (
        "EDMPrecond",
        "EDMPrecond",
        {**SONG, **NCSNPP, "label_dim": 10, "augment_dim": 9},
    ),
    "EDM, skip and skip": ("EDMPrecond", "EDMPrecond", {**SONG, "encoder_type": "skip", "decoder_type": "skip"}),
    "EDM, ADM, classes": ("EDMPrecond", "EDMPrecond", {**ADM, "label_dim": 5}),
    "VP": ("VPPrecond", "VPPrecond", {**SONG, "beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5}),
    "VE": ("VEPrecond", "VEPrecond", {**SONG, **NCSNPP, "sigma_min": 0.02, "sigma_max": 100}),
    "iDDPM": ("iDDPMPrecond", "iDDPMPrecond", {**ADM, "C_1": 0.001, "C_2": 0.008, "M": 50}),
    "GDD": ("OneStepPrecond", "GDDPrecond", {**SONG, **NCSNPP}),
    "D2O": ("OneStepPrecond", "D2OPrecond", {**SONG, "label_dim": 3}),
}


def made(precond: str, kwargs: dict[str, Any]) -> Precond:
    torch.manual_seed(0)
    net = from_edm(precond, img_resolution=8, img_channels=1, **kwargs)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net.eval()


def assert_same(net: Precond, loaded: Precond) -> None:
    a, b = net.state_dict(), loaded.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k].float(), b[k]) and b[k].is_contiguous() for k in a)
    assert all(not p.is_meta for p in (*loaded.parameters(), *loaded.buffers()))
    x = torch.randn(2, 1, net.img_resolution, net.img_resolution, generator=torch.Generator().manual_seed(1))
    labels = torch.eye(net.label_dim)[:2] if net.label_dim else None
    with torch.no_grad():
        assert torch.equal(net(x, 0.7, labels), loaded(x, 0.7, labels))
    json.dumps(loaded.init_kwargs, allow_nan=False)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, tmp_path: Path) -> None:
    precond, written_as, kwargs = NETWORKS[name]
    net = made(precond, kwargs)
    path = tmp_path / "network-snapshot-000001.pkl"
    path.write_bytes(snapshot(net, cls=written_as))
    loaded, meta = read_edm(path)
    assert type(loaded) is type(net)
    assert meta["original"]["class"] == written_as
    assert meta["original"]["key"] == "ema"
    assert meta["original"]["data"] == "digits-16x16.zip"
    assert_same(net, loaded)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [False, True])
def test_protocols_and_storages(protocol: int, zipped: bool, tmp_path: Path) -> None:
    net = tiny_net(label_dim=10)
    (tmp_path / "x.pkl").write_bytes(snapshot(net, protocol=protocol, zipped=zipped))
    assert_same(net, read_edm(tmp_path / "x.pkl")[0])


WRITTEN: dict[str, Callable[[Precond], bytes]] = {
    "positional arguments": lambda net: snapshot(net, args=(4, 1, 0, True)),
    "arguments in tuples": lambda net: snapshot(net, init={"resample_filter": (1, 1), "channel_mult": (1,)}),
    "sigma_max of infinity": lambda net: snapshot(net, init={"sigma_max": float("inf"), "sigma_min": 0}),
    "arguments known from attributes alone": lambda net: snapshot(net, state={"_init_args": (4, 1)}),
    "another key": lambda net: dumps({"G_ema": network(net), "data": easy(cur_nimg=7)}),
    "a network alone": lambda net: dumps(network(net)),
    "double precision": lambda net: snapshot(changed(net, lambda t: t.double())),
    "transposed weights": lambda net: snapshot(changed(net, lambda t: t.mT.contiguous().mT if t.ndim > 1 else t)),
    "channels last": lambda net: snapshot(
        changed(net, lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t)
    ),
    "weights inside larger storages": lambda net: snapshot(
        changed(net, lambda t: torch.cat([t.flatten(), t.flatten(), t.flatten()])[t.numel() : -t.numel()].view(t.shape))
    ),
    "buffers that are not kept": lambda net: snapshot(
        net, state={"_buffers": OrderedDict(scratch=torch.zeros(1)), "_non_persistent_buffers_set": {"scratch"}}
    ),
    "hooks and other state": lambda net: snapshot(
        net, state={"device": torch.Size([1, 2]), "note": "x", "seen": [1, (2.5,)]}
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_ways_of_writing(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(WRITTEN[name](small_net()))
    assert_same(small_net(), read_edm(tmp_path / "x.pkl")[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(snapshot(changed(small_net(), lambda t: t.to(dtype))))
    loaded = read_edm(tmp_path / "x.pkl")[0]
    for name, t in small_net().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], t.to(dtype).float()), name


@pytest.mark.parametrize("zipped", [False, True])
def test_torch_files_hold_what_torch_reads(zipped: bool, tmp_path: Path) -> None:
    """Every dtype, offset and stride, in both formats, against `torch.load(weights_only=True)`."""
    whole = torch.randn(3, 4, 5)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
    given = {str(d): (10 * whole).to(d) for d in (*dtypes, torch.int8, torch.uint8, torch.bool)}
    given |= {
        "part": whole[1:, 2],
        "turned": whole.permute(2, 0, 1),
        "steps": whole[:, ::2, 1::3],
        "one": whole[1, 1, 1],
    }
    given |= {"empty": torch.zeros(0, 3), "parameter": torch.nn.Parameter(whole[0])}
    torch.save(OrderedDict(given), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    read, expected = read_pickle(tmp_path / "x.pt"), torch.load(tmp_path / "x.pt", weights_only=True)
    assert read.keys() == expected.keys()
    for name, t in expected.items():
        assert isinstance(read[name], TensorData)
        got = read[name].view()
        assert got.dtype == t.dtype and got.stride() == t.stride() and torch.equal(got, t), name
    assert read["part"].storage is read["turned"].storage


def test_numpy_in_both_of_its_namespaces(tmp_path: Path) -> None:
    arrays: list[Any] = [np.arange(6, dtype="<i4").reshape(2, 3), np.asfortranarray(np.eye(3)), np.zeros((0, 2), "f2")]
    arrays += [np.arange(4, dtype=">f8"), np.ones(2, bool), np.array(7, "u1")]
    scalars = [np.float32(1.5), np.int64(-3), np.bool_(True), np.float64("nan")]
    for protocol in (2, 3, 4, 5):
        content = pickle.dumps([*arrays, *scalars], protocol)
        for here, there in ((b"numpy._core.", b"numpy._core."), (b"numpy._core.", b"numpy.core.")):
            old = content.replace(here, there) if protocol < 4 else content
            (tmp_path / "x.pkl").write_bytes(old)
            read = read_pickle(tmp_path / "x.pkl")
            for got, a in zip(read, arrays, strict=False):
                assert got.value.dtype == a.dtype and np.array_equal(got.value, a)
            np.testing.assert_array_equal(read[len(arrays) :], [s.item() for s in scalars])


STAND_INS = {
    "dnnlib/__init__.py": "from .util import EasyDict\n",
    "dnnlib/util.py": """
        class EasyDict(dict):
            def __getattr__(self, name):
                try:
                    return self[name]
                except KeyError:
                    raise AttributeError(name) from None
        """,
    "torch_utils/__init__.py": "",
    "torch_utils/persistence.py": """
        import dnnlib

        def _reconstruct_persistent_obj(meta):
            raise SystemExit("the code in a pickle was run")

        def reduce(obj):
            about = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": type(obj).__name__}
            return _reconstruct_persistent_obj, (dnnlib.EasyDict(about, state=obj.__dict__),)

        SOURCE = "raise SystemExit('the source in a pickle was run')"
        """,
    "write.py": """
        import pickle, sys
        import numpy as np, torch
        from torch import nn
        from gddlab.nets import save_network
        from tests.conftest import tiny_net
        from dnnlib import EasyDict
        from torch_utils import persistence

        def standing_in(module, *args, **kwargs):
            if isinstance(module, nn.ModuleDict):
                return nn.ModuleDict({k: standing_in(m) for k, m in module.items()})
            cls = type(type(module).__name__, (nn.Module,), {"__reduce__": persistence.reduce})
            new = cls()
            new._init_args, new._init_kwargs = args, EasyDict(kwargs)
            for k, p in module._parameters.items():
                new.register_parameter(k, p)
            for k, b in module._buffers.items():
                new.register_buffer(k, b)
            for k, m in module._modules.items():
                new.add_module(k, m and standing_in(m))
            return new.eval().requires_grad_(False)

        net = tiny_net(label_dim=10)
        save_network(net, "net.safetensors")
        net = standing_in(net, 16, 1, use_fp16=False, **{k: v for k, v in net.init_kwargs.items() if "img" not in k})
        net.img_resolution, net.img_channels, net.sigma_max, net.device = 16, 1, float("inf"), torch.device("cpu")
        extra = {"a": np.float64(0.5), "b": np.arange(3), "c": {1, 2}, "d": frozenset("x"), "e": b"bytes",
                 "f": bytearray(b"x"), "g": 2**70, "h": torch.float16, "i": torch.Size([1]),
                 "j": (None, True, -1.5, "\\u00e9"), "k": np.float32(2)}
        for protocol in (2, 3, 4, 5):
            kwargs = EasyDict(class_name="training.dataset.ImageFolderDataset", path="/somewhere/cifar10-32x32.zip")
            content = dict(ema=net, augment_pipe=None, training_set_kwargs=kwargs, extra=extra)
            with open(f"snapshot{protocol}.pkl", "wb") as f:
                pickle.dump(content, f, protocol)
        """,
}


def test_what_pickle_itself_writes_loads_without_the_code(tmp_path: Path) -> None:
    """Files by Python's own pickler from modules that stand in for EDM's, read where those do not exist."""
    for file, source in STAND_INS.items():
        (tmp_path / "theirs" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "theirs" / file).write_text(textwrap.dedent(source))
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = ['.', {str(ROOT)!r}]; exec(open('write.py').read())"]
    done = subprocess.run(command, cwd=tmp_path / "theirs", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    net = load_network(tmp_path / "theirs" / "net.safetensors")[0]
    for protocol in (2, 3, 4, 5):
        path = (tmp_path / "theirs" / f"snapshot{protocol}.pkl").rename(tmp_path / f"x{protocol}.pkl")
        assert load(path)[1] == ""  # under watch: nothing is imported, compiled or run
        loaded, meta = read_edm(path)
        assert meta["original"]["data"] == "cifar10-32x32.zip"
        assert_same(net, loaded)
        extra = read_pickle(path)["extra"]
        assert (
            extra["a"] == 0.5 and extra["c"] == {1, 2} and extra["g"] == 2**70 and extra["j"] == (None, True, -1.5, "é")
        )
        assert bytes(extra["e"].view) == b"bytes" and bytes(extra["f"].view) == b"x"
        assert extra["b"].value.tolist() == [0, 1, 2] and extra["i"] == (1,) and extra["k"] == 2
    assert not {"torch_utils", "dnnlib"} & sys.modules.keys()


def test_weights_are_copies(tmp_path: Path) -> None:
    """A network does not change with its file, nor the file with the network."""
    path = tmp_path / "x.pkl"
    path.write_bytes(before := snapshot(small_net()))
    loaded = read_edm(path)[0]
    with torch.no_grad():
        for p in loaded.parameters():
            p.zero_()
    assert path.read_bytes() == before
    loaded = read_edm(path)[0]
    with path.open("r+b") as f:
        f.write(bytes(len(before)))
    assert_same(small_net(), loaded)


@pytest.mark.parametrize("kind", ["teacher", "student"])
@pytest.mark.parametrize("key", [None, "ema"])
def test_our_own_networks_pickled_by_torch(kind: str, key: str | None, tmp_path: Path) -> None:
    net: Precond = made("EDMPrecond", {**SONG, "label_dim": 3})
    net = net if kind == "teacher" else make_student(net).eval()  # type: ignore[arg-type]
    torch.save(net if key is None else {key: net}, tmp_path / "net.pt")
    loaded = load_teacher(tmp_path / "net.pt")
    assert type(loaded) is type(net) and loaded.init_kwargs == net.init_kwargs | {"sigma_data": 0.5}
    assert_same(net, loaded)


def test_weights_alone_are_taken_where_they_fit_one_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"img_resolution": 8, "img_channels": 1, **SONG}
    table = {"plain": ("EDMPrecond", small), "augmented": ("EDMPrecond", {**small, "augment_dim": 9})}
    table |= {"augmented, more dropout": ("EDMPrecond", {**small, "augment_dim": 9, "dropout": 0.3})}
    monkeypatch.setattr(edm, "ARCHITECTURES", table)
    plain, augmented = made("EDMPrecond", SONG), made("EDMPrecond", {**SONG, "augment_dim": 9})
    file = tmp_path / "weights.pt"
    for content in (augmented.state_dict(), {"ema": augmented.state_dict()}, {"state_dict": augmented.state_dict()}):
        torch.save(content, file)
        assert_same(augmented, load_teacher(file))
    whose = "which fit plain and a student of plain and a student of augmented .*: net.load_state_dict them into"
    foreign = "of no network that gddlab knows: give an EDM .pkl, or a .safetensors file that gddlab wrote; gddlab.wrap"
    other = {**augmented.state_dict(), "model.map_layer0.bias": torch.zeros(3)}
    for weights, message in (
        (plain.state_dict(), whose),
        (other, foreign),
        (torch.nn.Linear(2, 2).state_dict(), foreign),
    ):
        torch.save({"ema": weights}, file)
        with pytest.raises(GddlabError, match=f"weights.pt holds weights alone, .* the first, {message}") as refused:
            load_teacher(file)
        assert "\n" not in str(refused.value)


def test_storages_stay_in_the_file(tmp_path: Path) -> None:
    out = io.BytesIO()
    torch.save({"x": torch.arange(4.0)}, out)
    (tmp_path / "x.pt").write_bytes(out.getvalue())
    x = read_pickle(tmp_path / "x.pt")["x"]
    assert isinstance(x.storage, Storage) and isinstance(x.storage.data, memoryview)
    values: Tensor = x.view()
    assert values.tolist() == [0, 1, 2, 3]
