"""`Conditioning`: what a network is told of the images besides noise and time, recorded from a pipeline."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gddlab.errors import GddlabError, NotFound, numbers_in, shown
from gddlab.files import atomic_path, hash_json, hash_tensors, path_of
from gddlab.nets.bare import unwrap
from gddlab.nets.calls import Call, class_count

Flag = bool | int | float | str
Shared = Mapping[str, Tensor | Flag]
FORMAT = "gddlab-conditioning-1"


@dataclass(frozen=True, eq=False, repr=False)
class Conditioning:
    """Conditioning of `len(cond)` images; `cond[3:7]` is that of some of them. Image i of a probe has row i modulo len.

        cond = Conditioning.record(pipe, ["a red bus", "a cat"])       # any keyword of the pipeline
        cond = Conditioning.classes([207, 360], of=pipe)

    Names are those of the network's arguments, dotted where they are entries of a dictionary
    ("added_cond_kwargs.time_ids").

    Attributes:
        rows: Tensors with one row per image.
        shared: What is the same for all images: tensors without an axis of images, numbers, names.
        negative: The rows of guidance's other branch, "uncond"; None where there are none.
        names: The prompts, or class ids.
        shape: Shape of the latents that they were recorded for, (C, H, W); None where it is not known.

    Raises:
        GddlabError: Tensors of different lengths.
    """

    rows: Mapping[str, Tensor]
    shared: Shared = field(default_factory=dict)
    negative: Mapping[str, Tensor] | None = None
    names: tuple[str, ...] = ()
    shape: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "shared", "negative"):
            given = getattr(self, name)
            if name != "negative" or given is not None:
                tensors = isinstance(given, Mapping) and all(
                    isinstance(x, Tensor) or (name == "shared" and isinstance(x, Flag)) for x in given.values()
                )
                if not tensors:
                    raise GddlabError(f"conditioning with {name}={shown(given)}: give tensors by name, in a dictionary")
        rows = (*self.rows.items(), *(self.negative or {}).items())
        lengths = [(name, len(x) if x.ndim else 0) for name, x in rows]
        counts = {n for _, n in lengths}
        if not lengths or min(counts) < 1 or len(counts) > 1:
            raise GddlabError(
                f"conditioning with rows {shown(dict(lengths))}: give tensors with one row per image, at least one"
            )
        if self.negative is not None and self.negative.keys() != self.rows.keys():
            raise GddlabError(
                f"conditioning of {', '.join(self.rows)} with negative {', '.join(self.negative)}: give the same names"
            )
        object.__setattr__(self, "names", tuple(self.names) or tuple(map(str, range(len(self)))))
        if len(self.names) != len(self):
            raise GddlabError(f"conditioning of {len(self)} images with {len(self.names)} names: give one each")

    @classmethod
    def record(cls, pipe: Any, prompts: Any = None, *, call: Call | None = None, **arguments: Any) -> Conditioning:
        """What a pipeline gives its network: it is run to its first network call, and stopped there.

        So text is encoded as the pipeline does it. Pipeline, scheduler and torch's random numbers are left as they
        were.

        Args:
            pipe: A diffusers pipeline with a `unet` or `transformer`.
            prompts: Its first argument: a text, or several; class ids for a DiT. None where `arguments` hold
                embeddings.
            call: How its network is called, where `CALLS` does not know its class.
            **arguments: Further arguments of the pipeline: height, width, negative_prompt, guidance_scale (which is
                part of the conditioning of a distilled network), ...

        Raises:
            GddlabError: No pipeline, several images per prompt, or a network that is given something else than tensors
                and numbers.
        """
        network = network_of(pipe)
        call = call or Call.of(network) or Call()
        if arguments.get("num_images_per_prompt") not in (None, 1):
            raise GddlabError("num_images_per_prompt= has no use here: give each prompt once")
        taken = inspect.signature(type(pipe).__call__).parameters
        prompt = "prompt" if "prompt" in taken else next(n for n in taken if n != "self")
        if prompts is None:
            prompts = arguments.get(prompt)
        if prompts is not None:
            listed = [prompts] if isinstance(prompts, str | int) else list(prompts)
            if not listed:
                raise GddlabError("prompts=[]: give at least one")
            arguments[prompt], names = listed, tuple(map(str, listed))
        else:
            given = [v for v in arguments.values() if isinstance(v, Tensor) and v.ndim > 1]
            if not given:
                raise GddlabError("prompts=None: give prompts, or embeddings as the pipeline's own arguments")
            names = tuple(map(str, range(len(given[0]))))
        if "output_type" in taken:
            arguments.setdefault("output_type", "latent" if type(pipe).__name__ != "DiTPipeline" else "pt")
        if "generator" in taken:
            arguments.setdefault("generator", torch.Generator().manual_seed(0))
        # a distilled network has one branch, unless it is given negative prompts
        both = not call.doubled and (not call.scale or any(name.startswith("negative") for name in arguments))
        return _of_calls(_first_calls(pipe, network, call, arguments, 2 if both else 1), call, names, network)

    @classmethod
    def classes(cls, ids: int | Sequence[int] | Tensor, *, of: Any) -> Conditioning:
        """Of class ids, or one-hot rows.

        Args:
            ids: Class ids, (n,), or one-hot, (n, classes).
            of: Network, pipeline, or what `wrap` made of it: says how classes are given, and which is none.

        Raises:
            GddlabError: A network without classes; ids that it does not have.
        """
        bare = unwrap(of) if isinstance(of, nn.Module) else network_of(of)
        call = getattr(of, "call", None) or Call.of(bare)
        if call is None or not call.labels:
            raise GddlabError(f"a {type(bare).__name__} takes no class ids: omit them, or record prompts")
        return cls.of_ids(ids, call, class_count(bare) or int(getattr(of, "label_dim", 0)))

    @classmethod
    def of_ids(cls, ids: int | Sequence[int] | Tensor, call: Call, count: int) -> Conditioning:
        """`classes` of a network with `count` classes, called like this."""
        try:
            listed = (
                ids if isinstance(ids, Tensor) else torch.tensor(numbers_in([ids] if isinstance(ids, int) else ids))
            )
        except (TypeError, ValueError, RuntimeError):
            raise GddlabError(f"ids={shown(ids)}: give class ids") from None
        if listed.ndim == 2 and listed.shape[1] == count:
            listed = listed.argmax(1)
        whole = listed.ndim == 1 and len(listed) > 0 and not listed.is_floating_point()
        if not whole or listed.min() < 0 or listed.max() >= count:
            raise GddlabError(f"ids={shown(ids)}: give class ids, 0 to {count - 1}")
        listed = listed.long()
        negative = None if call.null is None else {call.labels: torch.full_like(listed, call.null)}
        return cls({call.labels: listed}, {}, negative, tuple(map(str, listed.tolist())))

    def __deepcopy__(self, memo: Any) -> Conditioning:
        return self  # it is not changed

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Conditioning:
        """Some of the images."""
        if isinstance(index, slice):
            index = range(len(self))[index]
        try:
            chosen = torch.as_tensor([index] if isinstance(index, int) else list(index), dtype=torch.int64)
            chosen = torch.arange(len(self))[chosen]  # counts from the end
        except (TypeError, ValueError, RuntimeError, IndexError):
            raise IndexError(f"index {shown(index)} of {len(self)} rows of conditioning") from None

        def take(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: x[chosen.to(x.device)] for name, x in rows.items()}

        negative = None if self.negative is None else take(self.negative)
        return Conditioning(
            take(self.rows), self.shared, negative, tuple(self.names[i] for i in chosen.tolist()), self.shape
        )

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {tuple(x.shape[1:])}" for name, x in self.rows.items())
        also = "" if self.negative is None else ", with a negative branch"
        return f"<Conditioning of {len(self)}: {sizes}{also}>"

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by "rows.", "negative." or "shared." and name."""
        parts = {"rows": self.rows, "negative": self.negative or {}, "shared": self.shared}
        return {f"{part}.{name}": x for part, of in parts.items() for name, x in of.items() if isinstance(x, Tensor)}

    @property
    def flags(self) -> dict[str, Flag]:
        """What is shared and no tensor."""
        return {name: x for name, x in self.shared.items() if not isinstance(x, Tensor)}

    @property
    def hash(self) -> str:
        """sha256 of all that the network sees."""
        return hash_json([hash_tensors(self.tensors()), self.flags])

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        from safetensors.torch import save_file

        about = {"format": FORMAT, "names": self.names, "flags": self.flags, "shape": self.shape}
        tensors = {name: x.detach().cpu().contiguous().clone() for name, x in self.tensors().items()}
        with atomic_path(path) as tmp:
            save_file(tensors, tmp, metadata={k: json.dumps(v, allow_nan=False) for k, v in about.items()})

    @classmethod
    def load(cls, path: str | Path) -> Conditioning:
        """Reads a file that `save` wrote.

        Raises:
            NotFound: No such file.
            GddlabError: Another file.
        """
        from safetensors import SafetensorError, safe_open

        path = path_of("path", path)
        if not path.is_file():
            raise NotFound(f"no such file: {path}")
        parts: dict[str, dict[str, Any]] = {"rows": {}, "negative": {}, "shared": {}}
        try:
            with safe_open(path, framework="pt") as f:
                said = f.metadata() or {}
                if said.get("format") != json.dumps(FORMAT):  # those of other libraries are no JSON
                    raise GddlabError(f"{path} holds no conditioning: give a file that Conditioning.save wrote")
                about = {k: json.loads(v) for k, v in said.items()}
                for name in f.keys():  # noqa: SIM118 (not a dict)
                    part, _, rest = name.partition(".")
                    parts[part][rest] = f.get_tensor(name)
            shape = about["shape"]
            return cls(
                parts["rows"],
                parts["shared"] | about["flags"],
                parts["negative"] or None,
                tuple(about["names"]),
                None if shape is None else (shape[0], shape[1], shape[2]),
            )
        except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, IndexError) as e:
            raise GddlabError(f"{path} is damaged ({e}): record the conditioning again") from None


def network_of(pipe: Any) -> nn.Module:
    """The network of a diffusers pipeline that denoises.

    Raises:
        GddlabError: It is no pipeline, or has none.
    """
    for name in ("transformer", "unet"):
        if is_pipeline(pipe) and isinstance(found := getattr(pipe, name, None), nn.Module):
            return found
    raise GddlabError(f"{type(pipe).__name__} is no diffusers pipeline with a unet or transformer: give one")


def is_pipeline(value: object) -> bool:
    """By its class's name, since importing diffusers takes seconds."""
    return any(c.__name__ == "DiffusionPipeline" for c in type(value).__mro__)


def nested(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as dictionaries: {"a.b": 1} -> {"a": {"b": 1}}."""
    out: dict[str, Any] = {}
    for name, value in arguments.items():
        *outer, last = name.split(".")
        inside = out
        for part in outer:
            inside = inside.setdefault(part, {})
        inside[last] = value
    return out


def _flat(arguments: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value


class _Recorded(Exception):
    """Ends a pipeline's run."""


def _first_calls(
    pipe: Any, network: nn.Module, call: Call, arguments: dict[str, Any], most: int
) -> list[dict[str, Any]]:
    """The arguments, by dotted name, of the first network calls of a pipeline that are at one time; `most` of them."""
    kind = type(unwrap(network))
    positional = [name for name in inspect.signature(kind.forward).parameters if name != "self"]
    found: list[dict[str, Any]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen = dict(_flat(dict(zip(positional, args, strict=False)) | kwargs))
        if found and not torch.equal(torch.as_tensor(found[0][call.time]), torch.as_tensor(seen[call.time])):
            raise _Recorded  # the next step: there is no other branch
        found.append({name: x.detach().clone() if isinstance(x, Tensor) else x for name, x in seen.items()})
        if len(found) == most:
            raise _Recorded

    handle = network.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with _as_it_was(pipe):
            pipe(**arguments)
    except _Recorded:
        pass
    except (TypeError, ValueError, AttributeError, RuntimeError) as e:
        text = str(e).strip() or type(e).__name__
        lacks = [n for n in ("tokenizer", "text_encoder") if getattr(pipe, n, pipe) is None]
        if lacks and "NoneType" in text:
            raise GddlabError(
                f"{type(pipe).__name__} has no {lacks[0]} for prompts: give gddlab.Conditioning.record embeddings, "
                "prompt_embeds= and the like, negative ones too where guidance is on"
            ) from None
        raise GddlabError(f"{type(pipe).__name__} refused its arguments: {text.splitlines()[0]}") from None
    finally:
        handle.remove()
        pipe.maybe_free_model_hooks()
    if not found or not isinstance(found[0].get(call.sample), Tensor):
        taken = ", ".join(found[0]) if found else "nothing"
        raise GddlabError(
            f"{type(pipe).__name__} gave its network {taken}, no {call.sample!r}: give call=, such as "
            'gddlab.Call(sample="x", time="t")'
        )
    return found


@contextlib.contextmanager
def _as_it_was(pipe: Any) -> Iterator[None]:
    """With a copy of the scheduler, without a bar, without using up torch's random numbers."""
    scheduler, bar = getattr(pipe, "scheduler", None), getattr(pipe, "_progress_bar_config", None)
    try:
        if scheduler is not None:
            pipe.scheduler = copy.deepcopy(scheduler)
        pipe.set_progress_bar_config(disable=True)
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        if scheduler is not None:
            pipe.scheduler = scheduler
        if bar is None:
            del pipe._progress_bar_config
        else:
            pipe.set_progress_bar_config(**bar)


def _of_calls(calls: Sequence[dict[str, Any]], call: Call, names: tuple[str, ...], network: nn.Module) -> Conditioning:
    first, n = calls[0], len(names)
    total = len(first[call.sample])
    doubled = call.doubled and total == 2 * n
    if not doubled and total != n:
        raise GddlabError(f"the network was given {total} rows for {n} prompts: give one image per prompt")
    rows: dict[str, Tensor] = {}
    shared: dict[str, Any] = {}
    ours = {call.sample, call.time, "return_dict", *(["img_shapes"] if call.places == "img_shapes" else [])}
    for name, value in ((k, v) for k, v in first.items() if k not in ours):
        if isinstance(value, Tensor):
            of_images = value.ndim > 0 and len(value) == total and name not in call.shared
            (rows if of_images else shared)[name] = value
        elif isinstance(value, bool | int | float | str):
            shared[name] = value
        else:
            raise GddlabError(
                f"the network was given {name} as a {type(value).__name__}: conditioning holds tensors and numbers; "
                "give wrap a denoise= of your own"
            )
    if not rows:
        raise GddlabError("the network was given nothing but noise and time: it needs no conditioning")
    negative: dict[str, Tensor] | None = None
    if doubled:
        halves = {name: dict(zip(call.order, x.chunk(2), strict=True)) for name, x in rows.items()}
        rows, negative = ({name: half[b] for name, half in halves.items()} for b in ("cond", "uncond"))
    elif len(calls) > 1:
        rows, negative = _paired(rows, {k: v for k, v in calls[1].items() if k not in {*ours, *shared}})
    if call.labels in rows and call.null is not None:  # pipelines may take that of another network
        negative = {name: x.clone() for name, x in (negative or rows).items()}
        negative[call.labels] = torch.full_like(rows[call.labels], call.null)
    shape = _shape(first, call, network)
    return Conditioning(rows, shared, negative, names, shape)


def _paired(rows: dict[str, Tensor], others: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The rows of both branches under the same names: a mask that one alone has is all ones in the other."""
    for ours, theirs in ((rows, others), (others, rows)):
        for name in theirs.keys() - ours.keys():
            text = ours.get(name.removesuffix("_mask"))
            if text is None or text.ndim < 2:
                raise GddlabError(f"the network was given {name} in one branch alone: record without guidance")
            ours[name] = torch.ones(text.shape[:2], dtype=theirs[name].dtype, device=text.device)
    return rows, {name: others[name] for name in rows}


def _shape(seen: Mapping[str, Any], call: Call, network: nn.Module) -> tuple[int, int, int] | None:
    """Shape of the latents in a network call, (C, H, W)."""
    x = seen[call.sample]
    if x.ndim == 4:
        return tuple(x.shape[1:])
    if shapes := seen.get("img_shapes"):
        _, h, w = shapes[0][0] if isinstance(shapes[0], list) else shapes[0]
        return x.shape[2] // call.patch**2, h * call.patch, w * call.patch
    places = seen.get("img_ids")
    if x.ndim != 3 or not isinstance(places, Tensor):
        return None
    h, w = (call.patch * (int(places[..., k].max()) + 1) for k in (1, 2))
    return x.shape[2] // call.patch**2, h, w
