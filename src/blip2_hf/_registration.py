"""Registration of this library with the Auto classes and the pipelines of transformers."""

import functools
import json
from collections.abc import Collection
from contextvars import ContextVar
from pathlib import Path
from typing import Any


def register_configs():
    from transformers.models.auto.configuration_auto import AutoConfig

    from .models.configuration_blip2 import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig

    for config in (Blip2Config, Blip2QFormerConfig, Blip2VisionConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def register_models():
    from transformers.models.auto.modeling_auto import (
        AutoModel,
        AutoModelForCausalLM,
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
    # TRL loads models of classes that are not in transformers by AutoModelForCausalLM
    for auto_model in (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoModelForVisualQuestionAnswering,
    ):
        auto_model.register(Blip2ForConditionalGeneration.config_class, Blip2ForConditionalGeneration, exist_ok=True)


def register_processor():
    from transformers.models.auto.processing_auto import AutoProcessor

    from .models.configuration_blip2 import Blip2Config
    from .models.processing_blip2 import Blip2Processor

    AutoProcessor.register(Blip2Config, Blip2Processor, exist_ok=True)


def register_pipelines():
    """
    Make `transformers.pipeline` know `"image-to-text"` and `"visual-question-answering"`, with the default models of
    transformers 4, and use the class of this library for `"zero-shot-image-classification"`. A second call changes
    nothing, and neither does any call to the other tasks.
    """
    from transformers import AutoModelForImageTextToText, AutoModelForVisualQuestionAnswering
    from transformers.pipelines import PIPELINE_REGISTRY

    from .models.pipeline_blip2 import ImageToTextPipeline, VisualQuestionAnsweringPipeline
    from .models.pipeline_zero_shot import ZeroShotImageClassificationPipeline

    captioning, answering = AutoModelForImageTextToText, AutoModelForVisualQuestionAnswering
    new_tasks = {
        "image-to-text": (ImageToTextPipeline, (captioning,), ("ydshieh/vit-gpt2-coco-en", "5bebf1e")),
        "visual-question-answering": (
            VisualQuestionAnsweringPipeline,
            (answering, captioning),
            ("dandelin/vilt-b32-finetuned-vqa", "d0a1f6a"),
        ),
    }
    tasks = PIPELINE_REGISTRY.supported_tasks
    for task, (pipeline_class, model_classes, default) in new_tasks.items():
        if tasks.get(task, {}).get("impl") is not pipeline_class:
            PIPELINE_REGISTRY.register_pipeline(task, pipeline_class, model_classes, {"model": default}, "multimodal")
            # It would have every saved pipeline ask for trust_remote_code, see register_for_auto_class
            del pipeline_class._registered_impl
    zero_shot = "zero-shot-image-classification"
    if tasks[zero_shot]["impl"] is not ZeroShotImageClassificationPipeline:
        tasks[zero_shot] = tasks[zero_shot] | {"impl": ZeroShotImageClassificationPipeline}
    _keep_task_names(new_tasks)
    _keep_processors_of_adapters()


def _keep_processors_of_adapters():
    """
    Let a pipeline of adapters use the processor that was saved with them, with its prompt and its size of pictures,
    and the class of this library. transformers takes the processor of the base model and its own class.
    """
    from transformers import pipelines

    from .models.modeling_blip2 import Blip2ForConditionalGeneration
    from .models.modeling_retrieval import Blip2ForImageTextRetrieval

    load_model = getattr(pipelines, "load_model", None)
    names = [f"_resolve_{part}" for part in ("processor", "tokenizer", "image_processor")]
    if not all(hasattr(pipelines, name) for name in ("load_model", *names)) or hasattr(load_model, "keeps_processors"):
        return
    writers = ("image-to-text", "visual-question-answering", "image-text-to-text")
    classes = dict.fromkeys(writers, Blip2ForConditionalGeneration)
    classes["zero-shot-image-classification"] = Blip2ForImageTextRetrieval
    # Set when a model is loaded by its name, and read after it in the same call of `pipeline`
    place: ContextVar[str | None] = ContextVar("place", default=None)

    @functools.wraps(load_model)
    def load(model, *args, **kwargs):
        task, config = kwargs.get("task"), kwargs.get("config")
        # The configuration of adapters is that of their base model
        has_adapters = task in classes and getattr(config, "name_or_path", model) != model
        is_ours = has_adapters and _has_own_processor(model, _of_adapters(kwargs))
        place.set(model if is_ours else None)
        if is_ours and config.model_type == "blip-2":
            kwargs["model_classes"] = (classes[task],)
        return load_model(model, *args, **kwargs)

    def keep(resolve):
        @functools.wraps(resolve)
        def resolve_part(*, model_name, hub_kwargs, **kwargs):
            if model_name is not None and place.get() is not None:
                model_name, hub_kwargs = place.get(), hub_kwargs | _of_adapters(hub_kwargs)
            return resolve(model_name=model_name, hub_kwargs=hub_kwargs, **kwargs)

        return resolve_part

    load.keeps_processors = True
    pipelines.load_model = load
    for name in names:
        setattr(pipelines, name, keep(getattr(pipelines, name)))


def _of_adapters(hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with which adapters are found: their revision is what was asked for, if anything was."""
    kept = {name: hub_kwargs[name] for name in ("token", "local_files_only") if name in hub_kwargs}
    return kept | {"revision": getattr(hub_kwargs.get("revision"), "initial", None), "_commit_hash": None}


def _has_own_processor(name: str, hub_kwargs: dict[str, Any]) -> bool:
    """Return whether a folder or repository has adapters of PEFT with a processor of this library."""
    from transformers.utils import PROCESSOR_NAME, cached_file

    from .models.processing_blip2 import Blip2Processor

    try:
        file = cached_file(name, PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    except OSError:
        return False
    return file is not None and json.loads(Path(file).read_text()).get("processor_class") == Blip2Processor.__name__


def _keep_task_names(tasks: Collection[str]):
    """Keep transformers 5.23 from renaming one of the tasks, and refusing the other, before it asks the registry."""
    from transformers import pipelines

    resolve = getattr(pipelines, "_resolve_deprecated_task", None)
    if resolve is None or getattr(resolve, "keeps_blip2_hf_tasks", False):
        return

    @functools.wraps(resolve)
    def resolve_deprecated_task(task, *args, **kwargs):
        return task if task in tasks else resolve(task, *args, **kwargs)

    resolve_deprecated_task.keeps_blip2_hf_tasks = True
    pipelines._resolve_deprecated_task = resolve_deprecated_task


REGISTRATIONS = {
    "transformers.models.auto.configuration_auto": register_configs,
    "transformers.models.auto.modeling_auto": register_models,
    "transformers.models.auto.processing_auto": register_processor,
    "transformers.pipelines": register_pipelines,
}
