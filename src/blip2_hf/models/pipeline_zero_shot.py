"""The task "zero-shot-image-classification" of transformers, for BLIP-2 too."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Blip2ForImageTextRetrieval as TransformersBlip2ForImageTextRetrieval
from transformers import pipelines as transformers_pipelines

from .configuration_blip2 import public_class_name
from .image_loading import load_image_for
from .losses import image_text_similarity


_MODEL_TYPE = "blip2"
_PAIRS_AT_A_TIME = 128


@dataclass
class _Labels:
    """Labels as tokens, and as features with which images are compared."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    features: torch.Tensor


class ZeroShotImageClassificationPipeline(transformers_pipelines.ZeroShotImageClassificationPipeline):
    """
    The `"zero-shot-image-classification"` pipeline of transformers, for BLIP-2 too: which of the labels fits an image?
    For other models (CLIP, SigLIP, ...) it does what transformers' own does.

    With BLIP-2, labels are compared with images by contrast (ITC): the score is a softmax of cosines over the learned
    temperature, or over 0.07 for a checkpoint of transformers' own BLIP-2, which lacks it. Labels are read once a call
    for any number of images, and cut to the positions of the Q-Former.

    Args:
        model ([`Blip2ForImageTextRetrieval`], [`Blip2ForPreTraining`], or any that transformers' pipeline takes):
            The model. transformers' own `Blip2ForImageTextRetrieval` becomes ours, with the same weights.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the labels: the Q-Former's.
        image_processor ([`~transformers.BaseImageProcessor`]):
            Image processor.
        kwargs (`dict`, *optional*):
            `device` and the other arguments of [`~transformers.Pipeline`], and defaults for the arguments of a call.

    Raises:
        ValueError: if a BLIP-2 has not learned to compare images with texts.

    Example:

    ```python
    >>> import blip2_hf
    >>> from transformers import pipeline

    >>> classifier = pipeline("zero-shot-image-classification", model="stage1")
    >>> classifier("cat.jpg", candidate_labels=["cat", "dog", "bus"], hypothesis_template="a photo of a {}")
    [{'score': 0.97, 'label': 'cat'}, {'score': 0.02, 'label': 'dog'}, {'score': 0.01, 'label': 'bus'}]
    ```
    """

    def __init__(self, **kwargs):
        if isinstance(kwargs["model"], TransformersBlip2ForImageTextRetrieval):
            kwargs["model"] = _convert_from_transformers(kwargs["model"])
        super().__init__(**kwargs)
        if self._is_blip2:
            _check_has_learned_to_compare(self.model)

    @property
    def _is_blip2(self) -> bool:
        return self.model.config.model_type == _MODEL_TYPE

    def check_model_type(self, supported_models):
        # transformers' list has only its own models
        if not self._is_blip2:
            super().check_model_type(supported_models)

    def _sanitize_parameters(self, reranked=None, tokenizer_kwargs=None, labels=None, **kwargs):
        preprocess, forward, postprocess = super()._sanitize_parameters(tokenizer_kwargs=tokenizer_kwargs, **kwargs)
        if not self._is_blip2:
            if reranked is not None:
                raise ValueError(f"reranked is for BLIP-2: a {type(self.model).__name__} has no matching head.")
            return preprocess, forward, postprocess
        if tokenizer_kwargs is not None:
            preprocess["tokenizer_kwargs"] = tokenizer_kwargs
        given = {"reranked": reranked, "labels": labels}
        return preprocess, forward | {name: x for name, x in given.items() if x is not None}, postprocess

    def __call__(self, image: Any = None, candidate_labels: list[str] | None = None, **kwargs):
        """
        Score each label for the image or images.

        Args:
            image (an image, or a list, dataset or generator of images):
                With BLIP-2, anything that [`~blip2_hf.load_image`] reads.
            candidate_labels (`list[str]`, *optional*):
                The labels, if they were not given when the pipeline was made.
            images (same as `image`, *optional*):
                Another name for `image`.
            hypothesis_template (`str`, *optional*, defaults to `"This is a photo of {}."`):
                The text that a label is put into, in the place of `{}`.
            reranked (`bool`, *optional*, defaults to `False`):
                BLIP-2 alone: whether to add matching (ITM), which reads each image together with each label. The
                score is then the softmax of the logit of "match" plus the cosine, the paper's score for retrieval.
            tokenizer_kwargs (`dict`, *optional*):
                Arguments of the tokenizer.
            timeout (`float`, *optional*):
                Seconds that fetching an image from a URL may take. Without it 30, with other models for ever.
            batch_size (`int`, *optional*, defaults to 1):
                Number of images that the model takes at a time.

        Returns:
            `list[dict]` for an image, `list[list[dict]]` for a list, an iterator of `list[dict]` for a dataset or a
            generator: a dict for each label, the best first, with **score** (`float`) and **label** (`str`).

        Raises:
            ValueError: if there are no images or no labels, or the template has no place for them.
        """
        if "images" in kwargs:
            image = kwargs.pop("images")
        if candidate_labels is None:
            candidate_labels = self._preprocess_params.get("candidate_labels")
        if isinstance(candidate_labels, str) or not candidate_labels:
            raise ValueError(f"candidate_labels is {candidate_labels!r}: a list of one or more labels was expected.")
        if self._is_blip2:
            kwargs["labels"] = self._encode(
                **self._preprocess_params | kwargs | {"candidate_labels": candidate_labels}
            )
        return super().__call__(image, candidate_labels, **kwargs)

    def _encode(self, candidate_labels, hypothesis_template="This is a photo of {}.", tokenizer_kwargs=None, **_):
        if "{}" not in hypothesis_template:
            raise ValueError(f"hypothesis_template is {hypothesis_template!r}: put {{}} where the label goes.")
        texts = [hypothesis_template.replace("{}", label) for label in candidate_labels]
        limit = self.model.config.qformer_config.max_position_embeddings
        # A label that spells a special token, such as <image>, is text, as in training
        options = {"padding": True, "truncation": True, "max_length": limit, "split_special_tokens": True}
        options |= tokenizer_kwargs or {}
        tokens = self.tokenizer(texts, return_tensors="pt", **options)
        input_ids, attention_mask = (tokens[name].to(self.device) for name in ("input_ids", "attention_mask"))
        with torch.no_grad():
            features = self.model.get_text_features(input_ids, attention_mask).pooler_output
        return _Labels(input_ids, attention_mask, features)

    def preprocess(self, image, candidate_labels=None, timeout=None, **kwargs):
        if not self._is_blip2:
            return super().preprocess(image, candidate_labels=candidate_labels, timeout=timeout, **kwargs)
        picture = load_image_for(self.image_processor, image, timeout=30.0 if timeout is None else timeout)
        inputs = self.image_processor(images=[picture], return_tensors="pt").to(self.dtype)
        return {"pixel_values": inputs["pixel_values"], "candidate_labels": candidate_labels}

    def _forward(self, model_inputs, labels=None, reranked=False):
        if not self._is_blip2:
            return super()._forward(model_inputs)
        image_embeds = self.model.get_image_embeds(model_inputs["pixel_values"])
        image_features = self.model.get_image_features(image_embeds=image_embeds).pooler_output
        similarity = image_text_similarity(image_features, labels.features)
        logits = similarity + self._match(image_embeds, labels) if reranked else self.model.temperature(similarity)
        return {"candidate_labels": model_inputs["candidate_labels"], "logits": logits}

    def _match(self, image_embeds: torch.Tensor, labels: _Labels) -> torch.Tensor:
        """Return the logit of "match" of all pairs, of shape `(num_images, num_labels)`."""
        num_images = len(image_embeds)
        key_values = self.model.get_image_key_values(image_embeds)
        step = max(1, _PAIRS_AT_A_TIME // num_images)
        columns = []
        for start in range(0, len(labels.input_ids), step):
            texts = (tokens[start : start + step] for tokens in (labels.input_ids, labels.attention_mask))
            logits = self.model.get_matching_logits(*(tokens.repeat(num_images, 1) for tokens in texts), key_values)
            columns.append(logits[:, 1].view(num_images, -1))
        return torch.cat(columns, dim=1)


def _convert_from_transformers(model: TransformersBlip2ForImageTextRetrieval) -> Any:
    """Return our class with the same weights, and with the initial temperature."""
    from .modeling_retrieval import Blip2ForImageTextRetrieval

    if any(weight.is_meta or not weight.is_floating_point() for weight in model.parameters()):
        raise ValueError(
            "This Blip2ForImageTextRetrieval of transformers is quantised, or some of its weights are not in memory: "
            "give the pipeline what blip2_hf.Blip2ForImageTextRetrieval.from_pretrained loads."
        )
    dtype = model.vision_model.dtype  # not the model's own, which is that of the queries, float32
    ours = Blip2ForImageTextRetrieval.from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), dtype=dtype
    )
    ours.name_or_path = model.name_or_path
    return ours


def _check_has_learned_to_compare(model: Any):
    expected = "a Blip2ForImageTextRetrieval or a Blip2ForPreTraining"
    # By name, because each file of remote code has its own copy of the class
    if "Blip2ImageTextPreTrainedModel" not in [base.__name__ for base in type(model).__mro__]:
        raise ValueError(f"A {public_class_name(model)} does not compare images with texts: give {expected}.")
    for name in ("vision_projection", "text_projection", "itm_head"):
        bias = getattr(model, name).bias
        # Zeros are the initial values, which weights also have that a checkpoint lacks
        if not bias.is_meta and not bias.any():
            raise ValueError(
                f"{model.name_or_path or 'This model'} has not learned to compare images with texts: its {name} has "
                f"initial values. Give {expected} that has learned it."
            )


__all__ = ["ZeroShotImageClassificationPipeline"]
