"""Stage 1 of BLIP-2: a Q-Former learns from a frozen vision tower, by three objectives at once (section 3.2)."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.models.bert.modeling_bert import BertLMPredictionHead
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .bert_weights import load_bert_with_head
from .configuration_blip2 import Blip2Config
from .distributed import GlobalBatch
from .frozen import upcast_trained_parameters
from .generation_qformer import Blip2QFormerGenerationMixin
from .gradient_caching import GradientCachingMixin
from .losses import (
    draw_hard_negatives,
    image_grounded_text_generation_loss,
    image_text_contrastive_loss,
    image_text_matching_loss,
    image_text_similarity,
)
from .modeling_base import Blip2PreTrainedModel, image_side_from_parts
from .modeling_image_text import Blip2ImageTextPreTrainedModel, l2_normalize, upcast_to_float32
from .modeling_qformer import ImageKeyValues, block_attention_mask
from .text_inputs import check_one_image_input, check_options, count_images


@dataclass
class Blip2ForPreTrainingOutput(ModelOutput):
    r"""
    Output of [`Blip2ForPreTraining`]. The global batch is that of all processes; without torch.distributed it is the
    batch itself.

    Args:
        loss (`torch.Tensor` of shape `()`):
            Sum of the three losses.
        loss_itc, loss_itm, loss_itg (`torch.Tensor` of shape `()`):
            Image-text contrastive, image-text matching and image-grounded text generation loss. Their mean over
            processes is the loss of the global batch.
        logits_per_image (`torch.Tensor` of shape `(batch_size, global_batch_size)`):
            Similarities of the images with the texts of all processes, over the temperature.
        logits_per_text (`torch.Tensor` of shape `(batch_size, global_batch_size)`):
            Similarities of the texts with the images of all processes, over the temperature.
        itm_logits (`torch.Tensor` of shape `(3 * batch_size, 2)`):
            Scores of no and yes: for the pairs, for a negative image with each text, for a negative text with each
            image.
        itg_logits (`torch.Tensor` of shape `(num_labels, vocab_size)`):
            Scores of the next token at positions that have one, row by row. Not returned with gradient caching.
        negative_image_index, negative_text_index (`torch.LongTensor` of shape `(batch_size,)`):
            Which image of the global batch was drawn for each text, and which text for each image.
        image_features (`torch.Tensor` of shape `(batch_size, num_query_tokens, image_text_hidden_size)`):
            Projected queries, of length 1.
        text_features (`torch.Tensor` of shape `(batch_size, image_text_hidden_size)`):
            Projected [CLS] of the texts, of length 1.
        hidden_states, attentions, cross_attentions (`tuple[torch.Tensor]`, *optional*):
            Those of the first pass, over `[queries | text with [CLS] | text with [DEC]]`. Not returned with gradient
            caching.
    """

    loss: torch.Tensor | None = None
    loss_itc: torch.Tensor | None = None
    loss_itm: torch.Tensor | None = None
    loss_itg: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    itm_logits: torch.Tensor | None = None
    itg_logits: torch.Tensor | None = None
    negative_image_index: torch.Tensor | None = None
    negative_text_index: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    text_features: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class _Texts:
    """
    Embedded texts, with all padding after them: as they are (`embeds`), and with [DEC] in place of [CLS]
    (`decoder_embeds`). `labels` are the tokens to predict, `label_index` the position before each, over all rows.
    """

    embeds: torch.Tensor
    decoder_embeds: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    label_index: torch.Tensor


class Blip2HfForPreTraining(Blip2ImageTextPreTrainedModel, Blip2QFormerGenerationMixin, GradientCachingMixin):
    r"""
    BLIP-2 in stage 1 (section 3.2): image-text contrast (ITC), image-text matching (ITM) and image-grounded text
    generation (ITG), on a Q-Former that reads a frozen vision tower.

    Two passes of the Q-Former over one projection of the image give what the authors' code computes in four: one over
    `[queries | text with [CLS] | text with [DEC]]` under a block mask, for ITC and ITG, and one over pairs of image
    and text, for ITM, with hard negatives drawn from the similarities of the first.

    In several processes, the texts and images of all of them are contrasted, and negatives are drawn from all of them.
    Gradients flow between processes. Data parallelism takes the mean over processes of losses and gradients, which is
    that of the whole batch in one process.

    Args:
        config ([`Blip2Config`]):
            Its configuration, with `qformer_config.use_qformer_text_input=True`. A `text_config` is not used.
        vision_model ([`~transformers.PreTrainedModel`], *optional*):
            The tower; made from the configuration, with random weights, if it is not given.

    Example:

    ```python
    >>> from blip2_hf import Blip2ForPreTraining

    >>> model = Blip2ForPreTraining.from_encoders_pretrained("facebook/dinov2-small", "google-bert/bert-base-uncased")
    >>> outputs = model(pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask)
    >>> outputs.loss.backward()
    ```"""

    main_input_name = "input_ids"
    _tied_weights_keys = {
        "lm_head.decoder.weight": "embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }
    _keys_to_ignore_on_load_unexpected = [r"^language_model\.", r"^language_projection\."]
    _parts_not_in_transformers = ("temperature", "lm_head")
    _class_in_transformers = "Blip2ForImageTextRetrieval"
    # Trained parts stay in float32 if the rest is bfloat16. Patterns, because towers use the same names inside
    _keep_in_fp32_modules = None
    _keep_in_fp32_modules_strict = [
        *Blip2PreTrainedModel._keep_in_fp32_modules,
        r"^vision_model\.post_layernorm",
        r"^embeddings",
        "vision_projection",
        "text_projection",
        "itm_head",
        "lm_head",
        "temperature",
    ]
    # Trainer averages the loss over accumulation steps, because each loss is a mean over the batch already
    accepts_loss_kwargs = False

    def __init__(self, config: Blip2Config, vision_model: PreTrainedModel | None = None):
        qformer_config = config.qformer_config
        if not qformer_config.use_qformer_text_input:
            raise ValueError(
                "Blip2ForPreTraining reads text with the Q-Former: make its configuration with "
                "Blip2QFormerConfig(use_qformer_text_input=True)."
            )
        if qformer_config.bos_token_id is None or not qformer_config.bos_token_id < qformer_config.vocab_size:
            raise ValueError(
                f"qformer_config.bos_token_id, the id of [DEC], is {qformer_config.bos_token_id} in a vocabulary of "
                f"{qformer_config.vocab_size}: add [DEC] to the vocabulary and give its id."
            )
        # The head for ITG shares its weight with the word embeddings, as in BERT
        config.tie_word_embeddings = True
        super().__init__(config)
        self._build_image_side(config, vision_model)
        self._build_image_text_heads(config)
        self.lm_head = BertLMPredictionHead(qformer_config)
        self.post_init()
        self.freeze()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, BertLMPredictionHead):
            init.zeros_(module.bias)

    def freeze(self) -> "Blip2ForPreTraining":
        super().freeze()
        upcast_trained_parameters(self)
        return self

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.lm_head.decoder = new_embeddings
        self.lm_head.bias = new_embeddings.bias

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_ids: torch.Tensor | None = None,
        return_loss: bool = True,
        interpolate_pos_encoding: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | Blip2ForPreTrainingOutput:
        r"""
        Compute the three losses of stage 1, or features and similarities alone.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, channels, height, width)`, *optional*):
                Images.
            image_embeds (`torch.Tensor` of shape `(batch_size, features, vision hidden_size)`, *optional*):
                In place of `pixel_values`: what [`~Blip2PreTrainedModel.get_image_embeds`] returned.
            input_ids (`torch.LongTensor` of shape `(batch_size, text_length)`):
                The text of each image, in the Q-Former's tokens, [CLS] first. The copy that starts with [DEC] is made
                here. Placeholders of images are left out.
            attention_mask (`torch.Tensor` of shape `(batch_size, text_length)`, *optional*):
                0 at padding, which may stand on either side. Each text has two tokens at least.
            image_ids (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Id of each image. Pairs with the same id, in all processes, share the target of ITC and are no
                negatives of each other. By default all images differ. A pair without a negative in the batch enters
                ITM without one.
            return_loss (`bool`, *optional*, defaults to `True`):
                Whether to compute the losses, or only features and similarities of the pairs of this process.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `True`):
                Whether position embeddings are interpolated to the size of the images.
            kwargs:
                `output_hidden_states` and `output_attentions`, of the first pass.

        Returns:
            [`Blip2ForPreTrainingOutput`].

        Raises:
            TypeError: if an argument is not known.
            ValueError: if the batches of all processes have one pair in all, which leaves nothing to contrast with; if
                a text has fewer than two tokens, or tokens that the Q-Former does not know.
        """
        check_options(kwargs, "pixel_values or image_embeds, input_ids, attention_mask, image_ids and return_loss")
        check_one_image_input(pixel_values, image_embeds)
        num_images = count_images(pixel_values, image_embeds)
        if input_ids is None or len(input_ids) != num_images:
            given = "no" if input_ids is None else len(input_ids)
            raise ValueError(
                f"There are {num_images} images and {given} texts: give input_ids with one text for each image."
            )
        if not return_loss:
            if image_embeds is None:
                image_embeds = self._image_embeds_by_chunks(pixel_values, interpolate_pos_encoding)
            # Of this process alone, because others may be doing something else
            image_features = self.get_image_features(image_embeds=image_embeds, return_dict=True).pooler_output
            text_features = self.get_text_features(input_ids, attention_mask, return_dict=True).pooler_output
            own = GlobalBatch([len(input_ids)], rank=0, length=input_ids.shape[1])
            return Blip2ForPreTrainingOutput(**self._compare(own, image_features, text_features))
        # Values of the text are read before the tower runs, because reading waits for all that a GPU has to do. ITG
        # predicts the tokens after the first
        input_ids, attention_mask = self._prepare_texts(input_ids, attention_mask, min_length=2)
        label_positions = [attention_mask[rows, 1:].nonzero(as_tuple=True) for rows in self._chunks(len(input_ids))]
        batch = GlobalBatch.of(len(input_ids), input_ids.shape[1], input_ids.device)
        is_match = self._matches(batch, image_ids, input_ids.device)
        if batch.size == 1:
            raise ValueError(
                "Stage 1 contrasts each pair with the others of the batch, and the batch has one pair: give at least "
                "two. (An incomplete last batch is left out by dataloader_drop_last=True.)"
            )
        if image_embeds is None:
            image_embeds = self._image_embeds_by_chunks(pixel_values, interpolate_pos_encoding)
        compute = self._losses if self.gradient_caching_chunk_size is None else self._losses_by_chunks
        outputs = Blip2ForPreTrainingOutput(
            **compute(batch, image_embeds, input_ids, attention_mask, label_positions, is_match, **kwargs)
        )
        outputs.loss = outputs.loss_itc + outputs.loss_itm + outputs.loss_itg
        return outputs

    @staticmethod
    def _matches(batch: GlobalBatch, image_ids: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """Return which pairs are of the same image, of shape `(batch_size, global_batch_size)`."""
        if image_ids is None:
            own = torch.arange(batch.start, batch.start + batch.rows[batch.rank], device=device)
            return own[:, None] == torch.arange(batch.size, device=device)
        image_ids = torch.as_tensor(image_ids, device=device)
        return image_ids[:, None] == batch.gather(image_ids)

    def _losses(
        self, batch, image_embeds, input_ids, attention_mask, label_positions, is_match, **kwargs
    ) -> dict[str, Any]:
        """Compute all fields of the output except the sum of the losses."""
        texts = self._embed_texts(input_ids, attention_mask, *label_positions[0])
        images = self.get_image_key_values(image_embeds)
        image_features, text_features, itg_logits, passed = self._first_pass(images, texts, **kwargs)
        compared = self._compare(batch, image_features, text_features)
        negatives = self._draw_negatives(compared, is_match)
        if batch.world_size == 1:
            negative_images = _select(images, negatives["negative_image_index"])
            index = negatives["negative_text_index"]
            negative_texts = texts.embeds.index_select(0, index), texts.mask[index]
        else:
            negative_images = self._fetch_images(batch, image_embeds, negatives["negative_image_index"])
            negative_texts = self._fetch_texts(batch, input_ids, attention_mask, negatives["negative_text_index"])
        itm_logits = self._second_pass(images, negative_images, texts.embeds, texts.mask, *negative_texts)
        num_items = batch.mean_share(attention_mask[:, 1:].ne(0).sum())
        return {
            "loss_itg": image_grounded_text_generation_loss(itg_logits, texts.labels, num_items=num_items),
            "itg_logits": itg_logits,
            "hidden_states": passed.hidden_states,
            "attentions": passed.attentions,
            "cross_attentions": passed.cross_attentions,
            **self._pair_losses(batch, compared, itm_logits, is_match),
            **compared,
            **negatives,
        }

    def _embed_texts(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, row: torch.Tensor, position: torch.Tensor
    ) -> _Texts:
        """
        Embed both copies of the texts in one look-up, because the gradient of the vocabulary is large. `row` and
        `position`, of shape `(num_labels,)`, tell after which tokens there is one to predict.
        """
        length = input_ids.shape[1]
        dec = torch.full_like(input_ids[:, :1], self.config.qformer_config.bos_token_id)
        # [DEC], behind the text, has the position of [CLS]
        positions = torch.arange(length + 1, device=input_ids.device) % length
        embeds = self.embeddings(input_ids=torch.cat([input_ids, dec], dim=1), position_ids=positions[None])
        embeds, dec_embeds = embeds[:, :length], embeds[:, length:]
        decoder_embeds = torch.cat([dec_embeds, embeds[:, 1:]], dim=1)
        labels = input_ids[row, position + 1]
        return _Texts(embeds, decoder_embeds, attention_mask, labels, row * length + position)

    def _first_pass(
        self, images: ImageKeyValues, texts: _Texts, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, ModelOutput]:
        """Run queries and both copies of the text: `(image_features, text_features, itg_logits, outputs)`."""
        query_length, text_length = self.config.num_query_tokens, texts.embeds.shape[1]
        outputs = self.qformer(
            query_embeds=torch.cat([self.query_tokens(len(texts.embeds)), texts.embeds, texts.decoder_embeds], dim=1),
            query_length=query_length,
            attention_mask=block_attention_mask(query_length, texts.mask),
            encoder_key_values=images,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        image_features = l2_normalize(self.vision_projection(hidden_states[:, :query_length]))
        text_features = l2_normalize(self.text_projection(hidden_states[:, query_length]))
        decoded = hidden_states[:, query_length + text_length :].flatten(0, 1)
        itg_logits = self.lm_head(decoded[texts.label_index])
        return image_features, text_features, upcast_to_float32(itg_logits), outputs

    def _compare(
        self, batch: GlobalBatch, image_features: torch.Tensor, text_features: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        similarity = image_text_similarity(image_features, batch.gather(text_features))
        if batch.world_size == 1:
            similarity_per_text = similarity.T
        else:
            similarity_per_text = image_text_similarity(batch.gather(image_features), text_features).T
        return {
            "logits_per_image": self.temperature(similarity),
            "logits_per_text": self.temperature(similarity_per_text),
            "image_features": image_features,
            "text_features": text_features,
        }

    @staticmethod
    def _draw_negatives(compared: dict[str, torch.Tensor], is_match: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "negative_image_index": draw_hard_negatives(compared["logits_per_text"], is_match),
            "negative_text_index": draw_hard_negatives(compared["logits_per_image"], is_match),
        }

    def _fetch_images(self, batch: GlobalBatch, image_embeds: torch.Tensor, index: torch.Tensor) -> ImageKeyValues:
        """Compute keys and values of images of any process, to which only the tower's output is sent."""
        unique, inverse = index.unique(return_inverse=True)
        return _select(self.get_image_key_values(batch.fetch(image_embeds, unique)), inverse)

    @staticmethod
    def _gather_texts(batch: GlobalBatch, input_ids: torch.Tensor, attention_mask: torch.Tensor):
        """Gather the token ids and masks of the texts of all processes."""
        return batch.gather_padded(torch.stack([input_ids, attention_mask], dim=2)).unbind(2)

    def _fetch_texts(self, batch, input_ids, attention_mask, index) -> tuple[torch.Tensor, torch.Tensor]:
        input_ids, attention_mask = self._gather_texts(batch, input_ids, attention_mask)
        return self.embeddings(input_ids=input_ids[index]), attention_mask[index]

    def _second_pass(
        self,
        images: ImageKeyValues,
        negative_images: ImageKeyValues,
        text_embeds: torch.Tensor,
        text_mask: torch.Tensor,
        negative_embeds: torch.Tensor,
        negative_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Return `itm_logits` of the pairs, of negative images with the texts, and of images with negative texts."""
        query_length = self.config.num_query_tokens
        embeds = _cat_padded([text_embeds, text_embeds, negative_embeds])
        mask = _cat_padded([text_mask, text_mask, negative_mask])
        hidden_states = self.qformer(
            query_embeds=torch.cat([self.query_tokens(len(embeds)), embeds], dim=1),
            query_length=query_length,
            attention_mask=torch.cat([mask.new_ones(len(mask), query_length), mask], dim=1),
            encoder_key_values=[images, negative_images, images],
            output_length=query_length,
        ).last_hidden_state
        return self._matching_logits(hidden_states)

    @staticmethod
    def _pair_losses(batch, compared, itm_logits, is_match) -> dict[str, torch.Tensor]:
        rows_per_process = batch.size / batch.world_size
        # Pairs, then negative images and negative texts, which are ignored if a pair has none
        negatives = torch.where(is_match.all(dim=1), -100, 0)
        labels = torch.cat([torch.ones_like(negatives), negatives, negatives])
        return {
            "loss_itc": image_text_contrastive_loss(
                compared["logits_per_image"], compared["logits_per_text"], is_match, num_items=rows_per_process
            ),
            "loss_itm": image_text_matching_loss(itm_logits, labels, batch.mean_share(labels.ne(-100).sum())),
            "itm_logits": itm_logits,
        }

    @classmethod
    def from_encoders_pretrained(
        cls,
        vision_model: str | os.PathLike | PreTrainedModel,
        text_encoder: str | os.PathLike | PreTrainedModel,
        *,
        vision_feature_layer: int | None = None,
        num_query_tokens: int = 32,
        image_text_hidden_size: int = 256,
        load_vision_tower: bool = True,
        query_initialization: str = "words",
        **qformer_kwargs,
    ) -> "Blip2ForPreTraining":
        r"""
        Make a model for stage 1 from a tower, which stays as it is, and a BERT, from which the Q-Former starts.

        Args:
            vision_model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`]):
                Any tower of `AutoModel`, or a model that has one in it (CLIP, SigLIP, LLaVA, BLIP-2).
            text_encoder (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`]):
                Any BERT. Its masked-language-modelling head, if it has one, starts the head for ITG. [DEC] is the
                token after those of its tokenizer: `tokenizer.add_special_tokens({"bos_token": "[DEC]"})`.
            vision_feature_layer (`int`, *optional*):
                Index into the tower's `hidden_states`.
            num_query_tokens (`int`, *optional*, defaults to 32):
                Number of queries.
            image_text_hidden_size (`int`, *optional*, defaults to 256):
                Width of the space in which images and texts are compared.
            load_vision_tower (`bool`, *optional*, defaults to `True`):
                `False` leaves the tower out, to train from its stored output alone (see
                [`~Blip2PreTrainedModel.attach_vision_tower`]).
            query_initialization (`str`, *optional*, defaults to `"words"`):
                How the queries start: `"words"` as BERT's embeddings of random words, which keeps them different in
                training, or `"normal"` from N(0, `initializer_range`), as in the authors' code. The words of a BERT
                with random weights are random vectors too.
            qformer_kwargs (`dict`):
                Fields of [`Blip2QFormerConfig`], such as `cross_attention_frequency`.

        Returns:
            [`Blip2ForPreTraining`].

        Raises:
            ValueError: if `text_encoder` is not a BERT, no tower is in `vision_model`, one of them lacks weights, or
                `query_initialization` is unknown.
        """
        bert, head = load_bert_with_head(text_encoder)
        model: Any
        dec, sep = bert.config.vocab_size, None
        if not isinstance(text_encoder, PreTrainedModel):
            tokenizer = AutoTokenizer.from_pretrained(text_encoder)
            dec, sep = len(tokenizer), tokenizer.sep_token_id
        own = {
            "use_qformer_text_input": True,
            "bos_token_id": dec,
            "eos_token_id": sep,
            "vocab_size": max(bert.config.vocab_size, dec + 1),
        } | qformer_kwargs
        model = image_side_from_parts(
            vision_model,
            bert,
            vision_feature_layer,
            num_query_tokens,
            model_class=cls,
            load_vision_tower=load_vision_tower,
            image_text_hidden_size=image_text_hidden_size,
            query_initialization=query_initialization,
            **own,
        )
        if head is not None:
            model.lm_head.transform.load_state_dict(head.transform.state_dict())
            with torch.no_grad():
                model.lm_head.bias[: len(head.bias)] = head.bias
        return model


Blip2ForPreTraining = Blip2HfForPreTraining


def _cat_padded(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Join the rows of several tensors, with zeros after those that are shorter in their second axis."""
    length = max(tensor.shape[1] for tensor in tensors)
    trailing = (0, 0) * (tensors[0].dim() - 2)
    return torch.cat([nn.functional.pad(tensor, (*trailing, 0, length - tensor.shape[1])) for tensor in tensors])


def _select(images: ImageKeyValues, index: torch.Tensor) -> ImageKeyValues:
    return tuple((key.index_select(0, index), value.index_select(0, index)) for key, value in images)


__all__ = ["Blip2ForPreTraining", "Blip2ForPreTrainingOutput"]
