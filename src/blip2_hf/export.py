"""The image side of BLIP-2 as one graph for serving: from pictures to soft prompts or features."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import normalize

from .jobs.atomic_files import named_in_errors, rename, temporary_folder
from .models.configuration_blip2 import Blip2Config
from .models.modeling_base import Blip2PreTrainedModel
from .models.modeling_blip2 import Blip2ForConditionalGeneration
from .models.modeling_image_text import Blip2ImageTextPreTrainedModel


FORMATS = {".pt2": "torch", ".onnx": "onnx"}
INPUT, OUTPUT = "pixel_values", "image_features"


class ImageEncoder(nn.Module):
    r"""
    The vision tower, the Q-Former and the projection of a model.

    Args:
        model ([`Blip2ForConditionalGeneration`], [`Blip2ForPreTraining`] or [`Blip2ForImageTextRetrieval`]):
            The model. Its parts are shared.

    Raises:
        ValueError: if the model is of another class, is wrapped by PEFT, or has no tower.
    """

    def __init__(self, model: Blip2PreTrainedModel):
        super().__init__()
        if type(model).__module__.partition(".")[0] == "peft":
            raise ValueError("The model is wrapped by PEFT: export what its merge_and_unload() returns.")
        self.is_retrieval = isinstance(model, Blip2ImageTextPreTrainedModel)
        if not self.is_retrieval and not isinstance(model, Blip2ForConditionalGeneration):
            raise ValueError(
                f"{type(model).__name__} has no projection: give a Blip2ForConditionalGeneration, a "
                "Blip2ForPreTraining or a Blip2ForImageTextRetrieval."
            )
        config: Blip2Config = model.config
        if not config.has_vision_tower:
            raise ValueError("The model has no vision tower: call attach_vision_tower first.")
        self.vision_model = model.vision_model
        self.query_tokens = model.query_tokens
        self.qformer = model.qformer
        self.projection = model.vision_projection if self.is_retrieval else model.language_projection

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        layernorm = self.vision_model.post_layernorm
        image_embeds = self.vision_model(pixel_values).last_hidden_state.to(layernorm.weight.dtype)
        queries = self.qformer(
            query_embeds=self.query_tokens(pixel_values.shape[0]), encoder_hidden_states=layernorm(image_embeds)
        ).last_hidden_state
        features = self.projection(queries.to(self.projection.weight.dtype))
        return normalize(features, dim=-1) if self.is_retrieval else features


def check_format(path: str | os.PathLike, format: str | None = None) -> str:
    """Return the format of a file that is to be written, and check that the packages it needs are installed."""
    found = format or FORMATS.get(Path(path).suffix)
    if found is None or found not in FORMATS.values():
        formats = " or ".join(FORMATS.values())
        raise ValueError(f"{path}: a name that ends in {' or '.join(FORMATS)} was expected, or format {formats}.")
    if found == "onnx" and not (find_spec("onnx") and find_spec("onnxscript")):
        raise ImportError(
            'ONNX needs onnx and onnxscript: pip install "blip2-hf[export]". A name that ends in .pt2 needs neither.'
        )
    return found


@torch.no_grad()
def export_image_encoder(
    model: Blip2PreTrainedModel, path: str | os.PathLike, format: str | None = None, image_size: int | None = None
):
    r"""
    Write what `get_image_features(pixel_values).pooler_output` computes as one graph.

    The input `pixel_values` is of shape `(batch_size, channels, image_size, image_size)` with any `batch_size`. The
    output `image_features` of a [`Blip2ForConditionalGeneration`] are soft prompts of shape
    `(batch_size, num_query_tokens, language model hidden_size)`, which `generate(image_features=...)` takes. Those of
    the other two classes are of shape `(batch_size, num_query_tokens, image_text_hidden_size)`.

    Args:
        model ([`Blip2ForConditionalGeneration`], [`Blip2ForPreTraining`] or [`Blip2ForImageTextRetrieval`]):
            The model, in the precision that the graph is to have. If its Q-Former reads the question, the graph gives
            it none.
        path (`str` or `os.PathLike`):
            The file. The weights of an ONNX go beside it, into a file of the same name with `.data` added.
        format (`str`, *optional*):
            `"torch"` (torch.export) or `"onnx"`. If it is not given, the ending of `path` decides: `.pt2` or `.onnx`.
        image_size (`int`, *optional*):
            Side of the pictures in pixels; that of the tower if it is not given.

    Raises:
        ValueError: if the format is unknown, or if the model cannot be exported (see [`ImageEncoder`]).
        ImportError: if the format is ONNX, and its packages are not installed.
    """
    format = check_format(path, format)
    encoder = ImageEncoder(model)
    config = model.config.vision_config
    size = image_size or getattr(config, "image_size", None) or 224
    parameter = next(model.vision_model.parameters())
    # Two pictures, because torch.export takes a batch of one for a constant
    picture = torch.zeros(
        2, getattr(config, "num_channels", 3), size, size, dtype=parameter.dtype, device=parameter.device
    )
    with _in_eval_mode(encoder):
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(encoder, (picture,), dynamic_shapes={INPUT: {0: batch}})
    _write(program, Path(path), format)


@contextmanager
def _in_eval_mode(encoder: ImageEncoder) -> Iterator[None]:
    """Put the encoder into eval mode, and each part back into its own mode: the caller may be training it."""
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _write(program: torch.export.ExportedProgram, path: Path, format: str):
    """Write into a folder beside `path` first, under the final names because an ONNX names the file of its weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path.parent) as folder:
        file = folder / path.name
        if format == "torch":
            # Not into the file, because torch ends the process if the disk is full
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
            with named_in_errors(path, file):
                file.write_bytes(buffer.getbuffer())
        else:
            onnx = torch.onnx.export(program, input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False)
            onnx.save(file, external_data=True)
        # The weights first, so that there is no graph without them
        for written in sorted(folder.iterdir(), key=lambda found: found.name == path.name):
            rename(written, path.parent / written.name)
