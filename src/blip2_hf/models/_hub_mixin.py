"""What models, processors and pipelines do alike when they are saved or pushed to the Hub."""

import os
from typing import Any


_OF_PUSH = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr")


class SharedOnHub:
    """
    A mixin, in front of the class of transformers whose `save_pretrained` and `push_to_hub` it completes. It needs the
    package: a copy of this file on the Hub leaves both to transformers.
    """

    # Whether save_pretrained writes the code where it is not told: Trainer does not tell
    saves_code = False

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args, with_code: bool | None = None, **kwargs
    ) -> Any:
        # transformers would push before the code is there; without the package there is none
        hub = _hub(is_needed=False) if with_code is not False and kwargs.get("push_to_hub") else None
        if hub is not None:
            kwargs.pop("push_to_hub")
            of_push = {name: kwargs.pop(name) for name in _OF_PUSH if name in kwargs}
            before = hub.file_states(save_directory)
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            if with_code:
                self.write_code(save_directory)
            elif with_code is None and self.saves_code:
                _hub().write_code(save_directory, self)
            if hub is not None:
                hub.push_saved(self, save_directory, before, of_push.pop("repo_id", None), **of_push)
        return saved

    def write_code(self, save_directory: str | os.PathLike):
        """
        What `with_code=True` adds to a folder that `save_pretrained` has written: the code, where config.json and
        processor_config.json say that it is, and a model card if there is none.

        Args:
            save_directory (`str` or `os.PathLike`):
                The folder.
        """
        _hub().write_code_and_card(save_directory, self)

    def push_to_hub(self, repo_id: str, **kwargs):
        r"""
        Pushes to the Hub, in one commit, with the code (see `with_code` of `save_pretrained`) and, where there is none
        of yours, a model card.

        Args:
            repo_id (`str`):
                Name of the repository, which is made if there is none.
            kwargs:
                Those of [`~hub.push`]: `commit_message`, `private`, `token`, `revision`, ... and what the card can't
                know, such as `license`, `datasets` and `results`.

        Returns:
            [`~huggingface_hub.CommitInfo`]: the commit, whose `commit_url` says where it is.
        """
        hub = _hub(is_needed=False)
        return super().push_to_hub(repo_id, **kwargs) if hub is None else hub.push(self, repo_id, **kwargs)


def _hub(is_needed: bool = True):
    # In a `try`, where transformers does not take the package for a requirement of the code on the Hub
    try:
        from blip2_hf import hub
    except ImportError:
        if is_needed:
            raise ImportError("with_code=True needs the package blip2-hf, not only its code from the Hub.") from None
        return None
    return hub
