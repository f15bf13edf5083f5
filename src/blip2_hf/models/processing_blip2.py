"""Processor of BLIP-2: images and text to the inputs of the models, and generated tokens back to text."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, ProcessorMixin, TextKwargs, VideosKwargs
from transformers.tokenization_utils_base import AddedToken

from ._hub_mixin import HubMixin
from .chat_messages import default_chat_template, is_default_chat_template, messages_to_text
from .generation_presets import preset_prompt
from .image_loading import load_image_for
from .text_encoding import Blip2TextEncodingMixin, repeat_each
from .video_loading import NUM_FRAMES, VIDEO_TOKEN, Video, list_videos, sample_frames


IMAGE_TOKEN = "<image>"
QFORMER_TOKENIZER = "qformer_tokenizer"
_OF_FRAMES = (  # settings that the image processor of a picture has too
    *("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    "do_convert_rgb",
)


class Blip2HfProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"return_token_type_ids": False}}


class Blip2HfProcessor(HubMixin, Blip2TextEncodingMixin, ProcessorMixin):
    r"""
    Wraps an image processor and the language model's tokenizer (and the Q-Former's, if it reads text). Known as
    `Blip2Processor`: the name of the class differs from transformers' own, which `AutoProcessor` would find first.

    `<image>` is added to the tokenizer as a special token, after all others, if it has none.

    Args:
        image_processor (`BaseImageProcessor`):
            The image processor of the vision tower.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the language model.
        qformer_tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer of a Q-Former that also reads the text.
        num_query_tokens (`int`, *optional*):
            Number of queries of an image, and of its placeholders. `None`: no placeholders, because the model puts the
            image in front. So it is in the first published checkpoints, whose `image_token_index` is `None` too.
        is_encoder_decoder (`bool`, *optional*):
            Whether the language model is an encoder-decoder: `text_target` is then not appended to `text`. If it is
            not given, `from_pretrained` looks into config.json; without one, a tokenizer that ends each text with
            the end token is taken for an encoder-decoder's.
        end_token_id (`int`, *optional*):
            Token id that ends a `text_target` of a decoder-only language model: the id at which generation stops.
            Defaults to the tokenizer's end token. `from_pretrained` looks into config.json, because BLIP-2 with OPT
            ends texts with a newline.
        prompt (`str`, *optional*):
            What the model was fine-tuned to go on from, such as `"a photo of"`, or `"Question: {} Answer:"` with `{}`
            in the place of the question. Pipelines and commands take it if no other prompt is given. The processor
            itself adds nothing to a text.
        frames_per_video (`int`, *optional*, defaults to 4):
            Frames of a video that the model reads, if a call does not say how many.

    Example:

    ```python
    >>> processor = Blip2Processor.from_pretrained(folder)
    >>> inputs = processor(images="cats.jpg", text="Question: how many cats are there? Answer:", return_tensors="pt")
    >>> batch = processor(images=pictures, text="a photo of", text_target=captions, return_tensors="pt")  # with labels
    ```"""

    valid_kwargs = ["num_query_tokens", "is_encoder_decoder", "end_token_id", "prompt", "frames_per_video"]
    valid_processor_kwargs = Blip2HfProcessorKwargs

    def __init__(
        self,
        image_processor,
        tokenizer,
        qformer_tokenizer=None,
        num_query_tokens: int | None = None,
        is_encoder_decoder: bool | None = None,
        end_token_id: int | None = None,
        chat_template: str | None = None,
        prompt: str | None = None,
        frames_per_video: int = NUM_FRAMES,
        **kwargs,
    ):
        image_token = getattr(tokenizer, "image_token", None) or IMAGE_TOKEN
        if image_token not in tokenizer.get_vocab() and VIDEO_TOKEN in tokenizer.get_vocab():
            # InstructBLIP-Video marks each query of each frame by this token
            image_token = VIDEO_TOKEN
        if image_token not in tokenizer.get_vocab():
            tokenizer.add_tokens([AddedToken(image_token, normalized=False, special=True)], special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.num_query_tokens = num_query_tokens
        self._ends_texts = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
        # A text that is to be continued does not end with the end token
        self.is_encoder_decoder = self._ends_texts if is_encoder_decoder is None else is_encoder_decoder
        self.end_token_id = tokenizer.eos_token_id if end_token_id is None else end_token_id
        self.qformer_tokenizer = qformer_tokenizer
        self.prompt = prompt
        self.frames_per_video = frames_per_video
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self._update_chat_template()

    def _update_chat_template(self):
        """
        Choose the template of chats, if none was given: that of the language model or, if it has none or the model has
        learned a `prompt`, one that writes such prompts. Processors of stage 1 and of retrieval have none.
        """
        own = self.tokenizer.chat_template
        if self.chat_template is not None and not is_default_chat_template(self.chat_template):
            return
        if own is not None and self.prompt is None and not is_default_chat_template(own):
            self.chat_template = own
        elif self._writes_text:
            # An encoder-decoder reads earlier answers, and its end token ends all that is read
            end = " " if self.is_encoder_decoder else self.tokenizer.decode([self.end_token_id])
            question = learned_prompt(self, asks=True) or preset_prompt("vqa", self.is_encoder_decoder)
            caption = learned_prompt(self) or ""
            self.chat_template = default_chat_template(question, caption, self.image_token, end)

    @classmethod
    def get_attributes(cls) -> list[str]:
        # Without the Q-Former's tokenizer, because ProcessorMixin knows no optional parts: saved and loaded here
        return ["image_processor", "tokenizer"]

    def to_dict(self) -> dict[str, Any]:
        qformer_tokenizer, self.qformer_tokenizer = self.qformer_tokenizer, None
        try:
            output = super().to_dict()
        finally:
            self.qformer_tokenizer = qformer_tokenizer
        output.pop(QFORMER_TOKENIZER, None)
        if self.prompt is None:
            output.pop("prompt", None)
        if self.frames_per_video == NUM_FRAMES:
            output.pop("frames_per_video", None)
        if qformer_tokenizer is not None:
            output[QFORMER_TOKENIZER] = QFORMER_TOKENIZER
        return output

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        push_to_hub: bool = False,
        transformers_compatible: bool = False,
        **kwargs,
    ) -> list[str]:
        r"""
        Save the processor, as [`~transformers.ProcessorMixin.save_pretrained`] does.

        Args:
            save_directory (`str` or `os.PathLike`):
                The folder.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Whether to push it to the Hub.
            transformers_compatible (`bool`, *optional*, defaults to `False`):
                Whether plain transformers is to load its own processor from the files.
            kwargs:
                Arguments of [`~transformers.ProcessorMixin.save_pretrained`], and `with_code` (`bool`, defaults to
                `False`): whether to put the code next to it, for `trust_remote_code=True`.

        Raises:
            ValueError: if `transformers_compatible` with `with_code` or `push_to_hub`.
        """
        if transformers_compatible:
            self._check_transformers_compatible(kwargs.pop("with_code", None), push_to_hub)
        self._update_chat_template()
        if self.qformer_tokenizer is not None:
            self.qformer_tokenizer.save_pretrained(os.path.join(save_directory, QFORMER_TOKENIZER))
        if not transformers_compatible:
            return super().save_pretrained(str(save_directory), push_to_hub=push_to_hub, **kwargs)
        files = super().save_pretrained(str(save_directory), with_code=False, **kwargs)
        for name in ("processor_config.json", "tokenizer_config.json"):
            path = Path(save_directory) / name
            content = json.loads(path.read_text()) | {"processor_class": "Blip2Processor"}
            for own in ("is_encoder_decoder", "end_token_id", "prompt"):
                content.pop(own, None)
            path.write_text(json.dumps(content, indent=2))
        return files

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        processor_dict = {} if processor_dict is None else processor_dict
        video_processor = processor_dict.pop("video_processor", None)
        if video_processor is None or "image_processor" in processor_dict:
            args = super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)
        else:  # of InstructBLIP-Video, which treats a frame as BLIP's treats a picture
            settings = {name: video_processor[name] for name in _OF_FRAMES if name in video_processor}
            tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
            args = [BlipImageProcessorPil(**settings), tokenizer]
            processor_dict.setdefault(QFORMER_TOKENIZER, QFORMER_TOKENIZER)
        if processor_dict.get("is_encoder_decoder") is None:
            # Files of transformers' own processor lack it, but its model's configuration has it
            try:
                config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
                if config.model_type == "instructblip":
                    processor_dict.setdefault(QFORMER_TOKENIZER, QFORMER_TOKENIZER)
                text_config = config.get_text_config(decoder=True)
                processor_dict["is_encoder_decoder"] = text_config.is_encoder_decoder
                if isinstance(text_config.eos_token_id, int):
                    processor_dict["end_token_id"] = text_config.eos_token_id
            except (OSError, ValueError):
                processor_dict.pop("is_encoder_decoder", None)
        subfolder = processor_dict.pop(QFORMER_TOKENIZER, None)
        if subfolder is not None:
            kwargs["subfolder"] = os.path.join(kwargs.get("subfolder", ""), subfolder)
            args.append(AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs))
        return args

    @property
    def model_input_names(self) -> list[str]:
        names = self.image_processor.model_input_names + self.tokenizer.model_input_names
        names = [name for name in names if name != "token_type_ids"]
        if self.qformer_tokenizer is not None:
            names += ["qformer_input_ids", "qformer_attention_mask"]
        return names

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        **kwargs,
    ) -> BatchFeature:
        r"""
        Prepare images, videos and texts for the models.

        Args:
            images (*optional*):
                An image, or a list of images, of any kind that [`~image_loading.load_image`] takes. For several images
                in a text, a list of lists. Floats lie in [0, 1], unless `do_rescale=False`, which leaves them as they
                are.
            text (`str` or `list[str]`, *optional*):
                Prompts. `<image>` marks the place of an image. Without such marks, each text has its image (or the
                images of its list) in front. A single text goes with every image.
            videos (*optional*):
                A video, or a list of videos, of any kind that [`~video_loading.sample_frames`] takes: files, arrays,
                lists of pictures. The frames of a video are images in a row. `<video>` marks their place in a text.
                Without such marks, each text has the frames of its video in front. Images and videos in one call need
                a mark each.
            num_frames (`int`, *optional*):
                Frames of each video, spread evenly. Defaults to `frames_per_video`. `do_sample_frames=False` takes all
                frames.
            text_target (`str` or `list[str]`, *optional*):
                Texts to learn after the prompts, returned as `labels`. For a decoder-only language model they are
                appended to the prompts, with the end token; prompts and images have the label -100.
            candidates (`list[str]` or `list[list[str]]`, *optional*):
                Texts to score after the prompts ([`~Blip2ForConditionalGeneration.score_texts`]): the same for all
                prompts, or a list for each. Returned as `candidate_labels`.
            end_candidates (`bool`, *optional*, defaults to `True`):
                Whether the end token belongs to a candidate. Without it, a candidate is scored as the beginning of a
                text, as LAVIS does for InstructBLIP with Vicuna.
            kwargs (`dict`):
                Arguments of the image processor and of the tokenizer. By default texts are padded to the longest, on
                the right with `text_target` or for an encoder-decoder, and on the left otherwise. `max_length`
                (with `truncation=True`) counts the tokens of text, not the placeholders; what is cut is the end of
                the text, never the end token.

        Returns:
            [`BatchFeature`]: `pixel_values` of shape `(num_images, channels, height, width)`, frames included;
            `input_ids` and `attention_mask` of shape `(batch_size, length)`; `labels`; `candidate_labels` of shape
            `(batch_size, num_candidates, candidate_length)`, with -100 at padding; `qformer_input_ids` and
            `qformer_attention_mask` of shape `(num_images, text_length)`, for a Q-Former that reads text. Images
            without text have an empty one: the tokens with which the language model's tokenizer begins each text, if
            there are any. Processors of stage 1 and of retrieval, whose tokenizer is BERT's, then return
            `pixel_values` alone.

        Raises:
            TypeError: if an argument is not known, or holds audio.
            ValueError: if there is nothing to process, or images, videos and texts do not match, or a processor of
                stage 1 or of retrieval is given videos, or `do_rescale=False` with images of 8 bits and a mean for
                images in [0, 1].
            ImageLoadError: if an image or a video can't be read; the message names it.
        """
        text_target = kwargs.pop("text_target", None)
        candidates, end_candidates = kwargs.pop("candidates", None), kwargs.pop("end_candidates", True)
        if images is None and videos is None and text is None and text_target is None:
            raise ValueError("You have to specify either images or text.")
        if candidates is not None and (text_target is not None or not self._writes_text):
            reason = "text_target was given too" if self._writes_text else "the model of this processor writes no text"
            raise ValueError(f"candidates are scored after a prompt, but {reason}. Leave out one of the two.")
        self._check_arguments(kwargs, videos)
        output_kwargs = self._merge_kwargs(
            Blip2HfProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        text_kwargs = output_kwargs["text_kwargs"]
        return_tensors = text_kwargs.pop("return_tensors", None)
        caller_side = kwargs.get("padding_side") or (kwargs.get("text_kwargs") or {}).get("padding_side")
        text_kwargs.pop("padding_side", None)  # the tokenizer's own, the same for training and generation
        if caller_side is not None:
            text_kwargs["padding_side"] = caller_side
        groups = None if images is None else _group(images)
        if videos is not None:
            frames = self._sample(list_videos(videos), **output_kwargs["videos_kwargs"])
            text, groups = self._place_frames(frames, text, groups)
        if text is None and self._writes_text:
            text = ""
        data: dict[str, Any] = {}
        if text is not None or text_target is not None:
            texts, targets = _texts(text, text_target, groups, self.image_token)
            counts = self._images_in_front(texts, groups)
            data |= self._encode(texts, targets, counts, text_kwargs)
            if candidates is not None:
                data["candidate_labels"] = self._encode_candidates(texts, candidates, end_candidates, text_kwargs)
            if self.qformer_tokenizer is not None:
                repeats = [count or text.count(self.image_token) for text, count in zip(texts, counts, strict=True)]
                data |= self._encode_instructions(texts, repeats if groups is not None else None, text_kwargs)
        if groups is not None:
            image_kwargs = output_kwargs["images_kwargs"] | {"return_tensors": return_tensors}
            image_kwargs.pop("input_data_format", None)  # loaded images have channels first, or are PIL images
            data |= self.image_processor(
                self._load([i for group in groups for i in group], image_kwargs), **image_kwargs
            )
        if return_tensors is not None:
            data |= {name: np.zeros((len(rows), 0), dtype=np.int64) for name, rows in data.items() if _is_empty(rows)}
        return BatchFeature(data, tensor_type=return_tensors)

    def _check_arguments(self, kwargs: dict[str, Any], videos: Any):
        """Refuse arguments that ProcessorMixin would ignore."""
        # Generic callers give None for what there is none of, and options of videos to all processors
        given = {name for name, value in kwargs.items() if value is not None or name != "audio"}
        known = {"common_kwargs", "num_frames", "do_sample_frames", "videos_kwargs"}
        if videos is not None:
            given |= (kwargs.get("videos_kwargs") or {}).keys()
        options = [TextKwargs, ImagesKwargs, Blip2HfProcessorKwargs, self.image_processor.valid_kwargs]
        for kind in options if videos is not None else [*options, VideosKwargs]:
            known |= kind.__annotations__.keys()
        if unknown := sorted(given - known):
            raise TypeError(
                f"Blip2Processor was given {', '.join(unknown)}, and takes images, text, videos, num_frames, "
                "text_target, candidates and arguments of its image processor and tokenizer. Leave out what it does "
                "not know."
            )

    def _sample(
        self, videos: list, num_frames: int | None = None, do_sample_frames: bool = True, **kwargs
    ) -> list[list]:
        """Return the frames of each video."""
        if not self._writes_text:
            raise ValueError(
                "Videos go with a language model, which reads their frames in a row. Give this processor the frames "
                "as images: each is compared with texts on its own."
            )
        count = None if do_sample_frames is False else self.frames_per_video if num_frames is None else num_frames
        names = [f"video {number} of {len(videos)}" for number in range(1, len(videos) + 1)]
        return [sample_frames(video, count, name) for video, name in zip(videos, names, strict=True)]

    def _place_frames(self, frames: list[list], text: Any, groups: list[list] | None) -> tuple[Any, list[list]]:
        """Return texts with a mark of an image for each frame, and the images and frames of each text."""
        texts = _as_list(text, "text") or []
        marks = sum(text.count(VIDEO_TOKEN) for text in texts)
        if groups is None and (marks == 0 or (self.image_token == VIDEO_TOKEN and marks == sum(map(len, frames)))):
            return text, frames
        images = [image for group in groups or [] for image in group]
        image_marks = 0 if self.image_token == VIDEO_TOKEN else sum(text.count(self.image_token) for text in texts)
        if (marks, image_marks) != (len(frames), len(images)):
            raise ValueError(
                f"The texts have {marks} `{VIDEO_TOKEN}` and {image_marks} `{self.image_token}` marks, but there are "
                f"{len(frames)} videos and {len(images)} images. Each needs one mark in its text, or, if there are "
                "only images or only videos, no text may have one."
            )
        next_video, next_image = iter(frames), iter(images)
        placed: list[list] = [[] for _ in texts]
        for i, text in enumerate(texts):
            pieces = re.split(f"({VIDEO_TOKEN}|{re.escape(self.image_token)})", text)
            for j, mark in enumerate(pieces):
                if mark in (VIDEO_TOKEN, self.image_token):
                    found = next(next_video) if mark == VIDEO_TOKEN else [next(next_image)]
                    placed[i] += found
                    pieces[j] = self.image_token * len(found)
            texts[i] = "".join(pieces)
        return texts, placed

    @property
    def _writes_text(self) -> bool:
        """Return whether the tokenizer is that of a language model, which continues a text, or of a Q-Former."""
        return self.tokenizer.cls_token is None or self.is_encoder_decoder

    def _load(self, images: list, image_kwargs: dict[str, Any]) -> list:
        names = (f"image {number} of {len(images)}" for number in range(1, len(images) + 1))
        return [
            load_image_for(self.image_processor, image, name, **image_kwargs)
            for image, name in zip(images, names, strict=True)
        ]

    def _images_in_front(self, texts: list[str], groups: list[list] | None) -> list[int]:
        """Return the number of images in front of each text, which are those without an `<image>` inside it."""
        marks = [text.count(self.image_token) for text in texts]
        if self.num_query_tokens is None and any(marks):
            raise ValueError(
                f"This processor has no num_query_tokens and can't make room for the `{self.image_token}` of a text. "
                "Set processor.num_query_tokens, and model.config.image_token_index = processor.image_token_id."
            )
        if groups is None:
            return [0] * len(texts)
        if any(marks):
            sizes = [len(group) for group in groups]
            nested = len(groups) == len(texts) and max(sizes) > 1
            if sum(marks) != sum(sizes) or (nested and marks != sizes):
                raise ValueError(
                    f"The texts have {sum(marks)} `{self.image_token}` marks ({marks}), but there are "
                    f"{sum(sizes)} images ({sizes}). Each image needs one mark in its text, or no text may have one."
                )
            return [0] * len(texts)
        if len(groups) != len(texts):
            raise ValueError(
                f"{len(groups)} images (or lists of images) for {len(texts)} texts: one for each text was expected. "
                "To ask several questions about an image, compute model.get_image_features(...) once, repeat it, and "
                "pass it as image_features."
            )
        sizes = [len(group) for group in groups]
        if self.num_query_tokens is None and len(set(sizes)) > 1:
            raise ValueError(
                f"The texts have {sizes} images or frames. This processor has no num_query_tokens, so that the model "
                "puts images in front by itself, the same number for each text. Give as many for each, or set "
                "processor.num_query_tokens, and model.config.image_token_index = processor.image_token_id."
            )
        return sizes

    def apply_chat_template(
        self, conversation: list[dict] | list[list[dict]], tokenize: bool = False, return_dict: bool = False, **kwargs
    ) -> str | list[str] | torch.Tensor | BatchFeature:
        r"""
        Write conversations with the chat template, with `<image>` in the place of each image and of each frame of a
        video.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`):
                Messages with `role` and `content`: a string, or a list of parts such as
                `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}` (or `url`, `path`, `base64`, or
                OpenAI's `image_url`) and `{"type": "video", "video": ...}` (or `path`). Messages and parts may be
                dataclasses or pydantic models.
            tokenize (`bool`, *optional*, defaults to `False`):
                Whether to return inputs of the model instead of text.
            return_dict (`bool`, *optional*, defaults to `False`):
                Whether to return all inputs of the model instead of `input_ids` alone.
            kwargs (`dict`):
                Arguments of the tokenizer's `apply_chat_template`, `num_frames`, and, with `tokenize=True`, those of
                the processor, which may also be in a `dict`, `processor_kwargs`. With
                `return_assistant_tokens_mask=True` the output has `assistant_masks` too, 1 at tokens between
                `{% generation %}` and `{% endgeneration %}`.

        Returns:
            `str`, `list[str]`, `input_ids` or [`BatchFeature`].

        Raises:
            ValueError: if there is no chat template, because the model writes no text.
        """
        self._update_chat_template()
        template = kwargs.pop("chat_template", None) or self.chat_template
        if template is None:
            raise ValueError(
                "This processor has no chat template because its model writes no text: it is one of stage 1 or of "
                "retrieval."
            )
        with_masks = kwargs.pop("return_assistant_tokens_mask", False)
        if with_masks and not (tokenize and return_dict):
            raise ValueError("return_assistant_tokens_mask=True needs tokenize=True and return_dict=True.")
        call_names = ("return_tensors", "padding", "padding_side", "truncation", "max_length", "processor_kwargs")
        call_kwargs = {name: kwargs.pop(name) for name in call_names if name in kwargs}
        call_kwargs |= call_kwargs.pop("processor_kwargs", None) or {}
        given = [kwargs.pop(name, None) or call_kwargs.pop(name, None) for name in ("images", "videos")]
        if any(value is not None for value in given):
            raise ValueError("images or videos were given beside a chat: put them into its messages.")
        # What the processor knows of videos, so that it refuses what it does not know
        call_kwargs |= {name: kwargs.pop(name) for name in VideosKwargs.__annotations__ if name in kwargs}
        num_frames = call_kwargs.pop("num_frames", None)
        num_frames = self.frames_per_video if num_frames is None else num_frames
        if call_kwargs.pop("do_sample_frames", None) is False:
            raise ValueError("do_sample_frames=False: give num_frames, which the text of a chat has to make room for.")
        is_batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        conversations = conversation if is_batched else [conversation]
        pairs = [messages_to_text(messages, self.image_token, num_frames) for messages in conversations]
        texts = [
            self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs)
            for messages, _ in pairs
        ]
        if not tokenize:
            return texts if is_batched else texts[0]
        groups = [_with_frames(images, num_frames) for _, images in pairs]
        # A language model's template writes its special tokens itself
        call_kwargs["add_special_tokens"] = is_default_chat_template(template)
        inputs = self(images=groups if any(groups) else None, text=texts, **call_kwargs)
        if with_masks:
            chats = [messages for messages, _ in pairs]
            inputs["assistant_masks"] = self._assistant_masks(chats, inputs["attention_mask"], template, kwargs)
        return inputs if return_dict else inputs["input_ids"]

    def _assistant_masks(self, chats: list[list[dict]], attention_mask, template: str, kwargs: dict[str, Any]):
        """Return 1 at tokens of the assistant, otherwise 0, in the shape and type of `attention_mask`."""
        masks = [list(row) if isinstance(row, list) else row.clone() for row in attention_mask]
        starts = len(self.tokenizer("")["input_ids"]) if is_default_chat_template(template) else 0
        for messages, mask in zip(chats, masks, strict=True):
            encoding = self.tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **kwargs,
            )
            counts = [self.num_query_tokens if token == self.image_token_id else 1 for token in encoding["input_ids"]]
            values = [0] * starts + repeat_each(encoding["assistant_masks"], counts)
            places = [place for place, attended in enumerate(mask) if attended]
            for place, value in zip(places, values, strict=False):
                # Fewer places if the text was truncated
                mask[place] = value
        return masks if isinstance(attention_mask, list) else torch.stack(masks)

    def post_process_image_text_to_text(
        self, generated_outputs, input_ids=None, skip_special_tokens: bool = True, **kwargs
    ) -> list[str]:
        r"""
        Return the new text of what `generate` returned.

        Args:
            generated_outputs (`torch.Tensor` of shape `(batch_size * num_return_sequences, length)`):
                The output of `generate`.
            input_ids (`torch.Tensor` of shape `(batch_size, prompt_length)`, *optional*):
                The `input_ids` of `generate`, which a decoder-only language model repeats in front.
            skip_special_tokens (`bool`, *optional*, defaults to `True`):
                Whether to leave out special tokens.
            kwargs (`dict`):
                Arguments of the tokenizer's `batch_decode`.

        Returns:
            `list[str]`: one text for each sequence, stripped of white space.
        """
        if input_ids is not None:
            generated_outputs = _without_prompt(torch.as_tensor(generated_outputs), torch.as_tensor(input_ids))
        texts = self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return [text.strip() for text in texts]


Blip2Processor = Blip2HfProcessor


def _without_prompt(generated: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Return the new tokens: a decoder-only model repeats the prompt before them, an encoder-decoder does not."""
    prompt = prompt.to(generated.device).repeat_interleave(generated.shape[0] // prompt.shape[0], dim=0)
    length = prompt.shape[1]
    return generated[:, length:] if torch.equal(generated[:, :length], prompt) else generated


def _is_empty(rows: Any) -> bool:
    """Return whether there are texts but no token in any, of which a tensor of floats would be made."""
    return isinstance(rows, list) and len(rows) > 0 and all(isinstance(row, list) and not row for row in rows)


def learned_prompt(processor: Any, asks: bool = False) -> str | None:
    """Return the `prompt` of a processor of ours if it asks a question, or, by default, if it does not."""
    prompt = processor.prompt if isinstance(processor, Blip2HfProcessor) else None
    return prompt if prompt is not None and ("{}" in prompt) == asks else None


def _group(images: Any) -> list[list]:
    """Return images as one list for each text: a list of lists as it is, a list of images as lists of one."""
    if isinstance(images, (list, tuple)):
        return [list(group) if isinstance(group, (list, tuple)) else [group] for group in images]
    shape = getattr(images, "shape", ())
    return [[image] for image in images] if len(shape) == 4 else [[images]]


def _with_frames(images: list, num_frames: int) -> list:
    """Return images with the frames of each video in its place."""
    return [
        one
        for image in images
        for one in (sample_frames(image.source, num_frames) if isinstance(image, Video) else [image])
    ]


def _texts(text, text_target, groups: list[list] | None, image_token: str) -> tuple[list[str], list[str] | None]:
    """Return prompts and targets as lists of one length."""
    texts = _as_list(text, "text")
    targets = _as_list(text_target, "text_target")
    if texts is None:
        texts = [""] * len(targets)
    if len(texts) == 1 and image_token not in texts[0]:
        texts *= max(len(groups or [[]]), len(targets or [""]))
    if targets is not None and len(texts) != len(targets):
        raise ValueError(f"{len(texts)} texts, but {len(targets)} text_targets: one for each text was expected.")
    return texts, targets


def _as_list(text, name: str) -> list[str] | None:
    if text is None:
        return None
    # A column of a dataset is iterable too
    texts = [text] if isinstance(text, str) or not isinstance(text, Iterable) else list(text)
    if not texts or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"{name} is {text!r}: a string or a list of strings was expected.")
    return texts


__all__ = ["Blip2Processor"]
