# Copyright 2026 The blip2-hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The tasks "image-to-text" and "visual-question-answering" of transformers 4, on transformers 5."""

import copy
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import PROCESSOR_MAPPING
from transformers import pipelines as transformers_pipelines
from transformers.pipelines.base import Pipeline
from transformers.utils import logging

from ._hub_mixin import HubMixin
from .configuration_blip2 import public_class_name
from .generation_presets import GenerationPreset, generation_preset
from .image_loading import load_image_for
from .processing_blip2 import learned_prompt


logger = logging.get_logger(__name__)

_BLIP2 = ("blip2", "blip-2")  # ours and transformers' own
_DEFAULT_MAX_NEW_TOKENS = 256  # as in transformers 4


@dataclass
class _Item:
    """An image to caption or to ask about, and its name in errors."""

    image: Any
    question: str = ""
    name: str | None = None


def _image_item(image: Any, name: str | None) -> _Item:
    return _Item(image, name=name)


def _record_item(record: Any, name: str | None) -> _Item:
    if not isinstance(record, Mapping) or not {"image", "question"} <= set(record):
        found = f"the keys {sorted(map(str, record))}" if isinstance(record, Mapping) else type(record).__name__
        raise ValueError(
            f"{name or 'the input'}: visual question answering needs an image and a question, got {found}. Call "
            "pipe(image=..., question=...) or pipe({'image': ..., 'question': ...})"
        )
    if not isinstance(record["question"], str):
        raise ValueError(f"{name or 'the input'}: the question is {record['question']!r}; a string was expected")
    return _Item(record["image"], record["question"], name)


class _Items(Dataset):
    """A sequence or map-style dataset whose entries become items when they are read."""

    def __init__(self, entries: Sequence | Dataset, make: Callable[[Any, str], _Item]):
        self.entries = entries
        self.make = make

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> _Item:
        return self.make(self.entries[index], f"image {index + 1} of {len(self)}")


class _ImagesTimesQuestions(Dataset):
    """Every question about every image, in transformers 4's order: the first question about all images first."""

    def __init__(self, images: Sequence | Dataset, questions: Sequence[str]):
        self.images = images
        self.questions = questions

    def __len__(self) -> int:
        return len(self.images) * len(self.questions)

    def __getitem__(self, index: int) -> _Item:
        question, image = divmod(index, len(self.images))
        name = f"image {image + 1} of {len(self.images)}"
        return _Item(self.images[image], self.questions[question], name)


def _is_stream(inputs: Any) -> bool:
    return isinstance(inputs, (Iterator, IterableDataset)) and not isinstance(inputs, io.IOBase)


def _is_sequence(inputs: Any) -> bool:
    return isinstance(inputs, (Sequence, Dataset)) and not isinstance(inputs, (str, bytes, bytearray, memoryview))


class _ImageTextPipeline(HubMixin, Pipeline):
    """Base class of both pipelines: encodes an image with or without a text, batches, generates, decodes new text."""

    _load_processor = None
    _load_tokenizer = None
    _load_image_processor = None
    _load_feature_extractor = False
    _load_video_processor = False

    task_name: str

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_type = self.model.config.model_type
        self._complete_processor()

    def _complete_processor(self):
        """Make the model's processor if only a tokenizer and an image processor were given or found."""
        if self.processor is not None:
            self.tokenizer, self.image_processor = self.processor.tokenizer, self.processor.image_processor
        if self.tokenizer is None or self.image_processor is None:
            raise ValueError(
                f"the {self.task_name} pipeline needs a processor, or a tokenizer and an image processor. None came "
                "with the model: pass processor=..., or tokenizer=... and image_processor=..."
            )
        is_blip2 = self.model_type in _BLIP2
        if self.processor is not None and not (is_blip2 and self.processor.num_query_tokens is None):
            return
        if type(self.model.config) in PROCESSOR_MAPPING:
            parts = {"image_processor": self.image_processor, "tokenizer": self.tokenizer}
            if is_blip2 and self.model.config.image_token_index is not None:
                # processors saved before transformers 4.46 do not know how many placeholders an image needs
                parts["num_query_tokens"] = self.model.config.num_query_tokens
            if self.model_type == "blip2":
                parts["is_encoder_decoder"] = self.model.config.text_config.is_encoder_decoder
            self.processor = PROCESSOR_MAPPING[type(self.model.config)](**parts)

    @classmethod
    def register_for_auto_class(cls):
        """
        Make `save_pretrained` and `push_to_hub` of this pipeline write its code next to the model, so that
        `pipeline(..., trust_remote_code=True)` works without this package.
        """
        cls._registered_impl = {cls.task_name: transformers_pipelines.PIPELINE_REGISTRY.supported_tasks[cls.task_name]}

    def save_pretrained(self, save_directory, with_code: bool = False, **kwargs):
        """
        Save the model and its processor.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder to save to, which is created if it does not exist.
            with_code (`bool`, *optional*, defaults to `False`):
                Whether to put the code next to them, so that `pipeline(..., trust_remote_code=True)` works without
                this package, and a model card if there is none.
            kwargs (`dict`, *optional*):
                Passed to the `save_pretrained` of the parts.
        """
        super().save_pretrained(save_directory, with_code=False, **kwargs)
        if self.processor is not None:
            self.processor.save_pretrained(save_directory, **kwargs)
        if with_code:
            self.write_code(save_directory)

    def _run(self, inputs: Any, make: Callable[[Any, str | None], _Item], **kwargs):
        """Run one input, a sequence (returns a list), or a stream or dataset (returns an iterator)."""
        if _is_stream(inputs):
            items = (make(entry, f"image {index}") for index, entry in enumerate(inputs, start=1))
            return super().__call__(items, **kwargs)
        if isinstance(inputs, Dataset):
            return super().__call__(_Items(inputs, make), **kwargs)
        if _is_sequence(inputs):
            return list(super().__call__(_Items(inputs, make), **kwargs))
        return super().__call__(make(inputs, None), **kwargs)

    def _load(self, item: _Item, timeout: float | None) -> Any:
        return load_image_for(self.image_processor, item.image, item.name, timeout)

    def _encode(self, image: Any, text: str | None, **text_kwargs) -> dict[str, torch.Tensor]:
        """Encode one image and its text as inputs of the model, tensors with a batch dimension of 1."""
        if self.model_type in _BLIP2 and text is None:
            # the tokenizer knows what an empty text begins with; generate() could only guess
            text = ""
        if text is None:
            encode = self.image_processor if self.processor is None else self.processor
            encoding = encode(images=image, return_tensors="pt")
        elif self.model_type == "git":
            # the text is to be continued, so no [SEP] may follow it
            ids = self.tokenizer(text, add_special_tokens=False, **text_kwargs).input_ids
            encoding = self.image_processor(images=image, return_tensors="pt")
            encoding["input_ids"] = torch.tensor([[self.tokenizer.cls_token_id, *ids]])
        elif self.model_type == "vision-encoder-decoder":
            raise ValueError(f"Model type {self.model_type} does not support conditional text generation")
        elif self.processor is None:
            encoding = self.image_processor(images=image, return_tensors="pt")
            encoding.update(self.tokenizer(text, return_tensors="pt", **text_kwargs))
        else:
            encoding = self.processor(images=image, text=text, return_tensors="pt", **text_kwargs)
        return dict(encoding.to(self.dtype))

    def _merge(self, encodings: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Merge encodings of single items into one batch, with padding if they differ in size."""
        is_decoder_only = self.model_type in _BLIP2 and not self.model.config.text_config.is_encoder_decoder
        batch = {}
        for key in encodings[0]:
            # a decoder continues from the last token, which must not be padding
            is_left = is_decoder_only and key in ("input_ids", "attention_mask", "token_type_ids")
            value = self._pad_token_id if key in ("input_ids", "decoder_input_ids") else 0
            value = -100 if key == "candidate_labels" else value
            batch[key] = _stack([encoding[key] for encoding in encodings], value, is_left)
        return batch

    @property
    def _pad_token_id(self) -> int:
        return 0 if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs) -> dict[str, torch.Tensor]:
        encodings = model_inputs["encodings"]
        # the base class collates to a list, but leaves a batch of one as it is
        encodings = encodings if isinstance(encodings, list) else [encodings]
        if not self.model.can_generate():
            if generate_kwargs:
                raise TypeError(
                    f"{public_class_name(self.model)} does not generate and takes no {sorted(generate_kwargs)}"
                )
            return {"logits": self.model(**self._merge(encodings)).logits}
        if "candidate_labels" in encodings[0]:
            # Settings of generation that the pipeline was made with have no effect
            kwargs = {name: value for name, value in generate_kwargs.items() if name == "normalization"}
            return {"scores": self.model.score_texts(**self._merge(encodings), **kwargs)}
        lengths = {encoding["input_ids"].shape[1] for encoding in encodings if "input_ids" in encoding}
        # other models than BLIP-2 read the padding of a prompt as if it were text
        together = self.model_type in _BLIP2 or len(lengths) <= 1
        groups = [encodings] if together else [[encoding] for encoding in encodings]
        sequences = [self._generate(group, generate_kwargs) for group in groups]
        return {"sequences": _stack(sequences, self._pad_token_id, is_left=False)}

    def _generate(self, encodings: list[dict[str, torch.Tensor]], generate_kwargs: dict[str, Any]) -> torch.Tensor:
        """Return the new tokens of a batch, of shape `(batch_size, num_return_sequences, new_tokens)`."""
        inputs = self._merge(encodings)
        output = self.model.generate(**inputs, **self._with_default_length(generate_kwargs))
        prompt = inputs.get("input_ids", inputs.get("decoder_input_ids"))
        if prompt is not None:
            # BLIP leaves out the [SEP] at the end of the prompt
            output = _without_prompt(output, prompt[:, :-1] if self.model_type == "blip" else prompt)
        return output.reshape(len(encodings), -1, output.shape[-1])

    def _with_default_length(self, generate_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Add a length limit if neither the caller nor the model sets one; the output is always token ids."""
        config = generate_kwargs.get("generation_config")
        is_set = self.model.generation_config.to_diff_dict() | generate_kwargs
        added: dict[str, Any] = {"return_dict_in_generate": False}
        if not {"max_new_tokens", "max_length"} & (is_set | (config.to_diff_dict() if config else {})).keys():
            added["max_new_tokens"] = _DEFAULT_MAX_NEW_TOKENS
        if config is None:
            return generate_kwargs | added
        # generate() deprecates a config together with single parameters
        config = copy.deepcopy(config)
        config.update(**added)
        return generate_kwargs | {"generation_config": config}

    def _preset(self, preset: str | GenerationPreset, asks: bool) -> GenerationPreset:
        settings = generation_preset(preset, self.model.config) if isinstance(preset, str) else preset
        if settings.asks != asks:
            kind = "asks a question" if settings.asks else "asks none"
            raise ValueError(f"The preset {settings.name!r} {kind}: it does not fit the {self.task_name} pipeline.")
        return settings

    def _decode(self, sequences: torch.Tensor) -> list[str]:
        texts = self.tokenizer.batch_decode(sequences.flatten(0, 1), skip_special_tokens=True)
        return [text.strip() for text in texts]


def _given(params: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}


def _generate_params(max_new_tokens: int | None, generate_kwargs: dict | None, others: dict) -> dict[str, Any]:
    params = others if max_new_tokens is None else others | {"max_new_tokens": max_new_tokens}
    generate_kwargs = generate_kwargs or {}
    twice = sorted(params.keys() & generate_kwargs.keys())
    if twice:
        raise ValueError(f"{twice} given both as an argument and inside `generate_kwargs`: give each of them once")
    return params | generate_kwargs


def _with_preset(
    preset: dict[str, Any], max_new_tokens: int | None, generate_kwargs: dict | None, others: dict
) -> dict[str, Any]:
    """Return `others` with the arguments of a preset that the call does not give itself."""
    given = others | (generate_kwargs or {}) | ({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens})
    kept = {name: value for name, value in preset.items() if name not in given}
    if "min_new_tokens" in kept and "max_new_tokens" in given:
        kept["min_new_tokens"] = min(kept["min_new_tokens"], given["max_new_tokens"])
    return kept | others


def _stack(tensors: list[torch.Tensor], value: int, is_left: bool) -> torch.Tensor:
    """Join tensors of shape `(batch_size, ...)`, padded at the end, or at the start of dimension 1."""
    if len(tensors) == 1:
        return tensors[0]
    sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    stacked = tensors[0].new_full((sum(len(tensor) for tensor in tensors), *sizes), value)
    row = 0
    for tensor in tensors:
        spans = [slice(row, row + len(tensor)), *map(slice, tensor.shape[1:])]
        if is_left:
            spans[1] = slice(sizes[0] - tensor.shape[1], None)
        stacked[tuple(spans)] = tensor
        row += len(tensor)
    return stacked


def _without_prompt(output: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """
    Return the new tokens of what `generate` returns: decoder-only models put the prompt in front, while
    encoder-decoders, which may start with a token of their own, do not.
    """
    prompt = prompt.repeat_interleave(len(output) // len(prompt), dim=0)
    for start in (0, 1):
        end = start + prompt.shape[1]
        if output.shape[1] >= end and torch.equal(output[:, start:end], prompt):
            return output[:, end:]
    return output


class ImageToTextPipeline(_ImageTextPipeline):
    """
    Captions images: the `"image-to-text"` pipeline of transformers 4, for BLIP-2 and every other model of
    `AutoModelForImageTextToText` that needs no chat (BLIP, GIT, Pix2Struct, VisionEncoderDecoder, ...).

    Returns the new text only, without the prompt and stripped of white space. If neither the call nor the model's
    generation config limits the length, `max_new_tokens` is 256.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A model with `generate`.
        processor ([`~transformers.ProcessorMixin`], *optional*):
            The model's processor. It comes before `tokenizer` and `image_processor`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the language model, if no processor is given.
        image_processor ([`~transformers.BaseImageProcessor`], *optional*):
            Image processor, if no processor is given.
        kwargs (`dict`, *optional*):
            `device` and the other arguments of [`~transformers.Pipeline`], and defaults for the arguments of a call.

    Example:

    ```python
    >>> import blip2_hf
    >>> from transformers import pipeline

    >>> captioner = pipeline("image-to-text", model="Salesforce/blip2-opt-2.7b")
    >>> captioner("cat.jpg")
    [{'generated_text': 'a cat laying on a couch'}]
    ```
    """

    task_name = "image-to-text"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not self.model.can_generate():
            raise ValueError(f"{public_class_name(self.model)} cannot generate text, which image-to-text needs")

    def _sanitize_parameters(
        self,
        prompt=None,
        max_new_tokens=None,
        generate_kwargs=None,
        timeout=None,
        preset=None,
        **generation_params,
    ):
        if preset is not None:
            settings = self._preset(preset, asks=False)
            prompt = settings.prompt if prompt is None else prompt
            generation_params = _with_preset(
                settings.generate_kwargs, max_new_tokens, generate_kwargs, generation_params
            )
        preprocess_params = {"prompt": prompt, "timeout": timeout}
        preprocess_params = {key: value for key, value in preprocess_params.items() if value is not None}
        return preprocess_params, _generate_params(max_new_tokens, generate_kwargs, generation_params), {}

    def __call__(self, inputs: Any = None, images: Any = None, **kwargs):
        """
        Caption the image or images.

        Args:
            inputs (an image, list, dataset or generator of images):
                Anything that [`~blip2_hf.load_image`] reads: a path, URL, base64 string, PIL image,
                array, tensor, ...
            images (same as `inputs`, *optional*):
                Another name for `inputs`.
            prompt (`str`, *optional*):
                Text that the model continues. Without it the processor's `prompt`, if it has one.
            preset (`str` or [`~generation_presets.GenerationPreset`], *optional*):
                Settings of the paper by name, `"caption"` or `"nocaps"`, or settings of one's own
                (see [`~generation_presets.generation_preset`]). Arguments of the call take precedence.
            max_new_tokens (`int`, *optional*):
                The most tokens to generate.
            generate_kwargs (`dict`, *optional*):
                Arguments of `generate`. They can also be given to the call itself.
            timeout (`float`, *optional*, defaults to 30.0):
                Seconds to wait for an image from a URL.
            batch_size (`int`, *optional*, defaults to 1):
                Number of images that are captioned at a time.

        Returns:
            `list[dict]` for one image, `list[list[dict]]` for a list, an iterator of `list[dict]` for a dataset or
            generator: a dict for each of the `num_return_sequences` captions, with the key **generated_text** (`str`).
        """
        if (inputs is None) == (images is None):
            raise ValueError("Cannot call the image-to-text pipeline with none or both of `inputs` and `images`")
        return self._run(images if inputs is None else inputs, _image_item, **kwargs)

    def preprocess(self, item: _Item, prompt: str | None = None, timeout: float = 30.0) -> dict[str, Any]:
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(f"the prompt is of type {type(prompt).__name__}; a single string was expected")
        prompt = learned_prompt(self.processor) if prompt is None else prompt
        return {"encodings": self._encode(self._load(item, timeout), prompt)}

    def postprocess(self, model_outputs: dict[str, torch.Tensor]) -> list[dict[str, str]]:
        return [{"generated_text": text} for text in self._decode(model_outputs["sequences"])]


class VisualQuestionAnsweringPipeline(_ImageTextPipeline):
    """
    Answers questions about images: the `"visual-question-answering"` pipeline of transformers 4, for BLIP-2, for other
    models that generate the answer (BLIP, GIT, ...), and for those that choose among known answers (ViLT).

    BLIP-2 is asked with the `prompt` of its processor or, without one, with the paper's, `"Question: {} Answer:"`, or
    `"Question: {} Short answer:"` if the language model is an encoder-decoder; other models get the bare question.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A model with `generate`, or one whose logits are over `config.id2label`.
        processor ([`~transformers.ProcessorMixin`], *optional*):
            The model's processor. It comes before `tokenizer` and `image_processor`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the questions, if no processor is given.
        image_processor ([`~transformers.BaseImageProcessor`], *optional*):
            Image processor, if no processor is given.
        kwargs (`dict`, *optional*):
            `device` and the other arguments of [`~transformers.Pipeline`], and defaults for the arguments of a call.

    Example:

    ```python
    >>> import blip2_hf
    >>> from transformers import pipeline

    >>> oracle = pipeline("visual-question-answering", model="Salesforce/blip2-flan-t5-xl")
    >>> oracle(image="cat.jpg", question="What is the animal doing?")
    [{'answer': 'sleeping'}]
    ```
    """

    task_name = "visual-question-answering"

    def _sanitize_parameters(
        self,
        top_k=None,
        padding=None,
        truncation=None,
        timeout=None,
        prompt_template=None,
        candidates=None,
        normalization=None,
        max_new_tokens=None,
        generate_kwargs=None,
        preset=None,
        **generation_params,
    ):
        if candidates is not None:
            self._check_candidates(candidates, max_new_tokens, generate_kwargs, preset, generation_params)
        elif normalization is not None:
            raise ValueError("`normalization` is for scores of `candidates`, which were not given")
        if preset is not None:
            settings = self._preset(preset, asks=True)
            prompt_template = settings.prompt if prompt_template is None else prompt_template
            generation_params = _with_preset(
                settings.generate_kwargs, max_new_tokens, generate_kwargs, generation_params
            )
        preprocess_params = {
            "padding": padding,
            "truncation": truncation,
            "timeout": timeout,
            "prompt_template": prompt_template,
            "candidates": candidates,
        }
        postprocess_params = {"top_k": top_k, "candidates": candidates}
        forward_params = _generate_params(max_new_tokens, generate_kwargs, generation_params)
        forward_params |= {} if normalization is None else {"normalization": normalization}
        return _given(preprocess_params), forward_params, _given(postprocess_params)

    def _check_candidates(self, candidates, max_new_tokens, generate_kwargs, preset, generation_params):
        if self.model.config.model_type != "blip2":
            name, theirs = public_class_name(self.model), self.model.config.model_type == "blip-2"
            raise ValueError(
                f"{name}{' of transformers' if theirs else ''} scores no candidates: give the pipeline a model of "
                "blip2_hf and its processor, model=Blip2ForConditionalGeneration.from_pretrained(...) and "
                "processor=Blip2Processor.from_pretrained(...)"
            )
        generation = [*(generate_kwargs or {}), *generation_params]
        generation += [name for name, value in (("max_new_tokens", max_new_tokens), ("preset", preset)) if value]
        if generation:
            raise ValueError(f"{sorted(generation)} have no effect on `candidates`, because nothing is generated")
        is_list = isinstance(candidates, (list, tuple)) and all(isinstance(text, str) for text in candidates)
        if not is_list or len(set(candidates)) < max(2, len(candidates)):
            raise ValueError(f"`candidates` is {candidates!r}; a list of at least two different texts was expected")

    def __call__(self, image: Any = None, question: str | Sequence[str] | None = None, **kwargs):
        """
        Answer the question or questions about the image or images. A single image is used for every question, a
        single question for every image; several of both give every pair, the first question about all images first.

        Args:
            image (an image, list, dataset or generator of images, or `{"image": ..., "question": ...}` records):
                Anything that [`~blip2_hf.load_image`] reads. If `question` is not given, records with
                the image and the question: one, a list, a dataset or a generator.
            question (`str` or `list[str]`, *optional*):
                The question or questions.
            candidates (`list[str]`, *optional*):
                Answers to choose from. They are scored ([`~Blip2ForConditionalGeneration.score_texts`]), and nothing
                is generated.
            normalization (`str`, *optional*, defaults to `"sum"`):
                How candidates of different lengths compare: `"sum"`, `"mean"` or `"relative"`.
            top_k (`int`, *optional*):
                Number of answers to return: 5 by default if the model chooses among known answers, all if `candidates`
                are given. If an answer is generated, it has no effect.
            prompt_template (`str`, *optional*):
                The prompt, with `{}` in place of the question. `"{}"` asks the bare question.
            preset (`str` or [`~generation_presets.GenerationPreset`], *optional*):
                Settings of the paper by name, `"vqa"` or `"vqa-finetuned"`, or settings of one's own
                (see [`~generation_presets.generation_preset`]). Arguments of the call take precedence.
            padding (`bool` or `str`, *optional*, defaults to `False`):
                Padding of the tokenizer.
            truncation (`bool` or `str`, *optional*, defaults to `False`):
                Truncation of the tokenizer.
            timeout (`float`, *optional*, defaults to 30.0):
                Seconds to wait for an image from a URL.
            max_new_tokens (`int`, *optional*):
                The most tokens to generate.
            generate_kwargs (`dict`, *optional*):
                Arguments of `generate`. They can also be given to the call itself.
            batch_size (`int`, *optional*, defaults to 1):
                Number of questions that are answered at a time.

        Returns:
            `list[dict]` for one question about one image, `list[list[dict]]` for several, an iterator of `list[dict]`
            for a dataset of records or a generator. The keys are **answer** (`str`) and, if the model chooses,
            **score** (`float`). The best is the first. The scores of candidates are their probabilities among each
            other, which sum to 1.
        """
        if image is None:
            raise ValueError("Cannot call the visual-question-answering pipeline without an image: give one")
        if question is None:
            return self._run(image, _record_item, **kwargs)
        questions = [question] if isinstance(question, str) else question
        if not _is_sequence(questions) or not all(isinstance(entry, str) for entry in questions):
            raise ValueError(f"`question` is {question!r}; a string or a list of strings was expected")
        if _is_stream(image):
            if not isinstance(question, str):
                raise ValueError("A generator of images can be read once, so that it takes one question: give a list")
            records = ({"image": entry, "question": question} for entry in image)
            return self._run(records, _record_item, **kwargs)
        if not _is_sequence(image) and isinstance(question, str):
            return self._run({"image": image, "question": question}, _record_item, **kwargs)
        images = image if _is_sequence(image) else [image]
        return list(Pipeline.__call__(self, _ImagesTimesQuestions(images, questions), **kwargs))

    def preprocess(
        self,
        item: _Item,
        padding: bool | str = False,
        truncation: bool | str = False,
        timeout: float = 30.0,
        prompt_template: str | None = None,
        candidates: list[str] | None = None,
    ) -> dict[str, Any]:
        template = self._default_template() if prompt_template is None else prompt_template
        if "{}" not in template:
            raise ValueError(f"`prompt_template` needs {{}} where the question goes, got {template!r}")
        prompt = template.replace("{}", item.question)
        options: dict[str, Any] = {"padding": padding, "truncation": truncation}
        if candidates is not None:
            options["candidates"] = candidates
        return {"encodings": self._encode(self._load(item, timeout), prompt, **options)}

    def _default_template(self) -> str:
        if (prompt := learned_prompt(self.processor, asks=True)) is not None:
            return prompt
        return generation_preset("vqa", self.model.config).prompt if self.model_type in _BLIP2 else "{}"

    def postprocess(
        self, model_outputs: dict[str, torch.Tensor], top_k: int | None = None, candidates: list[str] | None = None
    ) -> list[dict[str, Any]]:
        if "sequences" in model_outputs:
            return [{"answer": text} for text in self._decode(model_outputs["sequences"])]
        if candidates is not None:
            scores, labels = model_outputs["scores"][0].softmax(dim=-1), dict(enumerate(candidates))
            top_k = len(labels) if top_k is None else top_k
        else:
            scores, labels = model_outputs["logits"][0].float().sigmoid(), dict(self.model.config.id2label)
            top_k = 5 if top_k is None else top_k
        best = scores.topk(min(top_k, len(labels)))
        return [
            {"score": score, "answer": labels[index]}
            for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


__all__ = ["ImageToTextPipeline", "VisualQuestionAnsweringPipeline"]
