"""Patching against layers exchanged by hand; both networks come back bit for bit."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from gddlab.datasets import order
from gddlab.errors import GddlabError
from gddlab.nets.io import make_student
from gddlab.probing import ProbeResult, probe, select_layers
from gddlab.probing.patch import patch
from gddlab.sampling import latents
from tests.probing.networks import tiny

CONV = "model.enc.8x8_block0.conv0"
BLOCK = "model.dec.16x16_up"
FROZEN = "model.enc.16x16_conv"


@pytest.fixture
def teacher():
    return tiny()


@pytest.fixture
def student(teacher):
    """Trained, all but for its first convolution."""
    net = make_student(teacher)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if not name.startswith(FROZEN):
                p.add_(0.1 * p.abs().mean() * torch.randn_like(p))
    return net.eval()


def exchanged(net, other, name):
    out = copy.deepcopy(net)
    out.get_submodule(name).load_state_dict(other.get_submodule(name).state_dict())
    return out


@torch.no_grad()
def with_activations(net, other, name, *args):
    kept = []
    handle = other.get_submodule(name).register_forward_hook(lambda m, a, y: kept.append(y.clone()))
    other(*args)
    handle.remove()
    handle = net.get_submodule(name).register_forward_hook(lambda m, a, y: kept[0])
    out = net(*args)
    handle.remove()
    return out


def value(result, stat, layer, column="value"):
    return torch.from_numpy(result.pivot(stat, column).loc[layer].to_numpy(copy=True))


@pytest.mark.parametrize("what", ["weights", "activations"])
@pytest.mark.parametrize("layer", [CONV, BLOCK])
def test_a_students_image_with_a_layer_of_the_teacher(student, teacher, what, layer):
    result = patch(student, teacher, [layer], what=what, n=4)
    x, sigma = 80 * latents(range(4), (1, 16, 16)), torch.full((4,), 80.0)
    with torch.no_grad():
        intact, goal = student(x, sigma), teacher(x, sigma)
        if what == "weights":
            found = exchanged(student, teacher, layer)(x, sigma)
        else:
            found = with_activations(student, teacher, layer, x, sigma)

    def distance(a, b):
        return (a.double() - b.double()).flatten(1).norm(dim=1)

    scale = ((80**2 + 0.25) ** 0.5 / 40) / 16  # 16 x 16 pixels
    change = scale * distance(found, intact)
    close = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(value(result, f"patch_output_{what}", layer)[0], change.mean(), **close)
    torch.testing.assert_close(value(result, f"patch_output_{what}", layer, "sem")[0], change.std() / 2, **close)
    recovered = 1 - distance(found, goal).mean() / distance(intact, goal).mean()
    torch.testing.assert_close(value(result, f"patch_recovered_{what}", layer)[0], recovered, **close)
    assert change.mean() > 1e-3
    assert result.sigmas == [80.0]
    assert result.stats == [f"patch_output_{what}", f"patch_recovered_{what}"]
    donor = probe(teacher, states="prior", n=1, stats="rms").meta["model"]["fingerprint"]
    assert result.meta["settings"] == {
        "tier": "patch",
        "what": what,
        "into": "student",
        "donor": donor,
        "dtype": "float32",
    }


@pytest.mark.parametrize("what", ["weights", "activations"])
def test_a_teachers_denoising_with_a_layer_of_the_student(student, teacher, pictures, what):
    sigmas = [80.0, 1.0, 0.01]
    result = patch(student, teacher, [CONV], what=what, into="teacher", timesteps=sigmas, data=pictures, n=4)
    clean = pictures.images(order(12, 0, 0, 4)).repeat_interleave(3, 0)
    sigma = torch.tensor(sigmas).repeat(4)
    x = clean + sigma.reshape(-1, 1, 1, 1) * latents(range(4), (1, 16, 16)).repeat_interleave(3, 0)
    with torch.no_grad():
        intact = teacher(x, sigma)
        if what == "weights":
            found = exchanged(teacher, student, CONV)(x, sigma)
        else:
            found = with_activations(teacher, student, CONV, x, sigma)
    weight = ((sigma**2 + 0.25) / (0.25 * sigma**2)).double()

    def error(a, b):
        return (weight * (a.double() - b.double()).square().mean((1, 2, 3))).reshape(4, 3)

    increase = error(found, clean) - error(intact, clean)
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(value(result, f"patch_loss_{what}", CONV), increase.mean(0), **close)
    torch.testing.assert_close(value(result, f"patch_loss_{what}", CONV, "sem"), increase.std(0) / 2, **close)
    change = error(found, intact).sqrt().mean(0)
    torch.testing.assert_close(value(result, f"patch_output_{what}", CONV), change, **close)
    assert (change > 1e-4).all()


def test_a_layer_that_is_equal_in_both_changes_nothing(student, teacher, pictures):
    for into, stats in (("student", ("output", "recovered")), ("teacher", ("output", "loss"))):
        data = None if into == "student" else pictures
        result = patch(student, teacher, [FROZEN, CONV], into=into, timesteps=18, data=data, n=3)
        for stat in stats:
            table = result.pivot(f"patch_{stat}_weights")
            assert (table.loc[FROZEN] == 0).all()
            assert (table.loc[CONV] != 0).any()
        assert (result.pivot(f"patch_{stats[1]}_weights", "sem").loc[FROZEN] == 0).all()


def test_all_layers_of_a_fresh_student_are_its_teachers(teacher):
    fresh = make_student(teacher)
    result = patch(fresh, teacher, n=2)
    assert len(result.layers) == len(select_layers(fresh, "conv"))
    assert (result.frame["value"] == 0).all()


@pytest.mark.parametrize("what", ["weights", "activations"])
def test_numbers_do_not_depend_on_the_batch_size_and_halves_merge(student, teacher, pictures, what, tmp_path):
    def run(into, **kwargs):
        noised = {"timesteps": [80.0, 1.0, 0.01], "data": pictures} if into == "teacher" else {}
        return patch(student, teacher, [CONV, BLOCK], what=what, into=into, **noised, **kwargs)

    for into in ("student", "teacher"):
        whole = run(into, n=6)
        first = run(into, n=2, batch_size=3)
        first.save(tmp_path)
        merged = ProbeResult.load(tmp_path).merge(run(into, n=4, start=2))
        numbers = ["value", "sem"]
        for other in (run(into, n=6, batch_size=7), merged):
            pd.testing.assert_frame_equal(other.frame.drop(columns=numbers), whole.frame.drop(columns=numbers))
            np.testing.assert_allclose(other.frame[numbers], whole.frame[numbers], rtol=1e-4, atol=1e-6)


def test_weights_and_activations_and_a_probe_of_the_student_join(student, teacher):
    found = [patch(student, teacher, n=2, what=what) for what in ("weights", "activations")]
    joined = probe(student, states="student", n=2, stats="rms").join(*found)
    assert {"rms", "patch_output_weights", "patch_recovered_activations"} <= set(joined.stats)
    with pytest.raises(GddlabError, match="different networks"):
        probe(teacher, states="student", n=2, stats="rms").join(found[0])


@pytest.mark.parametrize("what", ["weights", "activations"])
def test_both_networks_come_back_bit_for_bit(student, teacher, what):
    student.train()
    nets = (student, teacher)
    for net in nets:
        net.get_submodule(BLOCK).register_forward_hook(lambda *a: None)
    states = [{k: v.clone() for k, v in net.state_dict().items()} for net in nets]
    pointers = [[p.data_ptr() for p in net.parameters()] for net in nets]
    hooks = [[(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()] for net in nets]
    modes = [[m.training for m in net.modules()] for net in nets]
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 4:
            changed = [k for k, v in student.state_dict().items() if not torch.equal(v, states[0][k])]
            assert bool(changed) == (what == "weights")
            raise KeyboardInterrupt

    patch(student, teacher, [CONV, BLOCK], what=what, n=2)
    handle = student.model.dec["16x16_aux_conv"].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        patch(student, teacher, what=what, n=2)
    handle.remove()
    for net, state, pointer, hook, mode in zip(nets, states, pointers, hooks, modes, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
        assert pointer == [p.data_ptr() for p in net.parameters()]
        assert hook == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
        assert mode == [m.training for m in net.modules()]


@pytest.mark.parametrize("what", ["weights", "activations"])
def test_a_measure_of_ones_own(student, teacher, what):
    z = latents(range(5), (1, 16, 16))

    def brightness(net):
        return sum(net.generate(part).sum() for part in z.split(2)) / z.numel()

    result = patch(student, teacher, [FROZEN, CONV, BLOCK], what=what, n=2, measure=brightness)
    x, sigma = 80 * z, torch.full((5,), 80.0)
    with torch.no_grad():
        if what == "weights":
            found = exchanged(student, teacher, CONV)(x, sigma)
        else:
            found = with_activations(student, teacher, CONV, x, sigma)
        difference = (found - student(x, sigma)).double().mean()
    stat = f"patch_measure_{what}"
    torch.testing.assert_close(value(result, stat, CONV)[0], difference, rtol=1e-3, atol=1e-7)
    assert result.pivot(stat, "sem").isna().all(axis=None)
    if what == "weights":
        assert (result.pivot(stat).loc[FROZEN] == 0).all()
    with pytest.raises(GddlabError, match="does not merge"):
        result.merge(patch(student, teacher, [FROZEN, CONV, BLOCK], what=what, n=2, start=2, measure=brightness))
    with pytest.raises(GddlabError, match="gave a str, no number"):
        patch(student, teacher, [CONV], what=what, n=2, measure=lambda net: "good")
    with pytest.warns(RuntimeWarning, match=r"conv0 \(measure\) at sigma 80"):
        broken = patch(student, teacher, [CONV], what=what, n=2, measure=lambda net: net.generate(z).mean() * torch.inf)
    assert broken.pivot(stat).isna().all(axis=None)


def test_a_measure_into_the_teacher_is_repeated_at_every_sigma(student, teacher, pictures):
    kwargs = {"into": "teacher", "timesteps": [2.0, 1.0], "data": pictures, "n": 2}
    result = patch(student, teacher, [CONV], measure=lambda net: net.get_submodule(CONV).weight.norm(), **kwargs)
    difference = student.get_submodule(CONV).weight.norm() - teacher.get_submodule(CONV).weight.norm()
    assert result.pivot("patch_measure_weights").loc[CONV].tolist() == pytest.approx([difference.item()] * 2)


def test_values_that_are_not_finite_are_not_averaged_away(student, teacher):
    with torch.no_grad():
        teacher.get_submodule(CONV).bias[0] = torch.nan
    with pytest.warns(RuntimeWarning, match=r"conv0 \(patched\) at sigma 80"):
        result = patch(student, teacher, [CONV, FROZEN], n=3)
    assert value(result, "patch_output_weights", CONV).isnan().all()
    assert value(result, "patch_output_weights", FROZEN)[0] == 0
    bad = {"layer": CONV, "side": "patched", "sigma": 80.0, "images": 3}
    assert bad in result.meta["nonfinite"]


def test_networks_of_another_architecture_are_refused(student, teacher):
    with pytest.raises(GddlabError, match="same network: give two"):
        patch(teacher, teacher)
    with pytest.raises(GddlabError, match=r"'model.map_layer0.weight' is \(32, 16\) in the .*, \(64, 32\) in the"):
        patch(student, tiny(model_channels=16))
    with pytest.raises(
        GddlabError, match=r"'model.enc.8x8_block0.norm2.weight' is \(16,\) in the .*, missing in the t"
    ):
        patch(student, tiny(attn_resolutions=[]))
    with pytest.raises(GddlabError, match=r"'model.enc.8x8_block0.norm2.weight' is missing in the student, \(16,\)"):
        patch(make_student(tiny(attn_resolutions=[])), tiny())


def test_a_teacher_with_augmentation_has_a_layer_more(pictures):
    teacher = tiny(augment_dim=9)
    student = make_student(teacher)
    assert len(patch(student, teacher, "linear", n=1).layers) > 2
    with pytest.raises(GddlabError, match=r"'model.map_augment' is in the teacher alone"):
        patch(student, teacher, ["linear", "model.map_augment"], into="teacher", data=pictures, n=1)


def test_bad_input_is_refused(student, teacher, pictures):
    for kwargs, says in (
        ({"what": "weight"}, "did you mean 'weights'"),
        ({"into": "both"}, "accepted: student, teacher"),
        ({"data": pictures}, 'data= is for into="teacher"'),
        ({"timesteps": [1.0]}, "a student sees sigma 80 alone"),
        ({"layers": "model.enc.16x16_con"}, "did you mean"),
        ({"layers": "model.dec.16x16_up.skip.*"}, "unknown layer"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"into": "teacher"}, "names no dataset"),
    ):
        with pytest.raises(GddlabError, match=says):
            patch(student, teacher, **({"n": 2} | kwargs))


class Mine(nn.Module):
    img_channels, img_resolution = 1, 8

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.act = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.last, self.never = nn.Conv2d(4, 1, 1), nn.Conv2d(1, 1, 1)

    def forward(self, x, sigma, class_labels=None):
        return self.last(self.act(self.norm(self.first(x / sigma[:, None, None, None]))))


def test_a_network_of_ones_own_with_buffers():
    torch.manual_seed(0)
    student, teacher = Mine(), Mine()
    teacher.norm.running_mean += 1
    result = patch(student, teacher, ["norm", "first", "never"], n=3)
    assert (result.pivot("patch_output_weights")[80.0] > 0).to_dict() == {"first": True, "norm": True, "never": False}
    assert student.norm.running_mean.abs().max() == 0
    last = patch(student, teacher, ["last"], what="activations", n=3)
    assert last.pivot("patch_recovered_activations").loc["last", 80.0] == 1  # the last layer's output is the image
    with pytest.raises(GddlabError, match="'never' did not run"):
        patch(student, teacher, ["never"], what="activations", n=1)
    with pytest.raises(GddlabError, match="'act' has no weights"):
        patch(student, teacher, ["act"], n=1)


def test_low_precision_and_labels(pictures):
    teacher = tiny(label_dim=3)
    student = make_student(teacher)
    with torch.no_grad():
        student.get_submodule(CONV).weight.mul_(1.5)
    for what in ("weights", "activations"):
        full, low = (patch(student, teacher, [CONV], what=what, n=4, dtype=d) for d in (None, "bfloat16"))
        stat = f"patch_output_{what}"
        np.testing.assert_allclose(low.pivot(stat), full.pivot(stat), rtol=0.1)
        assert low.meta["settings"]["dtype"] == "bfloat16"
        one = patch(student, teacher, [CONV], what=what, n=4, class_labels=1)
        assert not np.array_equal(one.pivot(stat), full.pivot(stat))
