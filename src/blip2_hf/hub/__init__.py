"""Sharing on the Hub: the code that a model needs without this package, the model card, and pushes in one commit."""

from .model_card import write_model_card
from .remote_code import is_of_this_package, write_code, write_code_and_card
from .upload import fetch_card, file_states, push, push_saved


__all__ = [
    "fetch_card",
    "file_states",
    "is_of_this_package",
    "push",
    "push_saved",
    "write_code",
    "write_code_and_card",
    "write_model_card",
]
