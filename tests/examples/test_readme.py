"""The README's snippets, as written, with small models under the names that it uses."""

import re
import shlex

import pytest
from docs_world import fill_folder, fill_hub_cache, run_snippets, snippets
from hub_cache import use_hub_cache
from paths import DOCS, REPOSITORY
from tiny import assert_sees_the_whole

import blip2_hf
from blip2_hf.cli import make_parser


README = (REPOSITORY / "README.md").read_text()


def test_snippets_run_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use_hub_cache(monkeypatch, tmp_path / "hub")
    fill_hub_cache(tmp_path / "hub")
    fill_folder(tmp_path)
    assert len(snippets("README.md")) >= 6
    namespace = run_snippets("README.md")
    loaded = blip2_hf.Blip2ForConditionalGeneration.from_pretrained("captioner")
    assert loaded.config.vision_config.model_type == "dinov2"
    for name in ("processor", "stage1_processor"):
        assert_sees_the_whole(namespace[name].image_processor, 224)
    assert type(namespace["captioner"]).__name__ == "ImageToTextPipeline"
    assert any("query_tokens" in name for name, p in namespace["adapted"].named_parameters() if p.requires_grad)


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
