"""The README's snippets, as written, with small models under the names that it uses."""

import re
import shlex
from pathlib import Path

import datasets
import pytest
import transformers
from hub_cache import add_to_hub_cache, use_hub_cache
from paths import DOCS, REPOSITORY
from stage1 import Processor
from tiny import (
    LANGUAGE_MODELS,
    assert_sees_the_whole,
    make_cropping_image_processor,
    make_image,
    make_image_processor,
    make_model,
    make_processor,
    make_tokenizer,
)

import blip2_hf
from blip2_hf.cli import make_parser


README = (REPOSITORY / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def fill_hub_cache(cache: Path):
    blip2 = add_to_hub_cache(cache, "Salesforce/blip2-opt-2.7b")
    make_model("opt").save_pretrained(blip2, transformers_compatible=True)
    theirs = transformers.Blip2Processor(make_image_processor(), make_tokenizer(), num_query_tokens=4)
    theirs.save_pretrained(blip2)

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tower = add_to_hub_cache(cache, "facebook/dinov2-small")
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes, image_size=28)).save_pretrained(tower)
    make_cropping_image_processor().save_pretrained(tower)

    bert = add_to_hub_cache(cache, "google-bert/bert-base-uncased")
    transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=64)).save_pretrained(bert)
    Processor().tokenizer.save_pretrained(bert)

    language_model = add_to_hub_cache(cache, "HuggingFaceTB/SmolLM2-135M-Instruct")
    transformers.LlamaForCausalLM(LANGUAGE_MODELS["llama"]()).save_pretrained(language_model)
    make_tokenizer().save_pretrained(language_model)


def test_snippets_run_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use_hub_cache(monkeypatch, tmp_path / "hub")
    fill_hub_cache(tmp_path / "hub")
    make_model("llama").save_pretrained("outputs/demo/model")
    make_processor().save_pretrained("outputs/demo/model")
    for name in ("picture.png", "cat.png"):
        make_image().save(name)
    rows = {"image": [make_image(0), make_image(1)], "caption": ["a dog", "a red bus"]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet("pictures.parquet")

    assert len(SNIPPETS) >= 6
    namespace: dict = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), namespace)
    loaded = blip2_hf.Blip2ForConditionalGeneration.from_pretrained("captioner")
    assert loaded.config.vision_config.model_type == "dinov2"
    for name in ("processor", "stage1_processor"):
        assert_sees_the_whole(namespace[name].image_processor, 224)
    assert type(namespace["captioner"]).__name__ == "ImageToTextPipeline"
    assert any("query_tokens" in name for name, p in namespace["adapted"].named_parameters() if p.requires_grad)


def test_the_first_caption_of_the_docs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    use_hub_cache(monkeypatch, tmp_path / "hub")
    fill_hub_cache(tmp_path / "hub")
    make_image().save("picture.png")
    (snippet,) = re.findall(r"```python\n(.*?)```", (DOCS / "index.md").read_text(), flags=re.DOTALL)
    exec(compile(snippet, "index.md", "exec"), {})
    assert "generated_text" in capsys.readouterr().out


PAGES = [README, *(path.read_text() for path in sorted(DOCS.glob("*.md")))]
COMMANDS = re.findall(r"^blip2-hf [a-z].*?[^\\]$", "\n".join(PAGES), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_the_options_that_are_shown(command):
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    if words[-1] != "...":
        assert callable(make_parser().parse_known_args(words[1:])[0].run)


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_somewhere(path):
    assert (REPOSITORY / path).exists()
