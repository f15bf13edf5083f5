"""Log-probabilities of given texts: image and prompt are read once, then all candidates."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from ._compat import CACHE_NAME, cached_length
from .generation_blip2 import generating_part, pad_left
from .generation_presets import NORMALIZATIONS
from .text_inputs import decoder_inputs, text_positions


# From the rows of prompts, and the labels of one candidate for each, to the log-probability of each label
_Scorer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Blip2ScoringMixin:
    """`score_texts` and `rank_texts` of [`Blip2ForConditionalGeneration`]."""

    @torch.no_grad()
    def score_texts(
        self,
        candidate_labels: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        normalization: str = "sum",
        chunk_size: int = 32,
    ) -> torch.Tensor:
        r"""
        Compute how likely the language model finds given texts, after an image and a prompt. The tower, the Q-Former
        and the prompt are read once for all candidates. Language models with recurrent states are the exception: they
        read the prompt with each candidate.

        Args:
            candidate_labels (`torch.LongTensor` of shape `(batch_size, num_candidates, candidate_length)` or \
`(num_candidates, candidate_length)`):
                Token ids of the candidates of each prompt, or of the same candidates for all; -100 is padding, behind
                the tokens. [`Blip2Processor`] makes them of `candidates`.
            pixel_values, input_ids, attention_mask, image_embeds, image_features, qformer_input_ids, \
qformer_attention_mask, interpolate_pos_encoding:
                As in `generate`.
            normalization (`str`, *optional*, defaults to `"sum"`):
                `"sum"` is the log-probability of a text. `"mean"` divides it by the number of tokens, so that long
                texts are not at a disadvantage. `"relative"` subtracts the log-probability after the prompt alone, so
                that texts which are frequent in any case are not at an advantage.
            chunk_size (`int`, *optional*, defaults to 32):
                Candidates of a prompt at a time. Their memory is that of a batch of `batch_size * chunk_size` texts.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_candidates)`: natural logarithms, `-inf` for a candidate
            without tokens. `scores.softmax(dim=-1)` are the probabilities of the candidates among each other.

        Raises:
            ValueError: if labels and prompts do not match, or an argument has another value, or the prompt has no
                token that a decoder-only language model could go on from.

        Example:

        ```python
        >>> prompt = "Question: what is the animal? Answer:"
        >>> inputs = processor(images="cat.jpg", text=prompt, candidates=["a cat", "a dog"], return_tensors="pt")
        >>> model.score_texts(**inputs).softmax(dim=-1)
        ```"""
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization={normalization!r}: one of {', '.join(NORMALIZATIONS)} was expected.")
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}: at least 1 was expected.")
        image_features, _ = self._image_features(
            image_features,
            pixel_values,
            image_embeds,
            qformer_input_ids=qformer_input_ids,
            qformer_attention_mask=qformer_attention_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        if image_features is None and (input_ids is None or normalization == "relative"):
            raise ValueError("There is no image: give pixel_values, image_embeds or image_features.")
        if input_ids is None:
            num_images, image_length, _ = image_features.shape
            input_ids = self._start_tokens(num_images, image_length, image_features.device)
            attention_mask = None
        self._check_adapters()
        labels = _labels_of_each(candidate_labels, len(input_ids))
        prompt = self._embedded_prompt(image_features, input_ids, attention_mask)
        self._check_positions(prompt[1], labels)
        scores = _score_in_chunks(self._scorer(*prompt), labels, chunk_size)
        if normalization == "mean":
            scores = scores / labels.ne(-100).sum(dim=-1)
        elif normalization == "relative":
            text_alone = self._embedded_prompt(None, *self._without_images(input_ids, attention_mask))
            scores = scores - _score_in_chunks(self._scorer(*text_alone), labels, chunk_size)
        return scores.masked_fill(labels.eq(-100).all(dim=-1), -torch.inf)

    def rank_texts(self, candidate_labels: torch.Tensor, **kwargs) -> torch.Tensor:
        r"""
        Rank given texts, the likeliest first.

        Args:
            candidate_labels, kwargs:
                As in [`~Blip2ForConditionalGeneration.score_texts`].

        Returns:
            `torch.LongTensor` of shape `(batch_size, num_candidates)`: numbers of the candidates. With the default
            normalization it is the order of LAVIS's `predict_class`.
        """
        return self.score_texts(candidate_labels, **kwargs).argsort(dim=-1, descending=True, stable=True)

    def _check_positions(self, attention_mask: torch.Tensor, labels: torch.Tensor):
        """Refuse candidates that are longer than what the language model has positions for."""
        limit = getattr(self.config.text_config, "max_position_embeddings", None)
        # The last token is scored, and not read
        longest = int(labels.ne(-100).sum(dim=-1).max()) - 1
        used = 1 if self.config.is_encoder_decoder else int(attention_mask.sum(dim=1).max())
        if limit is not None and used + longest > limit:
            raise ValueError(
                f"The longest candidate has {longest + 1} tokens, and image and prompt have {used}: the language "
                f"model has {limit} positions. Give candidates of at most {max(0, limit - used + 1)} tokens."
            )

    def _embedded_prompt(
        self, image_features: torch.Tensor | None, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the prompts' embeddings and mask, with padding on the side that the language model expects."""
        if image_features is not None:
            prompt = self._insert_image_features(image_features, input_ids, attention_mask)
        else:
            self._check_text_without_image(input_ids)
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            embeds = self.get_input_embeddings()(input_ids)
            prompt = {"inputs_embeds": embeds, "attention_mask": mask, "input_ids": None, "is_image": None}
        if not self.config.is_encoder_decoder:
            prompt = pad_left(prompt)
            self._check_padding(prompt["attention_mask"])
        return prompt["inputs_embeds"], prompt["attention_mask"]

    def _without_images(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the prompts without their placeholders, and their mask."""
        is_text = torch.ones_like(input_ids) if attention_mask is None else attention_mask.ne(0).long()
        if self.config.image_token_index is not None:
            is_text = is_text * input_ids.ne(self.config.image_token_index)
        lengths = is_text.sum(dim=1)
        if int(lengths.min()) == 0:
            raise ValueError(
                f"The prompt of row {int(lengths.argmin())} has no token but those of its image, and "
                "normalization='relative' compares with the prompt alone. Give a prompt, such as 'a photo of'."
            )
        is_right = self.config.is_encoder_decoder
        order = is_text.argsort(dim=1, stable=True, descending=is_right)
        kept = is_text.gather(1, order).any(dim=0)
        # A placeholder may have no embedding
        input_ids = input_ids.masked_fill(is_text.eq(0), self.config.pad_token_id or 0)
        return input_ids.gather(1, order)[:, kept], is_text.gather(1, order)[:, kept]

    def _scorer(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> _Scorer:
        """Read the prompts. Return a function that reads candidates after them."""
        language_model: Any = self.language_model
        if self.config.is_encoder_decoder:
            encoder = language_model.get_encoder()
            encoded = encoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask, return_dict=True)

            def score_after_encoder(rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
                logits = language_model(
                    encoder_outputs=type(encoded)(**encoded | {"last_hidden_state": encoded.last_hidden_state[rows]}),
                    attention_mask=attention_mask[rows],
                    decoder_input_ids=decoder_inputs(language_model, labels),
                    use_cache=False,
                ).logits
                return _log_probs(logits, labels)

            return score_after_encoder
        cache, logits = None, None
        if not generating_part(language_model)._is_stateful:
            last = {"logits_to_keep": 1} if self.accepts_logits_to_keep else {}
            outputs = language_model(**self._text(inputs_embeds, attention_mask), **last, use_cache=True)
            cache, logits = outputs.get(CACHE_NAME), outputs.logits[:, -1:]
        # A cache of another kind may hold states that can't be copied row by row, and one that is not of the length of
        # the prompt was not filled, as with gradient checkpointing
        if type(cache) is not DynamicCache or cached_length(cache) != inputs_embeds.shape[1]:
            return lambda rows, labels: self._score_whole(inputs_embeds[rows], attention_mask[rows], labels)
        return lambda rows, labels: self._score_after_cache(cache, logits, attention_mask, rows, labels)

    def _score_after_cache(self, cache, logits, attention_mask, rows, labels) -> torch.Tensor:
        """Return log-probabilities of labels after the prompts whose cache and last logits are given."""
        logits = logits[rows.to(logits.device)]
        if labels.shape[1] > 1:
            own = copy.deepcopy(cache)
            own.reorder_cache(rows)
            ids = labels[:, :-1]
            mask = torch.cat([attention_mask[rows], ids.ne(-100).long()], dim=1)
            embeds = self.get_input_embeddings()(ids.clamp(min=0))
            outputs = self.language_model(**self._text(embeds, mask), **{CACHE_NAME: own}, use_cache=True)
            logits = torch.cat([logits, outputs.logits], dim=1)
        return _log_probs(logits, labels)

    def _score_whole(self, inputs_embeds, attention_mask, labels) -> torch.Tensor:
        """Return the same without a cache, for language models whose states do not go on from several tokens."""
        ids = labels[:, :-1]
        embeds = self.get_input_embeddings()(ids.clamp(min=0))
        text = self._text(
            torch.cat([inputs_embeds, embeds.to(inputs_embeds)], dim=1),
            torch.cat([attention_mask, ids.ne(-100).long()], dim=1),
        )
        logits = self.language_model(**text, use_cache=False).logits
        return _log_probs(logits[:, -labels.shape[1] :], labels)

    def _text(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the language model's inputs for embedded text, whose mask may cover a cache too."""
        text = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        if self.accepts_position_ids:
            text["position_ids"] = text_positions(None, **text)
        return text


def _labels_of_each(candidate_labels: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Return labels of shape `(batch_size, num_candidates, candidate_length)`."""
    shape = tuple(candidate_labels.shape)
    labels = candidate_labels.expand(batch_size, *shape) if len(shape) == 2 else candidate_labels
    if labels.dim() != 3 or len(labels) != batch_size or 0 in shape or labels.dtype != torch.long:
        raise ValueError(
            f"candidate_labels of shape {shape} and {labels.dtype} for {batch_size} prompts: torch.int64 of shape "
            "(num_candidates, candidate_length) or (batch_size, num_candidates, candidate_length) was expected. Let "
            "Blip2Processor make them of candidates."
        )
    if bool((labels[..., :-1].eq(-100) & labels[..., 1:].ne(-100)).any()):
        raise ValueError("candidate_labels have -100 before a token: padding was expected behind the tokens.")
    return labels


def _score_in_chunks(scorer: _Scorer, labels: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Return log-probabilities of shape `(batch_size, num_candidates)` of labels with a dimension of tokens more."""
    scores = []
    for chunk in labels.split(chunk_size, dim=1):
        # No longer than its longest candidate
        chunk = chunk[..., : max(1, int(chunk.ne(-100).sum(dim=-1).max()))]
        rows = torch.arange(len(chunk), device=chunk.device).repeat_interleave(chunk.shape[1])
        scores.append(scorer(rows, chunk.flatten(0, 1)).sum(dim=-1).view(chunk.shape[:2]).to(labels.device))
    return torch.cat(scores, dim=1)


def _log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each label, 0 at padding."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten().to(logits.device), reduction="none")
    return -losses.view(labels.shape)


__all__ = ["Blip2ScoringMixin"]
