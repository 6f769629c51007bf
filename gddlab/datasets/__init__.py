"""Images and labels: digits, EDM zips, folders, CIFAR-10, Hugging Face; `prepare` makes EDM zips."""

from __future__ import annotations

from gddlab.datasets.base import BatchReader, ImageDataset, Manifest, digits, order
from gddlab.datasets.open import open_dataset
from gddlab.datasets.prepare import PrepareReport, prepare

__all__ = ["BatchReader", "ImageDataset", "Manifest", "PrepareReport", "digits", "open_dataset", "order", "prepare"]
