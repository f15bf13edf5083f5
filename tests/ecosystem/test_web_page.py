"""`blip2-hf demo`: the page as a client and as a browser see it, and what it refuses."""

import math
import os
import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from saved_models import save_captioner, save_stage1
from scoring import scores_by_forward
from servers import served
from tiny import make_image, make_model, make_processor
from transformers import pipeline

from blip2_hf.attention_maps import text_heat_map
from blip2_hf.captioning.captions import MAX_NEW_TOKENS
from blip2_hf.cli import main
from blip2_hf.data.image_size import with_image_size
from blip2_hf.retrieval import load_retrieval_model
from blip2_hf.search import SearchIndex


pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")
NUM_PICTURES = 5


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Where `make demo` would have left its models and pictures."""
    work = tmp_path_factory.mktemp("work")
    save_captioner(work / "outputs/demo/model")
    save_stage1(work / "outputs/demo/retriever")
    (work / "outputs/demo/scenes").mkdir()
    for seed in range(NUM_PICTURES):
        make_image(seed).save(work / f"outputs/demo/scenes/{seed}.png")
    return work


@pytest.fixture(scope="module")
def address(work):
    with served("demo", folder=work) as address:
        yield address


@pytest.fixture(scope="module")
def client(address, tmp_path_factory):
    return gradio_client.Client(address, verbose=False, download_files=tmp_path_factory.mktemp("downloads"))


def picture(work, name: str = "1.png"):
    return gradio_client.handle_file(str(work / "outputs/demo/scenes" / name))


def test_captions_are_those_of_beam_search(client, work):
    found = client.predict(picture(work), 4, 3, api_name="/caption")["data"]
    captioner = pipeline("image-to-text", model=str(work / "outputs/demo/model"), device="cpu")
    options = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 30, "do_sample": False}
    expected = captioner(make_image(1), generate_kwargs=options)
    assert [text for text, _ in found] == [caption["generated_text"] for caption in expected]
    assert all(re.fullmatch(r"\d+%", score) for _, score in found)


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "L", "P"])
def test_the_page_sees_the_picture_that_the_commands_see(client, work, mode, tmp_path):
    ramp = np.linspace(0, 65535 if mode == "I;16" else 255, 64 * 64).reshape(64, 64)
    picture = Image.fromarray(ramp.astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "RGBA":
        picture = Image.merge("RGBA", [picture, picture, picture, picture.point(lambda value: 255 - value)])
    elif mode != "I;16":
        picture = picture.convert(mode)
    picture.save(tmp_path / "a.png")
    captioner = pipeline("image-to-text", model=str(work / "outputs/demo/model"), device="cpu")
    options = {"num_beams": 1, "max_new_tokens": 30, "do_sample": False}
    expected = captioner(str(tmp_path / "a.png"), generate_kwargs=options)[0]["generated_text"]
    uploaded = gradio_client.handle_file(str(tmp_path / "a.png"))
    assert client.predict(uploaded, 1, 1, api_name="/caption")["data"][0][0] == expected


def test_the_page_gives_nothing_but_pictures_that_it_shows(address, client, work):
    secret = work / "outputs/demo/scenes/secret.txt"
    secret.write_text("secret")
    for path in (secret, secret.with_name("1.png")):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{address}/gradio_api/file={path}", timeout=20)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("language_model", ["opt", "t5"])
def test_the_score_is_the_mean_probability_of_a_token(num_beams, language_model):
    from blip2_hf.web_page import caption_with_scores

    torch.manual_seed(0)
    model, processor = make_model(language_model).eval(), make_processor(is_encoder_decoder=language_model == "t5")
    found = caption_with_scores(model, processor, make_image(1), num_beams, 1)
    (text, confidence), *_ = found
    inputs = processor(images=make_image(1), candidates=[text], return_tensors="pt")
    # Without the end if the caption was cut off
    prompt, tokens = inputs["input_ids"].tolist(), inputs["candidate_labels"][0, :, :MAX_NEW_TOKENS].tolist()
    expected = scores_by_forward(model, inputs["pixel_values"], prompt, tokens).item() / len(tokens[0])
    assert confidence == pytest.approx(math.exp(expected), rel=1e-4)


def test_answers_of_the_page_are_those_of_ask(client, work, capsys):
    answer = client.predict(picture(work), "what is it?", api_name="/ask")
    scenes = work / "outputs/demo/scenes/1.png"
    main(["ask", str(scenes), "what is it?", "--model", str(work / "outputs/demo/model"), "--device", "cpu", "--json"])
    assert f'"{answer}"' in capsys.readouterr().out.encode().decode("unicode_escape") or answer == ""


def test_where_it_looks(client, work):
    drawing, text = client.predict(picture(work), "a dog", api_name="/look")
    model, processor = load_retrieval_model(work / "outputs/demo/retriever", "cpu")
    tokens = processor.tokenizer(["a dog"], return_tensors="pt")
    pixel_values = processor(images=make_image(1), return_tensors="pt")["pixel_values"]
    heat_map = text_heat_map(model, tokens["input_ids"], tokens["attention_mask"], pixel_values)
    assert heat_map.max() == 1
    with torch.no_grad():
        logits = model.get_matching_logits(tokens["input_ids"], pixel_values=pixel_values)
    assert f"probability of {logits.softmax(-1)[0, 1]:.0%}" in text
    assert Image.open(drawing).size == make_image(1).size


def test_it_looks_at_the_whole_picture(work):
    """As `look` does: a processor that crops would move the map."""
    from blip2_hf.web_page import look_for

    model, processor = load_retrieval_model(work / "outputs/demo/retriever", "cpu")
    wide = Image.new("RGB", (200, 50), "white")
    wide.paste(make_image(3).resize((50, 50)), (150, 0))
    size = processor.image_processor.size["height"]
    whole = load_retrieval_model(work / "outputs/demo/retriever", "cpu")[1].image_processor
    whole = with_image_size(whole, size)
    processor.image_processor.size = {"shortest_edge": size}
    processor.image_processor.do_center_crop, processor.image_processor.crop_size = (
        True,
        {"height": size, "width": size},
    )
    _, match = look_for(model, processor, wide, "a dog")
    tokens = processor.tokenizer(["a dog"], return_tensors="pt")
    pixel_values = whole(images=[wide], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model.get_matching_logits(tokens["input_ids"], pixel_values=pixel_values)
    assert match == pytest.approx(logits.softmax(-1)[0, 1].item(), abs=1e-5)
    assert wide.size == (200, 50)


def test_pictures_that_are_found_are_those_of_search(client, work):
    found = client.predict("a dog", 3, api_name="/search")
    index = SearchIndex.open(work / "outputs/demo/scenes", work / "outputs/demo/retriever", device="cpu")
    expected = [f"{score:.3f}  {path.name}" for path, score in index.search("a dog", top=3)]
    assert [picture["caption"] for picture in found] == expected


@pytest.mark.parametrize(
    ("inputs", "api_name", "message"),
    [
        ((None, 1, 1), "/caption", "There is no picture"),
        (("1.png", " "), "/ask", "The text is empty"),
        (("broken.png", 1, 1), "/caption", r"^image 1 of 1 \('broken.png'\): the image is broken"),
        (("text.png", 1, 1), "/caption", r"^image 1 of 1 \('text.png'\): not an image"),
        (("", 3), "/search", "The text is empty"),
    ],
)
def test_errors_are_shown_on_the_page(client, work, inputs, api_name, message, tmp_path):
    make_image(0).save(tmp_path / "broken.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "broken.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no picture")
    first, *rest = inputs
    if first in ("broken.png", "text.png"):
        first = gradio_client.handle_file(str(tmp_path / first))
    elif first and first.endswith(".png"):
        first = picture(work, first)
    with pytest.raises(gradio_client.exceptions.AppError, match=message):
        client.predict(first, *rest, api_name=api_name)


def test_the_page_writes_nothing_beside_its_code():
    import blip2_hf

    # gradio writes type stubs of components that others derive from its own
    assert not [*Path(blip2_hf.__file__).parent.rglob("*.pyi")]


def test_large_uploads_are_refused(client, tmp_path):
    (tmp_path / "large.png").write_bytes(b"0" * 21_000_000)
    with pytest.raises(Exception, match="(?i)max|size|413|large"):
        client.predict(gradio_client.handle_file(str(tmp_path / "large.png")), 1, 1, api_name="/caption")


def test_uploads_are_gone_when_the_page_is_closed(work, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with served("demo", folder=work) as address:
        client = gradio_client.Client(address, verbose=False)
        client.predict(picture(work), 1, 1, api_name="/caption")
        assert list(tmp_path.glob("blip2-hf-*/**/*.png"))
    assert not list(tmp_path.glob("blip2-hf-*"))


def test_a_page_without_models_says_how_to_get_some(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="Give --captioner or --retriever, or make those of the demo: make demo"):
        main(["demo"])


def test_missing_packages_are_named(work, monkeypatch):
    monkeypatch.chdir(work)
    message = re.escape("pip install 'blip2-hf[app]'")
    with mock.patch.dict("sys.modules", {"gradio": None}), pytest.raises(SystemExit, match=message):
        main(["demo"])


@pytest.mark.slow
@pytest.mark.parametrize("size", ["1300,900", "500,900"])
def test_in_a_browser(address, work, size, tmp_path):
    """A picture goes in, a caption comes out. The picture of the page goes into $SCREENSHOTS, if that is set."""
    webdriver = pytest.importorskip("selenium.webdriver")
    ui = pytest.importorskip("selenium.webdriver.support.ui")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("there is no chromium with its chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={size}"):
        options.add_argument(argument)
    window = webdriver.Chrome(options, webdriver.ChromeService(driver))
    wait = ui.WebDriverWait(window, 60)
    try:
        window.get(address)
        button = wait.until(lambda d: d.find_elements("xpath", "//button[contains(., 'Write captions')]"))[0]
        path = work / "outputs/demo/scenes/2.png"
        window.find_element("css selector", "input[type=file]").send_keys(str(path))
        wait.until(lambda d: d.find_elements("css selector", "img[src*='2.png']"))
        button.click()
        page = wait.until(lambda d: re.search(r"\d+%", (page := d.find_element("tag name", "body").text)) and page)
        assert "Error" not in page
        picture = Path(os.environ.get("SCREENSHOTS", tmp_path)) / f"page-{size.split(',')[0]}.png"
        window.save_screenshot(str(picture))
        assert Image.open(picture).width == int(size.split(",")[0])
    finally:
        window.quit()
