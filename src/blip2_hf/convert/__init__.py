"""Checkpoints of other codes, loaded into the models of this library."""

from .lavis import ConversionReport, convert_lavis_state_dict, load_lavis_checkpoint


__all__ = ["ConversionReport", "convert_lavis_state_dict", "load_lavis_checkpoint"]
