"""Checkpoints of other libraries, loaded into the models of this one."""

from .instructblip import load_instructblip_checkpoint, save_instructblip_checkpoint
from .lavis import load_lavis_checkpoint
from .lavis_names import ConversionReport, convert_lavis_state_dict
from .towers import load_lavis_tower, resize_tower


__all__ = [
    "ConversionReport",
    "convert_lavis_state_dict",
    "load_instructblip_checkpoint",
    "load_lavis_checkpoint",
    "load_lavis_tower",
    "resize_tower",
    "save_instructblip_checkpoint",
]
