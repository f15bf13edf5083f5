"""What transformers calls keys and values in arguments and outputs: `cache` from 5.24 on, `past_key_values` before."""

from dataclasses import fields

from transformers.modeling_outputs import CausalLMOutputWithPast


CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = next(name for name in CACHE_NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)})
