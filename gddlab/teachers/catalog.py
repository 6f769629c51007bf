"""Networks by name, file or run directory, their cards, and the teachers that EDM's and EDM2's authors publish."""

from __future__ import annotations

import inspect
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from gddlab.errors import GddlabError, NotFound, shown, unknown
from gddlab.files import HUB_NAME, as_text, by_number, data_dir, hash_tensors, is_run, made_in, path_of, read_json
from gddlab.nets import SIGMA_MAX, SIGMA_MIN, OneStepPrecond, Precond, load_network, without_labels
from gddlab.nets.architectures import ARCHITECTURES
from gddlab.nets.codec import Codec
from gddlab.nets.denoiser import Denoiser
from gddlab.nets.dit import DiT
from gddlab.nets.edm2 import EDM2Precond, EDM2UNet
from gddlab.nets.unets import UNETS
from gddlab.pretrained.published import Published
from gddlab.teachers.dit import check_options
from gddlab.teachers.edm import read_edm
from gddlab.teachers.folders import is_diffusers_folder, load_folder, read_codec
from gddlab.teachers.torchfiles import format_of


@dataclass(frozen=True, repr=False)
class TeacherCard:
    """Facts about a teacher; printed, it is a small table.

    `sigma_min` and `sigma_max` are the noise levels it was trained for; `scores` holds the evaluation records that were
    made with the teacher (distance, sample count, seeds, extractor and reference of each).
    """

    name: str
    precond: str
    unet: str
    init_kwargs: dict[str, Any]
    resolution: int
    channels: int
    classes: int
    parameters: int
    sigma_min: float
    sigma_max: float
    data: str | None
    """Name or path of the data set that it was trained on."""
    sha256: str
    source: str
    kimg: float | None = None
    original: dict[str, Any] | None = None
    """For a network read from a pickle: file, its sha256, class, key, and the data set that it names."""
    licence: str | None = None
    scores: tuple[dict[str, Any], ...] = field(default=())
    manifest: dict[str, Any] | None = None
    """Of the images that it was trained on; None where they are not known."""
    levels: str | None = None
    """How the noise levels of its training were drawn; None where that is not known."""
    path: str | None = None
    """What its network predicts, along which path and at which times; None for EDM's preconditionings."""
    codec: dict[str, Any] | None = None
    """How its latents are made, from a pickle of EDM2; None for a network of pixels.

    latents = (raw - `mean`) / `std` * `final_std`, by channel, where raw is the mean that the VAE called `vae` gives
    for an image in `range`, which is `factor` times as large. Of an encoder that is not known here, its `class`.
    """

    @classmethod
    def of(
        cls, net: Precond, *, name: str, source: str, meta: dict[str, Any], scores: list[dict[str, Any]]
    ) -> TeacherCard:
        return cls(
            name=name,
            precond=type(net).__name__,
            unet=type(net.model).__name__,
            init_kwargs=net.init_kwargs,
            resolution=net.img_resolution,
            channels=net.img_channels,
            classes=net.label_dim,
            parameters=sum(p.numel() for p in net.parameters()),
            sigma_min=float(meta.get("sigma_min", net.sigma_min or SIGMA_MIN)),
            sigma_max=float(meta.get("sigma_max", net.sigma_max if math.isfinite(net.sigma_max) else SIGMA_MAX)),
            data=meta.get("data"),
            sha256=hash_tensors(net.state_dict()),
            source=source,
            kimg=meta.get("kimg"),
            original=meta.get("original"),
            licence=meta.get("licence"),
            scores=tuple(scores),
            manifest=meta.get("manifest"),
            levels=meta.get("levels") or _levels_of(meta.get("training") or {}),
            path=None if net.path is None else str(net.path),
            codec=meta.get("codec"),
        )

    def to_meta(self) -> dict[str, Any]:
        """What a weights file keeps of the card: all that cannot be derived from the network."""
        keep = ("name", "data", "manifest", "sigma_min", "sigma_max", "kimg", "original", "licence", "levels", "codec")
        return {k: v for k in keep if (v := getattr(self, k)) is not None}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __repr__(self) -> str:
        size = f"{self.resolution}x{self.resolution}, {self.channels} channel{'s' * (self.channels > 1)}"
        rows = [
            ("teacher", self.name),
            ("network", f"{self.unet}{self._sizes()}"),
            ("preconditioning", self.precond),
            *([] if self.path is None else [("path", self.path)]),
            ("images" if self.codec is None else "latents", size),
            ("classes", str(self.classes) if self.classes else "none (unconditional)"),
            ("parameters", f"{self.parameters:,}"),
            ("sigma", f"{self.sigma_min:g} to {self.sigma_max:g}"),
            ("data", self.data or "not known"),
        ]
        if self.codec is not None:
            rows.append(("codec", _codec_text(self.codec)))
        if self.levels is not None:
            rows.append(("noise levels", self.levels))
        if self.original is not None:
            o = self.original
            rows.append(("original", f"{o['class']} in {o['file']}, sha256 {o['sha256'][:16]}"))
            if "data" in o:
                rows.append(("data, it says", o["data"]))
        if self.licence is not None:
            rows.append(("licence", self.licence))
        if self.kimg is not None:
            rows.append(("trained on", f"{self.kimg:,.10g} thousand images"))
        rows += [("sha256", self.sha256[:16]), ("file", self.source)]
        rows += [(s["metric"], f"{s['value']:.4g}  ({s['sampler']}, n = {s['n']})") for s in self.scores]
        width = max(len(k) for k, _ in rows)
        return "\n".join(f"{k:<{width}}  {v}" for k, v in rows)

    def _sizes(self) -> str:
        """How large the network is, for the table."""
        kinds: dict[str, Any] = {**UNETS, "DiT": DiT, "SiT": DiT, "EDM2UNet": EDM2UNet}
        kw = {k: p.default for k, p in inspect.signature(kinds[self.unet]).parameters.items()} | self.init_kwargs
        if kinds[self.unet] is DiT:
            p, blocks = kw["patch_size"], f"{kw['num_blocks']} blocks, {kw['num_heads']} heads"
            return f", patches of {p}x{p}, width {kw['model_channels']}, {blocks}"
        n = kw["num_blocks"]
        levels = f"{kw['model_channels']} x {list(kw['channel_mult'])}, {n} block{'s' * (n > 1)} per level"
        return f" ({kw.get('encoder_type', 'ADM')} encoder), {levels}" if self.unet in UNETS else f", {levels}"


def _levels_of(training: dict[str, Any]) -> str | None:
    """How a `TeacherConfig` draws noise levels."""
    if "p_mean" not in training:
        return None
    text = f"ln sigma ~ N({training['p_mean']:g}, {training['p_std']:g}²)"
    if share := training.get("uniform_share"):
        low, high = training["uniform_sigmas"]
        text += f", {100 * share:g} % log-uniform in {low:g} to {high:g}"
    return text


def _codec_text(codec: dict[str, Any]) -> str:
    if "vae" not in codec:
        return f"{codec['class']}, not known here"
    (low, high), mean, std = codec["range"], *(" ".join(f"{v:g}" for v in codec[key]) for key in ("mean", "std"))
    return (
        f"{codec['vae']}, 1/{codec['factor']} the size of images in [{low:g}, {high:g}]; raw mean {mean}; "
        f"raw std {std}, then {codec['final_std']:g}"
    )


def load_teacher(
    source: str | Path, *, vae: Any = None, family: str | None = None, heads: int | None = None
) -> Denoiser:
    """Loads a teacher, or a student: a network that denoises.

    A pickle is read as data: nothing that it names is imported or called, its embedded source is never run. The code of
    its authors is not needed.

    Args:
        source: One of
            the name of a bundled teacher, trained on "digits:train": "digits"; "digits-high", with a tenth of its noise
                levels log-uniform in 5 to 80, where "digits" saw next to none; "digits-cond", with classes;
                "digits-dit", a transformer with classes at the levels of "digits-high"; "digits-all", on all
                digits, twice as wide; or trained on "emoji:train", in colour: "emoji-cond", with classes, and "emoji",
                the same network without them;
            the name of a published one (`gddlab.teachers.PUBLISHED`, such as "edm-cifar10-32x32-uncond-ve" or
                "edm2-img64-s-1073741-0.075"), which is downloaded unless a copy is found;
            the path of a pickle of EDM (.pkl with `ema`; networks EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond,
                GDDPrecond, D2OPrecond) or of EDM2 (Precond, whose weights of 16 bits become float32), of one of our
                networks pickled by torch.save, or of a state dict that fits one of them and no other;
            the path of a .pt file of a DiT or SiT, its weights or a checkpoint of its train.py;
            the path of a .safetensors file that gddlab wrote;
            the folder of a diffusers pipeline, or of its network with the scheduler beside it: read offline,
                safetensors only; what text it needs is given by `gddlab.wrap(teacher, cond=...)`;
            a run directory: of `train_teacher` gives the teacher, of `gddlab.train` the student. One that is called as
            a bundled teacher is "./digits" or Path("digits").
        vae: Autoencoder of diffusers, or its folder, of a network that works on latents; a pipeline's folder has one.
        family: "dit" or "sit", where a .pt file tells neither by its options nor by its name: weights are named alike.
        heads: Attention heads of such a network, where its width is none of the published ones.

    Returns:
        The network on the CPU, float32, eval mode, gradients off; `teacher.card` describes it.

    Raises:
        GddlabError: Unknown name (near matches are given), a file that is no network (what it is, and at which byte it
            was refused), or a download that failed.
        NotFound: No such path, or a run without a student.
    """
    check_options(family, heads)
    folder = path_of("source", source)
    if as_text(source) not in bundled_teachers() and folder.is_dir() and is_diffusers_folder(folder):
        if family or heads:
            raise GddlabError(f"{folder} says what network it holds: omit family and heads")
        return load_folder(folder, vae)
    if (run_dir := run_of(source)) is not None:
        return load_student(run_dir.resolve())
    name, path = _find(source)
    if format_of(path) == "safetensors":
        if family or heads:
            raise GddlabError(f"{path} says what network it holds: omit family and heads")
        net, meta = load_network(path)
    else:
        net, meta = read_edm(path, family=family, heads=heads)
    bundled = name in bundled_teachers()
    if name in UNLABELLED:
        net = without_labels(net)
    net.requires_grad_(False)
    if name in PUBLISHED:
        meta = PUBLISHED[name].check(net, path) | meta
    beside = (data_dir() / "teachers" / name if bundled else path.parent) / "scores.json"
    try:
        net.card = TeacherCard.of(
            net,
            name=name or meta.get("name") or path.stem,
            source=f"teachers/{UNLABELLED.get(name, name)}, ships with gddlab" if bundled else str(path),
            meta=meta,
            scores=read_json(beside) if path.name == "teacher.safetensors" and beside.exists() else [],
        )
    except (TypeError, ValueError) as e:
        raise GddlabError(f"{path}: its metadata is damaged ({e}): convert the original again") from None
    net.latent = net.card.codec is not None or vae is not None or net.img_channels not in (1, 3)
    if vae is not None:
        net.codec = _codec_of(net, vae)
    return net


def _codec_of(net: Precond, vae: Any) -> Codec:
    codec = read_codec(vae)
    assert codec is not None
    if isinstance(net, EDM2Precond) and not isinstance(vae, Codec):
        said = net.card.codec or {}  # an unknown encoder has no numbers
        codec = Codec.edm2(codec.vae, **{k: said[k] for k in ("mean", "std", "final_std") if k in said})
    if codec.channels != net.img_channels:
        raise GddlabError(f"vae= makes {codec.channels} channels, this network takes {net.img_channels}: give its own")
    return codec


def load_precond(source: str | Path, **options: Any) -> Precond:
    """`load_teacher`, `options` included, for what is done with gddlab's own networks alone, such as training.

    Raises:
        GddlabError: The source holds another one.
    """
    net = load_teacher(source, **options)
    if not isinstance(net, Precond):
        kind = getattr(net.card, "network", type(net).__name__)
        raise GddlabError(f"{source} holds a {kind}, which can be probed and sampled, not trained: give an EDM network")
    return net


def run_of(source: str | Path) -> Path | None:
    """The run directory of `gddlab.train` that a source is; None for a name and for all else."""
    path = path_of("source", source)
    return path if as_text(source) not in bundled_teachers() and is_run(path) else None


def _find(source: str | Path) -> tuple[str, Path]:
    """The name, "" for a path, and the file."""
    name, path = as_text(source), path_of("source", source)
    if name in bundled_teachers():
        return name, bundled_file(name)
    if path.is_dir():
        if (path / "teacher.safetensors").exists():
            return "", path / "teacher.safetensors"
        if made_in(path) == "teacher":
            raise GddlabError(
                f"{path} holds a teacher whose training is not finished: the same train_teacher call, gddlab teacher "
                "train in a shell, continues it"
            )
        raise GddlabError(f"{path} holds no teacher.safetensors: give a run directory, or a folder of diffusers")
    if path.exists():
        return "", path
    if name in PUBLISHED:
        fetched = PUBLISHED[name].file.fetch()
        assert fetched is not None
        return name, fetched
    if HUB_NAME.fullmatch(name):
        raise NotFound(
            f"no such file: {name}; networks of the Hugging Face hub are not fetched: give a name, an EDM .pkl or a "
            ".safetensors file that gddlab wrote, or a run directory; gddlab.wrap probes any network in memory"
        )
    if "/" in name or path.suffix[1:2].isalpha():  # "-0.075" is no file's ending
        raise NotFound(f"no such file: {path}; accepted: a name, a .pkl or .safetensors file, a run directory")
    raise unknown("teacher", name, [*bundled_teachers(), *PUBLISHED])


UNLABELLED = {"emoji": "emoji-cond"}
"""Bundled teachers that are another one without its labels."""


def bundled_teachers() -> list[str]:
    """Names of the teachers that ship with gddlab."""
    found = {p.parent.name for p in (data_dir() / "teachers").glob("*/teacher.safetensors")}
    return sorted(found | {name for name, of in UNLABELLED.items() if of in found})


def bundled_file(name: str) -> Path:
    """The weights that a bundled teacher is made from."""
    return data_dir() / "teachers" / UNLABELLED.get(name, name) / "teacher.safetensors"


def tensors_of(name: str) -> dict[str, Tensor]:
    """The weights of a bundled teacher: a student that ships holds only what differs from them."""
    if name not in bundled_teachers():
        raise unknown("bundled teacher", name, bundled_teachers())
    return load_precond(name).state_dict()


# Students in run directories.


def snapshots_of(run_dir: Path) -> list[Path]:
    """Averaged students saved while training, oldest first; the file's name is its kimg."""
    return by_number(run_dir / "snapshots", ".safetensors")


def load_student(run_dir: str | Path, snapshot: str | Path | float | None = None) -> OneStepPrecond:
    """The averaged student of a run directory, without gradients, with a card.

    Args:
        run_dir: Folder of the run.
        snapshot: Path of a file, thousands of images, or "best" (`metric_kimg`); None takes the final student, or
            the newest snapshot where the run has not ended.

    Raises:
        NotFound: No such student.
        GddlabError: The file holds another kind of network.
    """
    run_dir = path_of("run_dir", run_dir)
    if snapshot == "best":
        found = [p for p in [run_dir / "best.safetensors"] if p.exists()]
    elif snapshot is None:
        final = run_dir / "student.safetensors"
        found = [final] if final.exists() else snapshots_of(run_dir)
    elif str(snapshot).endswith(".safetensors"):
        found = [p for p in [path_of("snapshot", snapshot)] if p.is_file()]
    else:
        wanted = f"{snapshot:g}" if isinstance(snapshot, int | float) else str(snapshot)
        found = [p for p in snapshots_of(run_dir) if wanted in (p.stem, f"{float(p.stem):g}")]
    if not found:
        have = ", ".join(p.stem for p in snapshots_of(run_dir))
        asked = "" if snapshot is None else f" {shown(snapshot)}"
        left = f"snapshots are {have}" if have else "it holds no weights (most runs ship without, others have none yet)"
        raise NotFound(f"{run_dir} has no student{asked}: {left}")
    net, meta = load_network(found[-1], beside=tensors_of)
    if not isinstance(net, OneStepPrecond):
        raise GddlabError(f"{found[-1]} holds a {type(net).__name__}, no one-step student")
    net.requires_grad_(False)
    net.card = TeacherCard.of(net, name=f"student of {run_dir.name}", source=str(found[-1]), meta=meta, scores=[])
    return net


# Published teachers.

ROOT = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained"
LICENCE = "CC BY-NC-SA 4.0, non-commercial"
_ARCHITECTURES = {  # and numbers of parameters, which take seconds to count
    "edm-afhqv2-64x64-uncond-ve": ("ncsnpp-afhqv2-64", 62_761_091),
    "edm-afhqv2-64x64-uncond-vp": ("ddpmpp-afhqv2-64", 61_805_571),
    "edm-cifar10-32x32-cond-ve": ("ncsnpp-cifar10-cond", 56_400_643),
    "edm-cifar10-32x32-cond-vp": ("ddpmpp-cifar10-cond", 55_735_299),
    "edm-cifar10-32x32-uncond-ve": ("ncsnpp-cifar10", 56_397_827),
    "edm-cifar10-32x32-uncond-vp": ("ddpmpp-cifar10", 55_733_891),
    "edm-ffhq-64x64-uncond-ve": ("ncsnpp-ffhq-64", 62_761_091),
    "edm-ffhq-64x64-uncond-vp": ("ddpmpp-ffhq-64", 61_805_571),
    "edm-imagenet-64x64-cond-adm": ("adm-imagenet-64", 295_899_267),
    "baseline-afhqv2-64x64-uncond-ve": ("ve-ncsnpp-64", 62_758_787),
    "baseline-afhqv2-64x64-uncond-vp": ("vp-ddpmpp-64", 61_804_419),
    "baseline-cifar10-32x32-cond-ve": ("ve-ncsnpp-cifar10-cond", 62_761_603),
    "baseline-cifar10-32x32-cond-vp": ("vp-ddpmpp-cifar10-cond", 61_805_827),
    "baseline-cifar10-32x32-uncond-ve": ("ve-ncsnpp-cifar10", 62_758_787),
    "baseline-cifar10-32x32-uncond-vp": ("vp-ddpmpp-cifar10", 61_804_419),
    "baseline-ffhq-64x64-uncond-ve": ("ve-ncsnpp-64", 62_758_787),
    "baseline-ffhq-64x64-uncond-vp": ("vp-ddpmpp-64", 61_804_419),
    "baseline-imagenet-64x64-cond-adm": ("iddpm-adm-imagenet-64", 295_904_454),
}


@dataclass(frozen=True)
class PublishedTeacher:
    """A teacher that its authors publish as a pickle: https://github.com/NVlabs/edm, https://github.com/NVlabs/edm2.

    `verified`: its authors published the training options that fix the architecture. For the baselines it is an
    estimate (configuration A); what the file itself says counts.
    """

    name: str
    url: str
    architecture: str
    parameters: int
    data: str
    verified: bool
    kimg: float | None = None
    """Thousands of images that it was trained on, where its name says so."""

    @property
    def file(self) -> Published:
        """The file; a copy that `gddlab teacher convert` wrote is preferred."""
        size = self.parameters * (2 if self.kimg is not None else 4)  # EDM2 publishes weights of 16 bits
        return Published(
            title=self.name,
            variable=None,
            url=self.url,
            name=self.name,
            suffixes=(".safetensors", ".pkl"),
            folder="teachers",
            about=f"about {size / 1e6:.0f} MB, {LICENCE}",
            noun="teacher",
        )

    def check(self, net: Precond, path: Path) -> dict[str, Any]:
        """Refuses a file that holds another network; returns what the card is to say besides the file."""
        precond, parameters = ARCHITECTURES[self.architecture][0], self.parameters
        found = type(net).__name__, sum(p.numel() for p in net.parameters())
        if self.verified and found != (precond, parameters):
            raise GddlabError(
                f"{path} is another network than {self.name}: {found[0]} with {found[1]:,} parameters, "
                f"not {precond} with {parameters:,}; rename or remove it"
            )
        return {"data": self.data, "licence": LICENCE} | ({} if self.kimg is None else {"kimg": self.kimg})


def _published(name: str, architecture: str, parameters: int) -> PublishedTeacher:
    kind, data, resolution = name.split("-")[:3]
    url = f"{ROOT}{'' if kind == 'edm' else '/baseline'}/{name}.pkl"
    data = data if resolution == "32x32" else f"{data}-64"
    return PublishedTeacher(name, url, architecture, parameters, data, verified=kind == "edm")


EDM2_ROOT = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions"
_EDM2: dict[str, tuple[int, dict[str, str]]] = {  # parameters; thousands of images, lengths of the average
    "edm2-img512-xs": (124_713_253, {"0134217": "0.125 0.165", "2147483": "0.045 0.135 0.150 0.200"}),
    "edm2-img512-xs-uncond": (
        124_201_253,
        {"0134217": "0.110 0.125", "2147483": "0.015 0.020 0.025 0.030 0.035 0.045 0.085 0.150"},
    ),
    "edm2-img512-s": (280_212_837, {"2147483": "0.025 0.070 0.085 0.120 0.130 0.190"}),
    "edm2-img512-s-uncond": (279_444_837, {"2147483": "0.070 0.090"}),
    "edm2-img512-m": (497_807_781, {"0268435": "0.155 0.205", "2147483": "0.015 0.030 0.100 0.155"}),
    "edm2-img512-l": (777_498_085, {"1879048": "0.015 0.035 0.085 0.155"}),
    "edm2-img512-xl": (1_119_283_749, {"1342177": "0.020 0.030 0.085 0.155"}),
    "edm2-img512-xxl": (1_523_164_773, {"0939524": "0.015 0.070 0.075 0.130 0.150"}),
    "edm2-img64-xs": (124_710_949, {"0134217": "0.110 0.175"}),
    "edm2-img64-s": (280_209_381, {"1073741": "0.045 0.075 0.105"}),
    "edm2-img64-m": (497_803_173, {"2147483": "0.060"}),
    "edm2-img64-l": (777_492_325, {"1073741": "0.040"}),
    "edm2-img64-xl": (1_119_276_837, {"0671088": "0.040"}),
}


def _published_edm2(architecture: str, parameters: int, kimg: str, length: str) -> PublishedTeacher:
    name, data = f"{architecture}-{kimg}-{length}", f"imagenet-{architecture.split('-')[1].removeprefix('img')}"
    return PublishedTeacher(name, f"{EDM2_ROOT}/{name}.pkl", architecture, parameters, data, True, float(kimg))


PUBLISHED = {name: _published(name, *about) for name, about in _ARCHITECTURES.items()} | {
    teacher.name: teacher
    for architecture, (parameters, files) in _EDM2.items()
    for kimg, lengths in files.items()
    for length in lengths.split()
    for teacher in [_published_edm2(architecture, parameters, kimg, length)]
}
"""By name; `edm-*` are EDM's own models (configuration F), `baseline-*` those it compares with (configuration A).

`edm2-DATA-SIZE-KIMG-LENGTH` are EDM2's (configuration G): the size of the network, thousands of images in training, and
the length of the weights' average, a share of the training (Karras et al. 2024, section 3); img512 are of latents.
"""
