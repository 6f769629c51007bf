"""Images and labels: digits, EDM zips, folders, CIFAR-10, Hugging Face; `prepare` makes EDM zips."""

from __future__ import annotations

from gddlab.datasets.base import ImageDataset, Manifest, order
from gddlab.datasets.digits import digits
from gddlab.datasets.opening import open_dataset
from gddlab.datasets.prepare import PrepareReport, prepare
from gddlab.datasets.reader import BatchReader

__all__ = ["BatchReader", "ImageDataset", "Manifest", "PrepareReport", "digits", "open_dataset", "order", "prepare"]
