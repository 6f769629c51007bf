"""Images from teachers and students."""

from gddlab.sampling.grid import image_grid, save_grid
from gddlab.sampling.samplers import ImageNoise, Sampler, heun, heun_step, integrate, latents, multistep, sample
from gddlab.sampling.schedules import karras_sigmas, nearest_level
from gddlab.sampling.to_files import sample_files

__all__ = [
    "ImageNoise",
    "Sampler",
    "heun",
    "heun_step",
    "image_grid",
    "integrate",
    "karras_sigmas",
    "latents",
    "multistep",
    "nearest_level",
    "sample",
    "sample_files",
    "save_grid",
]
