"""Options, errors and loading of all commands. Nothing heavy is imported before a command runs."""

import argparse
import json
import logging
import multiprocessing
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ._parser import Parser, above_zero, at_least_zero, folder_to_write, number, positive, probability
from ._quantization import check_width


DTYPES = ("bfloat16", "float16", "float32")

# Options of any command that are names of what is read
_FOLDERS, _DATA = ("folder", "images"), ("data", "validation")
_FILES = ("annotations", "questions", "instances", "synonyms")
_MODELS = ("model", "captioner", "filter", "retriever", "reranker", "vision_model", "language_model", "text_encoder")
_MODELS += ("stage1",)

_LONGEST_WAIT = timedelta(days=30)  # until the other processes have done their share, too


def generate_argument(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE as an argument of `generate`. The value is JSON or, if it is not, a string."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r}: NAME=VALUE was expected, such as num_beams=5")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


_SHARED: dict[str, dict[str, Any]] = {  # options that several commands have
    "--model": {"help": "BLIP-2: folder or id on the Hub"},
    **dict.fromkeys(
        ("data", "--data"),
        {
            "help": "folder of pictures, file (parquet, json, csv, tsv, arrow, tar, COCO's json), or id on the Hub",
            "metavar": "DATA",
        },
    ),
    "--output": {"type": folder_to_write, "metavar": "FOLDER"},
    "--config": {"help": "configuration of the dataset, if it has several"},
    "--split": {"help": "split of the data, also `train[:1000]`; without it train"},
    "--image-column": {
        "help": "column of the pictures, or their ending in tar files; without it the only one, or image"
    },
    "--image-root": {
        "help": "folder from which the paths of pictures start that are not beside the file that names them",
        "metavar": "FOLDER",
    },
    "--image-size": {
        "help": "side in pixels of the square that pictures are scaled to; without it, that of the checkpoint",
        "type": positive,
    },
    "--num-frames": {
        "help": "frames of a video that the model reads, spread evenly; without it, as many as its processor says, "
        "which is 4 for most",
        "type": positive,
    },
    "--batch-size": {"help": "pictures at a time, fewer if they don't fit", "type": positive},
    "--num-workers": {"help": "processes that load pictures", "type": at_least_zero, "default": 2},
    "--allow-urls": {
        "help": "fetch pictures that rows have as URLs, from public addresses; those of this machine and of private "
        "networks only from each HOST that is named",
        "nargs": "*",
        "metavar": "HOST",
        "default": False,
    },
    "--rows-per-shard": {
        "help": "rows of a file; what is computed again after a stop",
        "type": positive,
        "default": 1000,
    },
    "--max-new-tokens": {"help": "the most tokens that are written", "type": positive},
    "--num-beams": {
        "help": "beams of the search; without it the model's own setting, which is mostly 1",
        "type": positive,
    },
    "--temperature": {"help": "sample at this temperature", "type": above_zero},
    "--top-p": {"help": "sample from the likeliest tokens that have this probability together", "type": probability},
    "--generate": {
        "help": "other arguments of generate, such as length_penalty=0 repetition_penalty=1.15",
        "nargs": "+",
        "type": generate_argument,
        "metavar": "NAME=VALUE",
    },
    "--host": {
        "help": "address to listen at; whoever reaches it can have the models read pictures",
        "default": "127.0.0.1",
    },
    "--port": {"help": "port to listen at", "type": number(int, least=1, most=65535)},
    "--load-in-4bit": {"help": "quantise linear layers; the rest is bfloat16 without --dtype", "action": "store_true"},
    "--load-in-8bit": {"help": "as --load-in-4bit, more exactly", "action": "store_true"},
    "--dtype": {"help": "dtype of the model; without it, that of the checkpoint", "choices": DTYPES},
    "--device": {"help": "such as cuda:1 or cpu; without it, a GPU if there is one, its own for each process"},
}


# Options by the group of the help that they are in, in the same order in all commands; what is not here is an option
# of no group
_GROUPS = {
    "data": """
        --data --config --split --image-column --image-root --text-column --caption-column --question-column
        --answer-column --choices-column --id-column --image-id-column --group-column --annotations --questions
        --instances --synonyms --images --image --index --folder --allow-urls --limit --skip-broken --skip-bad-rows
        --validation --held-out --streaming
    """,
    "model": """
        --model --vision-model --language-model --text-encoder --tokenizer --captioner --filter --retriever
        --stage1
        --vision-feature-layer --num-query-tokens --query-initialization --image-size --size --max-pixels
        --num-frames
        --load-in-4bit --load-in-8bit
        --method --layer
    """,
    "generation": """
        --preset --prompt --prefix --suffix --num-beams --max-new-tokens --temperature --top-p --seed
        --num-captions --captions-per-image --generate
    """,
    "training": """
        --task --stage --epochs --max-steps --learning-rate --accumulate --eval-steps --early-stopping --report-to
        --prefix-lm --max-length --views
    """,
    "scores": """
        --confidence --choices --normalization --protocol --lemmatize --k --score --min-score --keep --top --rerank
        --exact
    """,
    "output": """
        --output --format --extension --existing --overwrite --rebuild --approximate --store-embeds --transformers
        --max-shard-size --merge --push-to-hub --sheet --open --json --per-word --full-size
    """,
    "server": "--host --port",
    "speed and memory": """
        --batch-size --num-workers --device --dtype --tower-dtype --rows-per-shard --part-index --num-parts
    """,
}
_GROUP_OF = {name: title for title, names in _GROUPS.items() for name in names.split()}


def add_command(
    commands: Any,
    name: str,
    run: Callable,
    text: str,
    description: str | None = None,
    example: str | None = None,
    check: Callable | None = None,
) -> Callable:
    """
    Add a command, and return the function that adds an option to it, as [`add_option`] does. `example` is a line that
    can be run, and ends the help. `check` is called with the options before files and models are looked up. It raises
    a `ValueError` if the options do not go together.
    """
    parser = commands.add_parser(
        name, help=text, description=description or text, example=example, group_titles=tuple(_GROUPS)
    )
    parser.set_defaults(run=partial(_run_command, run, check), takes_files=False)
    return partial(add_option, parser)


def _run_command(run: Callable, check: Callable | None, options: argparse.Namespace):
    """Run a command. An error that users can mend is told in a line, without a traceback."""
    from ..jobs.errors import tell_errors

    quieten_libraries()
    with tell_errors("blip2-hf"):
        try:
            if check is not None:
                check(options)
            check_device(getattr(options, "device", None))
            check_names(options)
            run(options)
        except KeyboardInterrupt:
            stop("stopped.")


def quieten_libraries():
    """Keep back what packages say of others that are not needed, and what PEFT asks transformers for."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("transformers.trainer_utils").addFilter(_is_needed)
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _is_needed(record: logging.LogRecord) -> bool:
    """Tell whether a message of a training is of use: not that Trainer copies ids of tokens, or sorts by numbers."""
    return not record.getMessage().startswith(("The tokenizer has new PAD/BOS/EOS", "mtime may not be reliable"))


def stop(message: str) -> NoReturn:
    """End after Ctrl-C, as the shell has it."""
    end_workers()
    print(f"blip2-hf: {message}", file=sys.stderr)
    raise SystemExit(130)


def check_device(name: str | None):
    """Refuse a device that is not there, before anything is loaded."""
    if name is None:
        return
    import torch

    from ..jobs.errors import first_sentence

    try:
        # Nothing is computed on the device `meta`
        torch.empty(1, device=name).cpu()
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"--device {name} is not there ({first_sentence(error)}). Give cpu, or leave it out."
        ) from error


def check_port(host: str, port: int):
    """Refuse a port that is taken, or an address that is not this machine's, before anything is loaded."""
    try:
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((host, port))
    except OSError as error:
        raise ValueError(
            f"port {port} of {host} can't be listened at ({error.strerror or error}). Give another --port or --host."
        ) from error


def check_names(options: argparse.Namespace):
    """Refuse names of models and of data that lead nowhere, before anything is loaded."""
    from ..jobs.names import check_data_name, check_file, check_folder, check_model_name

    for names, check in ((_FOLDERS, check_folder), (_FILES, check_file), (_DATA, check_data_name)):
        for value in (getattr(options, name, None) for name in names):
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    check(one)
    for name in _MODELS:
        if (value := getattr(options, name, None)) is not None and not (options.takes_files and Path(value).is_file()):
            check_model_name(value)


def check_whole_model(name: str, need: str, advice: str = "") -> tuple[Any, Any]:
    """Return the configuration and the processor of a model, once it is whole and of the class that is needed."""
    from ..jobs.inference import adapter_base
    from ..jobs.model_checks import check_checkpoint, check_not_quantized, load_processor
    from ..models.configuration_blip2 import Blip2Config

    if adapter_base(name) is not None:
        raise ValueError(
            f"{name} holds adapters, and a whole model is needed. Merge them: blip2-hf convert {name} --output FOLDER"
        )
    check_checkpoint(name, need, advice)
    check_not_quantized(name, "Give the model that it was made of, whose weights are whole.")
    return Blip2Config.from_pretrained(name), load_processor(name)


def check_output_apart(options: argparse.Namespace):
    """Refuse to write into a folder that is read, or into a folder inside of it."""
    output = Path(options.output).resolve()
    for name in (*_FOLDERS, *_DATA, *_MODELS):
        value = getattr(options, name, None)
        if not isinstance(value, str) or not Path(value).exists():
            continue
        source = Path(value).resolve()
        if output == source:
            raise ValueError(f"--output {options.output} is what is read, too. Give another folder.")
        # Everything may be in the current folder
        if source in output.parents and source != Path.cwd():
            raise ValueError(f"--output {options.output} is inside of {value}, which is read. Give another folder.")


def check_columns(data: str, rows: Any, columns: Mapping[str, str | None]):
    """Refuse columns that the data do not have. `columns` has them by the option that names each."""
    from ..data.feature_cache import EMBEDS
    from ..data.rows import column_names

    names = column_names(rows)
    for option, column in columns.items():
        is_picture_of_features = option == "--image-column" and EMBEDS in (names or [])
        if names is None or column is None or is_picture_of_features:
            continue
        if column not in names and column.partition(".")[0] not in names:
            there = ", ".join(sorted(names)) or "none"
            raise ValueError(
                f"{data} has no column {column!r}; its columns are {there}. Name the right one: {option}."
            )


def end_workers():
    """End the processes that load pictures: a `DataLoader` would wait 5 seconds for each that is busy."""
    for worker in multiprocessing.active_children():
        worker.terminate()


def add_option(parser: Parser, name: str, text: str | None = None, group: str | None = None, **kwargs):
    """Add an argument. What is not given is as in the other commands that have it. The help tells the default."""
    kwargs = _SHARED.get(name, {}) | kwargs | ({} if text is None else {"help": text})
    default = kwargs.get("default")
    if default is not None and default is not False:  # 0 is told
        kwargs["help"] += " (default: %(default)s)"
    place = parser.groups[group] if group is not None else option_group(parser, name)
    place.add_argument(name, **kwargs)


def option_group(parser: Parser, name: str) -> Any:
    """Return the group of the help that an option belongs to, or the parser itself."""
    return parser.groups.get(_GROUP_OF.get(name, ""), parser)


def pick(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return some of the options as keyword arguments."""
    return {name: getattr(options, name) for name in names}


def check_png(name: str):
    """Refuse a name for a drawing that does not end in .png."""
    if Path(name).suffix.lower() != ".png":
        raise ValueError(f"{name}: a name that ends in .png was expected.")


def save_png(drawing: Any, path: Path):
    """Write a drawing, whole, and make its folder."""
    from ..jobs.atomic_files import atomic_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        drawing.save(file, format="PNG")


@contextmanager
def processes(device: str | None) -> Iterator[Any]:
    """Yield the state of the processes that a resumable command runs in."""
    import torch
    from accelerate import PartialState

    # accelerate sees no other processes on a machine without a GPU, unless it is told so
    state = PartialState(cpu=device == "cpu" or not torch.accelerator.is_available(), timeout=_LONGEST_WAIT)
    if state.num_processes > 1 and device not in (None, "cpu"):
        raise ValueError(f"--device {device} with {state.num_processes} processes: leave --device out, or give cpu.")
    try:
        yield state
    except KeyboardInterrupt:
        end_workers()
        if state.is_main_process:
            print("\nInterrupted. What is finished is kept: the same command goes on with the rest.")
        raise SystemExit(130) from None
    state.destroy_process_group()


def load_dataset(options: argparse.Namespace, default_split: str = "train") -> Any:
    """
    Load the data that a user names, and set `options.image_column` to the column of the pictures. `default_split` is
    taken if the data have splits, and none is named.
    """
    from ..data import find_splits, load_rows
    from ..data.rows import find_image_column

    split = options.split
    if split is None and default_split != "train" and find_splits(options.data, options.config) != []:
        split = default_split
    rows = load_rows(options.data, split, **pick(options, "config", "image_column", "image_root"))
    options.image_column = options.image_column or find_image_column(rows)
    check_columns(options.data, rows, {"--image-column": options.image_column})
    return rows


def tell_image_size(processor: Any, given: int | None, of_paper: int):
    """Tell users if pictures have another size than the paper's."""
    from accelerate import PartialState

    from ..data.image_size import own_image_size

    own = own_image_size(processor.image_processor)
    if given is None and set(own.values()) != {of_paper} and PartialState().is_main_process:
        print(
            f"blip2-hf: pictures have the size of the checkpoint's image processor, {own}. The paper's have "
            f"{of_paper} px: --image-size {of_paper}, if the model was trained with it.",
            file=sys.stderr,
        )


def find_device(given: str | None) -> Any:
    """Return the device that is given, or an accelerator if there is one."""
    import torch

    return given or torch.accelerator.current_accelerator(check_available=True) or "cpu"


def load_captioner(
    name: str, dtype: str | None, device: Any, is_stage1: bool = False, bits: int | None = None
) -> tuple[Any, Any]:
    """
    Load a model that writes, with its language model or, in stage 1, with its Q-Former, and its processor. With `bits`
    the linear layers of its tower and of its language model are quantised.
    """
    from ..jobs.inference import load_model, quantization, weights_place
    from ..jobs.model_checks import WRITING, WRITING_ALONE, check_checkpoint, check_not_quantized, load_processor
    from ..models.configuration_blip2 import Blip2Config
    from ..models.modeling_blip2 import Blip2ForConditionalGeneration
    from ..models.modeling_pretraining import Blip2ForPreTraining

    check_checkpoint(name, WRITING_ALONE if is_stage1 else WRITING)
    if bits is not None or dtype is not None:
        check_not_quantized(name, "It keeps its precision: leave out --load-in-4bit, --load-in-8bit and --dtype.")
    model_class = Blip2ForPreTraining if is_stage1 else Blip2ForConditionalGeneration
    expected = f"A model that writes text, of {model_class.__name__},"
    processor = load_processor(name)
    if bits is None:
        return load_model(model_class, name, expected, dtype=dtype or "auto").to(device), processor
    import torch

    config = Blip2Config.from_pretrained(weights_place(name))
    check_width(bits, vision_tower=config.vision_config, language_model=config.text_config)
    dtype = dtype or "bfloat16"
    # A quantised model is not moved after it is loaded
    place = {"quantization_config": quantization(bits, getattr(torch, dtype)), "device_map": {"": str(device)}}
    return load_model(model_class, name, expected, dtype=dtype, **place), processor
