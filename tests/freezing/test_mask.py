import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gddlab.errors import GddlabError, NotFound
from gddlab.freezing import FreezeMask, select_freeze
from gddlab.probing.layers import parameter_table
from tests.probing.networks import tiny


@pytest.fixture
def mask(rule) -> FreezeMask:
    return rule


def test_apply_sets_every_flag(net, mask):
    net.requires_grad_(False)
    for _ in range(2):
        mask.apply(net)
        assert {n for n, p in net.named_parameters() if not p.requires_grad} == set(mask.frozen)
    trained = mask.trainable(net)
    assert [n for n, _ in trained] == [n for n, p in net.named_parameters() if p.requires_grad]
    assert all(p is net.get_parameter(n) for n, p in trained)
    assert sum(p.numel() for _, p in trained) == mask.n_params - mask.n_frozen


def test_a_teachers_mask_fits_its_student(mask):
    teacher = tiny(augment_dim=9)
    student = tiny("OneStepPrecond")
    made = select_freeze(teacher, strategy="gdd-i")
    assert made == mask
    made.apply(student)
    made.apply(teacher)
    assert teacher.model.map_augment.weight.requires_grad


def test_wrappers_do_not_matter(net, mask):
    wrapped = nn.ModuleDict({"module": nn.ModuleDict({"_orig_mod": net})})
    mask.apply(wrapped)
    assert {n for n, p in net.named_parameters() if not p.requires_grad} == set(mask.frozen)
    assert [n for n, _ in mask.trainable(wrapped)] == [n for n, _ in mask.trainable(net)]
    assert FreezeMask(("module." + mask.frozen[0],), mask.parameters).frozen == mask.frozen[:1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"label_dim": 3}, r"'model.map_label.weight' is missing in the mask, \(16, 3\) in the network"),
        ({"model_channels": 16}, r"'model.map_layer0.weight' is \(32, 16\) in the mask, \(64, 32\) in the network"),
        ({"encoder_type": "standard"}, "'model.enc.8x8_aux_residual.weight' is .* in the mask, missing in the network"),
    ],
)
def test_another_network_is_refused(mask, changes, says):
    other = tiny(**changes)
    flags = [p.requires_grad for p in other.parameters()]
    for action in (mask.apply, mask.trainable, lambda n: mask.verify(n, n)):
        with pytest.raises(GddlabError, match=f"for another network .*{says}"):
            action(other)
    assert flags == [p.requires_grad for p in other.parameters()]


def test_verify_sees_single_bits(net, mask):
    teacher = copy.deepcopy(net)
    student = tiny("OneStepPrecond")
    student.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        student.model.map_layer0.weight.add_(1)  # trained
    mask.verify(student, teacher)
    weight = student.get_parameter(mask.frozen[3])
    with torch.no_grad():
        weight.view(-1).view(torch.int32)[0] ^= 1
    with pytest.raises(GddlabError, match=f"1 of .* frozen tensors differ from the teacher's: {mask.frozen[3]}"):
        mask.verify(student, teacher)


def test_verify_sees_buffers_of_frozen_layers(net, mask):
    teacher = copy.deepcopy(net)
    net.get_buffer("model.enc.8x8_down.conv0.resample_filter").add_(1e-3)
    with pytest.raises(GddlabError, match=r"model.enc.8x8_down.conv0.resample_filter"):
        mask.verify(net, teacher)


def test_a_training_step_changes_what_is_trained_only(net, mask):
    teacher = copy.deepcopy(net)
    mask.apply(net)
    optimiser = torch.optim.Adam([p for _, p in mask.trainable(net)], lr=0.1)
    net(torch.randn(2, 1, 16, 16), 1.0).square().mean().backward()
    optimiser.step()
    mask.verify(net, teacher)
    moved = [n for n, p in net.named_parameters() if not torch.equal(p, teacher.get_parameter(n))]
    assert not set(moved) & set(mask.frozen)
    assert moved


def test_numbers_and_tables(net, mask):
    sizes = {n: p.numel() for n, p in net.named_parameters()}
    assert mask.n_params == sum(sizes.values())
    assert mask.n_frozen == sum(sizes[n] for n in mask.frozen)
    assert mask.fraction == mask.n_frozen / mask.n_params
    table = mask.summary()
    assert table.loc[("total", ""), "parameters"] == mask.n_params
    assert table.loc[("total", ""), "share"] == pytest.approx(mask.fraction)
    assert table.loc[("enc", "conv0"), "share"] == 1
    assert table.loc[("enc", "norm0"), "share"] == 0
    assert table.loc[("-", "map_layer0"), "share"] == 0
    frame = mask.to_frame().set_index("parameter")
    assert frame["size"].to_dict() == sizes
    assert set(frame.index[frame["frozen"]]) == set(mask.frozen)
    place = frame.loc["model.dec.8x8_block0.conv1.weight", ["block", "stage", "resolution", "kind"]]
    assert place.tolist() == ["model.dec.8x8_block0", "dec", 8, "conv1"]


def test_diff(net, mask):
    more = select_freeze(net, strategy="gdd-i-2")
    table = mask.diff(more)
    assert set(table["parameter"]) == set(more.frozen) - set(mask.frozen)
    assert (table["self"] == "trained").all()
    assert (table["other"] == "frozen").all()
    assert len(mask.diff(mask)) == 0
    with pytest.raises(GddlabError, match="different networks"):
        mask.diff(select_freeze(tiny(num_blocks=2), strategy="none"))


def test_json_round_trip(mask, result, tmp_path):
    made = [
        select_freeze(result, strategy="budget", score={"rms": 1, "mean_abs": -0.5}, budget=0.5, granularity="block"),
        select_freeze(
            result, strategy="per-resolution", score="rms", budget={16: 0.5}, always_train=["first", "*.qkv"]
        ),
        select_freeze(result, strategy="threshold", score=lambda r: {"model.enc.16x16_block0": 1.0}, threshold=1),
    ]
    for m in (mask, *made):
        m.save(tmp_path / "mask.json")
        other = FreezeMask.load(tmp_path / "mask.json")
        assert other == m
        assert other.hash == m.hash
        assert hash(other) == hash(m)
        assert other.fingerprint == m.fingerprint


PARAMETERS = parameter_table(tiny())


@settings(max_examples=25, deadline=None)
@given(names=st.lists(st.sampled_from([n for n, _ in PARAMETERS]), max_size=30), data=st.data())
def test_any_mask_comes_back_from_its_file(tmp_path_factory, names, data):
    mask = FreezeMask(tuple(names), PARAMETERS, arguments={"budget": len(names) / 100})
    path = tmp_path_factory.mktemp("mask") / "mask.json"
    mask.save(path)
    assert FreezeMask.load(path) == mask
    again = FreezeMask(tuple(data.draw(st.permutations(names))), PARAMETERS, "another name")
    assert (again.hash, again.frozen) == (mask.hash, mask.frozen)
    assert mask.transfer(tiny()).frozen == mask.frozen


def test_masks_saved_before_candidates_were_recorded_still_load(mask):
    value = mask.to_dict()
    del value["candidates"]
    assert FreezeMask.from_dict(value) == mask


def test_the_hash_is_of_what_is_frozen(net, mask):
    again = FreezeMask(tuple(reversed(mask.frozen)), mask.parameters, "custom")
    assert again.hash == mask.hash
    assert select_freeze(net, strategy="gdd-i-2").hash != mask.hash


def test_files_that_are_no_masks_are_refused(mask, tmp_path):
    path = tmp_path / "mask.json"
    with pytest.raises(NotFound):
        FreezeMask.load(path)
    path.write_text("{}")
    with pytest.raises(GddlabError, match="no freeze mask"):
        FreezeMask.load(path)
    path.unlink()
    mask.save(path)
    value = json.loads(path.read_text())
    value["frozen"].pop()
    path.write_text(json.dumps(value))
    with pytest.raises(GddlabError, match=r"mask.json: .*edited"):
        FreezeMask.load(path)
    del value["frozen"]
    path.write_text(json.dumps(value))
    with pytest.raises(GddlabError, match="incomplete"):
        FreezeMask.load(path)
    mask.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"strategy": 5}))
    with pytest.raises(GddlabError, match="strategy=5: input should be a valid string"):
        FreezeMask.load(path)


def test_unknown_names_are_refused(mask):
    with pytest.raises(GddlabError, match=r"did you mean 'model.enc.16x16_conv.weight'"):
        FreezeMask(("model.enc.16x16_conv.weigh",), mask.parameters)
    with pytest.raises(GddlabError, match=r"unknown layer 'model.enc.16x16_con': did you mean 'model.enc.16x16_conv'"):
        FreezeMask((), mask.parameters, candidates={"x": ("model.enc.16x16_con",)})


def test_in_words(mask, result):
    n, share = f"{mask.n_params:,}", f"{mask.fraction:.2%}"
    tensors = f"{len(mask.frozen)} of {len(mask.parameters)} tensors"
    assert str(mask).startswith(f"gdd-i: {share} of {n} parameters frozen ({tensors}); frozen conv 9")
    assert "%, proj; trained map_layer, norm, affine, " in str(mask)
    nothing = str(select_freeze(result, strategy="none"))
    assert "; frozen nothing; trained map_layer, conv, norm, affine" in nothing
    assert "model." not in repr(mask)
    html = mask._repr_html_()
    assert all(text in html for text in ("gdd-i", share, tensors, mask.hash[:12], "conv0"))
    asked = select_freeze(result, strategy="budget", score="rms", budget=0.5)
    reached = f"{asked.fraction:.2%}"
    assert f"tensors; budget 50.00%, reached {reached}); frozen " in str(asked)
    html = asked._repr_html_()
    assert f"<th>budget asked</th><td>50.00%</td></tr><tr><th>budget reached</th><td>{reached}</td>" in html
    counted = select_freeze(result, strategy="budget", score="rms", budget=0.5, unit="layers")
    assert "budget 50.00% of the candidates' number, reached 50.00%" in str(counted)
    each = select_freeze(result, strategy="per-resolution", score="rms", budget=0.5)
    assert "budget 50.00% of the candidates at each resolution, reached 16: " in str(each)
    custom = FreezeMask((), mask.parameters, "<b>")
    assert "<b>" not in custom._repr_html_()
