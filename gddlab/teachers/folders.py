"""Reads a network from a folder that diffusers wrote: a pipeline's, or a component's with its scheduler; offline."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from gddlab.errors import GddlabError, NotFound, shown
from gddlab.files import read_object
from gddlab.nets.codec import Codec
from gddlab.nets.denoiser import Wrapped
from gddlab.teachers.wrap import assemble

DENOISERS = ("transformer", "unet")
INDEX, WEIGHTS = "model_index.json", "diffusion_pytorch_model"


def is_diffusers_folder(path: Path) -> bool:
    """Whether diffusers wrote it: other folders have a config.json, too."""
    if (path / INDEX).is_file() or any((path / n / "config.json").is_file() for n in DENOISERS):
        return True
    try:
        return "_class_name" in read_object(path / "config.json")
    except GddlabError:
        return False


def load_folder(path: Path, vae: Any = None) -> Wrapped:
    """The network of a folder, float32, in eval mode, without gradients; its conditioning is given later.

    Nothing is fetched, no code of the folder is run, text encoders are not touched.

    Args:
        path: A pipeline's folder, with `model_index.json`; or that of its network, with `config.json`, whose scheduler
            is beside it, as in a pipeline's folder.
        vae: Autoencoder, or its folder; None takes the pipeline's, where it has one.

    Raises:
        GddlabError: diffusers is not installed; a class that is not its own, or that is called in an unknown way;
            weights that are no safetensors; no scheduler.
    """
    root, part = (path.resolve().parent, path) if (path / "config.json").is_file() else (path, None)
    index = read_object(root / INDEX)
    if part is None:
        names = [n for n in DENOISERS if (root / n / "config.json").is_file()]
        if not names:
            raise GddlabError(f"{path}: {shown(index.get('_class_name'))} has no transformer or unet: give another")
        part = root / names[0]
    network = read_component(part)
    where = next((p for p in (part, root / "scheduler") if (p / "scheduler_config.json").is_file()), None)
    if where is None:
        raise GddlabError(
            f"{path} has no scheduler_config.json beside it: give the pipeline's folder, or "
            "gddlab.wrap(network, scheduler=...)"
        )
    if vae is None and (root / "vae" / "config.json").is_file():
        vae = root / "vae"
    return assemble(
        network,
        scheduler=read_scheduler(where),
        vae=read_codec(vae),
        name=path.resolve().name,
        source=str(path),
    )


def read_codec(vae: Any) -> Codec | None:
    """A codec of an autoencoder, or of its folder."""
    if vae is None or isinstance(vae, Codec):
        return vae
    return Codec.of(read_component(Path(vae).expanduser()) if isinstance(vae, str | Path) else vae)


def read_component(folder: Path) -> nn.Module:
    """A network of `diffusers.models` from its folder."""
    with _diffusers():
        from diffusers import models
        from diffusers.models.modeling_utils import ModelMixin
    if not (folder / "config.json").is_file():
        raise NotFound(f"{folder} holds no config.json: give the folder of a network of diffusers")
    name = read_object(folder / "config.json").get("_class_name")
    kind = getattr(models, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise GddlabError(
            f"{folder}: {shown(name)} is no network of diffusers, code of others is not run: use gddlab.wrap"
        )
    with _quiet():
        try:
            made: Any = kind.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=False,  # made without values, a network loses buffers that its file does not hold
                variant=_variant(folder),
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError) as e:
            raise GddlabError(f"{folder} cannot be read ({' '.join(str(e).split())[:200]})") from None
    network, info = made
    if missing := info["missing_keys"]:  # they would be random numbers
        raise GddlabError(f"{folder} lacks {len(missing)} tensors, {missing[0]} the first: save the network again")
    network.eval().requires_grad_(False)
    whole: nn.Module = network
    return whole


def read_scheduler(folder: Path) -> Any:
    """A scheduler of diffusers from its folder."""
    with _diffusers():
        from diffusers import schedulers
    config = read_object(folder / "scheduler_config.json")
    name = config.get("_class_name")
    kind = getattr(schedulers, str(name), None)
    if not (isinstance(kind, type) and hasattr(kind, "from_config")):
        raise GddlabError(f"{folder}: {shown(name)} is no scheduler of diffusers")
    with _quiet():
        try:
            return kind.from_config(config)
        except (ValueError, TypeError, NotImplementedError, KeyError) as e:
            raise GddlabError(f"{folder}: a {name} cannot be made ({' '.join(str(e).split())[:200]})") from None


def _variant(folder: Path) -> str | None:
    """Of weights files such as diffusion_pytorch_model.fp16.safetensors, where there are no plain ones.

    Raises:
        GddlabError: There are no safetensors.
    """
    names = sorted(p.name for p in folder.iterdir())
    plain = (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.safetensors.index.json")
    if any(name in names for name in plain):
        return None
    for name in names:
        if found := re.fullmatch(rf"{WEIGHTS}\.safetensors\.index\.(\w+)\.json|{WEIGHTS}\.(\w+)\.safetensors", name):
            return found[1] or found[2]
    other = next((n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))), None)
    if other is not None:
        raise GddlabError(
            f"{folder} holds {other}, a pickle, which runs code when it is loaded: write it anew as safetensors "
            "(save_pretrained), or give gddlab.wrap the network"
        )
    raise GddlabError(f"{folder} holds no {plain[0]}")


@contextlib.contextmanager
def _diffusers() -> Iterator[None]:
    try:
        yield
    except ImportError as e:
        raise GddlabError(
            f"reading a diffusers folder needs diffusers ({e}): pip install 'gddlab[diffusers]'"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without its warnings, of configurations of other versions."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    try:
        logging.set_verbosity_error()
        yield
    finally:
        logging.set_verbosity(before)
