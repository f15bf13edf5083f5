"""`blip2-hf serve`: requests in OpenAI's format over HTTP, and models that cannot be served."""

import base64
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from unittest import mock

import pytest
import torch
from saved_models import save_captioner
from servers import LIMIT, START, served
from tiny import make_image, make_model, make_processor
from transformers.models.auto import modeling_auto

from blip2_hf import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor
from blip2_hf.cli import main


for package in ("fastapi", "openai", "uvicorn"):
    pytest.importorskip(package)


def ask(address: str, model: str, content: list[dict], **fields) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 6, **fields}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=LIMIT).read().decode()


def picture_part(image) -> dict:
    file = io.BytesIO()
    image.save(file, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    folder = save_captioner(tmp_path_factory.mktemp("captioner"))
    model, tokenizer = Blip2ForConditionalGeneration.from_pretrained(folder), make_processor().tokenizer
    # A stream has no halves of characters, which texts of random weights end with
    model.generation_config.suppress_tokens = [i for i in range(len(tokenizer)) if not tokenizer.decode([i]).isalnum()]
    model.save_pretrained(folder)
    return folder


def test_a_picture_and_a_question_are_answered_as_generate_does(captioner):
    model = Blip2ForConditionalGeneration.from_pretrained(captioner).eval()
    processor = Blip2Processor.from_pretrained(captioner)
    image, question = make_image(0), {"type": "text", "text": "what is it?"}

    def generated(prompt: str) -> str:
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        with torch.no_grad():
            sequences = model.generate(**inputs, max_new_tokens=6)
        return processor.decode(sequences[0], skip_special_tokens=True).removeprefix(prompt)

    with served("serve", str(captioner), "--host", "127.0.0.1", ready="health") as address:
        answer = json.loads(ask(address, str(captioner), [picture_part(image), question]))
        caption = json.loads(ask(address, str(captioner), [picture_part(image)]))
        streamed = ask(address, str(captioner), [picture_part(image), question], stream=True)
        broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}}
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            ask(address, str(captioner), [broken, question])
        stop = answer["choices"][0]["message"]["content"][1]
        stopped = json.loads(ask(address, str(captioner), [picture_part(image), question], stop=[stop]))
    assert "not an image that PIL can read" in json.loads(refused.value.read())["error"]["message"]
    assert stop in stopped["choices"][0]["message"]["content"]
    assert stopped["usage"]["completion_tokens"] < 6
    text = answer["choices"][0]["message"]["content"]
    assert text and text == generated("Question: what is it? Answer:")
    assert caption["choices"][0]["message"]["content"] == generated("") != text
    chunks = [json.loads(line.removeprefix("data: ")) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == text
    assert answer["usage"]["completion_tokens"] == 6


@pytest.fixture
def nothing_is_served():
    with mock.patch("blip2_hf.cli.serve._serve", side_effect=AssertionError):
        yield


def refusal(line: list[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(line)
    return str(stopped.value)


@pytest.mark.usefixtures("nothing_is_served")
def test_answers_of_an_encoder_decoder_would_be_cut_off(tmp_path):
    make_model("t5").save_pretrained(tmp_path)
    make_processor(is_encoder_decoder=True).save_pretrained(tmp_path)
    assert re.search("encoder-decoder language model.* a decoder alone", refusal(["serve", str(tmp_path)]))


@pytest.mark.usefixtures("nothing_is_served")
def test_a_model_in_the_format_of_transformers_is_converted_first(captioner, tmp_path):
    main(["convert", str(captioner), "--output", str(tmp_path / "theirs"), "--transformers"])
    assert "Convert it: blip2-hf convert" in refusal(["serve", str(tmp_path / "theirs")])


@pytest.mark.usefixtures("nothing_is_served")
def test_missing_packages_are_named(captioner):
    with mock.patch("transformers.utils.import_utils.is_serve_available", return_value=False):
        assert "pip install 'blip2-hf[serving]'" in refusal(["serve", str(captioner)])


def test_a_server_that_ends_leaves_transformers_as_it_was(captioner, tmp_path):
    shutil.copytree(captioner, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    names = dict(modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    assert "damaged" in refusal(["serve", str(tmp_path / "cut")])
    assert names == modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    found = modeling_auto.AutoModelForMultimodalLM._model_mapping[Blip2Config]
    assert found is Blip2ForConditionalGeneration


@pytest.mark.parametrize("command", [["serve"], ["demo", "--captioner"]], ids=str)
def test_ports_that_cannot_be_listened_at(command, captioner, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert re.search(
            f"port {port} of 127.0.0.1 can't be", refusal([*command, str(captioner), "--port", str(port)])
        )
    assert refusal([*command, str(captioner), "--port", "99999"]) == "2"
    assert "at least 1 and at most 65535" in capsys.readouterr().err
    assert "Give another --port or --host" in refusal([*command, str(captioner), "--host", "256.1.1.1"])


def test_options_that_the_server_does_not_have_are_refused(captioner):
    line = [sys.executable, "-c", START, "serve", str(captioner), "--prot", "1"]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT)
    assert ended.returncode == 2 and re.search("No such option.*--prot", ended.stderr)
