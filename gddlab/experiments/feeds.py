"""Which notebooks read which experiments; the same in every list."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["feeds_of"]

COURSE, MAIN, SECOND, MINIMA = "10_fid_over_images", "12_main_results", "13_second_extractor", "14_local_minima"
SAMPLES, LAYERS, MOVED, SPECTRA = "11_samples", "15_activations", "16_moved_parameters", "22_frequencies"
DISCRIMINATORS, AUGMENTATION, START = "18_discriminators", "19_augmentation_r1", "20_initialisation"
EFFICIENCY, COST = "21_data_efficiency", "23_cost"

FEEDS: Mapping[str, tuple[str, ...]] = {
    "gdd-i": (
        *(MAIN, SECOND, MINIMA, SAMPLES, LAYERS, MOVED, SPECTRA),
        *(DISCRIMINATORS, AUGMENTATION, START, EFFICIENCY, COST),
    ),
    "gdd": (MAIN, SECOND, MINIMA, SAMPLES, LAYERS, MOVED, SPECTRA, START, COST),
    "gdd-i-long": (COURSE, MAIN, EFFICIENCY, COST),
    "gdd-long": (COURSE, MAIN, COST),
    "scratch": (COURSE, SECOND, MINIMA, SAMPLES, START, COST),
    "fresh-fakes": (AUGMENTATION, COST),
    "reuse-fakes": (AUGMENTATION, COST),
    "no-r1": (AUGMENTATION,),
    "augment": (AUGMENTATION,),
    "ada": (AUGMENTATION,),
    "two-step": (MAIN, COST),
    "stylegan2": (SECOND, DISCRIMINATORS, COST),
    **dict.fromkeys(("pd", "cd", "ctm"), (MAIN, SECOND, MINIMA, SAMPLES, COST)),
    "rcd": (MINIMA,),
    "gdd-cd": (MAIN, MINIMA, COST),
}


def feeds_of(name: str) -> tuple[str, ...]:
    """Notebooks that read an experiment, beside those of masks."""
    if name.startswith("images-"):
        return (EFFICIENCY,)
    if name.startswith(("lpips", "lite0", "vgg16", "deit")):
        return (DISCRIMINATORS, COST)
    return FEEDS.get(name, ())
