"""BLIP-2 (arXiv 2301.12597) for the Hugging Face stack."""

from typing import TYPE_CHECKING

from ._lazy import lazy_attributes, when_imported
from ._registration import REGISTRATIONS


__version__ = "0.1.0.dev0"

_EXPORTS = {
    "configuration_blip2": ["Blip2Config", "Blip2QFormerConfig", "Blip2VisionConfig"],
    "image_loading": ["ImageLoadError", "load_image", "load_images"],
    "convert.lavis": ["load_lavis_checkpoint"],
    "modeling_base": ["Blip2Model", "Blip2PreTrainedModel"],
    "modeling_blip2": ["Blip2ForConditionalGeneration"],
    "modeling_pretraining": ["Blip2ForPreTraining"],
    "modeling_qformer": ["Blip2QFormerModel", "block_attention_mask"],
    "modeling_retrieval": ["Blip2ForImageTextRetrieval"],
    "modeling_vision": ["Blip2VisionModel"],
    "pipeline_blip2": ["ImageToTextPipeline", "VisualQuestionAnsweringPipeline"],
    "pipeline_zero_shot": ["ZeroShotImageClassificationPipeline"],
    "processing_blip2": ["Blip2Processor"],
}
__getattr__, __dir__, __all__ = lazy_attributes(__name__, _EXPORTS)

if TYPE_CHECKING:
    from .configuration_blip2 import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig
    from .convert.lavis import load_lavis_checkpoint
    from .image_loading import ImageLoadError, load_image, load_images
    from .modeling_base import Blip2Model, Blip2PreTrainedModel
    from .modeling_blip2 import Blip2ForConditionalGeneration
    from .modeling_pretraining import Blip2ForPreTraining
    from .modeling_qformer import Blip2QFormerModel, block_attention_mask
    from .modeling_retrieval import Blip2ForImageTextRetrieval
    from .modeling_vision import Blip2VisionModel
    from .pipeline_blip2 import ImageToTextPipeline, VisualQuestionAnsweringPipeline
    from .pipeline_zero_shot import ZeroShotImageClassificationPipeline
    from .processing_blip2 import Blip2Processor


# Nothing of torch is imported before it is used: the Auto classes and pipelines learn of this library when they are
for _module, _register in REGISTRATIONS.items():
    when_imported(_module, _register)
