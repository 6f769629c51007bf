"""Studies: what is measured of the teacher and of trained students, each with a table of its own."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gddlab.datasets import ImageDataset, open_dataset
from gddlab.diagnosis.preflight import preflight
from gddlab.distill.adversarial import adversarial_problem
from gddlab.editing import Restoration, inpaint
from gddlab.editing.operators import check_keep
from gddlab.evaluation import Record, evaluate, find_extractor, real_split, yardsticks
from gddlab.evaluation.features import image_features, real_features
from gddlab.evaluation.images import classes_of, drawn
from gddlab.evaluation.metrics import frechet, kernel
from gddlab.evaluation.references import Reference
from gddlab.experiments.experiment import Study, StudyInputs, StudyResult
from gddlab.experiments.factorial import groups
from gddlab.experiments.questions import ORDERED, OWN_RATE, RANDOM, RATES
from gddlab.nets import DiTPrecond, Precond, without_target
from gddlab.probing import ablate, grad_probe, probe, weight_change
from gddlab.probing.inputs import Inputs
from gddlab.probing.layers import owner_of
from gddlab.probing.null import Kind
from gddlab.probing.reductions import radial_power
from gddlab.sampling import sample
from gddlab.sampling.grid import to_uint8
from gddlab.teachers import bundled_teachers, load_precond

if TYPE_CHECKING:
    import pandas as pd

OTHER_NOISE = "other noise"
PROBED, ABLATED, DENOISED = 64, 16, 512
"""Images of the probes, of ablations, and of the spectra of noised and denoised images."""
NULLS: tuple[Kind, ...] = ("shuffled", "init", "spectrum")
DRAWS = 3
"""Null models of each kind beside a crossed probe."""
TIMED = 24
"""Iterations timed of each configuration; the median counts."""
SIGMAS = (80.0, 10.0, 2.5, 1.0, 0.5, 0.1)
"""Noise levels of denoised images' spectra."""


def teacher_steps(s: StudyInputs) -> StudyResult:
    """Scores of the teacher at each number of Heun steps."""
    import pandas as pd

    rows, records = [], []
    for steps in s.steps:
        found = list(_scores(s, steps=steps))
        records += found
        rows += [{"steps": steps, "nfe": 2 * steps - 1, **_flat(r)} for r in found]
    return StudyResult(pd.DataFrame(rows), {"n": records[0].n, "seed": 0}, tuple(records))


def _scores(s: StudyInputs, *, steps: int) -> Iterator[Record]:
    n = s.judge.n or len(open_dataset(s.data))
    shared: dict[str, Any] = {"n": n, "steps": steps, "nproc": s.nproc, "progress": False}
    for metrics, how in s.judge.scores(s.data, asked=s.asked, end=steps == s.steps[-1]):
        yield from evaluate(s.teacher, metrics=metrics, **shared, **how)


def known_cases(s: StudyInputs) -> StudyResult:
    """Scores of known cases: a copier of the training images, images held out, a missing class, another half.

    Where images are held out, these are `yardsticks`, and rows of `case` "copier" have the kernel distance of the
    training images to those held out. Elsewhere there is "other half" alone.
    """
    import pandas as pd

    rows, records = [], []
    for metrics, how in s.judge.scores(s.data, asked=s.asked, end=False):
        how |= {"metrics": metrics, "progress": False}
        if how["data"] != s.data:
            found = {"copier": evaluate(open_dataset(s.data), **how)}
        elif s.judge.held_out is not None:
            found = yardsticks(**how)
        else:
            found = {"other half": real_split(**how)}
        for case, scores in found.items():
            records += list(scores)
            rows += [{"case": case, **_flat(r)} for r in scores]
    return StudyResult(pd.DataFrame(rows), {"seed": 0}, tuple(records))


def _flat(record: Record) -> dict[str, Any]:
    """The fields of a record that fit into a table; the study's evaluation.jsonl has all."""
    keys = ("metric", "value", "std", "n", "extractor", "reference", "reference_n", "sampler", "model_sha256")
    seeds = "" if record.seeds is None else f"{record.seeds[0]} to {record.seeds[1]}"
    return {"label": record.label, **{k: getattr(record, k) for k in keys}, "seeds": seeds}


def local_minima(s: StudyInputs) -> StudyResult:
    """Distances of networks to the data and to each other: as sets, and image by image for the same noise."""
    import pandas as pd

    real = open_dataset(s.data)
    spec = find_extractor(s.judge.extractor).fitted(real.channels, real.resolution)
    n = s.judge.pairs or s.judge.n or len(real)
    images = {name: to_uint8(_sampled(net, real, n, steps)) for name, net, steps in _networks(s)}
    device = next(s.teacher.parameters()).device
    features = {name: image_features(x, spec, device=device) for name, x in images.items()}
    metric = f"{spec.metric_name('fid')}"
    rows: list[dict[str, Any]] = []

    def add(a: str, b: str, distance: str, value: float, sem: float | None, unit: str) -> None:
        rows.append({"a": a, "b": b, "distance": distance, "value": value, "sem": sem, "n": n, "unit": unit})

    def same_noise(a: str, b: str, x: Tensor, y: Tensor, f: Tensor, g: Tensor) -> None:
        pixel = ((x.float() - y.float()) / 127.5).square().flatten(1).mean(1).sqrt()  # (N,), on the scale of [-1, 1]
        feature = (f - g).norm(dim=1)
        for distance, values, unit in (("pixel", pixel, "rms of [-1, 1]"), ("feature", feature, f"{spec.name} units")):
            add(a, b, distance, values.mean().item(), values.std().item() / len(values) ** 0.5, unit)

    theirs = real_features(real, spec, device=device)
    for name, f in features.items():
        add(name, "data", metric, frechet(f, theirs)[0].value, None, "squared features")
    for a, b in itertools.combinations(images, 2):
        add(a, b, metric, frechet(features[a], features[b])[0].value, None, "squared features")
        same_noise(a, b, images[a], images[b], features[a], features[b])
    full = f"teacher-{s.steps[-1]}"
    x, f = images[full], features[full]
    same_noise(full, f"{full}, {OTHER_NOISE}", x, x.roll(1, 0), f, f.roll(1, 0))
    about = {"n": n, "seed": 0, "extractor": spec.name, "extractor_sha256": spec.sha256, "data": real.name}
    return StudyResult(pd.DataFrame(rows), about | {"data_sha256": real.manifest.sha256, "reference_n": len(real)})


def followed(s: StudyInputs) -> StudyResult:
    """How often a student makes the teacher's image of the same noise, by the share of its weights that are its own.

    Columns: experiment, seed, frozen (share of the parameters equal to the teacher's), found and correlation (as
    `gddlab.reporting.found_again` gives them, with the images of the full teacher), n.
    """
    import pandas as pd

    from gddlab.reporting import found_again

    real = open_dataset(s.data)
    n = s.judge.pairs or s.judge.n or len(real)
    target = _sampled(s.teacher, real, n, s.steps[-1])
    theirs, rows = s.teacher.state_dict(), list[dict[str, Any]]()
    for name, student in s.students.items():
        own = dict(without_target(student).named_parameters())
        frozen = sum(int((own[k] == theirs[k]).sum()) for k in own) / sum(p.numel() for p in own.values())
        alike = found_again({name: _sampled(student, real, n, None)}, target).loc[name]
        experiment, _, seed = name.partition("/seed-")
        row = {"experiment": experiment, "seed": int(seed or 0), "frozen": frozen}
        rows.append(row | {"found": alike["found"], "correlation": alike["correlation"], "n": n})
    return StudyResult(pd.DataFrame(rows), {"n": n, "seed": 0})


def completed(s: StudyInputs) -> StudyResult:
    """Held-out images of which a part is known, completed by students and by the teacher in several settings.

    One row per part and setting: the columns of `Restoration.scores`, and `kd`, the unbiased kernel distance of the
    first completion of each image to the training images (all completions would count an image as often as they are
    alike), with its standard deviation over subsets, `kd_std`. Settings "hidden truth" and "pasted" are what was
    hidden, and known pixels on an image of the GDD-I student that has nothing to do with them: the best and the worst
    that can be expected.
    """
    import pandas as pd

    assert s.judge.held_out is not None
    held_out = open_dataset(s.judge.held_out)
    n = s.judge.pairs or COMPLETED
    # the search's settings were chosen with the first images; spread, since a set may be sorted by class
    truth = held_out.images(torch.linspace(TUNED, len(held_out) - 1, n).long().tolist())
    student, several = s.student("gdd-i"), s.students.get("second-step-0.8")
    settings: list[tuple[str, Any, dict[str, Any]]] = [
        (f"student, search of {n} steps", student, {"steps": n}) for n in SEARCHED
    ]
    settings += [(f"teacher, {n} steps", s.teacher, {"steps": n, "method": "teacher"}) for n in TAUGHT]
    if several is not None:
        settings.insert(len(SEARCHED), ("student of two steps, rounds", several, {"method": "rounds"}))
    rows = []
    for part in PARTS:
        keep = check_keep(part, len(truth), truth.shape[1:])
        drawn = sample(student, len(truth) * WAYS, seed=0).unflatten(0, (len(truth), WAYS))
        pasted = torch.where(keep[:, None], truth[:, None], drawn)
        known = {"hidden truth": truth[:, None].repeat(1, WAYS, 1, 1, 1), "pasted": pasted}
        none = torch.full((len(truth), WAYS), float("nan"))
        found = {name: Restoration(x, none, "none", part, 0, 0.0) for name, x in known.items()}
        for name, net, how in settings:
            found[name] = inpaint(net, truth, part, n=WAYS, progress=False, **how)
        for name, restored in found.items():
            how = {"data": s.data, "extractor": s.judge.extractor, "metrics": "kid", "progress": False}
            (kd,) = evaluate(restored.images[:, 0], **how)
            about = {"part": part, "setting": name, "kd": kd.value, "kd_std": kd.std}
            rows += [about | row for row in restored.scores(truth).drop(columns="operator").to_dict("records")]
    about = {"images": len(truth), "ways": WAYS, "seed": 0, "data": held_out.name, "extractor": s.judge.extractor}
    return StudyResult(pd.DataFrame(rows), about)


def _networks(s: StudyInputs) -> Iterator[tuple[str, Precond, int | None]]:
    """Name, network, Heun steps."""
    for steps in s.steps:
        if steps > 1:  # one Euler step is the mean of the data, for every noise
            yield f"teacher-{steps}", s.teacher, steps
    for name, student in s.students.items():
        yield name, student, None


def _sampled(net: Precond, real: ImageDataset, n: int, steps: int | None) -> Tensor:
    return sample(net, n, steps=steps, seed=0, class_labels=classes_of(net, Reference.of(real), n, 0))


def rewound(s: StudyInputs) -> StudyResult:
    """Each group of layers of a GDD student put back to the teacher's weights; and the teacher with the student's.

    Rows of `into` "student" and "teacher"; groups are those of the factorial, beside "none", "all", and "rest" for what
    is in no group. `share` is a group's share of the squared movement of all weights.
    """
    import pandas as pd

    scores = _Scores(s)
    name = _gdd(s)
    student = s.student(name)
    own, theirs = ({k: v.clone() for k, v in net.state_dict().items()} for net in (student, s.teacher))
    theirs = {k: theirs[k] for k in own}
    moved = {k: (own[k] - theirs[k]).double().square().sum().item() for k in own}
    parts = {name: {k for k in own if owner_of(k) in layers} for name, layers in groups(student).items()}
    parts |= {"rest": {*own}.difference(*parts.values()), "none": set(), "all": {*own}}
    rows: list[dict[str, Any]] = []
    net = copy.deepcopy(student)
    for into, (here, there) in {"student": (own, theirs), "teacher": (theirs, own)}.items():
        for group, names in parts.items():
            net.load_state_dict(here | {k: there[k] for k in names})
            share = sum(moved[k] for k in names) / sum(moved.values())
            rows += [{"into": into, "group": group, "share": share, **row} for row in scores(net)]
    return StudyResult(pd.DataFrame(rows), scores.about | {"student": name})


def each_step(s: StudyInputs) -> StudyResult:
    """What students make with each number of their steps, and all of them mixed, which is what the discriminator saw.

    Rows by experiment, seed, `steps` (their number; 0 for the mixture, an equal part of each) and metric; `level` is
    the mean over pixels, 0 is black and 1 white, of these images, and `data_level` that of the data.
    """
    import pandas as pd

    scores, rows = _Scores(s), list[dict[str, Any]]()
    data_level = torch.from_numpy(scores.real.uint8).double().mean().item() / 255
    for name, student in s.students.items():
        labels = classes_of(student, Reference.of(scores.real), scores.n, 0)
        made = {
            k: to_uint8(sample(student, scores.n, sigmas=student.sigmas[:k], seed=0, class_labels=labels))
            for k in range(1, len(student.sigmas) + 1)
        }
        if len(made) > 1:
            made[0] = torch.stack([made[1 + i % len(made)][i] for i in range(scores.n)])
        experiment, _, seed = name.partition("/seed-")
        for steps, images in made.items():
            about = {"experiment": experiment, "seed": int(seed or 0), "steps": steps, "data_level": data_level}
            about["level"] = images.double().mean().item() / 255
            rows += [about | row for row in scores.of(images)]
    return StudyResult(pd.DataFrame(rows), scores.about)


def pulls(s: StudyInputs) -> StudyResult:
    """What might say which layers to train: one row per layer and measure, with the layer's group of the factorial.

    Measures are the statistics of `grad_probe` for the GAN loss at the teacher's weights, against a discriminator that
    has been trained on its one-step images ("gan fisher" and so on), and for the denoising loss at low noise
    ("denoising fisher"); of GDD students "moved", the mean of |w - w_teacher| / |w_teacher| over training seeds, and
    "agreement", the cosine of these movements between two seeds, mean over pairs, where there are two; of the teacher
    at sigma 80 "ablation" and "rel_update" (of the block).
    """
    import pandas as pd

    group_of = {layer: name for name, layers in groups(s.teacher).items() for layer in layers}
    layers, rows = [*group_of], list[dict[str, Any]]()

    def add(measure: str, values: Mapping[Any, float]) -> None:
        rows.extend(
            {"layer": k, "group": group_of[k], "measure": measure, "value": v}
            for k, v in values.items()
            if k in group_of
        )

    s.student("warm")
    problem = adversarial_problem(s.folders["warm"], n=PULLED)
    gan = grad_probe(*problem, layers=layers, progress=False)
    low = grad_probe(s.teacher, timesteps=LOW, layers=layers, data=s.data, n=PULLED, progress=False)
    for name, result in (("gan", gan), ("denoising", low)):
        for stat in ("grad_norm_ratio", "grad_snr", "fisher", "taylor"):
            add(f"{name} {stat}", result.pivot(stat).mean(axis=1).to_dict())
    theirs = s.teacher.state_dict()
    moves = [
        {k: v - theirs[k] for k, v in net.state_dict().items()} for name, net in s.students.items() if name != "warm"
    ]
    parts = {layer: [k for k in moves[0] if owner_of(k) == layer] for layer in layers} if moves else {}

    def flat(state: Mapping[str, Tensor], layer: str) -> Tensor:
        return torch.cat([state[k].flatten().double() for k in parts[layer]])

    moved, agreed = dict[str, float](), dict[str, float]()
    for layer in parts:
        own = [flat(m, layer) for m in moves]
        moved[layer] = (sum(x.norm() for x in own) / len(own) / flat(theirs, layer).norm()).item()
        if pairs := [torch.cosine_similarity(a, b, 0).item() for a, b in itertools.combinations(own, 2)]:
            agreed[layer] = sum(pairs) / len(pairs)
    add("moved", moved)
    add("agreement", agreed)
    ablated = ablate(s.teacher, [80.0], layers=layers, data=s.data, n=ABLATED, progress=False)
    add("ablation", ablated.pivot("ablation_output_mean")[80.0].to_dict())
    blocks = probe(s.teacher, [80.0], layers="block", data=s.data, n=PROBED, stats=("rel_update",), progress=False)
    update = blocks.pivot("rel_update")[80.0].to_dict()
    add("rel_update", {k: update[k.rpartition(".")[0]] for k in layers if k.rpartition(".")[0] in update})
    return StudyResult(pd.DataFrame(rows), {"n": PULLED, "seed": 0, "denoising": list(LOW)})


def line(s: StudyInputs) -> StudyResult:
    """Students on the straight line between the weights of two networks, (1 - t) a + t b.

    `length` is the distance of the two in weights; `copied` the distance of images to those of the full teacher for the
    same noise, root mean square over [-1, 1], which is what losses that copy lower.
    """
    import pandas as pd

    gdd = _gdd(s)
    net = copy.deepcopy(without_target(s.student(gdd)))
    students = {name: without_target(student) for name, student in s.students.items()}
    scores = _Scores(s)
    target = to_uint8(_sampled(s.teacher, scores.real, scores.n, s.steps[-1])).float()
    ends = {"teacher": s.teacher.state_dict(), **{name: student.state_dict() for name, student in students.items()}}
    ends = {name: {k: state[k].clone() for k in net.state_dict()} for name, state in ends.items()}
    rows: list[dict[str, Any]] = []
    for a, b in ((a.format(gdd=gdd), b.format(gdd=gdd)) for a, b in LINES):
        if a not in ends or b not in ends:
            continue
        length = sum((ends[a][k] - ends[b][k]).double().square().sum().item() for k in ends[a]) ** 0.5
        for t in PLACES:
            net.load_state_dict({k: torch.lerp(ends[a][k], ends[b][k], t) for k in ends[a]})
            images = scores.images(net)
            copied = ((images.float() - target) / 127.5).square().mean().sqrt().item()
            about = {"a": a, "b": b, "t": t, "length": length, "copied": copied}
            rows += [about | row for row in scores.of(images)]
    return StudyResult(pd.DataFrame(rows), scores.about)


def _gdd(s: StudyInputs) -> str:
    """The student that is trained whole, at its own learning rate where the list has one, else at the preset's."""
    return OWN_RATE if OWN_RATE in s.students else "gdd"


class _Scores:
    """Distances of a one-step generator's images to the data, for many networks that differ little."""

    def __init__(self, s: StudyInputs):
        self.real = open_dataset(s.data)
        self.spec = find_extractor(s.judge.extractor).fitted(self.real.channels, self.real.resolution)
        self.n = s.judge.pairs or s.judge.n or len(self.real)
        self.device = next(s.teacher.parameters()).device
        self.theirs = real_features(self.real, self.spec, device=self.device)
        self.about = {"n": self.n, "seed": 0, "extractor": self.spec.name, "extractor_sha256": self.spec.sha256}

    def images(self, net: Precond) -> Tensor:
        return to_uint8(_sampled(net, self.real, self.n, None))

    def of(self, images: Tensor) -> list[dict[str, Any]]:
        features = image_features(images, self.spec, device=self.device)
        found = {"fid": frechet(features, self.theirs)[0].value, "kid": kernel(features, self.theirs)[0].value}
        return [{"metric": self.spec.metric_name(name), "value": value, "n": self.n} for name, value in found.items()]

    def __call__(self, net: Precond) -> list[dict[str, Any]]:
        return self.of(self.images(net))


def layers(s: StudyInputs) -> StudyResult:
    """Activation of layers over noise levels, teacher and students; and how far each layer's weights moved."""
    import pandas as pd

    kinds = ("conv", "block")
    stats = ("rms", "active_fraction", "rel_update", "cosine", "spectral_share")
    parts: list[pd.DataFrame] = []
    for name, net in {"teacher": s.teacher, **s.students}.items():
        noised = probe(net, 18, data=s.data, layers=kinds, stats=stats, n=PROBED, progress=False)
        alone = probe(net, states="student", layers=kinds, stats=stats[:3] + stats[4:], n=PROBED, progress=False)
        parts += [f.frame.assign(network=name, states=x) for f, x in ((noised, "noised"), (alone, "student"))]
        if name != "teacher":
            moved = weight_change(net, s.teacher, "all").frame
            # a container's change is its layers'
            own = {m for m, module in net.named_modules() if any(True for _ in module.parameters(recurse=False))}
            parts.append(moved[moved["layer"].isin(own)].assign(network=name, states="weights"))
    texts = ("layer", "block", "kind", "stage", "stat", "unit", "network", "states")
    frame = pd.concat(parts, ignore_index=True).astype(dict.fromkeys(texts, "category"))
    return StudyResult(frame, {"n": PROBED, "seed": 0})


def input_or_level(s: StudyInputs) -> StudyResult:
    """What layers respond to, the input or the level told, of the teachers of these data, students and null models.

    Rows of `what` "response" are of `ProbeResult.responses`, "effect" of `effects`, "above null" of `above_null`.
    """
    import pandas as pd

    networks = {**_teachers(s, same=True), **s.students}
    frame = pd.concat([_crossed(name, net, s, _in_blocks) for name, net in networks.items()], ignore_index=True)
    return StudyResult(_texts(frame), _about_nulls("convolutions in blocks"))


def architectures(s: StudyInputs) -> StudyResult:
    """Blocks of all teachers of these data, U-Nets and transformers: what is active, what they respond to and need.

    Rows as of `input_or_level`, and of `what` "level" (18 levels, the network told its input's; null models by `draw`)
    and "needed" (the loss without a block over the loss with it). `position` is a block's place, 0 (first) to 1 (last).
    """
    import pandas as pd

    frames: list[pd.DataFrame] = []
    sizes: dict[str, Any] = {"layers": "block", "data": s.data, "progress": False}
    for name, net in _teachers(s).items():
        parted = ("rel_update_attn", "rel_update_mlp") if isinstance(net, DiTPrecond) else ()
        levels = probe(net, 18, stats=("rel_update", *parted), n=PROBED, nulls=NULLS, null_draws=DRAWS, **sizes)
        nulls = [(kind, i, draw) for kind, draws in levels.nulls.items() for i, draw in enumerate(draws)]
        needed = ablate(net, 18, n=ABLATED, **sizes).frame.query("stat == 'ablation_loss_ratio_mean'")
        parts = [
            _crossed(name, net, s, "block"),
            *(r.frame.assign(what="level", null=null, draw=i) for null, i, r in [("trained", 0, levels), *nulls]),
            needed.assign(what="needed", null="trained", draw=0),
        ]
        frame = pd.concat(parts, ignore_index=True).assign(network=name)
        order = {layer: i for i, layer in enumerate(levels.frame["layer"].unique())}
        frames.append(frame.assign(position=frame["layer"].map(order) / max(1, len(order) - 1)))
    return StudyResult(_texts(pd.concat(frames, ignore_index=True)), _about_nulls("blocks") | {"ablated": ABLATED})


def _crossed(name: str, net: Precond, s: StudyInputs, layers: Any) -> pd.DataFrame:
    """Responses, effects and what is above null models, of six levels of the input, each told as each of the six."""
    import pandas as pd

    stats = ("rms", "rel_update", "correlation", "cosine")
    sizes: dict[str, Any] = {"data": s.data, "n": PROBED, "stats": stats, "progress": False}
    result = probe(net, told="cross", nulls=NULLS, null_draws=DRAWS, layers=layers, **sizes)
    parts: list[pd.DataFrame] = []
    for similarity in ("correlation", "cosine"):
        table = result.responses(similarity)
        for stat in (similarity, *(["rel_update"] if similarity == "correlation" else [])):
            columns = {stat: "value", **{f"{stat}_{c}": c for c in ("sem", "q25", "q75")}}
            rows = table[["varied", "network", *columns]].rename(columns=columns | {"network": "null"})
            parts.append(rows.assign(network=name, what="response", stat=stat))
    for stat in stats:
        effects = result.effects(stat)
        for share in ("input", "told", "both", "spread"):
            rows = effects[[share, f"sem_{share}"]].set_axis(["value", "sem"], axis=1).reset_index()
            parts.append(rows.assign(network=name, null="trained", what="effect", stat=stat, varied=share))
        above = result.diagonal().above_null(stat).rename(columns={"kind": "null"})
        parts.append(above.assign(network=name, what="above null", stat=stat, varied="both"))
    return pd.concat(parts, ignore_index=True)


def _texts(frame: pd.DataFrame) -> pd.DataFrame:
    texts = ("network", "null", "what", "stat", "varied", "layer")
    return frame.astype(dict.fromkeys(texts, "category"))


def _about_nulls(layers: str) -> dict[str, Any]:
    return {"n": PROBED, "seed": 0, "nulls": list(NULLS), "draws": DRAWS, "layers": layers}


def _teachers(s: StudyInputs, *, same: bool = False) -> dict[str, Precond]:
    """The teacher, and those of its images that ship with gddlab; of the `same` architecture alone, or of all."""
    out = {s.teacher.card.name: s.teacher}
    for name in bundled_teachers():
        other = load_precond(name)
        alike = other.init_kwargs == s.teacher.init_kwargs or not same
        if name not in out and other.card.data == s.data and alike:
            out[name] = other.to(next(s.teacher.parameters()).device)
    return out


def _in_blocks(name: str, module: Any) -> bool:
    return name.rpartition(".")[2] in ("conv0", "conv1")


def spectra(s: StudyInputs) -> StudyResult:
    """Radial power spectra of images: the data, noised and denoised, and sampled by teacher and students."""
    import pandas as pd

    real = open_dataset(s.data)
    n = s.judge.pairs or s.judge.n or len(real)
    parts: list[pd.DataFrame] = []

    def add(network: str, source: str, sigma: float | None, x: Tensor) -> None:
        frequency, power = radial_power(x)
        sem = power.std(0) / len(power) ** 0.5
        columns = {"frequency": frequency.numpy(), "power": power.mean(0).numpy(), "sem": sem.numpy()}
        about = {"network": network, "source": source, "sigma": float("nan") if sigma is None else sigma}
        parts.append(pd.DataFrame({**about, **columns, "n": len(x)}))

    add("data", "data", None, real.images(drawn(len(real), n, 0)))
    for name, net, steps in _networks(s):
        add(name, "sampled", None, _sampled(net, real, n, steps))
    inputs = Inputs(s.teacher, SIGMAS, data=s.data, n=min(DENOISED, len(real)), seed=0)
    x, y = _denoised(s.teacher, inputs)  # (n, S, C, H, W)
    for i, sigma in enumerate(inputs.sigmas):
        add("data", "noised", sigma, x[:, i])
        add("teacher", "denoised", sigma, y[:, i])
    return StudyResult(pd.concat(parts, ignore_index=True), {"n": n, "seed": 0, "data": real.name})


def costs(s: StudyInputs) -> StudyResult:
    """Time and memory of a training step of each configuration, one after the other."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for name, config in s.configs.items():
        found = preflight(config, steps=TIMED, measure_batch=config.batch_per_device or config.batch)
        numbers = ("sec_per_kimg", "peak_mem_mib", "parameters", "trained", "discriminator", "device", "threads")
        missing = "; ".join(c.detail for c in found.checks if not c.ok) if found.sec_per_kimg is None else ""
        rows.append(
            {"experiment": name, "kimg": config.total_kimg, "batch": config.batch}
            | {k: getattr(found, k) for k in numbers}
            | {"state": missing or "done"}
        )
    return StudyResult(pd.DataFrame(rows), {"steps": TIMED})


@torch.inference_mode()
def _denoised(net: Precond, inputs: Inputs) -> tuple[Tensor, Tensor]:
    device = next(net.parameters()).device
    xs, ys = [], []
    for i in range(0, inputs.n, 16):
        x, sigma, labels = inputs.rows(i, min(i + 16, inputs.n), device=device)
        xs.append(x.cpu())
        ys.append(net(x, sigma, labels).float().cpu())
    shape = (inputs.n, len(inputs.sigmas), *inputs.shape)
    return torch.cat(xs).reshape(shape), torch.cat(ys).reshape(shape)


STUDENTS = ("gdd", "gdd-i", "cd")
PULLED, LOW = 512, (0.1, 0.3, 1.0)
"""Images of gradients, and noise levels of the denoising loss."""
COMPLETED, WAYS = 256, 2
"""Images completed, unless a list's judge has other pairs, and in how many ways each."""
TUNED = 256
"""The first images of a held-out set, which none of these is among."""
PARTS = ("top", "border")
"""What is known of them."""
SEARCHED, TAUGHT = (5, 15, 50), (6, 18)
"""Steps of a student's search, and of a teacher, each of which is taken four times."""
YARDSTICKS = (("{gdd}", "{gdd}/seed-1"), ("gdd-lr-0.0004/seed-1", "gdd-lr-0.0004/seed-2"), ("rcd", "rcd/seed-1"))
"""Two seeds of one student, of whatever is there."""
LINES = (("teacher", "{gdd}"), ("teacher", "rcd"), ("{gdd}", "rcd"), ("{gdd}", "gdd-i"), *YARDSTICKS)
"""Between which networks weights are averaged."""
PLACES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""On that line."""
ALONG = ("gdd", "gdd/seed-1", OWN_RATE, f"{OWN_RATE}/seed-1", "gdd-i", "rcd", "rcd/seed-1", *YARDSTICKS[1])
FOLLOWERS = (*(a for a in RATES if a.startswith("gdd-lr")), "gdd", *RANDOM, *ORDERED, "rcd", "scratch")
FOLLOWED = tuple(f"{name}/seed-{seed}" for name in FOLLOWERS for seed in range(3))
MIDS = (0.2, 0.8, 2.5)
"""Noise levels of a second step."""
STEPPED = tuple(f"{x}/seed-{seed}" for x in ("gdd-i", *(f"second-step-{m:g}" for m in MIDS)) for seed in range(3))
PULLING = ("warm", *(f"{OWN_RATE}/seed-{seed}" for seed in range(3)))
REWOUND = ("gdd", OWN_RATE)
COMPLETING = ("gdd-i", "second-step-0.8")
MANY = ("gdd", OWN_RATE, "gdd-i", "scratch", "pd", "cd", "ctm", "rcd")
BOTH = "the teacher at 1 to its full number of Heun steps, scored like a student"
AT = 12
"""Thousands of images that every student of the digits sees."""
STUDIES = (
    Study("teacher-steps", BOTH, (), teacher_steps, 900.0),
    Study("known-cases", "scores of a copier, of images held out, of a missing class", (), known_cases, 120.0),
    Study("local-minima", "distances of teacher and students to the data and to each other", MANY, local_minima, 500.0),
    Study(
        "followed", "how often a student makes the teacher's image of the same noise", FOLLOWED, followed, 200.0, at=AT
    ),
    Study(
        "line", "distances to the data on the straight line between the weights of two networks", ALONG, line, 2200.0
    ),
    Study(
        "pulls", "what might say which layers to train: gradients, movements, ablation", PULLING, pulls, 200.0, at=AT
    ),
    Study(
        "rewound", "a GDD student with the teacher's weights in one group of layers", REWOUND, rewound, 1400.0, at=AT
    ),
    Study("each-step", "images of few-step students by each number of their steps", STEPPED, each_step, 600.0, at=AT),
    Study("completed", "held-out images of which a part is known, completed", COMPLETING, completed, 1200.0),
    Study("layers", "activation over noise levels and moved weights, teacher and students", STUDENTS, layers, 60.0),
    Study("input-or-level", "what layers respond to: the input or the level told", ("gdd-i",), input_or_level, 1500.0),
    Study("architectures", "blocks of U-Nets and transformers beside each other", (), architectures, 1400.0),
    Study("spectra", "power spectra of images: data, noised, denoised, sampled", STUDENTS, spectra, 300.0),
    Study("costs", "time and memory of a training step of each configuration", (), costs, 600.0, timed=True),
)
