"""The one-step student at work: inversion, inpainting, restoration, editing."""

from gddlab.editing.edits import Direction, Directions, Edited, directions, edit
from gddlab.editing.inversion import Inversion, invert
from gddlab.editing.operators import Operator, blur, downscale, greyscale
from gddlab.editing.restoration import Restoration, inpaint, restore

__all__ = [
    "Direction",
    "Directions",
    "Edited",
    "Inversion",
    "Operator",
    "Restoration",
    "blur",
    "directions",
    "downscale",
    "edit",
    "greyscale",
    "inpaint",
    "invert",
    "restore",
]
