"""`wrap`: any network, or a diffusers pipeline, as a denoiser."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, SkipValidation
from torch import Tensor, nn

from gddlab.datasets import Source
from gddlab.errors import GddlabError, check_takes, shown, validated
from gddlab.nets import OneStepPrecond, Precond
from gddlab.nets.bare import denoiser_of, unwrap
from gddlab.nets.calls import Call, is_known, is_latent, shape_of
from gddlab.nets.codec import VAES, Codec
from gddlab.nets.conditioning import Conditioning, is_pipeline, network_of
from gddlab.nets.denoiser import EMBEDDED_GUIDANCE, Denoiser, Wrapped, takes_told
from gddlab.nets.path import Path

Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]

Denoise = SkipValidation[Callable[..., Tensor]]
"""(network, x (B, C, H, W), sigma (B,), labels) -> denoised images (B, C, H, W); labels are one-hot (B, label_dim), a
`Conditioning` of B images where `cond` was given, or None.

A function that has an argument `told` also gets the noise level that the network is to be told, (B,): sigma itself,
except where `probe(told=...)` crosses the two.
"""

FEW_STEPS = re.compile(r"turbo|lightning|lcm|hyper|sprint|schnell|distill|dmd|flash|[1248]-?steps?\b", re.IGNORECASE)
"""Names of students that make images in few steps."""


@dataclass(frozen=True, repr=False)
class WrappedCard:
    """What `wrap` found out about a network; printed, it is a small table.

    Attributes:
        name: Folder or class of the pipeline, or of the network.
        network: Class of the network.
        path, prediction: How noise and time go together, and what the network answers.
        conditioning, guidance: What it is told.
        images, codec: Shape of what it denoises, and what makes it of images.
        parameters: Their number.
        sigma_min, sigma_max: Range of sigma.
        notes: What to keep in mind, such as that it is itself a few-step student.
        data, manifest: Dataset, or its name, that it is probed with, and the manifest that it must have; None where
            there is none.
        source: Folder that it was read from; None for one in memory.
    """

    name: str
    network: str
    path: str
    prediction: str
    conditioning: str
    guidance: str
    images: str
    codec: str
    parameters: int
    sigma_min: float
    sigma_max: float
    notes: tuple[str, ...] = ()
    data: Any = None
    manifest: Any = None
    source: str | None = None

    def __repr__(self) -> str:
        rows = [
            ("teacher", self.name),
            ("network", self.network),
            ("path", self.path),
            ("prediction", self.prediction),
            ("conditioning", self.conditioning),
            ("guidance", self.guidance),
            ("images", self.images),
            ("codec", self.codec),
            ("parameters", f"{self.parameters:,}"),
            ("sigma", f"{self.sigma_min:.4g} to {self.sigma_max:.6g}"),
            *(("note", note) for note in self.notes),
        ]
        if self.source is not None:
            rows.append(("folder", self.source))
        width = max(len(k) for k, _ in rows)
        return "\n".join(f"{k:<{width}}  {v}" for k, v in rows)


@validated
def wrap(
    model: Any,
    denoise: Denoise | None = None,
    *,
    scheduler: Any = None,
    path: SkipValidation[Path | None] = None,
    call: SkipValidation[Call | None] = None,
    cond: SkipValidation[Conditioning | Sequence[Any] | None] = None,
    guidance: Annotated[float, Field(allow_inf_nan=False)] | None = None,
    vae: Any = None,
    branches: Sequence[str] = (),
    prediction: Prediction | None = None,
    alphas_cumprod: Any = None,
    img_channels: PositiveInt | None = None,
    img_resolution: PositiveInt | None = None,
    label_dim: Annotated[int, Field(ge=0)] = 0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    data: Source | None = None,
) -> Denoiser:
    """Makes any network a denoiser D(x; sigma) on the scale of its data, as `probe` and the like take it.

        wrap(pipe, cond=["a red bus", "a cat"])                     # a diffusers pipeline
        wrap(pipe, cond=["a red bus"], guidance=4.0)                # both branches of guidance
        wrap(unet, scheduler=pipe.scheduler)                        # a network alone
        wrap(net, path=gddlab.Path.flow(), call=gddlab.Call(sample="x", time="t"), img_channels=3, img_resolution=32)
        wrap(net, lambda net, x, sigma, labels: net(x, sigma.log() / 4), img_channels=3, img_resolution=32)

    x is image + sigma * noise, float32 whatever the network's own precision. Networks of the classes in
    `gddlab.nets.calls.CALLS` are called as their pipelines call them, times are float32, learned variances are ignored;
    clipping and thresholding of a scheduler are not done.

    Args:
        model: The network, also in DistributedDataParallel or compiled; a diffusers pipeline, whose network, scheduler
            and autoencoder are taken; or what `wrap` or `load_teacher` gave, to add conditioning or guidance.
        denoise: How it is called, see `Denoise`, where `path` and `call` cannot say it.
        scheduler: Its diffusers scheduler, which knows the path.
        path: How noise, time and prediction go together, in place of a scheduler.
        call: Names of the arguments of a network that is not known, or another form of guidance.
        cond: Conditioning of the images, `Conditioning.record` or `.classes`; of a pipeline also prompts, of a network
            with classes also class ids. Image i has row i modulo their number.
        guidance: Scale of classifier-free guidance: D = D_uncond + guidance (D_cond - D_uncond), with both branches in
            one call or in two, and rescaled or not, as the network's pipeline does it.
        vae: Autoencoder of a network that works on latents: a network of diffusers or a `Codec`. With it, data are
            images.
        branches: Of a `denoise` that makes both branches itself: their names in the order of their rows or calls, such
            as ("uncond", "cond").
        prediction: What it predicts, where the scheduler does not say it or says something else.
        alphas_cumprod: Its schedule, (T,), falling, in place of a scheduler.
        img_channels, img_resolution, label_dim: Shape of an image (or latent) and number of classes; known classes know
            their own. Without a shape the network can be probed with images only.
        sigma_min, sigma_max: Range of sigma; others are refused. None means the path's, or any.
        data: Dataset, or its name, that `probe` takes by default.

    Raises:
        GddlabError: It is not known how the network is called; an argument is missing, or has no use; conditioning that
            it needs; guidance of a network that has no second branch, or was distilled with guidance.
    """
    if path is not None and not isinstance(path, Path):
        raise GddlabError(f"path={shown(path)}: give a gddlab.Path, such as gddlab.Path.flow(1000.0)")
    if call is not None and not isinstance(call, Call):
        raise GddlabError(f'call={shown(call)}: give a gddlab.Call, such as gddlab.Call(sample="x", time="t")')
    shape = (img_channels, img_resolution, label_dim)
    pipe = model if is_pipeline(model) else None
    if pipe is not None:
        model = network_of(pipe)
    network = denoiser_of(model)
    if denoise is not None:
        unused = {"prediction": prediction, "alphas_cumprod": alphas_cumprod, "scheduler": scheduler, "path": path}
        unused |= {"call": call, "guidance": guidance}
        if names := [n for n, value in unused.items() if value is not None]:
            raise GddlabError(f"{names[0]}= has no use with denoise=: give one of them")
        if not callable(denoise):
            raise GddlabError(f"denoise={shown(denoise)}: give a function of (model, x, sigma, class_labels)")
        told = ("told",) if takes_told(denoise) else ()
        check_takes("denoise", denoise, "model", "x", "sigma", "class_labels", *told)
        if cond is not None and not isinstance(cond, Conditioning):
            raise GddlabError(f"cond={shown(cond)} with denoise=: give a gddlab.Conditioning")
        if len({*branches}) < len(branches):
            raise GddlabError(f"branches={shown(branches)}: give each name once")
        codec = _codec(vae)
        shape = (
            codec.channels if img_channels is None and codec is not None else img_channels,
            img_resolution,
            label_dim if cond is None else len(cond),
        )
        return Wrapped(
            model,
            denoise,
            shape=shape,
            sigmas=_range((sigma_min, sigma_max), 0.0, math.inf),
            cond=cond,
            codec=codec,
            latent=codec is not None,
            branches=tuple(branches) or ("cond",),
            card=None if data is None else SimpleNamespace(data=data),
        )
    if branches:
        raise GddlabError("branches= is for a denoise= that makes them itself: give guidance=")
    if isinstance(network, Wrapped):
        if network.call is None:
            raise GddlabError("it is wrapped with denoise= already: give wrap the network itself")
        if img_resolution is None and getattr(cond, "shape", None) is None:
            img_resolution = network.img_resolution
        classes = label_dim or (0 if network.cond is not None else network.label_dim)
        anew = {"scheduler": scheduler, "alphas_cumprod": alphas_cumprod}
        if path is None and all(value is None for value in anew.values()):
            path = network.path
            if prediction is not None and path is not None and not network.whole:
                path, prediction = _predicting(path, prediction), None
        kinds = [None if p is None else (p.kind, p.alphas_cumprod) for p in (path, network.path)]
        same = kinds[0] == kinds[1]  # another path has a range of its own
        made = assemble(
            network.gddlab_bare,
            **anew,
            prediction=prediction,
            path=None if network.whole and path is network.path else path,
            call=call or network.call,
            vae=vae or network.codec,
            shape=(img_channels or network.img_channels, img_resolution, classes),
            sigmas=(
                network.sigma_min if sigma_min is None and same else sigma_min,
                network.sigma_max if sigma_max is None and same else sigma_max,
            ),
            cond=network.cond if cond is None else cond,
            guidance=network.guidance if guidance is None else guidance,
            data=network.card.data if data is None else data,
            manifest=network.card.manifest if data is None else None,
            name=network.card.name,
            source=network.card.source,
        )
    else:
        if pipe is not None:
            scheduler = scheduler if scheduler is not None else getattr(pipe, "scheduler", None)
            if path is not None or alphas_cumprod is not None:
                scheduler = None
            own = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
            vae = vae if vae is not None or not _is_codec(own) else own
        made = assemble(
            model,
            scheduler=scheduler,
            path=path,
            call=call,
            vae=vae,
            prediction=prediction,
            alphas_cumprod=alphas_cumprod,
            shape=shape,
            sigmas=(sigma_min, sigma_max),
            cond=cond,
            guidance=guidance,
            data=data,
            pipe=pipe,
        )
    made.check_conditioning()
    return made


def assemble(
    model: nn.Module,
    *,
    shape: tuple[int | None, int | None, int] = (None, None, 0),
    sigmas: tuple[float | None, float | None] = (None, None),
    scheduler: Any = None,
    path: Path | None = None,
    call: Call | None = None,
    vae: Any = None,
    prediction: str | None = None,
    alphas_cumprod: Any = None,
    cond: Any = None,
    guidance: float | None = None,
    data: Any = None,
    manifest: Any = None,
    pipe: Any = None,
    name: str = "",
    source: str | None = None,
) -> Wrapped:
    """A network that is called by a `Call`, with its card; arguments as for `wrap`. Conditioning may be missing."""
    network, bare = denoiser_of(model), unwrap(model)
    title = type(bare).__name__
    codec = _codec(vae)
    if isinstance(network, OneStepPrecond):
        raise GddlabError("a one-step student is sampled and probed as it is: omit wrap")
    if isinstance(network, Precond):
        given = {"scheduler": scheduler, "path": path, "prediction": prediction, "alphas_cumprod": alphas_cumprod}
        if unused := [n for n, value in given.items() if value is not None]:
            raise GddlabError(f"{unused[0]}= has no use with a {title}, which is a denoiser itself: omit it")
        if cond is not None:
            raise GddlabError(f"cond= has no use with a {title}: give class_labels= where it is probed or sampled")
        call = _of_precond(network, call)
        path, codec = network.path, codec or network.codec
        found: tuple[Any, Any, int] = (network.img_channels, network.img_resolution, network.label_dim)
        about = network.card
        if data is None:
            data, manifest = getattr(about, "data", None), getattr(about, "manifest", None)
        low = max(network.sigma_min, getattr(about, "sigma_min", 0.0))
        high, latent = (
            min(network.sigma_max, getattr(about, "sigma_max", math.inf)),
            network.latent or codec is not None,
        )
    else:
        call = call or Call.of(bare)
        if call is None:
            raise GddlabError(
                f"how a {title} is called is not known: give path= and call=, as in wrap(net, path=gddlab.Path.flow(), "
                'call=gddlab.Call(sample="x", time="t")), or denoise=, a function of (model, x, sigma, class_labels) '
                "that returns the denoised image"
            )
        found = shape
        if is_known(bare):
            s = shape_of(bare, call)
            found = (s.channels, s.side, s.classes)
        path = _path(title, call, path, scheduler, prediction, alphas_cumprod)
        low, high, latent = path.sigma_min, path.sigma_max, is_latent(bare) or codec is not None
    channels, side, classes = (a or b for a, b in zip(shape, found, strict=True))
    cond = _conditioning(cond, call, pipe, title, classes)
    if cond is not None:
        classes = len(cond)
        if cond.shape is not None and shape[1] is None:
            if cond.shape[1] != cond.shape[2]:
                raise GddlabError(
                    f"cond= was recorded at {cond.shape[1]} x {cond.shape[2]} latents: images here are square, record "
                    "with equal height and width"
                )
            side = cond.shape[1]
    if codec is not None and channels is not None and codec.channels != channels:
        raise GddlabError(f"vae= makes {codec.channels} channels, this network takes {channels}: give its own")
    if guidance is not None:
        _check_guidance(guidance, call, cond, title, classes)
    limits = _range(sigmas, low, high)
    notes = _notes(bare, pipe, source, call, cond)
    card = WrappedCard(
        name=name or _name_of(bare, pipe),
        network=title,
        path="its own preconditioning" if path is None else str(path),
        prediction="not known" if path is None else path.prediction,
        conditioning=_conditioning_in_words(call, cond, classes),
        guidance=_guidance_in_words(call, cond, guidance),
        images=f"{'latents' if latent else 'images'}, {channels or '?'} x {side or '?'} x {side or '?'}",
        codec="none" if codec is None else str(codec),
        parameters=sum(p.numel() for p in bare.parameters()),
        sigma_min=limits[0],
        sigma_max=limits[1],
        notes=notes,
        data=data,
        manifest=manifest,
        source=source,
    )
    return Wrapped(
        model,
        call=call,
        path=path,
        whole=isinstance(network, Precond),
        shape=(channels, side, classes),
        sigmas=limits,
        cond=cond,
        guidance=guidance,
        codec=codec,
        latent=latent,
        branches=call.order if guidance is not None else ("cond",),
        card=card,
    )


def _of_precond(network: Precond, call: Call | None) -> Call:
    """One-hot labels, of which rows of zeros mean no class; the form of guidance as given."""
    form, default = call or Call(order=("cond", "uncond")), Call()
    for name in {f.name for f in dataclasses.fields(Call)} - {"order", "doubled", "guide_channels"}:
        if (value := getattr(form, name)) != getattr(default, name):
            raise GddlabError(
                f"call= with {name}={shown(value)}: a network with its own preconditioning takes order, doubled and "
                "guide_channels"
            )
    return Call(
        sample="x",
        time="sigma",
        labels="class_labels" if network.label_dim else "",
        null=0,
        order=form.order,
        doubled=form.doubled,
        guide_channels=form.guide_channels,
    )


def _predicting(path: Path, prediction: str) -> Path:
    """The same path of a network that predicts something else."""
    if path.kind == "flow" or prediction == "flow_prediction":
        raise GddlabError(f"prediction={prediction!r} with a {path.kind} path: give path=")
    return dataclasses.replace(path, prediction=prediction)  # type: ignore[arg-type]


def _path(
    title: str, call: Call, path: Path | None, scheduler: Any, prediction: str | None, alphas_cumprod: Any
) -> Path:
    if path is not None:
        given = {"scheduler": scheduler, "prediction": prediction, "alphas_cumprod": alphas_cumprod}
        if unused := [n for n, value in given.items() if value is not None]:
            raise GddlabError(f"{unused[0]}= has no use with path=: give one of them")
        return path
    if alphas_cumprod is not None:
        prediction = prediction or getattr(getattr(scheduler, "config", None), "prediction_type", None)
        if prediction is None:
            raise GddlabError(
                f"a {title} does not know what it predicts: give prediction=, one of epsilon, v_prediction, sample"
            )
        return Path.vp(alphas_cumprod, prediction)
    if scheduler is None:
        raise GddlabError(
            f"a {title} does not know its noise schedule: give alphas_cumprod= or scheduler=, or path=, such as "
            "gddlab.Path.flow(1000.0)"
        )
    return call.path(Path.of(scheduler, prediction))


def _range(asked: tuple[float | None, float | None], low: float, high: float) -> tuple[float, float]:
    sigma_min, sigma_max = (b if a is None else a for a, b in zip(asked, (low, high), strict=True))
    if not low <= sigma_min < sigma_max <= high:
        within = f"{low:g} to {high:g}" if high < math.inf else "0 and above"
        raise GddlabError(f"sigma_min={sigma_min:g}, sigma_max={sigma_max:g}: give a range within {within}")
    return sigma_min, sigma_max


def _codec(vae: Any) -> Codec | None:
    return vae if vae is None or isinstance(vae, Codec) else Codec.of(vae)


def _is_codec(vae: Any) -> bool:
    return any(c.__name__ in VAES for c in type(vae).__mro__)


def _conditioning(cond: Any, call: Call, pipe: Any, title: str, classes: int) -> Conditioning | None:
    if cond is None or isinstance(cond, Conditioning):
        return cond
    if call.labels and classes:
        return Conditioning.of_ids(cond, call, classes)
    if pipe is None:
        raise GddlabError(
            f"cond={shown(cond)} of a {title} alone: give a gddlab.Conditioning, of its arguments or of a pipeline's "
            "(gddlab.Conditioning.record); for class ids say which argument takes them, Call(labels=), and label_dim="
        )
    listed = [cond] if isinstance(cond, str) else cond
    if not isinstance(listed, list | tuple) or not all(isinstance(prompt, str) for prompt in listed):
        raise GddlabError(
            f"cond={shown(cond)}: give prompts, or a gddlab.Conditioning, which gddlab.Conditioning.record(pipe, "
            "prompt_embeds=...) makes of embeddings"
        )
    return Conditioning.record(pipe, listed, call=call)


def _check_guidance(guidance: float, call: Call, cond: Conditioning | None, title: str, classes: int) -> None:
    """Refuses guidance of a network that has no second branch here."""
    if cond is not None and cond.negative is not None:
        return
    said = f"guidance={guidance:g}"
    if call.scale:
        raise GddlabError(
            f"{said}: a {title} takes its guidance as an input ({call.scale}), recorded with the conditioning: "
            "record(pipe, prompts, guidance_scale=...); or record negative prompts (negative_prompt=, true_cfg_scale=) "
            "for a second branch"
        )
    if cond is not None:
        raise GddlabError(
            f"{said}: the conditioning has no negative rows, record it with guidance_scale= above 1, or with "
            "negative_prompt= and true_cfg_scale="
        )
    if call.labels and classes:
        if call.null is None:
            raise GddlabError(f"{said}: a {title} has no class that stands for no class, omit guidance=")
        return
    if call.needs:
        return  # refused for its conditioning
    raise GddlabError(f"{said}: a {title} without conditioning has one branch, omit guidance=")


# What a card says.


def _name_of(bare: nn.Module, pipe: Any) -> str:
    config = getattr(pipe if pipe is not None else bare, "config", None)
    path = str(getattr(config, "_name_or_path", None) or getattr(pipe, "name_or_path", None) or "")
    return path.rstrip("/").rpartition("/")[2] or type(bare if pipe is None else pipe).__name__


def _notes(bare: nn.Module, pipe: Any, source: str | None, call: Call, cond: Conditioning | None) -> tuple[str, ...]:
    notes = []
    names = [source, getattr(pipe, "name_or_path", None)]
    names += [getattr(getattr(x, "config", None), "_name_or_path", None) for x in (pipe, bare)]
    scheduler = type(getattr(pipe, "scheduler", None)).__name__
    words = [m[0] for n in [*names, scheduler] if n and (m := FEW_STEPS.search(str(n).rstrip("/").rpartition("/")[2]))]
    if call.scale == "timestep_cond":
        words.append("time_cond_proj_dim")
    if words:
        notes.append(f"it says {words[0]!r}: a student that makes images in few steps, no teacher of many")
    elif call.scale:
        notes.append("distilled with guidance: the scale is one of its inputs")
    if call.scale == "guidance" and cond is not None and call.scale not in cond.rows:
        notes.append(f"its conditioning holds no guidance scale: it is told {EMBEDDED_GUIDANCE:g}, diffusers' default")
    return tuple(notes)


def _conditioning_in_words(call: Call, cond: Conditioning | None, classes: int) -> str:
    if cond is not None:
        names = ", ".join(cond.names[:3]) + (", ..." if len(cond) > 3 else "")
        return f"{len(cond)} recorded: {names}"
    if call.needs:
        return f"missing: {', '.join(call.needs)}; record it with gddlab.Conditioning.record(pipe, prompts)"
    if classes:
        return f"{classes} classes" + ("" if call.null is None else ", and none")
    return "none"


def _guidance_in_words(call: Call, cond: Conditioning | None, guidance: float | None) -> str:
    if guidance is not None:
        how = "in one call" if call.doubled else "in two calls"
        norm = ", rescaled to the norm of cond" if call.rescale else ""
        return f"{guidance:g}, {call.order[0]} and {call.order[1]} {how}{norm}"
    if call.scale == "guidance":
        scales = [EMBEDDED_GUIDANCE] if cond is None or call.scale not in cond.rows else cond.rows[call.scale].unique()
        return f"an input, {', '.join(f'{float(s):g}' for s in scales)}"
    return "none"
