"""A module of sentence-transformers: texts as one vector and images as one for each query, for late interaction."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sentence_transformers.base.modality import infer_batch_modality, raise_unsupported_modality_error
from sentence_transformers.base.modules import InputModule

from .models.modeling_image_text import Blip2ImageTextPreTrainedModel
from .models.modeling_retrieval import Blip2ForImageTextRetrieval
from .models.processing_blip2 import Blip2Processor


class ImageTextVectors(InputModule):
    r"""
    The features of a [`Blip2ForImageTextRetrieval`], or of a [`Blip2ForPreTraining`], as the embeddings of a
    `sentence_transformers.MultiVectorEncoder`. The MaxSim of a text and an image is the model's `logits_per_text`: the
    highest cosine of the text and the image's queries (section 3.2).

    Texts are the queries of a search and images its documents. The other way round, MaxSim adds up the cosines of all
    queries of an image, for which the model was not trained.

    Args:
        model ([`Blip2ForImageTextRetrieval`] or [`Blip2ForPreTraining`]):
            The model.
        processor ([`Blip2Processor`]):
            Its processor, with the Q-Former's tokenizer as `tokenizer`.

    Example:

    ```python
    >>> from sentence_transformers import MultiVectorEncoder

    >>> encoder = MultiVectorEncoder("retriever", trust_remote_code=True)  # a folder that save_pretrained wrote
    >>> texts = encoder.encode_query(["a cat on a sofa"])
    >>> images = encoder.encode_document(["cat.jpg", "dog.jpg"])
    >>> scores = encoder.similarity(texts, images)  # (1, 2)
    ```"""

    def __init__(self, model: Blip2ImageTextPreTrainedModel, processor: Blip2Processor):
        super().__init__()
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer

    @property
    def modalities(self) -> list:
        return ["text", "image"]

    @property
    def max_seq_length(self) -> int:
        return self.model.config.qformer_config.max_position_embeddings

    def get_embedding_dimension(self) -> int:
        return self.model.config.image_text_hidden_size

    def preprocess(self, inputs: Sequence, prompt: str | None = None, **kwargs) -> dict[str, Any]:
        """
        Make inputs of the model.

        Args:
            inputs (sequence of `str`, of images, or of `{"text": str}` or `{"image": ...}`):
                Texts alone or images alone. A string that is a URL or a path of an image stands for the image.
            prompt (`str`, *optional*):
                What is put in front of texts.
            kwargs:
                Not used: what sentence-transformers gives to every module.

        Returns:
            `dict[str, torch.Tensor]`: `pixel_values`, or `input_ids` and `attention_mask`.

        Raises:
            ValueError: if the inputs are neither texts nor images, or a picture is not there.
        """
        modality = infer_batch_modality(inputs, self.modalities)
        if modality not in self.modalities:
            raise_unsupported_modality_error(inputs, modality, self.modalities, "BLIP-2 model for retrieval")
        plain = [value[modality] if isinstance(value, dict) else value for value in inputs]
        if modality == "image":
            return dict(self.processor(images=plain, return_tensors="pt"))
        options = {"padding": True, "truncation": True, "max_length": self.max_seq_length, "return_tensors": "pt"}
        for text in plain:
            # sentence-transformers takes the path of a picture that is not there for a text
            if len(text.split()) == 1 and Path(text).suffix.lower() in Image.registered_extensions():
                raise ValueError(
                    f"There is no picture {text}. Give a picture that is there, or a text of several words."
                )
        encoding = self.tokenizer(self._prepend_prompt(plain, prompt or ""), **options)
        return {name: encoding[name] for name in ("input_ids", "attention_mask")}

    def forward(self, features: dict[str, Any], **kwargs) -> dict[str, Any]:
        """
        Add features of texts or images.

        Args:
            features (`dict`):
                What [`~ImageTextVectors.preprocess`] returned.

        Returns:
            `dict`: `token_embeddings` of shape `(batch_size, vectors, image_text_hidden_size)`, of length 1 each, and
            `attention_mask` of shape `(batch_size, vectors)`. A text has one vector, an image as many as the model has
            queries.
        """
        pixel_values, input_ids = features.pop("pixel_values", None), features.pop("input_ids", None)
        if pixel_values is not None:
            vectors = self.model.get_image_features(pixel_values).pooler_output
        else:
            vectors = self.model.get_text_features(input_ids, features["attention_mask"]).pooler_output[:, None]
        mask = torch.ones(vectors.shape[:2], dtype=torch.long, device=vectors.device)
        return features | {"token_embeddings": vectors, "attention_mask": mask}

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ) -> "ImageTextVectors":
        """Load model and processor, as sentence-transformers asks each module to."""
        place = {"subfolder": subfolder, "token": token, "cache_dir": cache_folder, "revision": revision}
        place |= {"local_files_only": local_files_only}
        place = {name: value for name, value in place.items() if value is not None}
        model = Blip2ForImageTextRetrieval.from_pretrained(model_name_or_path, **place, **(model_kwargs or {}))
        processor = Blip2Processor.from_pretrained(model_name_or_path, **place, **(processor_kwargs or {}))
        return cls(model, processor)

    def save(self, output_path: str | os.PathLike, *args, **kwargs):
        """Write model and processor."""
        self.model.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)


__all__ = ["ImageTextVectors"]
