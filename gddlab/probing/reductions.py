"""What a hook keeps of an activation: a few numbers per row, computed at once.

In a forward pass, row i * S + s of a batch is image i at noise level s. A reduction takes the activation, (n * S, ...),
float32 or float64, and n, and returns a tensor whose first dimension counts images, or groups of images. Statistics are
updated from these after the pass; no activation outlives its hook.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gddlab.errors import GddlabError

Reduction = Callable[[Tensor, int], Tensor]
"""Takes an activation and the number of images in it."""

BLOCK, PIECE = 1 << 12, 1 << 14
"""How many numbers are summed, or multiplied and summed, in float32 before float64 takes over.

The error stays below 1e-7 of the sum of magnitudes.
"""

SHORT = 1 << 8
"""The same, where numbers are added in sequence."""

GROUP = 8
"""Images that CKA compares with each other."""

BANDS = (0.0, 0.25, 0.5, 1.0, math.inf)
"""Edges of bands of radial frequency, as a share of the Nyquist frequency; the spectrum's corners are above 1."""

Side = Literal["input", "output", "attention"]


class Tap(NamedTuple):
    """Where a number is read: a module's output or first input, and the reduction applied there.

    Attributes:
        side: "attention" reads the entropies of the module's softmax attention, (B, heads), see `entropies`.
        before: With a module and side that run earlier, the reduction is of how the output or input differs from
            theirs, which has the same shape.
        stream: Stream of tokens that it belongs to, where the layer it is read for has several.
    """

    module: str
    side: Side
    reduction: Reduction
    before: tuple[str, Side] | None = None
    stream: str = ""


def double(x: Tensor) -> Tensor:
    """float64, except on MPS, which has none: to fetch the numbers inside a hook would wait for the device."""
    return x if x.device.type == "mps" else x.double()


def flat(x: Tensor) -> Tensor:
    """Rows as vectors, in the order of memory: sums over a row are the same and no copy is made.  (B, ...) -> (B, D)

    Tokens cut from an image, (B, C, H, W) -> (B, T, C), lie channel by channel, and so does all that is added to them.
    """
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    elif x.ndim == 3 and x.mT.is_contiguous():
        x = x.mT
    return x.reshape(x.shape[0], -1)


def _blocks(x: Tensor) -> Tensor:
    """Rows cut into equal blocks, (blocks, P): long enough for speed, short enough for an exact sum in float32."""
    v = flat(x)
    p = math.gcd(v.shape[1], BLOCK)
    return v.reshape(-1, p if p >= 64 else v.shape[1])


def _row_means(blocks: Tensor, x: Tensor, n: int) -> Tensor:
    """Sums of blocks to means of the rows of `x`.  (blocks,) -> (n, S)"""
    return (double(blocks).reshape(len(x), -1).sum(1) / x[0].numel()).reshape(n, -1)


def _chunk(x: Tensor, width: int) -> int:
    """Blocks of `width` numbers whose copy stays in a CPU's cache; an accelerator takes more at once."""
    return max(1, (1 << (20 if x.device.type == "cpu" else 26)) // width)


def _even(blocks: Tensor) -> int:
    """How many blocks to take at once: about a chunk, and each time as many.

    Threads then write to the same parts of a buffer each time: what another core has just written comes slowly.
    """
    k, p = blocks.shape
    return math.ceil(k / math.ceil(k / _chunk(blocks, p)))


def _buffered(blocks: Tensor, change: Callable[..., Tensor], total: Callable[..., Tensor]) -> Tensor:
    """`total` of `change` of each block, without a temporary of the activation's size.  (blocks, P) -> (blocks,)"""
    size = _even(blocks)
    out, buffer = torch.empty_like(blocks[:, 0]), torch.empty_like(blocks[:size])
    for i in range(0, len(blocks), size):
        part = blocks[i : i + size]
        total(change(part, out=buffer[: len(part)]), out=out[i : i + size])
    return out


def _sum(x: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.sum(x, -1, out=out)


def _norm(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Squares and adds in one pass."""
    norm: Tensor = torch.linalg.vector_norm(x, 2, -1, out=out)
    return norm


def mean(x: Float[Tensor, "rows ..."], n: int) -> Float[Tensor, "n s"]:
    """Mean of each row."""
    return _row_means(_sum(_blocks(x)), x, n)


def mean_square(x: Float[Tensor, "rows ..."], n: int) -> Float[Tensor, "n s"]:
    """Mean of squares of each row."""
    return _row_means(double(_norm(_blocks(x))).square(), x, n)


def mean_square_between(
    x: Float[Tensor, "rows ..."], others: Sequence[Float[Tensor, "rows ..."]], n: int
) -> list[Float[Tensor, "n s"]]:
    """`mean_square` of x - y for each y of `others`, without a temporary of their size; tokens, (B, T, C), or vectors.

    x is read once for all of them.
    """
    blocks = _blocks(x)
    k = len(blocks)
    # Where another lies in memory otherwise, so do its vectors.
    past = [_blocks(y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)) for y in others]
    out, size = blocks.new_empty(len(past), k), _even(blocks)
    buffer = torch.empty_like(blocks[:size])
    for i in range(0, k, size):
        part = blocks[i : i + size]
        place = buffer[: len(part)]
        for y, found in zip(past, out[:, i : i + size].unbind(), strict=True):
            _norm(torch.sub(part, y[i : i + size], out=place), out=found)
    return list((double(out).square().view(len(past), len(x), -1).sum(2) / x[0].numel()).unflatten(1, (n, -1)))


def moments(x: Float[Tensor, "rows ..."], n: int) -> Float[Tensor, "n s 3"]:
    """Mean of each row, mean square of the distance from it, and mean of absolute values.  (n * S, ...) -> (n, S, 3)

    Reading the activation is what costs time, so one reading gives all three. Distances are taken from the mean of each
    block, and the blocks' means are added in float64: where means are large, a difference of mean squares would lose
    its digits.
    """
    blocks = _blocks(x)
    k, p = blocks.shape
    size = _even(blocks)
    found, buffer = blocks.new_empty(3, k), torch.empty_like(blocks[:size])
    for i in range(0, k, size):
        part = blocks[i : i + size]
        place = buffer[: len(part)]
        total, away, magnitude = found[:, i : i + size].unbind()
        _sum(part, out=total)
        _norm(torch.sub(part, (total / p)[:, None], out=place), out=away)
        _sum(torch.abs(part, out=place), out=magnitude)
    sums = double(found).view(3, len(x), -1) / p  # (3, rows, blocks of a row)
    middle, (total, away, _) = sums.mean(2), sums.unbind()
    spread = p * away.square() + (total - middle[0][:, None]).square()
    if p & (p - 1):  # distances were taken from a mean that is rounded to float32, unless divided by a power of two
        spread -= (total - double(found[0] / p).view_as(total)).square()
    return torch.stack([middle[0], spread.mean(1), middle[2]], -1).unflatten(0, (n, -1))


def mean_magnitude(x: Float[Tensor, "rows ..."], n: int) -> Float[Tensor, "n s"]:
    """Mean of absolute values of each row."""
    blocks = _blocks(x)  # torch's 1-norm needs no buffer, but three times as long
    return _row_means(_buffered(blocks, torch.abs, _sum), x, n)


def positive_share(x: Float[Tensor, "rows ..."], n: int) -> Float[Tensor, "n s"]:
    """Share of values above 0 of each row."""
    blocks = _blocks(x)  # to sum booleans directly takes ten times as long
    return _row_means(_buffered(blocks, functools.partial(torch.gt, other=0), _sum), x, n)


def gram(x: Float[Tensor, "rows ..."], n: int) -> Float[Tensor, "n s s"]:
    """Inner products of the rows of each image, over the number of values."""
    v = flat(x)
    v = v.reshape(n, v.shape[0] // n, -1)
    p = math.gcd(v.shape[2], PIECE)
    if p < 1024:
        parts = [double(torch.bmm(part, part.mT)) for part in v.split(PIECE, -1)]
        return functools.reduce(torch.add, parts) / v.shape[-1]
    pieces = v.unflatten(2, (-1, p)).transpose(1, 2)  # (n, pieces, S, p)
    return torch.stack([double(torch.bmm(a, a.mT)).sum(0) for a in pieces]) / v.shape[-1]


def pair_gram(x: Float[Tensor, "rows ..."], n: int) -> Float[Tensor, "pairs s s"]:
    """Half the inner products of the differences within pairs of images, over the number of values.

    Images 2 i and 2 i + 1 are a pair; one that is left over is omitted. The mean over pairs is an unbiased estimate of
    the covariance over images, summed over the values of a layer: what images share drops out before anything is
    multiplied.
    """
    v = flat(x).unflatten(0, (n, -1))[: n // 2 * 2].unflatten(0, (-1, 2))  # (pairs, 2, S, D)
    pairs, _, s, d = v.shape
    p = math.gcd(d, PIECE >> 1)
    equal = [v.unflatten(3, (-1, p)).transpose(2, 3)] if p >= 1024 else [v[:, :, None] for v in v.split(PIECE, -1)]
    out = double(v.new_zeros(pairs, s, s))
    buffer = x.new_empty(0)
    for pieces in equal:  # (pairs, 2, pieces, S, p)
        size = _chunk(x, s * pieces.shape[-1])  # pieces; as many pairs as are no more than that
        for found, some in zip(*(a.split(max(1, size // pieces.shape[2])) for a in (out, pieces)), strict=True):
            for part in some.split(size, 2):
                a, b = part.unbind(1)
                if buffer.numel() < a.numel():
                    buffer = x.new_empty(a.numel())
                away = torch.sub(a, b, out=buffer[: a.numel()].view(a.shape)).flatten(0, 1)
                found += double(torch.bmm(away, away.mT)).unflatten(0, a.shape[:2]).sum(1)
    return out / (2 * d)


def _by_channel(x: Tensor) -> Tensor:
    """Pixels of (B, C, H, W), or tokens of (B, T, C); (B, C) has one. No copy is made.  -> (B, C, pixels)"""
    if x.ndim == 3:
        return x.mT
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).flatten(1, 2).mT
    return x.flatten(2) if x.ndim > 2 else x[:, :, None]


def _channels(x: Tensor, n: int, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean over pixels.  -> (n, S, C)"""
    v = _by_channel(x)
    piece = SHORT if v.stride(1) == 1 else PIECE  # where channels lie side by side, a CPU adds in sequence
    parts = [double(total(part)) for part in v.split(piece, 2)]
    return (functools.reduce(torch.add, parts) / v.shape[2]).unflatten(0, (n, -1))


def channel_mean(x: Float[Tensor, "rows ..."], n: int) -> Float[Tensor, "n s c"]:
    """Mean of each channel of each row."""
    return _channels(x, n, _sum)


def channel_square(x: Float[Tensor, "rows ..."], n: int) -> Float[Tensor, "n s c"]:
    """Mean of squares of each channel of each row."""
    return _channels(x, n, lambda v: double(_norm(v)).square())


def activity(x: Float[Tensor, "rows ..."], n: int) -> Float[Tensor, "n s 1+c"]:
    """Share of values above 0 of each row, then the mean of squares of each channel.  (n * S, ...) -> (n, S, 1 + C)"""
    return torch.cat([positive_share(x, n)[..., None], channel_square(x, n)], -1)


def channel_variance(x: Float[Tensor, "rows ..."], n: int) -> Float[Tensor, "n s c"]:
    """Mean square of each channel's distance from its own mean over pixels."""
    found = []
    for part in x.split(max(1, (1 << 20) // x[0].numel())):  # no temporary of the activation's size
        middle = channel_mean(part, 1)[0].to(x.dtype)
        middle = middle[:, None] if x.ndim == 3 else middle.reshape(*middle.shape, *[1] * (x.ndim - 2))
        found.append(channel_square(part - middle, 1)[0])
    return torch.cat(found).unflatten(0, (n, -1))


def band_share(x: Float[Tensor, "rows ..."], n: int) -> Float[Tensor, "n s bands"]:
    """Share of each row's power in the bands of radial frequency between `BANDS`.  (n * S, C, H, W) -> (n, S, 4)"""
    if x.ndim != 4:
        raise ValueError(f"spectral_share needs (rows, C, H, W), this is {tuple(x.shape)}")
    h, w = x.shape[-2:]
    band, weight = _radial(h, w, x.device)
    out = double(x.new_zeros(x.shape[0], len(BANDS) - 1))
    rows = max(1, (1 << 22) // x[0].numel())  # the transform of a whole batch would be larger than the activation
    for i, part in enumerate(x.split(rows)):
        power = double(torch.view_as_real(torch.fft.rfft2(part)).square().sum((1, -1))) * weight  # (b, H, W/2+1)
        out[i * rows : i * rows + len(part)].index_add_(1, band.flatten(), power.flatten(1))
    return (out / out.sum(1, keepdim=True)).reshape(n, -1, len(BANDS) - 1)


@functools.lru_cache(maxsize=64)
def _radial(h: int, w: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Band of each frequency of `rfft2`, and how often it occurs in the full spectrum."""
    fy, fx = torch.fft.fftfreq(h), torch.fft.rfftfreq(w)
    radius = (fy[:, None].square() + fx.square()).sqrt() / 0.5
    band = torch.bucketize(radius, torch.tensor(BANDS[1:-1]), right=True)
    weight = torch.full((w // 2 + 1,), 2.0)
    weight[0] = 1.0
    if w % 2 == 0:
        weight[-1] = 1.0
    return band.to(device), weight.to(device)


def per_head(x: Float[Tensor, "rows heads"], n: int) -> Float[Tensor, "n s heads"]:
    """A number of each head, as it is."""
    return double(x).unflatten(0, (n, -1))


def hsic(x: Float[Tensor, "rows ..."], n: int) -> Float[Tensor, "groups s s"]:
    """Unbiased HSIC between noise levels within whole groups of `GROUP` images; a group that is not full is omitted.

    Song et al. 2012, equation 5, as a mini-batch estimate (Nguyen et al. 2021, equation 3).
    """
    v = flat(x).unflatten(0, (n, -1))  # (n, S, D)
    m, s = GROUP, v.shape[1]
    out = [double(x.new_zeros(0, s, s))]
    for group in v.split(m):
        if len(group) < m:
            break
        a = group.transpose(0, 1)  # (S, m, D)
        # Only differences between images count; at low noise they may be a millionth of the values.
        parts = (double(p) - double(p).mean(1, keepdim=True) for p in a.split(PIECE, -1))
        k = functools.reduce(torch.add, [torch.bmm(p, p.mT) for p in parts]) / v.shape[-1]
        k = k - torch.diag_embed(k.diagonal(dim1=-2, dim2=-1))  # (S, m, m)
        rows = k.sum(-1)  # (S, m)
        total = rows.sum(-1)  # (S,)
        trace = torch.einsum("sij,tij->st", k, k)
        found = trace + torch.outer(total, total) / ((m - 1) * (m - 2)) - 2 / (m - 2) * rows @ rows.mT
        out.append(found[None] / (m * (m - 3)))
    return torch.cat(out)


FOLLOW: dict[Reduction, dict[Reduction, Callable[[Tensor], Tensor]]] = {
    moments: {
        mean: lambda x: x[..., 0],
        mean_square: lambda x: x[..., 0].square() + x[..., 1],
        mean_magnitude: lambda x: x[..., 2],
    },
    gram: {mean_square: lambda x: x.diagonal(dim1=-2, dim2=-1)},
    activity: {positive_share: lambda x: x[..., 0], channel_square: lambda x: x[..., 1:]},
}
"""What follows from one reduction's numbers: reading the activation is what costs time, so it is read once for all."""


def follow(found: Mapping[Reduction, Tensor]) -> dict[Reduction, Tensor]:
    """What follows from these reductions' numbers, (..., n, S, ...)."""
    return {part: take(x) for r, x in found.items() for part, take in FOLLOW.get(r, {}).items()}


def one_reading(wanted: Collection[Reduction]) -> tuple[Reduction, ...]:
    """What to compute of an activation, so that all that are wanted are there or follow."""
    left = set(wanted)
    if FOLLOW[activity].keys() <= left:
        left.add(activity)
    for whole in left & FOLLOW.keys():
        left -= FOLLOW[whole].keys()
    return tuple(sorted(left, key=lambda r: getattr(r, "__name__", "")))


def mean_over_calls(runs: Sequence[Mapping[Reduction, Tensor]]) -> dict[Reduction, Tensor]:
    """The numbers of several runs of a layer as those of one, whose output holds theirs side by side.

    Shares of frequency bands and HSIC are means over the runs.
    """
    stacked = {reduction: torch.stack([found[reduction] for found in runs]) for reduction in runs[0]}
    out = {reduction: x.mean(0) for reduction, x in stacked.items()}
    if moments in out:  # variances gain what lies between the runs
        out[moments][..., 1] += stacked[moments][..., 0].var(0, correction=0)
    if channel_variance in out and channel_mean in out:
        out[channel_variance] = out[channel_variance] + stacked[channel_mean].var(0, correction=0)
    return out


# The same numbers by compiled code, whose temporaries are registers: one call, one pass over memory. Compiled code adds
# in sequence, so that sums in float32 are of no more than SHORT numbers here.


def _moments(v: Tensor) -> Tensor:
    """See `moments`.  (rows, pieces, P) -> (rows, 3)"""
    p = v.shape[2]
    middle = v.sum(2, keepdim=True) / p
    away = v - middle
    off = double(away.sum(2)) / p  # what rounding left in `middle`
    total = double(middle[..., 0]) + off
    mean = total.mean(1)
    spread = double(away.square().sum(2)) / p - off.square() + (total - mean[:, None]).square()
    return torch.stack([mean, spread.mean(1), (double(v.abs().sum(2)) / p).mean(1)], -1)


def _activity(v: Tensor, dim: int) -> Tensor:
    """See `activity`.  (rows, C, pieces, P), dim -1, or (rows, pieces, P, C), dim -2 -> (rows, 1 + C)"""
    positive = double((v > 0).to(v.dtype).sum(dim)).flatten(1).sum(1) / v[0].numel()
    square = double(v.square().sum(dim)).mean(dim) / v.shape[dim]
    return torch.cat([positive[:, None], square], 1)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True, fullgraph=True)


def compiled(reduction: Reduction, *, beside: bool = False) -> Reduction:
    """The same reduction by compiled code where there is such: of float32, and of sizes that divide into short sums.

    Args:
        beside: Whether it is called where compiled networks are made to run as Python.

    Raises:
        GddlabError: In a call: PyTorch has no compiler for this device.
    """
    if reduction not in (moments, activity):
        return reduction

    @functools.wraps(reduction)
    def run(x: Tensor, n: int) -> Tensor:
        v = flat(x) if reduction is moments else _by_channel(x)
        size = v.shape[-1]
        p = size if size <= SHORT else math.gcd(size, SHORT)
        if x.dtype != torch.float32 or size == 1 or (p < size and p < SHORT >> 2):
            return reduction(x, n)
        try:
            with torch.compiler.set_stance("default") if beside else contextlib.nullcontext():
                if reduction is moments:
                    found = _compiled(_moments)(v.unflatten(-1, (-1, p)))
                elif v.is_contiguous():
                    found = _compiled(_activity)(v.unflatten(-1, (-1, p)), -1)
                else:
                    found = _compiled(_activity)(v.mT.contiguous().unflatten(1, (-1, p)), -2)
        except torch._dynamo.exc.FailOnRecompileLimitHit:  # more kinds of sizes than PyTorch compiles one function for
            return reduction(x, n)
        except torch._dynamo.exc.TorchDynamoException as e:
            needs = "a C++ compiler, such as g++" if x.device.type == "cpu" else "Triton"
            why = str(e).strip().splitlines()[0]
            raise GddlabError(f"compile=True needs {needs} that PyTorch can use ({why}): omit compile") from None
        return found.unflatten(0, (n, -1))

    return run


@functools.lru_cache(maxsize=256)
def per_row(reduce: Callable[[Tensor], Tensor]) -> Reduction:
    """A user's function of rows, (B, ...) -> (B,) or (B, K), as a reduction: the same one for the same function."""

    @functools.wraps(reduce)
    def reduction(x: Tensor, n: int) -> Tensor:
        found = reduce(x)
        if not isinstance(found, Tensor) or found.ndim not in (1, 2) or len(found) != len(x):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"reduce gave {shape} for {len(x)} rows: give a tensor ({len(x)},) or ({len(x)}, K)")
        return double(found).unflatten(0, (n, -1))

    return reduction


def radial_power(x: Tensor) -> tuple[Int[Tensor, " f"], Float[Tensor, "n f"]]:
    """Mean power of each image at each radial frequency.

    The transform is orthonormal: white noise of standard deviation s has power s^2 at every frequency. A coefficient
    belongs to the whole number of cycles nearest to its radius; the corners, beyond Nyquist, are omitted.

    Args:
        x: (N, C, H, H), square.

    Returns:
        Frequencies in cycles per image, 0 to H // 2, (F,); power, mean over coefficients and channels, float64, (N, F).

    Raises:
        GddlabError: Not square images.
    """
    if x.ndim != 4 or x.shape[2] != x.shape[3]:
        raise GddlabError(f"radial_power of {tuple(x.shape)}: give square images, (N, C, H, H)")
    h = x.shape[-1]
    f = torch.fft.fftfreq(h, 1 / h)
    ring = (f[:, None] ** 2 + f[None] ** 2).sqrt().round().long().to(x.device)  # (H, H)
    rings = h // 2 + 1
    inside = ring < rings
    power = torch.fft.fft2(x.double(), norm="ortho").abs().square().mean(1)  # (N, H, H)
    total = power.new_zeros(len(x), rings).index_add_(1, ring[inside], power[:, inside])
    return torch.arange(rings), total / ring[inside].bincount(minlength=rings)
