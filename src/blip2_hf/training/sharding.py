"""Models whose weights Trainer divides among processes."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.training_args import TrainingArguments


@contextmanager
def shared_weights_in_one_group(model: nn.Module) -> Iterator[None]:
    """
    Let FSDP2 keep weights that several modules share in one group, which it demands. accelerate puts embeddings and
    head into a group without other modules that share their weights, such as BERT's head, or the encoder and the
    decoder of T5. In this context the embeddings and the head of such a model go into the group of the rest.
    """
    embeddings = {model.get_input_embeddings(), model.get_output_embeddings()}
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for weight in module._parameters.values():
            if weight is not None:
                owners.setdefault(weight, set()).add(module)
    if all(len(modules) == 1 or modules <= embeddings for modules in owners.values()):
        yield
        return
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_input_embeddings, model.get_output_embeddings


@contextmanager
def made_whole(arguments: TrainingArguments) -> Iterator[None]:
    """
    Make a model as if there were no ZeRO-3, which would divide it while it is loaded. Weights in pieces can't be
    copied, and a preset runs the tower to see what is read of it. DeepSpeed divides the model when training begins.
    """
    if not arguments.deepspeed:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(arguments.hf_deepspeed_config)
