"""Saving and pushing to the Hub, alike for models, processors and pipelines."""

import os
from typing import Any


_PUSH_ARGUMENTS = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr")


class HubMixin:
    """
    A mixin that adds the code and the model card to `save_pretrained` and `push_to_hub` of a transformers class. A
    copy of this file on the Hub, without the package, leaves both to transformers.
    """

    # Whether save_pretrained writes the code if with_code is not given: Trainer does not give it
    saves_code = False

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args, with_code: bool | None = None, **kwargs
    ) -> Any:
        # Pushed below, because transformers would push before the code is there
        hub = _hub(is_needed=False) if with_code is not False and kwargs.get("push_to_hub") else None
        if hub is not None:
            kwargs.pop("push_to_hub")
            push_kwargs = {name: kwargs.pop(name) for name in _PUSH_ARGUMENTS if name in kwargs}
            before = hub.file_states(save_directory)
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self._save_beside(save_directory)
            if with_code:
                self.write_code(save_directory)
            elif with_code is None and self.saves_code:
                _hub().write_code(save_directory, self)
            if hub is not None:
                hub.push_saved(self, save_directory, before, push_kwargs.pop("repo_id", None), **push_kwargs)
        return saved

    def _save_beside(self, save_directory: str | os.PathLike):
        """Write further files of a class."""

    def write_code(self, save_directory: str | os.PathLike):
        """
        Put the code into a folder that `save_pretrained` has written, name it in config.json and
        processor_config.json, and add a model card if there is none: what `with_code=True` does.

        Args:
            save_directory (`str` or `os.PathLike`):
                The folder.
        """
        _hub().write_code_and_card(save_directory, self)

    def push_to_hub(self, repo_id: str, **kwargs):
        r"""
        Push to the Hub in one commit, with the code (see `with_code` of `save_pretrained`) and, unless you have
        written one, a model card.

        Args:
            repo_id (`str`):
                Name of the repository, which is created if it does not exist.
            kwargs:
                Arguments of [`~hub.push`]: `commit_message`, `private`, `token`, `revision`, ... and facts for the
                card, such as `license`, `datasets` and `results`.

        Returns:
            [`~huggingface_hub.CommitInfo`]: the commit, whose `commit_url` is its address.
        """
        hub = _hub(is_needed=False)
        return super().push_to_hub(repo_id, **kwargs) if hub is None else hub.push(self, repo_id, **kwargs)

    @staticmethod
    def _check_transformers_compatible(with_code: bool | None, push_to_hub: bool | None):
        """Refuse options of `save_pretrained` that do not go with `transformers_compatible`."""
        if with_code:
            raise ValueError(
                "with_code does not go with transformers_compatible: plain transformers needs no code. Leave out one."
            )
        if push_to_hub:
            raise ValueError(
                "push_to_hub does not go with transformers_compatible. Save without it, then upload the folder: "
                "huggingface_hub.upload_folder(repo_id=..., folder_path=...)."
            )


def _hub(is_needed: bool = True):
    # In a `try`, so that transformers does not take the package for a requirement of the code on the Hub
    try:
        from blip2_hf import hub
    except ImportError:
        if is_needed:
            raise ImportError("with_code=True needs the package blip2-hf, not only its code from the Hub.") from None
        return None
    return hub
