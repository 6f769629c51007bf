import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import gddlab
from gddlab.errors import GddlabError, NotFound
from gddlab.nets import Codec, Conditioning, Precond
from gddlab.teachers import load_precond, load_teacher, wrap
from tests.models import CHANNELS, SIDE, network, pipeline, vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline's folder, by name of its network; written once."""
    made = {}

    def of(name):
        if name not in made:
            pipe, _ = pipeline(name, **({"num_embeds_ada_norm": 10} if name == "dit" else {}))
            made[name] = tmp_path_factory.mktemp("pipes") / f"tiny-{name}"
            pipe.save_pretrained(made[name])
        return made[name]

    return of


@pytest.mark.parametrize("name", ["dit", "sd", "sd3", "flux"])
def test_a_pipelines_folder_is_the_pipeline(folder, name, nowhere):
    pipe, call = pipeline(name, **({"num_embeds_ada_norm": 10} if name == "dit" else {}))
    teacher = load_teacher(folder(name))
    x = torch.randn(2, CHANNELS, SIDE, SIDE)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert teacher.codec.factor == 2 and teacher.card.name == f"tiny-{name}"
    if name != "dit":
        with pytest.raises(GddlabError, match="needs encoder_hidden_states"):
            teacher(x, 1.0)
        assert "missing: encoder_hidden_states" in repr(teacher.card)
        cond = Conditioning.record(pipe, **call)
        teacher, ours = wrap(teacher, cond=cond), wrap(pipe, cond=cond)
    else:
        ours = wrap(pipe)
    with torch.no_grad():
        assert torch.equal(teacher(x, 1.0), ours(x, 1.0))  # buffers that files do not hold are there too
        images = torch.rand(1, 3, 16, 16) * 2 - 1
        assert torch.equal(teacher.codec.encode(images), ours.codec.encode(images))
    assert teacher.path == ours.path


def test_the_networks_own_folder_has_its_scheduler_beside_it(folder, tmp_path):
    inside = load_teacher(folder("dit") / "transformer")
    whole = load_teacher(str(folder("dit")))
    assert inside.path == whole.path and inside.codec is not None
    alone = tmp_path / "transformer"
    shutil.copytree(folder("dit") / "transformer", alone)
    with pytest.raises(GddlabError, match=r"no scheduler_config.json beside it"):
        load_teacher(alone)
    diffusers.DDPMScheduler().save_pretrained(alone)
    assert load_teacher(alone).path.kind == "vp"
    with_vae = load_teacher(alone, vae=folder("dit") / "vae")
    assert with_vae.codec.channels == CHANNELS


def test_parts_and_variants(tmp_path, folder):
    target = tmp_path / "pipe"
    shutil.copytree(folder("dit"), target)
    shutil.rmtree(target / "transformer")
    net = network("dit")
    x, labels = torch.randn(1, CHANNELS, SIDE, SIDE), torch.eye(10)[:1]
    wanted = wrap(net, scheduler=diffusers.DDIMScheduler())(x, 1.0, labels)
    net.save_pretrained(target / "transformer", max_shard_size="20KB")
    assert len(list((target / "transformer").glob("*.safetensors"))) > 1
    torch.testing.assert_close(load_teacher(target)(x, 1.0, labels), wanted, rtol=1e-4, atol=1e-4)
    for shards in ("10GB", "20KB"):
        shutil.rmtree(target / "transformer")
        net.half().save_pretrained(target / "transformer", variant="fp16", max_shard_size=shards)
        half = load_teacher(target)
        assert next(half.parameters()).dtype == torch.float32
        torch.testing.assert_close(half(x, 1.0, labels), wanted, rtol=0.05, atol=0.05)


def test_what_would_run_code_is_refused(tmp_path, folder):
    target = tmp_path / "pipe"
    shutil.copytree(folder("dit"), target)
    weights = target / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(GddlabError, match=r"diffusion_pytorch_model.bin, a pickle, which runs code"):
        load_teacher(target)
    weights.with_suffix(".bin").unlink()
    with pytest.raises(GddlabError, match=r"holds no diffusion_pytorch_model.safetensors"):
        load_teacher(target)
    config = target / "transformer" / "config.json"
    for name in ("Evil", "ModelMixin.__init__", "os", None):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": name}))
        with pytest.raises(GddlabError, match="is no network of diffusers"):
            load_teacher(target)


def test_damaged_folders_are_refused_in_one_line(tmp_path, folder):
    target = tmp_path / "pipe"
    shutil.copytree(folder("dit"), target)
    (target / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"no")
    with pytest.raises(GddlabError, match="cannot be read") as e:
        load_teacher(target)
    assert "\n" not in str(e.value)
    shutil.rmtree(target / "transformer")
    with pytest.raises(GddlabError, match="has no transformer or unet"):
        load_teacher(target)
    scheduler = folder("dit") / "scheduler" / "scheduler_config.json"
    other = tmp_path / "other"
    shutil.copytree(folder("dit"), other)
    (other / "scheduler" / "scheduler_config.json").write_text(scheduler.read_text().replace("DDIM", "Evil"))
    with pytest.raises(GddlabError, match="is no scheduler of diffusers"):
        load_teacher(other)


def test_training_refuses_a_folder(folder):
    with pytest.raises(
        GddlabError, match="holds a DiTTransformer2DModel, which can be probed and sampled, not trained"
    ):
        load_precond(folder("dit"))
    assert isinstance(load_precond("digits"), Precond)


def test_own_teachers_take_an_autoencoder():
    net = gddlab.load_teacher("digits")
    assert net.codec is None and not net.latent
    with pytest.raises(GddlabError, match="vae= makes 4 channels, this network takes 1"):
        gddlab.load_teacher("digits", vae=vae())
    one = gddlab.load_teacher("digits", vae=Codec.of(vae(latent_channels=1)))
    assert one.latent and one.codec.channels == 1


def test_a_folder_needs_no_index(tmp_path, folder):
    shutil.copytree(folder("dit"), tmp_path / "dit")
    (tmp_path / "dit" / "model_index.json").unlink()
    assert load_teacher(tmp_path / "dit").path == load_teacher(folder("dit")).path
    with pytest.raises(GddlabError, match="says what network it holds: omit family and heads"):
        load_teacher(folder("dit"), family="dit")
    with pytest.raises(NotFound, match=r"nowhere holds no config\.json"):
        load_teacher(folder("dit"), vae=str(tmp_path / "nowhere"))


def test_weights_that_are_missing_are_not_made_up(tmp_path, folder):
    shutil.copytree(folder("dit"), tmp_path / "dit")
    file = tmp_path / "dit" / "transformer" / "diffusion_pytorch_model.safetensors"
    held = load_file(file)
    del held["proj_out_1.weight"]
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(GddlabError, match=r"transformer lacks 1 tensors, proj_out_1\.weight the first"):
        load_teacher(tmp_path / "dit")


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("scheduler/scheduler_config.json", {"beta_schedule": "odd"}, "a DDIMScheduler cannot be made .odd is not"),
        ("vae/config.json", {"scaling_factor": "x"}, "AutoencoderKL whose configuration is damaged"),
    ],
)
def test_damaged_configurations_are_refused(tmp_path, folder, file, change, says):
    shutil.copytree(folder("dit"), tmp_path / "dit")
    config = json.loads((tmp_path / "dit" / file).read_text())
    (tmp_path / "dit" / file).write_text(json.dumps(config | change))
    with pytest.raises(GddlabError, match=says):
        load_teacher(tmp_path / "dit")
