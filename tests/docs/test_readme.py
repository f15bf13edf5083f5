"""The README's snippets, as written, with small models under the names that it uses."""

import re
import shlex

import pytest
from docs_world import fill_folder, fill_hub_cache, run_snippets, snippets
from hub_cache import use_hub_cache
from paths import DOCS, REPOSITORY

from blip2_hf.cli import make_parser


README = (REPOSITORY / "README.md").read_text()


def test_snippets_run_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    use_hub_cache(monkeypatch, tmp_path / "hub")
    fill_hub_cache(tmp_path / "hub")
    fill_folder(tmp_path)
    assert len(snippets("README.md")) == 2
    names = run_snippets("README.md")
    assert type(names["captioner"]).__name__ == "ImageToTextPipeline"
    assert capsys.readouterr().out.startswith("[{'generated_text': ")
    model = names["model"]
    assert (model.config.vision_config.model_type, model.config.text_config.model_type) == ("dinov2", "llama")
    assert {name.split(".")[0] for name, weight in model.named_parameters() if weight.requires_grad} == {
        "vision_model",  # the LayerNorm after the tower
        "query_tokens",
        "qformer",
        "language_projection",
    }


def test_it_is_short():
    assert len(README.splitlines()) < 130


PAGES = [README, *(path.read_text() for path in sorted(DOCS.glob("*.md")))]
COMMANDS = re.findall(r"^blip2-hf [a-z].*?[^\\]$", "\n".join(PAGES), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_the_options_that_are_shown(command):
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    if words[-1] != "...":
        options, others = make_parser().parse_known_args(words[1:])
        # The others are options of Trainer or of transformers serve
        assert callable(options.run) and (not others or words[1] in ("finetune", "pretrain", "serve"))


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_somewhere(path):
    assert (REPOSITORY / path).exists()
