"""The obvious way to the log-probability of a text: the model reads image, prompt and text once for each of them."""

import torch


@torch.no_grad()
def scores_by_forward(model, pixel_values, prompts: list[list[int]], candidates: list[list[int]]) -> torch.Tensor:
    """Return log-probabilities of shape `(len(prompts), len(candidates))`, with an image for each prompt or none."""
    scores = torch.zeros(len(prompts), len(candidates))
    for row, prompt in enumerate(prompts):
        image = {} if pixel_values is None else {"pixel_values": pixel_values[row : row + 1]}
        for column, candidate in enumerate(candidates):
            labels = torch.tensor([candidate])
            if model.config.is_encoder_decoder:
                logits = model(**image, input_ids=torch.tensor([prompt]), labels=labels).logits
            else:
                ids = torch.tensor([prompt + candidate])
                logits = model(**image, input_ids=ids, use_cache=False).logits[:, -len(candidate) - 1 : -1]
            scores[row, column] = logits.float().log_softmax(-1).gather(2, labels[..., None]).sum()
    return scores


def pad_candidates(candidates: list[list[int]]) -> torch.Tensor:
    length = max(map(len, candidates))
    return torch.tensor([candidate + [-100] * (length - len(candidate)) for candidate in candidates])
