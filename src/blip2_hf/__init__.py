"""BLIP-2 (arXiv 2301.12597) for the Hugging Face stack."""

from typing import TYPE_CHECKING

from ._import_hook import alias_modules, lazy_attributes, when_imported
from ._registration import REGISTRATIONS


__version__ = "0.1.0.dev0"

_EXPORTS = {
    "models.configuration_blip2": ["Blip2Config", "Blip2QFormerConfig", "Blip2VisionConfig"],
    "models.image_loading": ["ImageLoadError", "load_image", "load_images"],
    "convert.lavis": ["load_lavis_checkpoint"],
    "models.modeling_base": ["Blip2Model", "Blip2PreTrainedModel"],
    "models.modeling_blip2": ["Blip2ForConditionalGeneration"],
    "models.modeling_pretraining": ["Blip2ForPreTraining"],
    "models.modeling_projection": ["Blip2TextModelWithProjection", "Blip2VisionModelWithProjection"],
    "models.modeling_qformer": ["Blip2QFormerModel", "block_attention_mask"],
    "models.modeling_retrieval": ["Blip2ForImageTextRetrieval"],
    "models.modeling_vision": ["Blip2VisionModel"],
    "models.pipeline_blip2": ["ImageToTextPipeline", "VisualQuestionAnsweringPipeline"],
    "models.pipeline_zero_shot": ["ZeroShotImageClassificationPipeline"],
    "models.processing_blip2": ["Blip2Processor"],
}
__getattr__, __dir__, __all__ = lazy_attributes(__name__, _EXPORTS)

if TYPE_CHECKING:
    from .convert.lavis import load_lavis_checkpoint
    from .models.configuration_blip2 import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig
    from .models.image_loading import ImageLoadError, load_image, load_images
    from .models.modeling_base import Blip2Model, Blip2PreTrainedModel
    from .models.modeling_blip2 import Blip2ForConditionalGeneration
    from .models.modeling_pretraining import Blip2ForPreTraining
    from .models.modeling_projection import Blip2TextModelWithProjection, Blip2VisionModelWithProjection
    from .models.modeling_qformer import Blip2QFormerModel, block_attention_mask
    from .models.modeling_retrieval import Blip2ForImageTextRetrieval
    from .models.modeling_vision import Blip2VisionModel
    from .models.pipeline_blip2 import ImageToTextPipeline, VisualQuestionAnsweringPipeline
    from .models.pipeline_zero_shot import ZeroShotImageClassificationPipeline
    from .models.processing_blip2 import Blip2Processor


# Names that modules had before models/ was made: documented ones, and those that hand-written code may know
alias_modules(
    __name__,
    {name.removeprefix("models."): name for name in _EXPORTS if name.startswith("models.")}
    | {name: f"models.{name}" for name in ("distributed", "frozen", "generation_presets", "losses")}
    | {"model_card": "hub.model_card", "parts": "models.backbones"},
)

# Nothing of torch is imported before it is used: the Auto classes and pipelines learn of this library when they are
for _module, _register in REGISTRATIONS.items():
    when_imported(_module, _register)
