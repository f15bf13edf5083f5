"""Generation: one pass over the image, then text from the language model."""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import ProcessorMixin
from transformers.utils import ModelOutput

from ._compat import CACHE_NAME, CACHE_NAMES, cached_length
from .text_inputs import check_attention_mask


# Settings of assisted decoding, in arguments of `generate` or in a generation config
_ASSISTED_DECODING = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "speculation_type",
)
# Model types whose positions or states also count padding in front of a text
_READ_PADDING = ("git", "recurrent_gemma", "roformer", "rwkv", "trocr")


class Blip2GenerationMixin(GenerationMixin):
    """`generate` of [`Blip2ForConditionalGeneration`]: that of the language model, with the image in the prompt."""

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        inputs_embeds: torch.Tensor | None = None,
        inputs: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        skip_logits: bool | None = None,
        **generate_kwargs,
    ) -> torch.Tensor | ModelOutput:
        r"""
        Generate text about images: [`~transformers.GenerationMixin.generate`] of the language model, after one pass
        through the tower and the Q-Former for any number of beams and returned sequences.

        Args:
            pixel_values, input_ids, attention_mask, image_embeds, image_features, qformer_input_ids, \
qformer_attention_mask, interpolate_pos_encoding, inputs_embeds:
                As in `forward`. Prompts may be padded on either side. [`Blip2Processor`] also makes `input_ids` for
                images without text: the tokens with which its tokenizer begins each text. Without `input_ids`, the
                text starts from `config.bos_token_id`.
            inputs (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                Another name for `input_ids`.
            labels (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                Passed by `Seq2SeqTrainer`. A decoder-only model does not see tokens of `input_ids` that have a label.
            skip_logits (`bool`, *optional*):
                Passed by [`~training.Blip2Trainer`], without effect here.
            generate_kwargs (`dict`):
                Arguments of [`~transformers.GenerationMixin.generate`]. With a cache (`cache` or `past_key_values`),
                give the whole text, padded in front: the part that the cache holds is not read again. If
                `config.image_token_index` is `None`, give the image again too, best as `image_features`.

        Returns:
            `torch.LongTensor` of shape `(batch_size * num_return_sequences, length)`, or a `ModelOutput` with it as
            `sequences`: `input_ids` and the new tokens for a decoder-only language model, the decoder's tokens for an
            encoder-decoder. [`~Blip2Processor.post_process_image_text_to_text`] gives the new text alone.

        Raises:
            ValueError: if images and placeholders do not match, or `attention_mask` does not fit the text.
        """
        input_ids = _text_ids(input_ids, inputs)
        image_features, _ = self._image_features(
            image_features,
            pixel_values,
            image_embeds,
            qformer_input_ids=qformer_input_ids,
            qformer_attention_mask=qformer_attention_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        cache, generate_kwargs = self._prepare_generate_kwargs(generate_kwargs, image_features is not None)
        # The language model was made before the generation config of a checkpoint was read
        generating_part(self.language_model).generation_config = self.generation_config
        if image_features is None:
            return self._generate_without_image(input_ids, inputs_embeds, attention_mask, cache, generate_kwargs)
        if input_ids is None and inputs_embeds is None:
            num_images, image_length, _ = image_features.shape
            input_ids = self._start_tokens(num_images, image_length, image_features.device)
            attention_mask = None
        elif labels is not None and input_ids is not None and not self.config.is_encoder_decoder:
            is_prompt = self._match_labels(labels, input_ids) == -100
            attention_mask = is_prompt.long() if attention_mask is None else attention_mask * is_prompt
            input_ids = input_ids.masked_fill(~is_prompt, self.config.pad_token_id)
        prompt = self._insert_image_features(image_features, input_ids, attention_mask, inputs_embeds=inputs_embeds)
        if self.config.is_encoder_decoder:
            text = {name: prompt[name] for name in ("inputs_embeds", "attention_mask")}
            return self.language_model.generate(**text, **generate_kwargs)
        if cache is not None:
            _check_prompt_with_cache(prompt["attention_mask"], cache, prompt["num_added"])
        return self._generate_after_prompt(input_ids, pad_left(prompt), generate_kwargs)

    def _prepare_generate_kwargs(
        self, generate_kwargs: dict[str, Any], has_image: bool
    ) -> tuple[Cache | None, dict[str, Any]]:
        """Return the cache and the arguments of the language model's `generate`; refuse what would go wrong there."""
        self._check_adapters()
        caches = [generate_kwargs[name] for name in CACHE_NAMES if generate_kwargs.get(name) is not None]
        generate_kwargs = {name: value for name, value in generate_kwargs.items() if name not in CACHE_NAMES}
        cache = caches[0] if caches else None
        if cache is not None:
            # Under the name that this version of transformers has for it
            generate_kwargs[CACHE_NAME] = cache
            length = cached_length(cache)
            if length is None:
                raise ValueError(
                    "A cache of recurrent states alone does not tell how much text it has read. Give the whole text "
                    "without a cache."
                )
            if length and self._is_assisted(generate_kwargs):
                raise ValueError("Assisted decoding cannot continue from a cache: leave out one of the two.")
        if isinstance(generate_kwargs.get("tokenizer"), ProcessorMixin):
            # Stop strings are looked up in the vocabulary
            generate_kwargs["tokenizer"] = generate_kwargs["tokenizer"].tokenizer
        assistant_model = generate_kwargs.get("assistant_model")
        if isinstance(assistant_model, Blip2GenerationMixin):
            # The assistant continues the text without the image
            generate_kwargs["assistant_model"] = assistant_model.language_model
        if self.config.is_encoder_decoder:
            if has_image and assistant_model is not None:
                raise ValueError(
                    "assistant_model needs a decoder-only language model; this one is an encoder-decoder."
                )
            if self._setting("guidance_scale", generate_kwargs) not in (None, 1):
                raise ValueError("guidance_scale needs a decoder-only language model; this one is an encoder-decoder.")
        return cache, generate_kwargs

    def _check_adapters(self):
        """Refuse adapters that add virtual tokens, which would not be where they are in training."""
        # PEFT adds its virtual tokens by replacing this method of the model alone
        adapted = getattr(vars(self).get("prepare_inputs_for_generation"), "__self__", None)
        for adapter in (getattr(part, "active_peft_config", None) for part in (adapted, self.language_model)):
            if adapter is not None and adapter.is_prompt_learning:
                raise ValueError(
                    f"{type(adapter).__name__}: PEFT's virtual tokens do not reach the language model in generate and "
                    "score_texts. Train adapters that change weights, such as LoraConfig."
                )

    def _generate_without_image(
        self, input_ids, inputs_embeds, attention_mask, cache: Cache | None, generate_kwargs: dict[str, Any]
    ) -> torch.Tensor | ModelOutput:
        """Generate without an image, or with one that is in the cache already."""
        text = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        past_length = 0 if cache is None or self.config.is_encoder_decoder else cached_length(cache)
        if input_ids is not None:
            check_attention_mask(attention_mask, input_ids, past_length)
            if attention_mask is not None and attention_mask.shape[1] > input_ids.shape[1]:
                # As in GenerationMixin, a longer mask means that input_ids are only what follows the cache
                past_length = 0
            self._check_text_without_image(input_ids[:, past_length:])
            if input_ids.shape[1] == 0:
                raise ValueError("There is neither an image nor a token to continue: give one of them.")
        if past_length and input_ids is not None:
            index = self.config.image_token_index
            if index is None:
                raise ValueError(
                    "A cache was given without an image, and this model has no `<image>` placeholders (config."
                    "image_token_index is None) that tell where the cache holds one. Give the image again, best as "
                    "image_features, or set model.config.image_token_index = processor.image_token_id."
                )
            if attention_mask is None:
                self._check_no_padding(input_ids)
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            _check_prompt_with_cache(mask, cache)
            prompt = text | {"attention_mask": mask, "is_image": input_ids == index, "num_added": 0}
            return self._generate_after_prompt(input_ids, prompt, generate_kwargs)
        self._check_padding(attention_mask)
        given = {name: value for name, value in text.items() if value is not None}
        return self.language_model.generate(**given, **generate_kwargs)

    def _generate_after_prompt(
        self, input_ids: torch.Tensor | None, prompt: dict[str, Any], generate_kwargs: dict[str, Any]
    ) -> torch.Tensor | ModelOutput:
        """Generate with a decoder-only model: the new tokens follow `input_ids`, as the caller gave them."""
        self._check_padding(prompt["attention_mask"])
        text = {name: prompt[name] for name in ("inputs_embeds", "attention_mask")}
        if input_ids is None:
            # As in GenerationMixin: the new tokens alone, and penalties that see no prompt
            input_ids = prompt["attention_mask"].new_zeros(len(prompt["attention_mask"]), 0)
        else:
            text["input_ids"] = self._readable_prompt(prompt)
        length = text["input_ids"].shape[1] if "input_ids" in text else 0
        if prompt["num_added"]:
            generate_kwargs = self._with_longer_limits(generate_kwargs, prompt["num_added"])
            if length:
                generate_kwargs = _with_text_alone(generate_kwargs, prompt["is_image"])
        if generate_kwargs.get("streamer") is not None and length:
            generate_kwargs["streamer"] = _PromptStreamer(generate_kwargs["streamer"], input_ids)
        language_model = _with_embedded_text(self.language_model)
        if self._is_assisted(generate_kwargs):
            language_model = _with_assisted_decoding(language_model, prompt["is_image"][0, :length])
        outputs = language_model.generate(**text, **generate_kwargs)
        sequences = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
        repeats = sequences.shape[0] // input_ids.shape[0]
        given = input_ids.repeat_interleave(repeats, dim=0).to(sequences.device)
        sequences = torch.cat([given, sequences[:, length:]], dim=1)
        if isinstance(outputs, torch.Tensor):
            return sequences
        outputs.sequences = sequences
        return outputs

    def _check_no_padding(self, input_ids: torch.Tensor):
        pad, eos = self.config.pad_token_id, self.config.eos_token_id
        if pad not in (eos if isinstance(eos, list) else [eos]) and bool((input_ids[:, 0] == pad).any()):
            raise ValueError(
                "Texts begin with padding, but no attention_mask was given. With a cache, give it for the whole text: "
                "that of the earlier turns, then ones for the new tokens."
            )

    def _check_padding(self, attention_mask: torch.Tensor | None):
        """Refuse padding in front of texts if the language model reads it."""
        model_type = self.config.text_config.model_type
        if attention_mask is None or attention_mask.dim() != 2 or model_type not in _READ_PADDING:
            return
        if bool((attention_mask[:, 0] == 0).any()):
            raise ValueError(
                f"Texts of different lengths were given, but language models of type {model_type!r} read the padding "
                "in front of the shorter ones. Give texts of one length, or one text at a time."
            )

    def _with_longer_limits(self, generate_kwargs: dict[str, Any], added: int) -> dict[str, Any]:
        """Add the images that were put in front to the limits of length, which count only the caller's tokens."""
        limits: dict[str, Any] = {}
        for name, by_new_tokens in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            limit = self._setting(name, generate_kwargs)
            if limit and self._setting(by_new_tokens, generate_kwargs) is None:
                limits[name] = limit + added
        config = generate_kwargs.get("generation_config")
        if config is not None and limits:
            # generate() deprecates a config together with single parameters
            config = copy.deepcopy(config)
            config.update(**{name: limits.pop(name) for name in list(limits) if generate_kwargs.get(name) is None})
            limits["generation_config"] = config
        return generate_kwargs | limits

    def _setting(self, name: str, generate_kwargs: dict[str, Any]) -> Any:
        """Return a setting of the call, otherwise of the config given to it, otherwise of the model's own config."""
        configs = [generate_kwargs.get("generation_config"), self.generation_config]
        values = [generate_kwargs.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value is not None), None)

    def _is_assisted(self, generate_kwargs: dict[str, Any]) -> bool:
        return any(self._setting(name, generate_kwargs) for name in _ASSISTED_DECODING)

    def _start_tokens(self, num_images: int, image_length: int, device: torch.device) -> torch.Tensor:
        """Return `input_ids` for images without text: placeholders, if there is such a token, and a first token."""
        start = self.config.bos_token_id
        if start is None and self.config.is_encoder_decoder:
            # An empty text, as an encoder-decoder's tokenizer makes it
            eos = self.config.eos_token_id
            start = eos[0] if isinstance(eos, list) else eos
        tokens = [] if start is None else [start]
        if self.config.image_token_index is not None:
            tokens = [self.config.image_token_index] * image_length + tokens
        return torch.tensor([tokens] * num_images, dtype=torch.long, device=device)

    def _readable_prompt(self, prompt: dict[str, Any]) -> torch.Tensor:
        """
        Return `input_ids` with a token of the text in place of each placeholder, whose id may lie beyond the
        vocabulary. Repetition penalties and the like then find only tokens of the text in the prompt.
        """
        is_text = prompt["attention_mask"].bool() & ~prompt["is_image"]
        first = prompt["input_ids"].gather(1, is_text.int().argmax(dim=1, keepdim=True))
        fallback = self.config.bos_token_id or self.config.pad_token_id or 0
        filler = torch.where(is_text.any(dim=1, keepdim=True), first, fallback)
        return torch.where(prompt["is_image"], filler, prompt["input_ids"])


class _PromptStreamer(BaseStreamer):
    """A streamer that is given the prompt as the caller wrote it, then all that follows."""

    def __init__(self, streamer: BaseStreamer, input_ids: torch.Tensor):
        self.streamer = streamer
        self.prompt = input_ids.cpu()

    def put(self, value: torch.Tensor):
        self.streamer.put(value if self.prompt is None else self.prompt)
        self.prompt = None

    def end(self):
        self.streamer.end()


def generating_part(language_model: nn.Module) -> Any:
    """Return the model inside wrappers of PEFT and torch.compile, whose methods GenerationMixin calls."""
    return next((part for part in language_model.modules() if isinstance(part, GenerationMixin)), language_model)


def _with_embedded_text(language_model: PreTrainedModel) -> PreTrainedModel:
    """
    Return the language model, or a view of it for one call that shares all weights: GenerationMixin only gives
    embedded text to models that name it in `prepare_inputs_for_generation`, but some pass it on without naming it.
    """
    part = generating_part(language_model)
    prepare_inputs = part.prepare_inputs_for_generation
    if "inputs_embeds" in inspect.signature(prepare_inputs).parameters:
        return language_model

    def prepare_inputs_for_generation(input_ids, inputs_embeds=None, is_first_iteration=False, **kwargs):
        inputs = prepare_inputs(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration and inputs.get("inputs_embeds") is None:
            raise ValueError(
                f"{type(part).__name__} does not generate from embedded text, which holds the image. Choose another "
                "language model (docs/python.md lists those that do not work)."
            )
        return inputs

    view = copy.copy(part)
    view.prepare_inputs_for_generation = prepare_inputs_for_generation
    return view


def _with_assisted_decoding(language_model: PreTrainedModel, is_image: torch.Tensor) -> PreTrainedModel:
    """
    Return a view of the language model for one call of assisted decoding, which shares all weights: drafts are made
    from the text alone, and the first draft is embedded after the prompt. `is_image` of shape `(length,)` marks the
    image features in the prompt.
    """
    part = generating_part(language_model)
    view, prepare_inputs, get_generator = (
        copy.copy(part),
        part.prepare_inputs_for_generation,
        part._get_candidate_generator,
    )

    @functools.wraps(prepare_inputs)
    def prepare_inputs_for_generation(input_ids, inputs_embeds=None, is_first_iteration=False, **kwargs):
        if inputs_embeds is not None and is_first_iteration:
            draft = input_ids[:, inputs_embeds.shape[1] :]
            inputs_embeds = torch.cat([inputs_embeds, part.get_input_embeddings()(draft)], dim=1)
        return prepare_inputs(input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs)

    def get_candidate_generator(input_ids, model_kwargs, **kwargs):
        model_kwargs = {name: value for name, value in model_kwargs.items() if name in (*CACHE_NAMES, "use_cache")}
        text_ids = input_ids[:, ~is_image]
        generator = get_generator(input_ids=text_ids, model_kwargs=model_kwargs, **kwargs)
        get_text_candidates = generator.get_candidates

        def get_candidates(input_ids: torch.Tensor, **kwargs):
            is_text = torch.cat([~is_image, is_image.new_ones(input_ids.shape[1] - is_image.shape[0])])
            text_ids = input_ids[:, is_text]
            candidates, logits = get_text_candidates(text_ids, **kwargs)
            return torch.cat([input_ids, candidates[:, text_ids.shape[1] :].to(input_ids.device)], dim=1), logits

        generator.get_candidates = get_candidates
        return generator

    view.prepare_inputs_for_generation = prepare_inputs_for_generation
    view._get_candidate_generator = get_candidate_generator
    return view


def _with_text_alone(generate_kwargs: dict[str, Any], is_image: torch.Tensor) -> dict[str, Any]:
    """
    Let the caller's own functions see the text as it was given, if images were put in front of it. `is_image` of shape
    `(batch_size, length)` marks the images in the prompt.
    """

    def text_of(input_ids: torch.Tensor) -> torch.Tensor:
        length, count = is_image.shape[1], len(input_ids)
        is_text = ~is_image.repeat_interleave(count // len(is_image), dim=0).to(input_ids.device)
        return torch.cat([input_ids[:, :length][is_text].view(count, -1), input_ids[:, length:]], dim=1)

    def on_text(function: Callable) -> Callable:
        return lambda input_ids, *args, **kwargs: function(text_of(input_ids), *args, **kwargs)

    def wrap(function: Callable) -> Callable:
        if isinstance(function, MaxLengthCriteria):
            return MaxLengthCriteria(function.max_length + added, function.max_position_embeddings)
        # transformers' own only find tokens of the text anyway, and generate recognises them by their type
        return function if type(function).__module__.startswith("transformers.") else on_text(function)

    added, own = int(is_image[0].sum()), {}
    for name, kind in (("logits_processor", LogitsProcessorList), ("stopping_criteria", StoppingCriteriaList)):
        if generate_kwargs.get(name):
            own[name] = kind([wrap(function) for function in generate_kwargs[name]])
    if (allowed := generate_kwargs.get("prefix_allowed_tokens_fn")) is not None:
        # Called with one row at a time
        length = is_image.shape[1]
        own["prefix_allowed_tokens_fn"] = lambda row, input_ids: allowed(
            row, torch.cat([input_ids[:length][~is_image[row].to(input_ids.device)], input_ids[length:]])
        )
    return generate_kwargs | own


def _text_ids(input_ids: torch.Tensor | None, inputs: torch.Tensor | None) -> torch.Tensor | None:
    if inputs is None:
        return input_ids
    if input_ids is not None:
        raise ValueError("`inputs` is another name for `input_ids`: give only one of them.")
    if inputs.is_floating_point():
        raise ValueError(
            f"`inputs` of shape {tuple(inputs.shape)} and type {inputs.dtype} were given; token ids were expected. "
            "Give images as pixel_values, image_embeds or image_features, and embedded text as inputs_embeds."
        )
    return inputs


def _check_prompt_with_cache(attention_mask: torch.Tensor, cache: Cache, num_added: int = 0):
    length, past_length = attention_mask.shape[1], cached_length(cache)
    if length <= past_length:
        raise ValueError(
            f"A cache of {past_length} positions and a prompt of {length} (images and text) were given: with a cache, "
            "the whole text is expected, the part that the cache holds and the new part."
        )
    mask = attention_mask[:, num_added:].bool()
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ValueError(
            "With a cache, padding is expected in front of each text (padding_side='left'), as in the cache; "
            "attention_mask has zeros after tokens."
        )


def pad_left(prompt: dict[str, Any]) -> dict[str, Any]:
    """Return the same prompts with all their padding in front, as generation expects it."""
    order = prompt["attention_mask"].bool().int().argsort(dim=1, stable=True)
    names = [name for name in ("input_ids", "attention_mask", "is_image") if prompt[name] is not None]
    embeds = prompt["inputs_embeds"]
    index = order[..., None].expand(-1, -1, embeds.shape[-1]).to(embeds.device)
    padded = {name: prompt[name].gather(1, order) for name in names}
    return prompt | padded | {"inputs_embeds": embeds.gather(1, index)}
