"""What the Auto classes of transformers are told of this library."""


def register_configs():
    from transformers.models.auto.configuration_auto import AutoConfig

    from .models.configuration_blip2 import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig

    for config in (Blip2Config, Blip2QFormerConfig, Blip2VisionConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def register_models():
    from transformers.models.auto.modeling_auto import (
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoModelForPreTraining,
        AutoModelForVisualQuestionAnswering,
        AutoModelForZeroShotImageClassification,
    )

    from .models.modeling_base import Blip2Model
    from .models.modeling_blip2 import Blip2ForConditionalGeneration
    from .models.modeling_pretraining import Blip2ForPreTraining
    from .models.modeling_qformer import Blip2QFormerModel
    from .models.modeling_retrieval import Blip2ForImageTextRetrieval
    from .models.modeling_vision import Blip2VisionModel

    for model in (Blip2Model, Blip2QFormerModel, Blip2VisionModel):
        AutoModel.register(model.config_class, model, exist_ok=True)
    AutoModelForPreTraining.register(Blip2ForPreTraining.config_class, Blip2ForPreTraining, exist_ok=True)
    retrieval = Blip2ForImageTextRetrieval
    AutoModelForZeroShotImageClassification.register(retrieval.config_class, retrieval, exist_ok=True)
    for auto_model in (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForVisualQuestionAnswering):
        auto_model.register(Blip2ForConditionalGeneration.config_class, Blip2ForConditionalGeneration, exist_ok=True)


def register_processor():
    from transformers.models.auto.processing_auto import AutoProcessor

    from .models.configuration_blip2 import Blip2Config
    from .models.processing_blip2 import Blip2Processor

    AutoProcessor.register(Blip2Config, Blip2Processor, exist_ok=True)


def register_pipelines():
    from .models.pipeline_blip2 import register_pipelines as register
    from .models.pipeline_zero_shot import register_zero_shot_pipeline

    register()
    register_zero_shot_pipeline()


REGISTRATIONS = {
    "transformers.models.auto.configuration_auto": register_configs,
    "transformers.models.auto.modeling_auto": register_models,
    "transformers.models.auto.processing_auto": register_processor,
    "transformers.pipelines": register_pipelines,
}
