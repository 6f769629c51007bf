"""Datasets by name: `open_dataset("digits")`."""

from __future__ import annotations

from gddlab.datasets.base import ImageDataset, Manifest, order
from gddlab.datasets.digits import digits
from gddlab.errors import unknown

__all__ = ["ImageDataset", "Manifest", "digits", "open_dataset", "order"]

_NAMED = {"digits": digits}


def open_dataset(data: str | ImageDataset) -> ImageDataset:
    """A dataset by name, or the dataset itself.

    Args:
        data: "digits", or an ImageDataset.

    Raises:
        GddlabError: Unknown name.
    """
    if isinstance(data, ImageDataset):
        return data
    if data not in _NAMED:
        raise unknown("dataset", data, _NAMED)
    return _NAMED[data]()
