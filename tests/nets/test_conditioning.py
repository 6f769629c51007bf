import copy

import pytest
import torch

from gddlab.errors import GddlabError, NotFound
from gddlab.nets import Call, Conditioning
from tests.models import PIPELINES, network, pipeline, with_text


def example(n=3):
    rows = {"encoder_hidden_states": torch.randn(n, 7, 12), "added_cond_kwargs.time_ids": torch.randn(n, 6)}
    shared = {"txt_ids": torch.zeros(7, 3), "flag": True, "scale": 0.5}
    negative = {name: -x for name, x in rows.items()}
    return Conditioning(rows, shared, negative, tuple("abcdefgh"[:n]), (4, 8, 8))


def same(a, b):
    assert (a.names, a.shape, a.flags, a.hash) == (b.names, b.shape, b.flags, b.hash)
    assert a.tensors().keys() == b.tensors().keys()
    for name, x in a.tensors().items():
        assert torch.equal(x, b.tensors()[name])


def test_saved_and_loaded_it_is_the_same(tmp_path):
    cond = example()
    cond.save(tmp_path / "c.safetensors")
    same(Conditioning.load(tmp_path / "c.safetensors"), cond)
    plain = Conditioning({"class_labels": torch.tensor([1, 2])})
    plain.save(tmp_path / "p.safetensors")
    back = Conditioning.load(tmp_path / "p.safetensors")
    same(back, plain)
    assert back.negative is None and back.names == ("0", "1")


def test_what_is_no_file_of_it_is_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(NotFound, match="no such file"):
        Conditioning.load(tmp_path / "absent.safetensors")
    (tmp_path / "text").write_text("no")
    with pytest.raises(GddlabError, match="damaged"):
        Conditioning.load(tmp_path / "text")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(GddlabError, match="holds no conditioning"):
        Conditioning.load(tmp_path / "other")


def test_a_part_holds_the_rows_asked_for():
    cond = example(5)
    for index, ids in ((slice(1, 3), [1, 2]), (4, [4]), (-1, [4]), ([3, 0], [3, 0]), (torch.tensor([2]), [2])):
        part = cond[index]
        assert len(part) == len(ids) and part.names == tuple(cond.names[i] for i in ids)
        for name in cond.rows:
            assert torch.equal(part.rows[name], cond.rows[name][ids])
            assert torch.equal(part.negative[name], cond.negative[name][ids])
        assert part.shared is cond.shared
    with pytest.raises(IndexError):
        cond[5]


def test_the_hash_is_of_what_the_network_sees():
    cond = example()
    assert copy.deepcopy(cond).hash == cond.hash == cond[[0, 1, 2]].hash
    others = [cond[[0, 1, 1]], Conditioning(cond.rows, {**cond.shared, "scale": 0.6}, cond.negative)]
    others.append(Conditioning(cond.rows, cond.shared))
    assert len({cond.hash, *(c.hash for c in others)}) == 4


@pytest.mark.parametrize("rows", [{}, {"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)}, {"a": torch.zeros(())}])
def test_rows_are_one_per_image(rows):
    with pytest.raises(GddlabError, match="one row per image"):
        Conditioning(rows)


def test_names_and_negative_rows_fit():
    with pytest.raises(GddlabError, match="with 1 names"):
        Conditioning({"a": torch.zeros(2)}, names=("x",))
    with pytest.raises(GddlabError, match="give the same names"):
        Conditioning({"a": torch.zeros(2)}, negative={"b": torch.zeros(2)})


@pytest.mark.parametrize("name", PIPELINES)
def test_what_is_recorded_is_what_was_passed(name):
    pipe, call = pipeline(name, n=2)
    net = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    scheduler, hooks = pipe.scheduler, len(net._forward_pre_hooks)
    state = torch.get_rng_state()
    cond = Conditioning.record(pipe, **call) if name != "dit" else Conditioning.record(pipe, call.pop("class_labels"))
    assert torch.equal(torch.get_rng_state(), state)
    assert pipe.scheduler is scheduler and getattr(scheduler, "num_inference_steps", None) is None
    assert len(net._forward_pre_hooks) == hooks and pipe._progress_bar_config == {"disable": True}
    assert len(cond) == 2
    if name == "dit":
        assert cond.rows["class_labels"].tolist() == [0, 1] and cond.negative["class_labels"].tolist() == [1000, 1000]
        assert cond.names == ("0", "1")
        return
    assert torch.equal(cond.rows["encoder_hidden_states"], call["prompt_embeds"])
    if name == "flux":
        assert cond.negative is None and cond.rows["guidance"].tolist() == [4.0, 4.0]
        assert cond.shared["txt_ids"].shape == (7, 3) and cond.shared["img_ids"].shape == (16, 3)
    else:
        assert torch.equal(cond.negative["encoder_hidden_states"], call["negative_prompt_embeds"])
    if name == "sdxl":
        assert torch.equal(cond.rows["added_cond_kwargs.text_embeds"], call["pooled_prompt_embeds"])
        assert cond.rows["added_cond_kwargs.time_ids"].shape == (2, 6)
    if name == "sd3":
        assert torch.equal(cond.rows["pooled_projections"], call["pooled_prompt_embeds"])
    side = 16 if name == "sana" else 8
    assert cond.shape == (4, side, side)
    forms = Call.of(net)
    assert all(n in cond.rows for n in forms.needs)


def test_prompts_are_encoded_by_the_pipeline(tmp_path):
    pipe = with_text(tmp_path)
    cond = Conditioning.record(pipe, ["a b", "c"], height=16, width=16)
    assert cond.names == ("a b", "c") and cond.negative is not None
    wanted, negative = pipe.encode_prompt(["a b", "c"], "cpu", 1, True)
    torch.testing.assert_close(cond.rows["encoder_hidden_states"], wanted)
    torch.testing.assert_close(cond.negative["encoder_hidden_states"], negative)
    assert not torch.allclose(wanted[0], wanted[1])
    one = Conditioning.record(pipe, "c", height=16, width=16)
    torch.testing.assert_close(one.rows["encoder_hidden_states"], wanted[1:], rtol=1e-4, atol=1e-5)


def test_a_recording_without_guidance_has_no_negative_rows():
    pipe, call = pipeline("sd")
    assert Conditioning.record(pipe, **call | {"guidance_scale": 1.0}).negative is None


def test_what_cannot_be_recorded_is_refused():
    pipe, call = pipeline("sd")
    with pytest.raises(GddlabError, match="no diffusers pipeline"):
        Conditioning.record(pipe.unet, "a")
    with pytest.raises(GddlabError, match="give each prompt once"):
        Conditioning.record(pipe, **call, num_images_per_prompt=2)
    other, its = pipeline("sd3")
    with pytest.raises(GddlabError, match="StableDiffusion3Pipeline refused its arguments"):
        Conditioning.record(other, **its, colour="red")
    with pytest.raises(GddlabError, match="give prompts, or embeddings"):
        Conditioning.record(pipe, height=16, width=16)
    with pytest.raises(GddlabError, match=r"no 'x': give call="):
        Conditioning.record(pipe, call=Call(sample="x"), **call)
    assert len(pipe.unet._forward_pre_hooks) == 0


def test_classes_are_ids_and_none_is_the_last():
    net = network("dit")
    for ids in ([2, 7], torch.tensor([2, 7]), torch.eye(10)[[2, 7]]):
        cond = Conditioning.classes(ids, of=net)
        assert cond.rows["class_labels"].tolist() == [2, 7] and cond.negative["class_labels"].tolist() == [10, 10]
        assert cond.names == ("2", "7")
    assert len(Conditioning.classes(3, of=net)) == 1
    plain = Conditioning.classes([1], of=network("unet2d", num_class_embeds=4))
    assert plain.negative is None
    for ids, says in (([10], "0 to 9"), ([-1], "0 to 9"), ([], "0 to 9"), ("ab", "give class ids"), ([0.5], "0 to 9")):
        with pytest.raises(GddlabError, match=says):
            Conditioning.classes(ids, of=net)
    with pytest.raises(GddlabError, match="takes no class ids"):
        Conditioning.classes([1], of=network("sd"))


@pytest.mark.parametrize("given", [{"a": [1, 2]}, torch.zeros(2), "a", {"a": "b"}])
def test_conditioning_is_of_tensors(given):
    with pytest.raises(GddlabError, match="give tensors by name"):
        Conditioning(given)
    with pytest.raises(GddlabError, match=r"with negative=.*: give tensors by name"):
        Conditioning({"a": torch.zeros(2)}, negative=given)


def test_negative_rows_are_as_many():
    with pytest.raises(GddlabError, match="one row per image"):
        Conditioning({"a": torch.zeros(2, 3)}, negative={"a": torch.zeros(1, 3)})


def test_weights_are_no_conditioning(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    with pytest.raises(GddlabError, match="holds no conditioning: give a file"):
        Conditioning.load(tmp_path / "a.safetensors")
