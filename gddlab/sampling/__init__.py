"""Images from teachers and students."""

from gddlab.sampling.grid import image_grid, save_grid
from gddlab.sampling.samplers import heun, karras_sigmas, latents, sample

__all__ = ["heun", "image_grid", "karras_sigmas", "latents", "sample", "save_grid"]
