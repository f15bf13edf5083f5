"""Initialisation of the Q-Former from a BERT (section 3.1)."""

import os
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModel
from transformers.models.bert.modeling_bert import BertForMaskedLM

from .backbones import load_whole
from .configuration_blip2 import Blip2QFormerConfig


QUERY_INITIALIZATIONS = ("words", "normal")


def load_bert(text_encoder: str | os.PathLike | PreTrainedModel) -> PreTrainedModel:
    """Load the [`~transformers.BertModel`] inside any BERT; its pooler, which is not read, may be missing."""
    if isinstance(text_encoder, PreTrainedModel):
        model, given = text_encoder, type(text_encoder).__name__
    else:
        model = load_whole(AutoModel, text_encoder, "A checkpoint of a BERT", not_needed=("pooler.",))
        given = str(text_encoder)
    bert = getattr(model, "bert", model)
    if bert.config.model_type != "bert":
        raise ValueError(f"A Q-Former starts from a BERT, but {given} is of type {bert.config.model_type!r}.")
    return bert


def load_bert_with_head(text_encoder: str | os.PathLike | PreTrainedModel) -> tuple[PreTrainedModel, nn.Module | None]:
    """Load the [`~transformers.BertModel`] inside any BERT, and its masked-language-modelling head if it has one."""
    if isinstance(text_encoder, PreTrainedModel):
        head = getattr(getattr(text_encoder, "cls", None), "predictions", None)
        return load_bert(text_encoder), head
    bert = load_bert(text_encoder)
    loaded: Any = BertForMaskedLM.from_pretrained(text_encoder, output_loading_info=True)
    model, info = loaded
    has_head = not any(name.startswith("cls.predictions.transform") for name in info["missing_keys"])
    return bert, model.cls.predictions if has_head else None


def qformer_config_from_bert(bert_config, **kwargs) -> Blip2QFormerConfig:
    """Return the configuration of a Q-Former with the sizes of a BERT. Keyword arguments override them."""
    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "max_position_embeddings",
        "layer_norm_eps",
        "pad_token_id",
    )
    # BERT has no [DEC]: the caller that adds it gives its id
    fields = {name: getattr(bert_config, name) for name in names} | {"bos_token_id": None}
    return Blip2QFormerConfig(**(fields | kwargs))


@torch.no_grad()
def copy_bert_weights(bert: PreTrainedModel, qformer: PreTrainedModel, embeddings: nn.Module | None = None):
    """
    Copy the weights of a BERT into a Q-Former of the same sizes, except those of token types, which it lacks.

    Args:
        bert ([`~transformers.BertModel`]):
            The source.
        qformer ([`Blip2QFormerModel`]):
            The target. Its feed-forward networks for queries start as copies of those for text.
        embeddings (`Blip2TextEmbeddings`, *optional*):
            Text embeddings. Rows beyond BERT's vocabulary are not changed.
    """
    qformer.layernorm.load_state_dict(bert.embeddings.LayerNorm.state_dict())
    for source, target in zip(bert.encoder.layer, qformer.encoder.layer, strict=True):
        for name in ("query", "key", "value"):
            state = getattr(source.attention.self, name).state_dict()
            getattr(target.attention.attention, name).load_state_dict(state)
        target.attention.output.load_state_dict(source.attention.output.state_dict())
        for suffix in ("_query", "") if qformer.config.use_qformer_text_input else ("_query",):
            getattr(target, f"intermediate{suffix}").load_state_dict(source.intermediate.state_dict())
            getattr(target, f"output{suffix}").load_state_dict(source.output.state_dict())
    if embeddings is not None:
        for name in ("word_embeddings", "position_embeddings"):
            weight = getattr(bert.embeddings, name).weight
            getattr(embeddings, name).weight[: len(weight)] = weight


@torch.no_grad()
def start_queries_from_words(bert: PreTrainedModel, queries: torch.Tensor):
    """
    Set queries to a BERT's embeddings of random words, one at each position: word + position embedding, which the
    Q-Former's first LayerNorm is given for texts too. BERT's layers keep such vectors apart, and pull vectors from
    N(0, 0.02) together.

    The words are different tokens of the middle half of the vocabulary, because special and unused tokens and single
    characters stand at its beginning, and added tokens at its end. They depend on torch's seed, and drawing them does
    not change what is drawn later. Words or positions repeat if there are fewer than queries.

    Args:
        bert ([`~transformers.BertModel`]):
            The source.
        queries (`torch.Tensor` of shape `(1, num_query_tokens, hidden_size)`):
            The queries, which are written in place, in their own dtype.
    """
    embeddings: Any = bert.embeddings
    words, positions = embeddings.word_embeddings.weight, embeddings.position_embeddings.weight
    first, last = len(words) // 4, len(words) - len(words) // 4
    with torch.random.fork_rng(devices=[]):
        drawn = first + torch.randperm(last - first, device="cpu")
    index = torch.arange(queries.shape[1], device="cpu")
    queries.copy_((words[drawn[index % len(drawn)]] + positions[index % len(positions)])[None])


def check_query_initialization(query_initialization: str):
    """
    Check the name of a start of the queries.

    Raises:
        ValueError: if it is neither `"words"` nor `"normal"`.
    """
    if query_initialization not in QUERY_INITIALIZATIONS:
        expected = " or ".join(f'"{name}"' for name in QUERY_INITIALIZATIONS)
        raise ValueError(f"query_initialization is {query_initialization!r}: {expected} was expected.")


__all__ = [
    "QUERY_INITIALIZATIONS",
    "check_query_initialization",
    "copy_bert_weights",
    "load_bert",
    "load_bert_with_head",
    "qformer_config_from_bert",
    "start_queries_from_words",
]
