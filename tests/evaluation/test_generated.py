"""Features of generated images: kept by content, and shared by processes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from gddlab import cli
from gddlab.datasets import ImageDataset
from gddlab.errors import GddlabError
from gddlab.evaluation import evaluate, features
from gddlab.evaluation import images as generated
from gddlab.evaluation.features import GeneratedImages
from gddlab.nets import Conditioning, save_network
from gddlab.nets import Path as NoisePath
from gddlab.ranks import share
from gddlab.sampling import Sampler, sample, sample_files
from gddlab.teachers import wrap
from tests.conftest import tiny_net
from tests.evaluation.conftest import subset
from tests.evaluation.test_evaluate import network
from tests.models import CHANNELS, FACTOR, SIDE, pipeline, vae


def test_a_second_evaluation_neither_samples_nor_extracts(some, counter, monkeypatch, cache):
    net = network()
    first = evaluate(net, data=some, metrics="kid").records[0]
    assert counter == [64, 64]
    monkeypatch.setattr("gddlab.evaluation.features.draw", lambda *a, **k: pytest.fail("sampled again"))
    again = evaluate(net, data=some, metrics=("kid", "mind")).records[0]
    assert counter == [64, 64]
    assert (again.value, again.images_sha256) == (first.value, first.images_sha256)


def test_whatever_images_depend_on_is_in_the_key(some, counter):
    net = network()
    about = {"data": some, "metrics": "kid", "n": 4}
    evaluate(net, **about)
    evaluate(net, seed=1, **about)
    evaluate(net, sigmas=(40.0,), **about)
    evaluate(net, data=subset(9, 73), metrics="kid", n=4)  # other labels
    evaluate(net, extractor="lite0", **about)
    evaluate(net, data=some, metrics="kid", n=5)
    evaluate(net.double(), **about)
    with torch.no_grad():
        next(net.parameters()).mul_(1.01)
    evaluate(net, **about)
    files = list(Path(os.environ["GDDLAB_CACHE"]).glob("generated/*"))
    assert len(files) == 8


def test_a_damaged_file_is_made_again(some, counter, cache):
    net = network()
    want = evaluate(net, data=some, metrics="kid", n=8).records[0]
    (file,) = (cache / "generated").iterdir()
    whole = bytearray(file.read_bytes())
    for damaged in (b"", bytes(whole[:500]), b"no tensors", bytes(whole[:-9] + b"\x7f" + whole[-8:])):
        file.write_bytes(damaged)
        before = len(counter)
        got = evaluate(net, data=some, metrics="kid", n=8).records[0]
        assert (got.value, got.images_sha256) == (want.value, want.images_sha256)
        again = evaluate(net, data=some, metrics="kid", n=8).records[0]  # from the file that replaced it
        assert counter[before:] == [8]
        assert again.images_sha256 == want.images_sha256


def test_the_cache_keeps_what_was_used_last(some, counter, cache, monkeypatch):
    net = network()
    for seed in (0, 1):
        evaluate(net, data=some, metrics="kid", n=8, seed=seed)
    files = {p.name for p in (cache / "generated").iterdir()}
    old = min((cache / "generated").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    for p in (cache / "generated").iterdir():
        os.utime(p, (1, 1) if p == old else (2, 2))
    monkeypatch.setattr(generated, "KEEP_GIB", 2.5 * old.stat().st_size / 2**30)
    evaluate(net, data=some, metrics="kid", n=8, seed=2)
    left = {p.name for p in (cache / "generated").iterdir()}
    assert len(files) == len(left) == 2 and old.name not in left


def test_memory_follows_features_not_images(some, counter, monkeypatch):
    """At no time are more images alive than a batch."""
    alive, most = 0, 0
    real = GeneratedImages.batch

    def batch(self, start, stop):
        nonlocal alive, most
        x = real(self, start, stop)
        alive += len(x)
        most = max(most, alive)
        weakref.finalize(x, drop, len(x))
        return x

    def drop(n):
        nonlocal alive
        alive -= n

    monkeypatch.setattr(GeneratedImages, "batch", batch)
    monkeypatch.setattr(features, "RECENT_BYTES", 0)  # these would be small enough to be kept for other extractors
    evaluate(network(), data=some, metrics="kid", n=64, batch_size=4)
    assert 4 <= most <= 8 and alive <= 8


def test_small_images_are_drawn_once_for_several_extractors(some, counter, monkeypatch):
    drawn = 0
    real = GeneratedImages._batch

    def batch(self, start, stop):
        nonlocal drawn
        drawn += stop - start
        return real(self, start, stop)

    monkeypatch.setattr(GeneratedImages, "_batch", batch)
    net = network()
    first = evaluate(net, data=some, metrics="kid", n=16, batch_size=4, extractor="pixels")
    evaluate(net, data=some, metrics="kid", n=16, batch_size=4)
    assert drawn == 16
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05)  # another network
    second = evaluate(net, data=some, metrics="kid", n=16, batch_size=4, extractor="pixels")
    assert drawn == 32 and first["kd-pixels"] != second["kd-pixels"]


def test_shares_are_whole_batches_and_cover_all():
    for n, batch, size in ((10, 4, 2), (7, 100, 3), (1797, 128, 2), (3, 1, 5)):
        parts = [share(n, batch, r, size) for r in range(size)]
        assert parts[0][0] == 0 and parts[-1][1] == n
        assert all(a[1] == b[0] and a[1] % batch in (0, n % batch) for a, b in itertools.pairwise(parts))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_fresh_processes_give_the_same_bits(one_thread, monkeypatch, cache):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    net = tiny_net(label_dim=10)
    about = {"data": subset(0, 24), "metrics": ("kid", "mind"), "n": 22, "steps": 2, "batch_size": 4, "S_churn": 1.0}
    alone = evaluate(net, **about)
    for file in (cache / "generated").iterdir():
        file.unlink()
    monkeypatch.setattr("gddlab.evaluation.features.draw", lambda *a, **k: pytest.fail("sampled in this process"))
    both = evaluate(net, nproc=2, **about)
    assert [r.value for r in both] == [r.value for r in alone]
    assert both.records[0].images_sha256 == alone.records[0].images_sha256


def test_ranks_of_a_process_group_give_the_same_bits(one_thread, tmp_path, cache):
    save_network(tiny_net(), tmp_path / "net.safetensors")
    real = sample_files(tiny_net(seed=1), tmp_path / "real", 24, steps=2, progress=False)
    code = (
        "import json, os, gddlab\n"
        "about = {'data': 'real', 'n': 22, 'progress': False}\n"
        "s = gddlab.evaluate('net.safetensors', steps=2, batch_size=4, metrics=('kid', 'mind'), **about)\n"
        "open(f'{os.environ[\"RANK\"]}.json', 'w').write(json.dumps([r.to_dict() for r in s]))\n"
        "try:\n"
        "    gddlab.evaluate('net.safetensors', sigma_max=1e-9, **about)\n"
        "except gddlab.GddlabError as e:\n"
        "    open(f'{os.environ[\"RANK\"]}.txt', 'w').write(str(e))\n"
    )
    (tmp_path / "job.py").write_text(code)
    root = str(Path(__file__).resolve().parents[2])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root, "GDDLAB_CACHE": str(cache / "ranks")}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "job.py"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = evaluate(tmp_path / "net.safetensors", data=real, n=22, steps=2, batch_size=4, metrics=("kid", "mind"))
    for rank in (0, 1):
        records = json.loads((tmp_path / f"{rank}.json").read_text())
        assert [r["images_sha256"] for r in records] == [r.images_sha256 for r in alone]
        assert [r["value"] for r in records] == pytest.approx([r.value for r in alone], rel=1e-6)
        assert "sigma" in (tmp_path / f"{rank}.txt").read_text()


def test_the_name_of_a_sampler_has_all_its_settings():
    images = GeneratedImages(tiny_net(), Sampler(steps=2, S_max=float("inf")), 4, 0, None, 2)
    assert generated.sampler_of(images.settings) == images.how
    assert features.extract(images, generated.find_extractor("lite2")).rows.shape == (4, 1280)


@pytest.fixture
def photos():
    side = FACTOR * SIDE
    images = np.random.default_rng(1).integers(0, 256, (8, side, side, 3), dtype=np.uint8)
    return ImageDataset(images, np.arange(8) % 4, classes=4, name="photos", source="random")


def prompted(**options):
    pipe, call = pipeline("sd", 3)
    return wrap(pipe, cond=Conditioning.record(pipe, **call), img_resolution=SIDE, **options)


def test_latents_are_decoded_and_scored(photos, counter):
    net, how = prompted(), {"steps": 2, "batch_size": 3}
    found = evaluate(net, data=photos, metrics="kid", n=6, seed=1, **how).records[0]
    images = sample(net, 6, seed=1, **how)  # prompts in turn, whatever classes the photos have
    want = evaluate(images, data=photos, metrics="kid").records[0]
    assert found.value == pytest.approx(want.value, rel=1e-3) and found.images_sha256 == want.images_sha256
    bare = wrap(net.gddlab_bare, path=net.path, cond=net.cond)
    with pytest.raises(GddlabError, match="no autoencoder is known"):
        evaluate(bare, data=photos, n=6)
    with pytest.raises(GddlabError, match="16x16 with 3 channels, but 'some-digits' has 16x16 with 1"):
        evaluate(net, data=subset(0, 8), n=6)
    with pytest.raises(GddlabError, match=r"nproc=2 with what gddlab\.wrap made"):
        evaluate(net, data=photos, n=6, nproc=2, seed=5, **how)


def test_what_a_network_is_told_is_in_the_key(photos, counter):
    net, how = prompted(), {"data": photos, "metrics": "kid", "n": 4, "steps": 2}
    others = [wrap(net, guidance=2.0), wrap(net, cond=net.cond[[2, 1, 0]]), wrap(net, vae=vae(0.2))]
    others += [wrap(net, sigma_max=5.0), wrap(net, path=NoisePath.vp(net.path.alphas_cumprod, "sample"))]
    for each in (net, *others, prompted()):  # the last has it all from the cache
        evaluate(each, **how)
    assert len(list(Path(os.environ["GDDLAB_CACHE"]).glob("generated/*"))) == 1 + len(others)


def test_what_a_function_does_is_not_cached(photos, counter):
    bare = prompted().gddlab_bare
    for scale in (0.0, 1.0):
        how = {"img_channels": CHANNELS, "img_resolution": SIDE, "vae": vae()}
        net = wrap(bare, lambda model, x, sigma, labels, scale=scale: scale * x, **how)
        found = evaluate(net, data=photos, metrics="kid", n=4, steps=2).records[0]
        want = evaluate(sample(net, 4, steps=2), data=photos, metrics="kid").records[0]
        assert found.images_sha256 == want.images_sha256


def test_what_is_named_goes_to_the_device_and_what_is_given_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gddlab.evaluation.images.chosen_device", lambda: torch.device("meta"))
    assert {p.device.type for p in generated.open_source("digits").parameters()} == {"meta"}
    monkeypatch.setattr("gddlab.runtime.chosen_device", lambda: torch.device("meta"))
    assert {p.device.type for p in cli.network("digits").parameters()} == {"meta"}
