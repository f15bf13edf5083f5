"""The options --load-in-4bit and --load-in-8bit."""

import argparse
from importlib.util import find_spec
from typing import Any


_NARROWEST_IN_4_BITS = 64  # bitsandbytes has scales for blocks of 64


def quantization_bits(options: argparse.Namespace) -> int | None:
    """Return 4, 8 or, without quantisation, `None`."""
    if options.load_in_4bit and options.load_in_8bit:
        raise ValueError("--load-in-4bit and --load-in-8bit: give one of the two.")
    bits = 4 if options.load_in_4bit else 8 if options.load_in_8bit else None
    if bits is not None and find_spec("bitsandbytes") is None:
        raise ImportError('--load-in-4bit and --load-in-8bit need bitsandbytes: pip install "blip2-hf[quantization]".')
    return bits


def check_width(bits: int | None, **configs: Any):
    """Refuse 4 bits of parts that are too narrow for them. `configs` are those of the parts that are quantised."""
    for part, config in configs.items():
        width, name = getattr(config, "hidden_size", None), part.replace("_", " ")
        if bits == 4 and width is not None and width < _NARROWEST_IN_4_BITS:
            raise ValueError(
                f"--load-in-4bit: the {name} is {width} wide, and {_NARROWEST_IN_4_BITS} are needed. Leave the option "
                "out: so small a model fits as it is."
            )
