"""The cache of keys and values, which transformers names `cache` from 5.24 on and `past_key_values` before."""

from dataclasses import fields

from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast


CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = next(name for name in CACHE_NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)})


def cached_length(cache: Cache | None) -> int | None:
    """Return the number of positions in a cache; `None` for the states of a recurrent model, which have none."""
    if cache is None:
        return 0
    try:
        return cache.get_seq_length()
    except ValueError:
        return None
