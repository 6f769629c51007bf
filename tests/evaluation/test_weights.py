"""Published weights: where they are found, downloads, refusals; extractors with random weights from files."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.server
import threading

import pytest
import torch

from gddlab.datasets import ImageDataset
from gddlab.errors import GddlabError
from gddlab.evaluation import EXTRACTORS, evaluate, find_extractor
from gddlab.evaluation.fidelity import FeatureExtractorTimmDinoV2, _resized
from gddlab.pretrained.published import Published
from tests.evaluation.conftest import as_float, subset
from tests.evaluation.networks import save_clip, save_inception, save_vgg16

VARIABLES = ("GDDLAB_OPEN_NSFW", "GDDLAB_INCEPTION", "GDDLAB_CLIP", "GDDLAB_DINOV2", "GDDLAB_VGG16")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """No weights on this machine, and no network."""
    for name in (*VARIABLES, "GDDLAB_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GDDLAB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["inception", "clip", "dinov2", "vgg16"])
def test_missing_weights_are_refused_in_a_line_before_the_first_image(name, some, cache, monkeypatch):
    monkeypatch.setattr("gddlab.evaluation.features.draw", lambda *a, **k: pytest.fail("sampled"))
    with pytest.raises(GddlabError, match="GDDLAB_OFFLINE is set") as e:
        evaluate("digits", data=some, n=4, extractor=name)
    published = EXTRACTORS[name].published
    for part in (published.url, str(cache / "backbones" / published.target.name), published.variable):
        assert part in str(e.value)
    assert "\n" not in str(e.value)


def published(url: str, **about) -> Published:
    return Published("Thing", "GDDLAB_THING", url, **about)


def test_where_files_are_looked_for(tmp_path, cache, monkeypatch):
    thing = published("https://example.org/thing-1.pth", aliases=("other",))
    places = [
        tmp_path / "hub" / "checkpoints" / "thing-1.pth",
        cache / "backbones" / "thing-1.pth",
        tmp_path / "home" / "backbones" / "thing-1.pt",
        tmp_path / "home" / "thing-1.pth",
        tmp_path / "other.pth",
    ]
    monkeypatch.setenv("GDDLAB_HOME", str(tmp_path / "home"))
    assert thing.locate() is None
    for path in places:  # each goes before those above
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        assert thing.locate() == path
    monkeypatch.setenv("GDDLAB_THING", str(tmp_path / "absent"))
    with pytest.raises(GddlabError, match="which GDDLAB_THING names"):
        thing.locate()


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{s.server_address[1]}"
        s.shutdown()


def test_downloads_are_checked(server, cache, monkeypatch):
    folder, address = server
    monkeypatch.setenv("GDDLAB_OFFLINE", "0")
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()
    name = f"thing-{digest[:8]}.pth"
    (folder / name).write_bytes(content)
    path = published(f"{address}/{name}").fetch()
    assert path == cache / "backbones" / name and path.read_bytes() == content
    (folder / name).unlink()
    assert published(f"{address}/{name}").fetch() == path  # from the cache
    path.write_bytes(b"weight")
    with pytest.raises(GddlabError, match="is damaged: its sha256"):
        published(f"{address}/{name}").fetch()
    (folder / "thing-00000000.pth").write_bytes(content)
    with pytest.raises(GddlabError, match="its sha256 is not the one in its name"):
        published(f"{address}/thing-00000000.pth").fetch()
    (folder / "plain.pth").write_bytes(content)
    with pytest.raises(GddlabError, match="the server sent another file"):
        published(f"{address}/plain.pth", known_hash="sha256:" + "0" * 64).fetch()
    with pytest.raises(GddlabError, match=r"no weights of Thing \(the server answers 404 File not found\)"):
        published(f"{address}/absent.pth").fetch()
    assert [p.name for p in (cache / "backbones").iterdir() if p.suffix != ".lock"] == [name]


def rgb(n: int) -> ImageDataset:
    d = subset(0, n)
    return ImageDataset(d.uint8.repeat(3, 3), d.class_ids, classes=10, name="rgb", source="digits")


def test_inception_with_random_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("GDDLAB_INCEPTION", str(save_inception(tmp_path / "inception.pth")))
    scores = evaluate(as_float(rgb(12)), data=rgb(4), metrics=("kid", "is", "mind"), extractor="inception")
    assert [r.metric for r in scores] == ["kid@12", "is@12", "mind@12"]
    assert scores.records[0].extractor_input_size == 299 and "TensorFlow" in scores.records[0].preprocessing
    assert scores["is"] > 1
    grey = evaluate(as_float(subset(0, 12)), data=subset(0, 4), metrics="kid", extractor="inception")
    assert grey["kid"] == pytest.approx(scores["kid"], rel=1e-3)


def test_clip_with_random_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("GDDLAB_CLIP", str(save_clip(tmp_path / "clip.pt")))
    scores = evaluate(as_float(subset(0, 6)), data=subset(0, 4), metrics=("fid", "kid", "mind"), extractor="clip")
    assert [r.metric for r in scores] == ["clip-fid@6", "kd-clip@6", "mind-clip@6"]
    assert scores["clip-fid"] > 0


def test_vgg16_with_random_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("GDDLAB_VGG16", str(save_vgg16(tmp_path / "vgg16.pth")))
    scores = evaluate(as_float(subset(0, 5)), data=subset(0, 4), metrics=("kid", "prc"), extractor="vgg16")
    assert [r.metric for r in scores] == ["kd-vgg16@5", "precision-vgg16@5", "recall-vgg16@5"]


def test_dinov2_with_random_weights(tmp_path, monkeypatch):
    """A small network instead of the large one (1.2 GB); the file has the authors' names and 37x37 positions."""
    import timm

    torch.manual_seed(0)
    net = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0).eval()
    torch.save({**net.state_dict(), "mask_token": torch.zeros(1, 384)}, tmp_path / "dino.pth")
    assert net.pos_embed.shape == (1, 1 + 37 * 37, 384)
    monkeypatch.setattr(FeatureExtractorTimmDinoV2, "architecture", "vit_small_patch14_dinov2")
    monkeypatch.setitem(EXTRACTORS, "dinov2", dataclasses.replace(EXTRACTORS["dinov2"], dims=384))
    monkeypatch.setenv("GDDLAB_DINOV2", str(tmp_path / "dino.pth"))
    (record,) = evaluate(as_float(subset(0, 5)), data=subset(0, 4), metrics="kid", extractor="dinov2")
    assert record.metric == "kd-dinov2@5"
    built = find_extractor("dinov2").build().model
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        patches = net.patch_embed.proj(x).flatten(2).transpose(1, 2)
        h = torch.cat([net.cls_token.expand(2, -1, -1), patches], 1) + _resized(net.pos_embed)
        for block in net.blocks:
            h = block(h)
        torch.testing.assert_close(built(x), net.norm(h)[:, 0], rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(FeatureExtractorTimmDinoV2, "architecture", "vit_base_patch14_dinov2")
    monkeypatch.setitem(EXTRACTORS, "dinov2", dataclasses.replace(EXTRACTORS["dinov2"], dims=768))
    with pytest.raises(GddlabError, match="does not fit"):
        find_extractor("dinov2").build()


def test_positions_are_resized_as_the_authors_do():
    """A constant stays; a ramp stays a ramp, shifted by what the offset of 0.1 shifts it."""
    flat = torch.cat([torch.zeros(1, 1, 2), torch.ones(1, 37 * 37, 2)], 1)
    torch.testing.assert_close(_resized(flat)[:, 1:], torch.ones(1, 256, 2))
    ramp = torch.arange(37.0).repeat(37)[None, :, None]
    got = _resized(torch.cat([torch.zeros(1, 1, 1), ramp], 1))[0, 1:, 0].reshape(16, 16)[8]
    want = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    torch.testing.assert_close(got[2:-2], want[2:-2], rtol=0, atol=0.1)  # without the offset 0.2 at the end
    assert _resized(torch.zeros(1, 257, 2)).shape == (1, 257, 2)


def test_weights_that_do_not_fit_are_refused(tmp_path, monkeypatch, some):
    for name, variable in (("inception", "GDDLAB_INCEPTION"), ("vgg16", "GDDLAB_VGG16"), ("clip", "GDDLAB_CLIP")):
        for content in ({}, {"conv.weight": torch.zeros(2)}, {"x": print}):
            torch.save(content, tmp_path / "bad.pth")
            monkeypatch.setenv(variable, str(tmp_path / "bad.pth"))
            monkeypatch.setattr("gddlab.evaluation.features.draw", lambda *a, **k: pytest.fail("sampled"))
            with pytest.raises(GddlabError, match=r"bad\.pth") as e:
                evaluate("digits", data=some, n=4, extractor=name)
            assert "\n" not in str(e.value)
        (tmp_path / "bad.pth").write_bytes(b"no weights")
        with pytest.raises(GddlabError, match=r"bad\.pth"):
            evaluate("digits", data=some, n=4, extractor=name)
    monkeypatch.setenv("GDDLAB_CLIP", str(save_clip(tmp_path / "clip.pt", embedding=256)))
    with pytest.raises(GddlabError, match="gives 256 features per image: clip-vit-b-32 has 512"):
        evaluate("digits", data=some, n=4, steps=1, extractor="clip")
