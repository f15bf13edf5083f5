"""`blip2-hf serve`: `transformers serve` with this library loaded, an HTTP server that speaks OpenAI's API."""

import argparse
from typing import Any

from ._common import add_command, check_port, check_whole_model


def add_parser(commands: Any):
    text = (
        "Serve a model over HTTP: `transformers serve`, which speaks OpenAI's API for chats with pictures "
        "(/v1/chat/completions). Any other option is one of `transformers serve`, such as --quantization bnb-4bit."
    )
    example = "blip2-hf serve captioner --port 8000"
    add = add_command(commands, "serve", _run, "Serve a model over HTTP, by OpenAI's API.", text, example)
    add.args[0].set_defaults(takes_rest=True)  # type: ignore[attr-defined]
    add("model", "BLIP-2 that is saved by this library: folder or id on the Hub", metavar="MODEL")
    add("--host")
    add("--port", default=8000)
    add("--device")
    add("--dtype", "precision; without it, the model's")


def _run(options: argparse.Namespace):
    from transformers.utils.import_utils import is_serve_available

    from ..jobs.model_checks import WRITING, read_class
    from ..models.configuration_blip2 import Blip2Config

    check_port(options.host, options.port)
    config, _ = check_whole_model(options.model, WRITING)
    if read_class(options.model)[0] != Blip2Config.model_type:
        raise ValueError(
            f"{options.model} is in the format of transformers, whose processor takes no chats. Convert it: blip2-hf "
            f"convert {options.model} --output FOLDER"
        )
    if config.text_config.is_encoder_decoder:
        raise ValueError(
            f"{options.model} has an encoder-decoder language model, and `transformers serve` would cut off its "
            "answers. Give a model whose language model is a decoder alone, such as OPT."
        )
    if not is_serve_available():
        raise ImportError("blip2-hf serve needs packages of a server: pip install 'blip2-hf[serving]'")
    _serve(options)


def _serve(options: argparse.Namespace):
    from transformers import AutoModelForMultimodalLM
    from transformers.cli.serving import server
    from transformers.cli.transformers import app
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    from ..jobs.inference import load_model
    from ..models.configuration_blip2 import Blip2Config
    from ..models.modeling_blip2 import Blip2ForConditionalGeneration

    class Whole(Blip2ForConditionalGeneration):
        """Refuses weights that are missing or damaged, as the other commands do."""

        @classmethod
        def from_pretrained(cls, name, **kwargs):
            return load_model(Blip2ForConditionalGeneration, name, "A model that writes text", **kwargs)

    AutoModelForMultimodalLM.register(Blip2Config, Whole, exist_ok=True)
    # The server tells text models and others apart by these names, and not by what is registered
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[Blip2Config.model_type] = Blip2ForConditionalGeneration.__name__
    build_server = server.build_server

    def build(*args, **kwargs) -> Any:
        """Answer what a model refuses with its reason, and not with an internal error."""
        built = build_server(*args, **kwargs)
        built.add_exception_handler(ValueError, _refuse)
        return built

    server.build_server = build
    given = {"--host": options.host, "--port": options.port, "--device": options.device, "--dtype": options.dtype}
    named = [text for name, value in given.items() if value is not None for text in (name, str(value))]
    try:
        app(["serve", options.model, *named, *options.rest], prog_name="blip2-hf")
    finally:
        # As it was, in a process that goes on
        AutoModelForMultimodalLM.register(Blip2Config, Blip2ForConditionalGeneration, exist_ok=True)
        del MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[Blip2Config.model_type]
        server.build_server = build_server


def _refuse(request: Any, error: Exception) -> Any:
    from fastapi.responses import JSONResponse

    return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)
