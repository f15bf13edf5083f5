"""Texts of the processor as token ids: prompts with places for images, targets, candidates, instructions."""

from typing import Any


class Blip2TextEncodingMixin:
    """Encoding of texts in [`Blip2Processor`], whose attributes it reads."""

    tokenizer: Any
    qformer_tokenizer: Any
    image_token: str
    image_token_id: int
    num_query_tokens: int | None
    is_encoder_decoder: bool
    end_token_id: int
    _ends_texts: bool

    def _encode(
        self, texts: list[str], targets: list[str] | None, counts: list[int], text_kwargs: dict[str, Any]
    ) -> dict[str, list]:
        text_kwargs = dict(text_kwargs)
        padding = {
            name: text_kwargs.pop(name)
            for name in ("padding", "padding_side", "pad_to_multiple_of")
            if name in text_kwargs
        }
        appended = targets is not None and not self.is_encoder_decoder
        max_length = text_kwargs.get("max_length")
        suffixes = targets if targets is not None and appended else [None] * len(texts)
        rows = [
            self._encode_one(text, suffix, count, text_kwargs)
            for text, suffix, count in zip(texts, suffixes, counts, strict=True)
        ]
        if not appended:
            padding.setdefault("padding_side", "right" if self.is_encoder_decoder else "left")
        data = self._pad(rows, "right", padding, max_length)
        if targets is not None and not appended:
            data["labels"] = self._encode_targets(targets, text_kwargs)
        return data

    def _encode_one(self, text: str, target: str | None, count: int, text_kwargs: dict[str, Any]) -> dict[str, list]:
        """Return `input_ids` (and `labels`) of one sample: images in front, then the text with its images inside."""
        while text.startswith(self.image_token):
            text, count = text[len(self.image_token) :], count + 1
        marks = text.count(self.image_token)
        kwargs = {k: v for k, v in text_kwargs.items() if k not in ("return_attention_mask", "return_tensors")}
        if kwargs.get("max_length") is not None:
            kwargs["max_length"] += marks
        if target is None:
            ids, labels = self._encode_prompt(text, kwargs), None
        else:
            ids, labels = self._encode_with_target(text, target, kwargs)
        if ids.count(self.image_token_id) != marks:
            raise ValueError(
                f"max_length={text_kwargs.get('max_length')} cuts off an `{self.image_token}` of {text!r}. Allow more."
            )
        num_query_tokens = self.num_query_tokens or 0
        repeats = [num_query_tokens if token == self.image_token_id else 1 for token in ids]
        front = num_query_tokens * count
        row = {"input_ids": [self.image_token_id] * front + repeat_each(ids, repeats)}
        if labels is not None:
            row["labels"] = [-100] * front + repeat_each(labels, repeats)
        return row

    def _encode_with_target(self, prompt: str, target: str, kwargs: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Encode the prompt and the target as one text, so that the tokens at the seam are those of the whole text."""
        truncation, max_length = kwargs.get("truncation"), kwargs.get("max_length")
        kwargs = {k: v for k, v in kwargs.items() if k not in ("truncation", "max_length")}
        end = self.end_token_id
        if prompt.endswith(" "):
            # In generation this space is a token of its own, so that the target has none
            ids = self._encode_prompt(prompt, kwargs)
            prompt_length = len(ids)
            ids = ids + self.tokenizer(target, **(kwargs | {"add_special_tokens": False}))["input_ids"]
        else:
            seam = "" if not prompt or prompt[-1].isspace() or target[:1].isspace() else " "
            encoding = self.tokenizer(prompt + seam + target, return_offsets_mapping=True, **kwargs)
            ids = self._without_end(encoding["input_ids"])
            starts = [start for start, _ in encoding["offset_mapping"][: len(ids)]]
            prompt_length = sum(start < len(prompt) for start in starts)
            if not prompt:
                # Everything is learned except the tokens that the tokenizer puts in front of any text
                prompt_length = len(self._encode_prompt("", kwargs))
        if truncation and max_length is not None:
            ids = ids[: max_length - 1]
        labels = [-100] * min(prompt_length, len(ids)) + ids[prompt_length:]
        return [*ids, end], [*labels, end]

    def _encode_prompt(self, text: str, kwargs: dict[str, Any]) -> list[int]:
        """Encode a text to be continued, without the end token that the tokenizers of some decoders put behind it."""
        ids = self.tokenizer(text, **kwargs)["input_ids"]
        is_ended = kwargs.get("add_special_tokens", True) and not self.is_encoder_decoder and self._ends_texts
        return ids[:-1] if is_ended else ids

    def _without_end(self, ids: list[int]) -> list[int]:
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids

    def _encode_targets(self, targets: list[str], text_kwargs: dict[str, Any]) -> list[list[int]]:
        kwargs = {k: v for k, v in text_kwargs.items() if k not in ("return_attention_mask", "return_tensors")}
        rows = [self.tokenizer(text_target=target, **kwargs)["input_ids"] for target in targets]
        longest = max(map(len, rows))
        return [row + [-100] * (longest - len(row)) for row in rows]

    def _encode_candidates(
        self, texts: list[str], candidates: Any, with_end: bool, text_kwargs: dict[str, Any]
    ) -> list[list[list[int]]]:
        """Return the tokens of the candidates of each prompt, with -100 at padding."""
        names = ("add_special_tokens", "split_special_tokens")
        kwargs = {name: text_kwargs[name] for name in names if name in text_kwargs}
        rows = [
            [self._encode_candidate(text, candidate, with_end, kwargs) for candidate in own]
            for text, own in zip(texts, _candidates_of_each(candidates, len(texts), self.image_token), strict=True)
        ]
        most, longest = max(map(len, rows)), max(len(ids) for row in rows for ids in row)
        padded = [[ids + [-100] * (longest - len(ids)) for ids in row] for row in rows]
        return [row + [[-100] * longest] * (most - len(row)) for row in padded]

    def _encode_candidate(self, text: str, candidate: str, with_end: bool, kwargs: dict[str, Any]) -> list[int]:
        if self.is_encoder_decoder:
            ids = self.tokenizer(text_target=candidate, **kwargs)["input_ids"]
            return ids if with_end else self._without_end(ids)
        prompt = text
        while prompt.startswith(self.image_token):
            prompt = prompt[len(self.image_token) :]
        ids, labels = self._encode_with_target(prompt, candidate, kwargs)
        start = len(labels) - sum(label != -100 for label in labels)
        if ids[:start] != self._encode_prompt(prompt, kwargs):
            raise ValueError(
                f"The last token of the prompt {text!r} changes if {candidate!r} follows. End the prompt with a word, "
                "a punctuation mark or a space."
            )
        return ids[start:] if with_end else ids[start:-1]

    def _encode_instructions(
        self, texts: list[str], repeats: list[int] | None, text_kwargs: dict[str, Any]
    ) -> dict[str, list]:
        names = ("padding", "pad_to_multiple_of", "truncation", "max_length", "split_special_tokens")
        kwargs = {name: text_kwargs[name] for name in names if name in text_kwargs}
        # One instruction for each image of the text
        plain = repeat_each(
            [text.replace(self.image_token, " ").strip() for text in texts], repeats or [1] * len(texts)
        )
        encoding = self.qformer_tokenizer(plain, **({"padding": True} | kwargs))
        return {f"qformer_{name}": encoding[name] for name in ("input_ids", "attention_mask")}

    def _pad(
        self, rows: list[dict[str, list]], side: str, padding: dict[str, Any], max_length: int | None
    ) -> dict[str, list]:
        """Pad rows to one length. `padding="max_length"` leaves room for `max_length` tokens of text in each."""
        strategy = padding.get("padding", True)
        side = padding.get("padding_side") or side
        lengths = [len(row["input_ids"]) for row in rows]
        length = max(lengths)
        if strategy == "max_length" and max_length is not None:
            length = max(length, max_length + max(row["input_ids"].count(self.image_token_id) for row in rows))
        multiple = padding.get("pad_to_multiple_of") or 1
        length = -(-length // multiple) * multiple
        fill = {"input_ids": self.tokenizer.pad_token_id, "labels": -100, "attention_mask": 0}
        data: dict[str, list] = {name: [] for name in (*rows[0], "attention_mask")}
        for row in rows:
            row["attention_mask"] = [1] * len(row["input_ids"])
            missing = 0 if strategy in (False, "do_not_pad") else length - len(row["input_ids"])
            for name, values in row.items():
                pads = [fill[name]] * missing
                data[name].append(pads + values if side == "left" else values + pads)
        return data


def _candidates_of_each(candidates: Any, num_texts: int, image_token: str) -> list[list[str]]:
    """Return a list of candidates for each prompt."""
    rows = [candidates] * num_texts if candidates and isinstance(candidates[0], str) else candidates
    if isinstance(candidates, str) or not rows or not all(isinstance(row, (list, tuple)) and row for row in rows):
        raise ValueError(f"candidates is {candidates!r}: a list of strings, or one for each text, was expected.")
    if len(rows) != num_texts:
        raise ValueError(f"{len(rows)} lists of candidates for {num_texts} texts: one for each text was expected.")
    for text in (text for row in rows for text in row):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"A candidate is {text!r}: a string that is not empty was expected.")
        if image_token in text:
            raise ValueError(f"The candidate {text!r} has {image_token!r}, which stands for an image. Leave it out.")
    return rows


def repeat_each(values: list, repeats: list[int]) -> list:
    """Return values, each as often as its number says."""
    return [value for value, count in zip(values, repeats, strict=True) for _ in range(count)]


__all__ = ["Blip2TextEncodingMixin"]
