"""Where a number is read: layer x call x stream x guidance branch, inside the calls of a network."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gddlab.errors import unknown
from gddlab.nets.bare import denoiser_of, unwrap
from gddlab.probing.layers import PRESETS, LayerSelection, anatomy, holds_both, plain_name, streams_of, type_of

COND = "cond"
"""The guidance branch of a network that has one."""
IMAGE, CONTEXT = "image", "context"
"""Streams of tokens."""

Calls = Literal["each", "mean", "first", "last"]
"""What is measured of a layer that runs several times in one call of the network."""


class Site(NamedTuple):
    """A measured place.

    Attributes:
        layer: Name of the module.
        call: Which of its runs within one call of the network, from 1; 0 is the mean over several.
        stream: "image" or "context" where its output holds several streams of tokens, "" where it does not.
        branch: Guidance branch of the rows.
    """

    layer: str
    call: int = 1
    stream: str = ""
    branch: str = COND

    @property
    def key(self) -> str:
        """Its name in tables: that of the layer, with what differs from its first call, image and "cond" appended."""
        call = f"@{self.call}" if self.call > 1 else ""
        stream = "" if self.stream in ("", IMAGE) else f":{self.stream}"
        return f"{self.layer}{call}{stream}{'' if self.branch == COND else f':{self.branch}'}"


_KEY = re.compile(r"(?P<layer>.+?)(?:@(?P<call>[1-9]\d*))?(?P<rest>(?::[^.:@]+){0,2})")


def layer_of(key: str, known: Iterable[str]) -> str:
    """The layer's name in the key of a site; a name that is known is itself."""
    if key in known:
        return key
    found = _KEY.fullmatch(key)
    return found["layer"] if found else key


class Sites(NamedTuple):
    """Some sites of a layer: None is any.

    "name" means all of them, "name@1" its first run, "name:context" a stream, "name:cond" a branch; these combine.
    """

    call: int | None = None
    stream: str | None = None
    branch: str | None = None

    @classmethod
    def of(cls, key: str, known: Iterable[str]) -> Sites:
        found = None if key in known else _KEY.fullmatch(key)
        if found is None:
            return cls()
        rest = [x for x in found["rest"].split(":") if x]
        streams = [x for x in rest if x in (IMAGE, CONTEXT)]
        branches = [x for x in rest if x not in streams]
        call = None if found["call"] is None else int(found["call"])
        return cls(call, streams[0] if streams else None, branches[0] if branches else None)

    def hold(self, site: Site) -> bool:
        return all(want in (None, is_) for want, is_ in zip(self, site[1:], strict=True))


def again(layers: LayerSelection) -> LayerSelection:
    """A selection that can be read more than once."""
    return list(layers) if isinstance(layers, Iterator) else layers


def named_in(layers: LayerSelection) -> Callable[[str], bool]:
    """Whether a selection names a layer or chooses it by a function: others come with a preset or a glob."""
    if callable(layers) or not isinstance(layers, Iterable):
        return lambda name: True
    items = [layers] if isinstance(layers, str) else layers
    names = {plain_name(x) for x in items if isinstance(x, str) and x not in PRESETS}
    return lambda name: name in names


def is_attention(module: nn.Module) -> bool:
    """Whether attention is computed in its forward: a class of that name, or a residual block that holds one."""
    parts = anatomy(module)
    held = parts is not None and parts.attention and isinstance(getattr(module, parts.attention, None), nn.Module)
    return "Attention" in type(module).__name__ or bool(held)


# Layout.

_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding)


def channel_axis(module: nn.Module) -> int | None:
    """1 or -1, whatever the rank of the output; None: the last of (B, T, C), the second of (B, C, H, W)."""
    kind = type(module).__name__
    if isinstance(module, _CHANNELS_LAST) or "RMSNorm" in kind or ("LayerNorm" in kind and not kind.endswith("2d")):
        return -1
    if isinstance(module, nn.modules.conv._ConvNd) or any(
        w in kind for w in ("GroupNorm", "BatchNorm", "InstanceNorm")
    ):
        return 1
    return {"conv": 1, "linear": -1}.get(type_of(module))


def arranged(x: Tensor, axis: int | None) -> Tensor:
    """An output as reductions take it: (B, C), (B, T, C) or (B, C, H, W). No copy is made of a contiguous one."""
    if axis == -1 and x.ndim > 3:
        return x.flatten(1, -2)
    return x[..., None] if axis == 1 and x.ndim == 3 else x


def grid_of(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of tokens that are square patches of a height x width image; None where they are not."""
    k = math.isqrt(height * width // tokens) if tokens else 0
    if not k or k * k * tokens != height * width or height % k or width % k:
        return None
    return height // k, width // k


# The calls of a network.


class Window:
    """The calls of the bare network in one pass: whose rows they hold, and how often each module has run.

    A pass of R rows is one call of R rows for each guidance branch, or one of all branches, R rows after R rows, in the
    order of the denoiser's `branches`. Modules that run after such a call and outside of one, as when the backward pass
    computes a checkpointed block again, are not seen. Where the network itself is never called, since a function calls
    its parts, the whole pass is one call.

    Args:
        model: A denoiser, or any network.

    Attributes:
        branches: Of the call that runs now; () where the denoiser names no more.
        grid: Height and width of the image in it, pixels or packed patches; None where they are not known.
        context: Tokens of the context.
    """

    def __init__(self, model: nn.Module):
        denoiser = denoiser_of(model)
        self.root = unwrap(model)
        names = getattr(denoiser, "branches", None)
        said = isinstance(names, tuple | list) and bool(names) and all(isinstance(n, str) for n in names)
        self.names: tuple[str, ...] = tuple(names) if said else (COND,)  # type: ignore[arg-type]
        self._sample = getattr(denoiser, "sample_argument", None)
        self._outside = denoiser if denoiser is not self.root else None
        self._given = False
        self._packed: dict[int, tuple[int, int] | None] = {}
        self.start(None)

    def start(self, rows: int | None) -> None:
        """Begins a pass of `rows`; None takes those that the denoiser is called with."""
        self.rows, self._given = rows, rows is not None
        self.branches: tuple[str, ...] = self.names[:1]
        self.grid: tuple[int, int] | None = None
        self.context = 0
        self._next, self._inside, self._began = 0, 0, False
        self._runs: Counter[Any] = Counter()

    def hooks(self) -> list[Callable[[], None]]:
        """Registers hooks on the network; returns what removes each."""
        handles = [
            self.root.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.root.register_forward_hook(self._end, always_call=True),
        ]
        if self._outside is not None:
            handles.append(self._outside.register_forward_pre_hook(self._asked, with_kwargs=True))
        return [h.remove for h in handles]

    @property
    def closed(self) -> bool:
        """Whether what runs now is outside of the network's calls."""
        return self._began and not self._inside

    def run(self, place: Any) -> int | None:
        """Counts a run of a module: which it is within this call of the network; None outside of calls."""
        if self.closed:
            return None
        self._runs[place] += 1
        return self._runs[place]

    def expected(self) -> int | None:
        """Rows of an output in this call."""
        return None if self.rows is None else self.rows * max(1, len(self.branches))

    def parts(self, x: Tensor) -> list[tuple[str, Tensor]]:
        """Guidance branches of an output and their rows."""
        if len(self.branches) == 1:
            return [(self.branches[0], x)]
        rows = len(x) // len(self.branches)
        return [(branch, x[i * rows : (i + 1) * rows]) for i, branch in enumerate(self.branches)]

    def _asked(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        x = next(iter((*args, *kwargs.values())), None)
        if not self._given and isinstance(x, Tensor) and x.ndim:
            self.rows = len(x)

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._inside += 1
        if self._inside > 1:
            return
        name = self._sample
        x = kwargs[name] if name in kwargs else next(iter((*args, *kwargs.values())), None)
        rows = len(x) if isinstance(x, Tensor) and x.ndim else self.rows or 1
        if self.rows is None:
            self.rows = rows
        count = rows // self.rows if rows % self.rows == 0 else 1
        left = self.names[self._next :]
        self.branches = left[:count] if count <= len(left) else left[:1]  # one alone: its layers are refused by rows
        self._next += len(self.branches)
        self._began = True
        self._runs.clear()
        context = kwargs.get("encoder_hidden_states")
        self.context = context.shape[1] if isinstance(context, Tensor) and context.ndim == 3 else 0
        self.grid = self._grid(x, kwargs.get("img_ids"))

    def _grid(self, x: Any, ids: Any) -> tuple[int, int] | None:
        """Of images, or of packed patches, whose places are in `ids`, (N, 3) or (B, N, 3)."""
        if not isinstance(x, Tensor) or x.ndim not in (3, 4):
            return None
        if x.ndim == 4:
            return x.shape[-2], x.shape[-1]
        if (n := x.shape[1]) not in self._packed:  # once: to read the places waits for the device
            side = math.isqrt(n)
            found = (side, side) if side * side == n else None
            if isinstance(ids, Tensor) and ids.shape[-1] == 3:
                places = ids.reshape(-1, 3)[:, 1:]
                height, width = (places.amax(0) - places.amin(0) + 1).long().tolist()
                found = (height, width) if height * width == n else None
            self._packed[n] = found
        return self._packed[n]

    def _end(self, *_: Any) -> None:
        self._inside = max(0, self._inside - 1)


class View:
    """What a hook sees of one module: its streams, their layout and grid.

    Args:
        name: Its name.
        modules: All modules by name.
        window: The calls it runs in.
        block: The transformer block that it is, or is in; "" outside of these.

    Attributes:
        axis: See `channel_axis`.
        tokens: Whether it is in such a block, whose tokens have places in the image.
    """

    def __init__(self, name: str, modules: Mapping[str, nn.Module], window: Window, block: str):
        self.window, module = window, modules[name]
        self.streams, self.axis, self.tokens = streams_of(module), channel_axis(module), bool(block)
        self.joint = bool(block) and name != block and holds_both(modules[block])
        self._takes_both = bool(self.streams) and "Attention" not in type(module).__name__
        self._context_last = bool(self.streams) and type(module).__name__ == "Attention"

    def output(self, output: Any) -> list[tuple[str, Tensor]] | None:
        """Streams and their tensors; None where it is no tensor, nor a tuple whose parts are known."""
        if isinstance(output, Tensor):
            return self.cut(output)
        if not isinstance(output, tuple | list):
            return None
        if self.streams and len(output) >= len(self.streams):
            return [(s, x) for s, x in zip(self.streams, output, strict=False) if isinstance(x, Tensor)] or None
        tensors = [x for x in output if isinstance(x, Tensor)]
        return [("", tensors[0])] if len(tensors) == 1 else None

    def input(self, args: Any, kwargs: dict[str, Any]) -> list[tuple[str, Tensor]] | None:
        """The same of what it is given: its first argument, of a joint block both streams."""
        first = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
        if not isinstance(first, Tensor):
            return None
        if not self._takes_both:
            return self.cut(first)
        other = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        return [(IMAGE, first), *([(CONTEXT, other)] if isinstance(other, Tensor) else [])]

    def cut(self, x: Tensor) -> list[tuple[str, Tensor]]:
        """Streams of one tensor, as views: tokens of both in the blocks that hold them side by side, context first."""
        t, grid = self.window.context, self.window.grid
        if not (self.joint and t and grid and x.ndim > 2 and x.shape[1] > t and grid_of(x.shape[1] - t, *grid)):
            return [("", x)]
        return [(CONTEXT, x[:, :t]), (IMAGE, x[:, t:])]

    def replaced(self, output: Any, new: Sequence[tuple[str, int, Tensor]]) -> Any:
        """The output with other rows: of a stream, of the branch at a position, each. The output itself is kept.

        New tensors have the memory format of the old ones: later layers may write into them.
        """
        several = isinstance(output, tuple | list)
        items = list(output) if several else [output]
        copies: dict[int, Tensor] = {}
        for stream, i, rows in new:
            at = self.streams.index(stream) if several and stream else _first_tensor(items)
            old = items[at]
            whole = len(self.window.branches) == 1 and (several or not stream)
            if at not in copies:
                copies[at] = torch.empty_like(old).copy_(rows if whole else old)
            if not whole:
                held = copies[at] if several else dict(self.cut(copies[at]))[stream]
                self.window.parts(held)[i][1].copy_(rows)
        for at, x in copies.items():
            items[at] = x
        return items[0] if not several else type(output)(*items) if hasattr(output, "_fields") else type(output)(items)

    def queries(self, x: Tensor) -> list[tuple[str, Tensor]]:
        """Streams of a number of each query of a joint attention, (B, heads, Q): `Attention` puts the context last."""
        t, grid, q = self.window.context, self.window.grid, x.shape[-1]
        if not ((self.streams or self.joint) and t and grid and q > t and grid_of(q - t, *grid)):
            return [("", x)]
        image, context = (x[..., : q - t], x[..., q - t :]) if self._context_last else (x[..., t:], x[..., :t])
        return [(IMAGE, image), (CONTEXT, context)]

    def grid(self, x: Tensor, stream: str) -> tuple[int, int] | None:
        """Rows and columns of the tokens of an output, (B, T, C)."""
        grid, t = self.window.grid, x.shape[1] if x.ndim == 3 else 0
        if grid is None or not t or not self.tokens or stream == CONTEXT or (not stream and t == self.window.context):
            return None
        return grid_of(t, *grid)


def _first_tensor(items: Sequence[Any]) -> int:
    return next(i for i, x in enumerate(items) if isinstance(x, Tensor))


def ancestors(name: str) -> list[str]:
    """Names of the modules around one, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]


def innermost(name: str, blocks: Container[str]) -> str:
    """The block that a module is, or is in; "" outside of blocks."""
    return next((a for a in (name, *ancestors(name)) if a in blocks), "")


def on_grid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens as an image.  (B, h * w, C) -> (B, C, h, w)"""
    return x.unflatten(1, grid).permute(0, 3, 1, 2)


def spread(mean: Tensor, output: Tensor, axis: int | None = None) -> Tensor:
    """Means of channels, (rows, C), in the shape that expands over the pixels or tokens of `output`."""
    last = axis == -1 or (axis is None and output.ndim == 3)
    ones = [1] * (output.ndim - 2)
    return mean.reshape(len(mean), *ones, -1) if last else mean.reshape(len(mean), -1, *ones)


def check_branch(branch: str, names: tuple[str, ...]) -> None:
    """Refuses a guidance branch that the denoiser does not have."""
    if branch != "all" and branch not in names:
        raise unknown("branch", branch, (*names, "all"))


def check_stream(stream: str) -> None:
    """Refuses the name of a stream that no network here has."""
    if stream not in (known := (IMAGE, CONTEXT, "all")):
        raise unknown("stream", stream, known)


def version_of(x: Tensor) -> int | None:
    """The version of a tensor, which every in-place operation raises; None where inference mode keeps none."""
    return None if x.is_inference() else x._version


def left_out(why: Mapping[str, str]) -> str:
    """The text of the one warning about layers that a preset or glob brought and that cannot be measured."""
    name, reason = next(iter(why.items()))
    rest = f" and {len(why) - 1} more" if len(why) > 1 else ""
    return f'layers that cannot be measured are left out: {name!r} {reason}{rest}; see meta["not_run"]'
