"""`ideal_denoiser`: what a perfect network would do on a data set."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from gddlab.datasets import Source, open_dataset
from gddlab.errors import GddlabError, validated
from gddlab.nets import Precond
from gddlab.nets.ideal import IdealPrecond


@validated
def ideal_denoiser(data: Source, *, conditional: bool = False) -> Precond:
    """The denoiser with the least error on a data set, for comparison with a trained one.

    D(x; sigma) is the exact posterior mean E[y | x] of an image y of the set, all equally likely, given
    x = y + sigma * noise (Karras et al. 2022, equation 57, appendix B.3): the mean of the images with weights
    softmax(-|x - y|^2 / (2 sigma^2)). At small sigma it is the nearest image, at large sigma the mean image; sampled
    with many steps it gives images of the set themselves. `sample`, `evaluate`, `probe` and the like take it as a
    teacher; it has no layers. A call compares with every image: time and memory grow with the set, held as float32.

    Args:
        data: The images, as for `open_dataset`.
        conditional: Given a class, the mean over the images of this class alone.

    Returns:
        The network on the CPU, called as `model(x, sigma, class_labels)`; x is (B, C, H, W) on the scale [-1, 1], sigma
        above 0. Its card names the data, so that no data= is needed. It cannot be saved or distilled: make it again.

    Raises:
        GddlabError: No such data; `conditional` with data without classes.
    """
    dataset = open_dataset(data)
    if conditional and not dataset.classes:
        raise GddlabError(f"conditional=True: {dataset.name!r} has no classes, omit it")
    ids = torch.from_numpy(dataset.class_ids) if conditional and dataset.class_ids is not None else None
    net = IdealPrecond(dataset.images(), ids, dataset.classes if conditional else 0)
    net.card = SimpleNamespace(name=f"ideal denoiser of {dataset.manifest.what}", data=dataset)
    return net.eval()
