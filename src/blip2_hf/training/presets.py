"""Which parts of a BLIP-2 are trained: in the paper's stages, in its fine-tuning, and other choices."""

import re
from typing import TYPE_CHECKING, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..models.configuration_blip2 import public_class_name
from ..models.frozen import upcast_trained_parameters
from ..models.modeling_base import Blip2PreTrainedModel
from ..models.modeling_pretraining import Blip2ForPreTraining


if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


Preset = Literal[
    "stage1",
    "stage2",
    "finetune",
    "projection",
    "qformer",
    "everything",
    "lora_language_model",
    "lora_qformer",
    "lora_vision_model",
]

# Beginnings of the names of the parameters that each trains
PRESETS: dict[str, tuple[str, ...]] = {
    "stage1": (
        "vision_model.post_layernorm",
        "query_tokens",
        "qformer",
        "embeddings",
        "vision_projection",
        "text_projection",
        "itm_head",
        "temperature",
        "lm_head",
    ),
    "stage2": ("vision_model.post_layernorm", "query_tokens", "qformer", "embeddings", "language_projection"),
    "finetune": (
        "vision_model",
        "query_tokens",
        "qformer",
        "embeddings",
        "language_projection",
        "vision_projection",
        "text_projection",
        "itm_head",
        "temperature",
        "lm_head",
    ),
    "projection": ("language_projection",),
    "qformer": ("vision_model.post_layernorm", "query_tokens", "qformer", "embeddings"),
    "everything": ("",),
}
LORA_PARTS = {f"lora_{part}": part for part in ("language_model", "qformer", "vision_model")}


def train_only(
    model: Blip2PreTrainedModel, preset: Preset, lora_config: "LoraConfig | None" = None
) -> "Blip2PreTrainedModel | PeftModel":
    r"""
    Choose which parts of a model are trained. All others are frozen, and stay in eval mode in training.

    | preset | trained |
    |---|---|
    | `"stage1"` | all of a [`Blip2ForPreTraining`] but the tower (section 3.2) |
    | `"stage2"` | Q-Former, queries, the LayerNorm after the tower, the projection (section 3.3) |
    | `"finetune"` | these and the tower (appendix); for retrieval, all of a [`Blip2ForPreTraining`] |
    | `"projection"` | the projection alone: a trained Q-Former is aligned to another language model |
    | `"qformer"` | the Q-Former, queries and the LayerNorm after the tower |
    | `"lora_language_model"`, `"lora_qformer"`, `"lora_vision_model"` | low-rank adapters in one part |
    | `"everything"` | everything, the language model too |

    Args:
        model ([`Blip2PreTrainedModel`]):
            The model. Trained parts in half precision are cast to float32, because AdamW would lose small steps.
        preset (`str`):
            One of the presets above.
        lora_config (`peft.LoraConfig`, *optional*):
            Configuration of the adapters. Defaults to rank 16 in all linear layers of the part.

    Returns:
        The model, or with adapters the `peft.PeftModel` around it.

    Raises:
        ValueError: if there is no such preset, or the model lacks the part.

    Example:

    ```python
    >>> model = Blip2ForConditionalGeneration.from_pretrained_parts("trained-blip2", "another/language-model")
    >>> train_only(model, "projection")
    ```"""
    if preset in LORA_PARTS:
        return _add_adapters(model, LORA_PARTS[preset], lora_config)
    if preset not in PRESETS:
        raise ValueError(f"There is no preset {preset!r}: one of {[*PRESETS, *LORA_PARTS]} was expected.")
    if lora_config is not None:
        raise ValueError(f"lora_config is for {sorted(LORA_PARTS)}, but the preset is {preset!r}: leave it out.")
    if preset not in ("finetune", "everything") and (preset == "stage1") != isinstance(model, Blip2ForPreTraining):
        raise ValueError(f"The preset {preset!r} is not for a {public_class_name(model)}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(PRESETS[preset]))
    model.freeze_unused_parameters()
    upcast_trained_parameters(model)
    # Parts that are frozen now leave training mode, others return to it
    return model.train(model.training)


def _add_adapters(model: Blip2PreTrainedModel, part: str, lora_config: "LoraConfig | None") -> "PeftModel":
    from peft import LoraConfig, get_peft_model

    if not hasattr(model, part):
        raise ValueError(f"A {public_class_name(model)} has no {part} to adapt.")
    if lora_config is None:
        head = getattr(model, part).get_output_embeddings()
        linear = {
            name.rpartition(".")[2]
            for name, module in getattr(model, part).named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and module is not head
        }
        if not linear:
            raise ValueError(f"{part} has no linear layers to adapt: give a lora_config.")
        # By their last name, anywhere in the part
        targets = rf"{part}\..*\.({'|'.join(sorted(map(re.escape, linear)))})"
        lora_config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=targets)
    adapted = get_peft_model(model, lora_config)
    model.freeze_unused_parameters()
    return adapted


def describe_trained_parts(model: nn.Module) -> str:
    """
    Describe which parts of a model are trained, with numbers of parameters and dtypes.

    Args:
        model (`nn.Module`):
            The model.

    Returns:
        `str`: a table, a line for each part and one for all.
    """
    rows = [_describe(name, list(part.parameters())) for name, part in without_adapters(model).named_children()]
    total = _describe("all", list(model.parameters()))
    header = f"{'part':24} {'parameters':>15} {'trained':>15} {'frozen':>15}  dtype"
    return "\n".join([header, *(row for row in rows if row), total])


def without_adapters(model: nn.Module) -> nn.Module:
    """Return the model inside PEFT's wrapper, or the model itself without one."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _describe(name: str, parameters: list[nn.Parameter]) -> str:
    if not parameters:
        return ""
    # ZeRO-3 leaves nothing in the weight itself
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in parameters]
    total, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
    return f"{name:24} {total:>15,} {trained:>15,} {total - trained:>15,}  {dtypes}"


__all__ = ["PRESETS", "describe_trained_parts", "train_only"]
