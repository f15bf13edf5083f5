"""Generation: one pass over the image, then text from the language model."""

import copy
from typing import Any

import torch
from transformers.generation import GenerationMixin
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from .cache_name import CACHE_NAMES


class Blip2GenerationMixin(GenerationMixin):
    """`generate` of [`Blip2ForConditionalGeneration`]: transformers' own, once the image stands in the prompt."""

    # Where the prompt in generation has images, while there is one
    _image_positions: torch.Tensor | None = None

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
        labels: torch.Tensor | None = None,
        skip_logits: bool | None = None,
        **generate_kwargs,
    ) -> torch.Tensor | ModelOutput:
        r"""
        Writes text about images: [`~transformers.GenerationMixin.generate`], after one pass through the tower and the
        Q-Former, whatever the number of beams or of returned sequences.

        Args:
            pixel_values, input_ids, attention_mask, image_embeds, image_features, qformer_input_ids, \
qformer_attention_mask, interpolate_pos_encoding:
                As in `forward`. Prompts may be padded on either side. Without `input_ids` the text starts from the
                language model's first token.
            labels (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                What `Seq2SeqTrainer` passes along: a decoder-only model is not shown what it has to write.
            skip_logits (`bool`, *optional*):
                Passed along too; it says nothing here.
            generate_kwargs (`dict`):
                Those of [`~transformers.GenerationMixin.generate`].

        Returns:
            `torch.LongTensor` of shape `(batch_size * num_return_sequences, length)`, or a `ModelOutput` with it as
            `sequences`: `input_ids` and the new tokens for a decoder-only language model, the decoder's tokens for an
            encoder-decoder. [`~Blip2Processor.post_process_image_text_to_text`] gives the new text alone.

        Raises:
            ValueError: if images and placeholders do not match.
        """
        image_features, _ = self._image_features(
            image_features,
            pixel_values,
            image_embeds,
            qformer_input_ids=qformer_input_ids,
            qformer_attention_mask=qformer_attention_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        if image_features is None:
            return super().generate(input_ids=input_ids, attention_mask=attention_mask, **generate_kwargs)
        if input_ids is None:
            input_ids, attention_mask = self._start_tokens(image_features), None
        elif labels is not None and not self.config.is_encoder_decoder:
            is_prompt = self._match_labels(labels, input_ids) == -100
            attention_mask = is_prompt.long() if attention_mask is None else attention_mask * is_prompt
            input_ids = input_ids.masked_fill(~is_prompt, self.config.pad_token_id)
        prompt = self._insert_image_features(image_features, input_ids, attention_mask)
        if self.config.is_encoder_decoder:
            encoder_outputs = self.language_model.get_encoder()(
                inputs_embeds=prompt["inputs_embeds"], attention_mask=prompt["attention_mask"], return_dict=True
            )
            return super().generate(
                encoder_outputs=encoder_outputs, attention_mask=prompt["attention_mask"], **generate_kwargs
            )
        return self._generate_after_prompt(input_ids, prompt, generate_kwargs)

    def _generate_after_prompt(
        self, input_ids: torch.Tensor, prompt: dict[str, Any], generate_kwargs: dict[str, Any]
    ) -> torch.Tensor | ModelOutput:
        """Generation with a decoder-only model: the new tokens follow `input_ids`, as the caller gave them."""
        prompt = _pad_left(prompt)
        added = prompt["input_ids"].shape[1] - input_ids.shape[1]
        if added:
            generate_kwargs = self._with_longer_limits(generate_kwargs, added)
        if generate_kwargs.get("streamer") is not None:
            generate_kwargs["streamer"] = _PromptStreamer(generate_kwargs["streamer"], input_ids)
        self._image_positions = prompt["is_image"]
        try:
            outputs = super().generate(
                input_ids=self._readable_prompt(prompt),
                inputs_embeds=prompt["inputs_embeds"],
                attention_mask=prompt["attention_mask"],
                **generate_kwargs,
            )
        finally:
            self._image_positions = None
        sequences = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
        repeats = sequences.shape[0] // input_ids.shape[0]
        given = input_ids.repeat_interleave(repeats, dim=0).to(sequences.device)
        sequences = torch.cat([given, sequences[:, prompt["input_ids"].shape[1] :]], dim=1)
        if isinstance(outputs, torch.Tensor):
            return sequences
        outputs.sequences = sequences
        return outputs

    def _with_longer_limits(self, generate_kwargs: dict[str, Any], added: int) -> dict[str, Any]:
        """Limits of length count what the caller gave and gets; the images that were put in front come on top."""
        names = ("max_length", "min_length")
        limits = {name: generate_kwargs[name] + added for name in names if generate_kwargs.get(name) is not None}
        config = generate_kwargs.get("generation_config") or self.generation_config
        in_config = {name: getattr(config, name) for name in names if name not in limits and getattr(config, name)}
        if in_config and "max_new_tokens" not in generate_kwargs:
            config = copy.deepcopy(config)
            for name, limit in in_config.items():
                setattr(config, name, limit + added)
            limits["generation_config"] = config
        return generate_kwargs | limits

    def _start_tokens(self, image_features: torch.Tensor) -> torch.Tensor:
        """`input_ids` for images without text: their placeholders, where there is such a token, and a first token."""
        start = self.config.bos_token_id
        if start is None and self.config.is_encoder_decoder:
            # An empty text, as an encoder-decoder's tokenizer makes it
            eos = self.config.eos_token_id
            start = eos[0] if isinstance(eos, list) else eos
        tokens = [] if start is None else [start]
        if self.config.image_token_index is not None:
            tokens = [self.config.image_token_index] * image_features.shape[1] + tokens
        return torch.tensor([tokens] * image_features.shape[0], dtype=torch.long, device=image_features.device)

    def _readable_prompt(self, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        `input_ids` with a token of the text in place of each placeholder, whose id may lie beyond the vocabulary: what
        repetition penalties and their like find in the prompt is then the text's tokens alone.
        """
        is_text = prompt["attention_mask"].bool() & ~prompt["is_image"]
        first = prompt["input_ids"].gather(1, is_text.int().argmax(dim=1, keepdim=True))
        fallback = self.config.bos_token_id or self.config.pad_token_id or 0
        filler = torch.where(is_text.any(dim=1, keepdim=True), first, fallback)
        return torch.where(prompt["is_image"], filler, prompt["input_ids"])

    def _get_candidate_generator(self, *args, assistant_model: PreTrainedModel | None = None, **kwargs):
        if self.config.is_encoder_decoder:
            if assistant_model is not None:
                raise ValueError("Assisted decoding with an assistant_model needs a decoder-only language model.")
            return super()._get_candidate_generator(*args, assistant_model=None, **kwargs)
        if self._image_positions is None:
            return super()._get_candidate_generator(*args, assistant_model=assistant_model, **kwargs)
        # The assistant has no eyes: it continues the text without the image
        if isinstance(assistant_model, Blip2GenerationMixin):
            assistant_model = assistant_model.language_model
        model_kwargs = {k: v for k, v in kwargs.pop("model_kwargs").items() if k in (*CACHE_NAMES, "use_cache")}
        input_ids, is_image = kwargs.pop("input_ids"), self._image_positions[0]
        text_ids = input_ids[:, ~is_image]
        generator = super()._get_candidate_generator(
            *args, input_ids=text_ids, assistant_model=assistant_model, model_kwargs=model_kwargs, **kwargs
        )
        get_text_candidates = generator.get_candidates

        def get_candidates(input_ids: torch.Tensor, **kwargs):
            is_text = torch.cat([~is_image, is_image.new_ones(input_ids.shape[1] - is_image.shape[0])])
            text_ids = input_ids[:, is_text]
            candidates, logits = get_text_candidates(text_ids, **kwargs)
            return torch.cat([input_ids, candidates[:, text_ids.shape[1] :].to(input_ids.device)], dim=1), logits

        generator.get_candidates = get_candidates
        return generator

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, **kwargs):
        if inputs_embeds is not None and kwargs.get("is_first_iteration"):
            # Assisted decoding appends its first draft to the prompt
            draft = input_ids[:, inputs_embeds.shape[1] :]
            inputs_embeds = torch.cat([inputs_embeds, self.get_input_embeddings()(draft)], dim=1)
        return self.language_model.prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)


class _PromptStreamer(BaseStreamer):
    """Gives a streamer the prompt as the caller wrote it, then all that follows."""

    def __init__(self, streamer: BaseStreamer, input_ids: torch.Tensor):
        self.streamer = streamer
        self.prompt = input_ids.cpu()

    def put(self, value: torch.Tensor):
        self.streamer.put(value if self.prompt is None else self.prompt)
        self.prompt = None

    def end(self):
        self.streamer.end()


def _pad_left(prompt: dict[str, Any]) -> dict[str, Any]:
    """The same prompts with all their padding in front, where generation wants it."""
    order = prompt["attention_mask"].bool().int().argsort(dim=1, stable=True)
    padded = {k: prompt[k].gather(1, order) for k in ("input_ids", "attention_mask", "is_image")}
    embeds = prompt["inputs_embeds"]
    padded["inputs_embeds"] = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1]).to(embeds.device))
    return padded
