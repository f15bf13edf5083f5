"""The page about videos: its snippets as written, and what it says of files."""

import re

import transformers
from hub_cache import add_to_hub_cache, use_hub_cache
from paths import DOCS
from tiny import make_image, make_image_processor, make_model, make_tokenizer
from videos import write_video

from blip2_hf.models.video_loading import VIDEO_ENDINGS


PAGE = (DOCS / "video.md").read_text()


def test_snippets_run_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use_hub_cache(monkeypatch, tmp_path / "hub")
    blip2 = add_to_hub_cache(tmp_path / "hub", "Salesforce/blip2-opt-2.7b")
    make_model("opt").save_pretrained(blip2, transformers_compatible=True)
    theirs = transformers.Blip2Processor(make_image_processor(), make_tokenizer(), num_query_tokens=4)
    theirs.save_pretrained(blip2)
    make_image().save("cat.png")
    for name in ("clip.mp4", "other.mp4"):
        write_video(tmp_path / name)
    namespace: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(snippet, "video.md", "exec"), namespace)
    images = {name: len(namespace[name]["pixel_values"]) for name in ("inputs", "both", "between")}
    assert images == {"inputs": 4, "both": 16, "between": 5}


def test_the_endings_are_those_of_the_page():
    sentence = PAGE[PAGE.index("A file is a video if it ends in") : PAGE.index("In a folder\nthat has pictures")]
    assert re.findall(r"`(\.\w+)`", sentence) == list(VIDEO_ENDINGS)
