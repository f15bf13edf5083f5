"""Stage 1 as the authors' code computes it: four passes of the Q-Former, the image projected in each that needs it."""

import torch
from torch.nn.functional import cross_entropy, normalize, pad
from transformers import DynamicCache

from blip2_hf.models.modeling_qformer import QFormerTextCache


def naive_stage1(model, image_embeds, input_ids, attention_mask, image_ids=None, pad_to=None) -> dict:
    """
    Losses and what they come from; `image_embeds` is the tower's output.

    `pad_to`: the authors pad every text to 32 tokens.
    """
    if pad_to is not None:
        missing = pad_to - input_ids.shape[1]
        input_ids, attention_mask = pad(input_ids, (0, missing)), pad(attention_mask, (0, missing))
    batch_size, query_length = len(input_ids), model.config.num_query_tokens
    image = model.vision_model.post_layernorm(image_embeds)
    queries = model.query_tokens.weight.expand(batch_size, -1, -1)

    # 1: queries
    cache = DynamicCache()
    query_output = model.qformer(
        query_embeds=queries, encoder_hidden_states=image, past_key_values=cache
    ).last_hidden_state
    image_features = normalize(model.vision_projection(query_output), dim=-1)
    # 2: text
    text_output = model.qformer(
        query_embeds=model.embeddings(input_ids=input_ids), query_length=0, attention_mask=attention_mask
    ).last_hidden_state
    text_features = normalize(model.text_projection(text_output[:, 0]), dim=-1)

    similarity = torch.einsum("iqd,td->itq", image_features, text_features).max(dim=-1).values
    logits_per_image = similarity / model.temperature.weight
    logits_per_text = logits_per_image.T
    ids = torch.arange(batch_size) if image_ids is None else image_ids
    same = ids[:, None].to(input_ids.device) == ids[None, :].to(input_ids.device)
    targets = same.to(logits_per_image.dtype)
    targets = 0.9 * targets / targets.sum(1, keepdim=True) + 0.1 / batch_size
    loss_itc = (cross_entropy(logits_per_image, targets) + cross_entropy(logits_per_text, targets)) / 2

    with torch.no_grad():
        negative_image = torch.multinomial(logits_per_text.masked_fill(same, -torch.inf).softmax(1), 1)[:, 0]
        negative_text = torch.multinomial(logits_per_image.masked_fill(same, -torch.inf).softmax(1), 1)[:, 0]

    # 3: queries and text, three times the batch
    ids_all = torch.cat([input_ids, input_ids, input_ids[negative_text]])
    mask_all = torch.cat([attention_mask, attention_mask, attention_mask[negative_text]])
    images_all = torch.cat([image, image[negative_image], image])
    queries_all = model.query_tokens.weight.expand(3 * batch_size, -1, -1)
    itm_output = model.qformer(
        query_embeds=model.embeddings(input_ids=ids_all, query_embeds=queries_all),
        query_length=query_length,
        attention_mask=torch.cat([mask_all.new_ones(3 * batch_size, query_length), mask_all], dim=1),
        encoder_hidden_states=images_all,
    ).last_hidden_state
    itm_logits = model.itm_head(itm_output[:, :query_length]).mean(dim=1)
    itm_labels = torch.cat([torch.ones(batch_size), torch.zeros(2 * batch_size)]).long().to(input_ids.device)
    loss_itm = cross_entropy(itm_logits, itm_labels)

    # 4: text, causally, over the queries' keys and values of pass 1
    decoder_ids = input_ids.clone()
    decoder_ids[:, 0] = model.config.qformer_config.bos_token_id
    length = decoder_ids.shape[1]
    causal = torch.ones(batch_size, length, length, dtype=torch.bool, device=input_ids.device).tril()
    causal &= attention_mask[:, None, :].bool()
    query_key_values = torch.stack([torch.stack([layer.keys, layer.values], 1) for layer in cache.layers], 1)
    lm_output = model.qformer(
        query_embeds=model.embeddings(input_ids=decoder_ids),
        query_length=0,
        attention_mask=torch.cat([causal.new_ones(batch_size, length, query_length), causal], dim=2),
        past_key_values=QFormerTextCache(query_key_values, DynamicCache()),
    ).last_hidden_state
    lm_logits = model.lm_head(lm_output)
    labels = input_ids.masked_fill(attention_mask == 0, -100)[:, 1:]
    loss_itg = cross_entropy(lm_logits[:, :-1].flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    return {
        "loss": loss_itc + loss_itm + loss_itg,
        "loss_itc": loss_itc,
        "loss_itm": loss_itm,
        "loss_itg": loss_itg,
        "logits_per_image": logits_per_image,
        "logits_per_text": logits_per_text,
        "itm_logits": itm_logits,
        "itg_logits": lm_logits[:, :-1][labels != -100],
        "negative_image_index": negative_image,
        "negative_text_index": negative_text,
    }
