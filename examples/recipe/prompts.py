"""
Measure how well the frozen language model repeats a word that it is given as an embedding, for several prompts.

Stage 2 gives a picture in the same way. Prompts differ in their examples, and in how often they have the embedding.

    python examples/recipe/prompts.py
"""

import sys
from pathlib import Path

import torch
import transformers
from pictures import load_pictures
from transformers import AutoModelForCausalLM, AutoTokenizer


sys.path.insert(0, str(Path(__file__).parents[1]))
from precision import device_type, fast_dtype  # noqa: E402
from real_assets import real_assets  # noqa: E402


# {} is where the embedding goes
PROMPTS = (
    "dog = dog\n{} =",
    "dog = dog\nred apple = red apple\n{} =",
    "dog: dog\nred apple: red apple\n{}:",
    "dog: dog\nred apple: red apple\ncoffee: coffee\n{}:",
)


@torch.no_grad()
def repeats(model, tokenizer, prompt: str, names: list[str], times: int) -> list[bool]:
    """Tell for each name if the model writes it, given the mean of its word embeddings `times` times in a row."""
    embed = model.get_input_embeddings()

    def embedded(token_ids: list[int]) -> torch.Tensor:
        return embed(torch.tensor(token_ids, device=model.device))

    before, after = (embedded(tokenizer(part)["input_ids"]) for part in prompt.split("{}"))
    words = [tokenizer(" " + name)["input_ids"] for name in names]
    middle = torch.stack([embedded(token_ids).float().mean(dim=0) for token_ids in words]).to(before.dtype)
    rows = len(names)
    embeds = torch.cat(
        [before.expand(rows, -1, -1), middle[:, None].expand(-1, times, -1), after.expand(rows, -1, -1)], dim=1
    )
    tokens = model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=model.device),
        max_new_tokens=max(map(len, words)) + 1,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    lines = [text.strip().split("\n")[0].strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    return [line == name for line, name in zip(lines, names, strict=True)]


def main():
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(real_assets().language_model)
    model = AutoModelForCausalLM.from_pretrained(real_assets().language_model, dtype=fast_dtype())
    model.to(device_type()).eval()
    by_length: dict[int, list[str]] = {1: [], 2: []}
    for name in sorted(set(load_pictures()["train"]["name"])):
        by_length.setdefault(len(tokenizer(" " + name)["input_ids"]), []).append(name)
    print("| prompt | times | names of one token, % | of two, % |\n|---|---|---|---|")
    for prompt in PROMPTS:
        for times in (1, 4):
            right = [repeats(model, tokenizer, prompt, by_length[length], times) for length in (1, 2)]
            shares = " | ".join(f"{100 * sum(part) / len(part):.0f}" for part in right)
            print(f"| `{prompt!r}` | {times} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
