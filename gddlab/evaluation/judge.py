"""Judges: small classifiers trained on the training part of a labelled data set, whose features and classes score."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from pydantic import PositiveInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from gddlab.datasets import ImageDataset, Source, order, parts_of
from gddlab.errors import GddlabError, NotFound, validated
from gddlab.files import atomic_path, check_free, check_kind, data_dir, folder_of, write_json, write_text
from gddlab.progress import progress_bar
from gddlab.provenance import versions
from gddlab.runtime import Seed, chosen_device, generator, tf32

FILE = "judge.safetensors"
FORMAT = "gddlab-judge-1"
"""To be raised when a change of code changes what the weights of a file give."""
FEATURES = 64
SMALLEST = 8
"""Least side of an image, pixels."""

BATCH = 64
LR = 3e-3
"""Adam's highest learning rate; it rises over a tenth of the training, and falls linearly to 0."""
WEIGHT_DECAY = 1e-2
DEGREES, SCALE, SHIFT = 10.0, 0.1, 1 / 16
"""Augmentation: the most that an image is turned, scaled (a share), and shifted (a share of its side)."""


class Classifier(nn.Module):
    """3x3 convolutions with batch norm and ReLU: one at each side down to 16 pixels, two at half of that, one below.

    93,546 parameters for the digits.

    Args:
        channels, resolution, classes: Of the images.
    """

    def __init__(self, channels: int, resolution: int, classes: int):
        super().__init__()
        half, side = FEATURES // 2, resolution
        layers = [_convolution(channels, half)]
        while side > 16:
            layers += [nn.MaxPool2d(2), _convolution(half, half)]
            side //= 2
        layers += [nn.MaxPool2d(2), _convolution(half, FEATURES), _convolution(FEATURES, FEATURES)]
        layers += [nn.MaxPool2d(2), _convolution(FEATURES, FEATURES)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images: UInt8[Tensor, "n c r r"]) -> tuple[Float[Tensor, "n 64"], Float[Tensor, "n k"]]:
        """Features, the mean over pixels of the last layer, and logits; of images as a feature extractor takes them."""
        return self.seen(images.float() / 127.5 - 1)

    def seen(self, x: Float[Tensor, "n c r r"]) -> tuple[Float[Tensor, "n 64"], Float[Tensor, "n k"]]:
        """As `forward`, of images in [-1, 1]."""
        features = self.layers(x).mean((2, 3))
        return features, self.head(features)


def _convolution(inside: int, outside: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU())


@validated
def train_judge(
    data: Source,
    run_dir: str | Path,
    *,
    seed: Seed = 0,
    epochs: PositiveInt = 20,
    device: Literal["auto", "cpu", "cuda"] = "cpu",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Trains a judge: a small classifier that has seen only the training part of a data set, to score images by.

    Given as `extractor`, it measures by its 64 features, fewer than there are images, and by its classes. It is scored
    on the part that is held out after each epoch; the last epoch is kept, whatever its score. The digits take half a
    minute on one core.

    Args:
        data: Labelled images, as for `open_dataset`: the whole set, of which two thirds are trained on, or a part.
        run_dir: Folder for judge.safetensors (weights in half precision), config.json (with the versions and the number
            of images), and metrics.jsonl: loss and held-out accuracy of each epoch, the last line those of the file.
        seed: Of weights, order and augmentation (small turns, scales and shifts).
        epochs: Passes over the training part.
        device: Where to train. On a CPU, by one thread, the weights are a function of images, settings and versions.
        overwrite: Replaces a judge that is there.
        progress: Shows a bar at a terminal.

    Returns:
        Path of judge.safetensors.

    Raises:
        GddlabError: Images without labels, of one class, or of fewer than 8 pixels a side; a folder that holds a judge,
            or something else.
    """
    folder, where = folder_of("run_dir", run_dir), chosen_device(device)
    check_kind(folder, lambda path: (path / FILE).is_file(), "judge")
    check_free(folder, overwrite)
    train, held_out = parts_of(data, progress=progress)
    whole = train.name.rpartition(":")[0]
    if train.classes < 2:
        raise GddlabError(f"{whole!r} has {train.classes} classes: a judge needs labelled images of at least 2")
    if train.resolution < SMALLEST:
        side = train.resolution
        raise GddlabError(f"{whole!r} has {side}x{side} images: a judge takes {SMALLEST}x{SMALLEST} or more")
    network = {"channels": train.channels, "resolution": train.resolution, "classes": train.classes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier(**network)
    with _alike(where), tf32(False):
        log = list(_epochs(net.to(where), train, held_out, seed, epochs, progress))
    settings = {"batch": BATCH, "lr": LR, "weight_decay": WEIGHT_DECAY, "degrees": DEGREES, "scale": SCALE}
    about: dict[str, Any] = {
        "name": whole,
        **network,
        "seed": seed,
        "epochs": epochs,
        **settings,
        "shift": SHIFT,
        "parameters": sum(p.numel() for p in net.parameters()),
        "train": {"images": len(train), "sha256": train.manifest.sha256},
        "held_out": {"images": len(held_out), "sha256": held_out.manifest.sha256},
        "versions": versions(),
    }
    write_json(folder / "config.json", about)
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line, allow_nan=False) + "\n" for line in log))
    meta = {"format": FORMAT, "network": network, "name": whole, "accuracy": log[-1]["accuracy"]}
    tensors = {k: v.cpu().half() for k, v in net.state_dict().items() if v.is_floating_point()}
    with atomic_path(folder / FILE) as tmp:
        save_file(tensors, tmp, metadata={"judge": json.dumps(meta, allow_nan=False)})  # several are in no fixed order
    return folder / FILE


@contextmanager
def _alike(device: torch.device) -> Iterator[None]:
    """Inside, one thread on a CPU: sums of several are of another order."""
    before = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def _epochs(
    net: Classifier, train: ImageDataset, held_out: ImageDataset, seed: int, epochs: int, progress: bool
) -> Iterator[dict[str, Any]]:
    """Trains, and says after each epoch how good it is; in the end the weights are rounded to half precision."""
    device, began = next(net.parameters()).device, time.perf_counter()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=WEIGHT_DECAY)
    steps = math.ceil(len(train) / BATCH)
    with progress_bar(total=epochs * len(train), desc="judge", unit="img", enabled=progress) as bar:
        for epoch in range(epochs):
            net.train()
            losses = []
            for step, index in enumerate(order(len(train), seed, epoch * len(train), len(train)).split(BATCH)):
                done = (epoch * steps + step) / (epochs * steps)
                for group in optimizer.param_groups:
                    group["lr"] = LR * min(10 * done + 1 / (epochs * steps), (1 - done) / 0.9, 1)
                x = augmented(train.images(index), generator(seed, epoch * steps + step)).to(device)
                labels = train.labels(index).argmax(1).to(device)
                loss = F.cross_entropy(net.seen(x)[1], labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach() * len(index))
                bar.update(len(index))
            if epoch == epochs - 1:
                for tensor in net.state_dict().values():
                    if tensor.is_floating_point():
                        tensor.copy_(tensor.half())
            mean = torch.stack(losses).sum().item() / len(train)
            if not math.isfinite(mean):
                raise GddlabError(f"the loss is {mean} after epoch {epoch + 1}: give another seed")
            seconds = round(time.perf_counter() - began, 1)
            yield {"epoch": epoch + 1, "loss": mean, "accuracy": accuracy(net, held_out), "seconds": seconds}


def augmented(x: Float[Tensor, "n c r r"], g: torch.Generator) -> Float[Tensor, "n c r r"]:
    """Images turned, scaled and shifted a little, each by its own draw; pixels at the edge are repeated."""
    angle, scale, dx, dy = (2 * torch.rand(4, len(x), generator=g) - 1) * torch.tensor(
        [[math.radians(DEGREES)], [SCALE], [2 * SHIFT], [2 * SHIFT]]
    )
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    matrix = torch.stack([torch.stack([cos, -sin, dx], 1), torch.stack([sin, cos, dy], 1)], 1)  # (n, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


@torch.inference_mode()
def accuracy(net: Classifier, data: ImageDataset) -> float:
    """The share of images whose class a judge names; it is then in eval mode."""
    net.eval()
    device = next(net.parameters()).device
    right = 0
    for index in torch.arange(len(data)).split(256):
        classes = net.seen(data.images(index).to(device))[1].argmax(1).cpu()
        right += int((classes == data.labels(index).argmax(1)).sum())
    return right / len(data)


def bundled_judges() -> list[str]:
    """Names of the judges that ship with gddlab, which are those of their data sets."""
    return sorted(p.parent.name for p in (data_dir() / "judges").glob(f"*/{FILE}"))


def judge_file(name: str | Path) -> Path:
    """The file of a bundled judge, or that of a path, which may be its folder.

    Raises:
        NotFound: No such file.
    """
    if name in bundled_judges():
        return data_dir() / "judges" / str(name) / FILE
    path = Path(name).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise NotFound(f"no such judge: {path}; gddlab.train_judge makes one")
    return path


def read_judge(path: Path) -> dict[str, Any]:
    """What a file says of its judge: `network`, the arguments of `Classifier`, `name`, `accuracy`.

    Raises:
        GddlabError: The file holds no judge.
    """
    try:
        with safe_open(path, framework="pt") as f:
            about = json.loads((f.metadata() or {})["judge"])
        sizes = about["network"].values()
        if about["format"] == FORMAT and len(sizes) == 3 and all(type(n) is int and 0 < n < 1e5 for n in sizes):
            return dict(about)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise GddlabError(f"{path} holds no judge: give a file that gddlab.train_judge wrote")


def load_judge(path: Path) -> Classifier:
    """The judge in a file, in eval mode, float32, without gradients.

    Raises:
        GddlabError: The file holds none.
    """
    about = read_judge(path)
    try:
        net = Classifier(**about["network"])
        with safe_open(path, framework="pt") as f:
            state = {k: f.get_tensor(k).float() for k in f.keys()}  # noqa: SIM118 (not a dict)
        counts = {k: v for k, v in net.state_dict().items() if not v.is_floating_point()}  # of batches, in training
        net.load_state_dict(state | counts, strict=True)
    except (SafetensorError, TypeError, RuntimeError) as e:
        raise GddlabError(f"{path} is a damaged judge ({' '.join(str(e).split())[:120]}): train it again") from None
    return net.eval().requires_grad_(False)
