"""The snippets of docs/works_with.md."""

import re

import pytest
from paths import DOCS
from saved_models import save_captioner, save_stage1
from servers import served
from tiny import make_image


SNIPPETS = re.findall(r"```python\n(.*?)```", (DOCS / "works_with.md").read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    save_captioner(work / "captioner")
    save_stage1(work / "stage1")
    for seed, name in enumerate(["cat", "bus"]):
        make_image(seed).save(work / f"{name}.png")
    return work


def run(package: str, **changes: str) -> dict:
    """Run the snippet that imports a package, and return its names."""
    pytest.importorskip(package)
    (snippet,) = (snippet for snippet in SNIPPETS if f"from {package} import" in snippet)
    for old, new in changes.items():
        assert old in snippet
        snippet = snippet.replace(old, new)
    namespace: dict = {}
    exec(compile(snippet, "works_with.md", "exec"), namespace)
    return namespace


def test_chats(work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    run("transformers")
    assert capsys.readouterr().out.strip()


def test_a_server(work, monkeypatch):
    monkeypatch.chdir(work)
    pytest.importorskip("uvicorn")
    with served("serve", "captioner", ready="health", folder=work) as address:
        names = run("openai", **{"http://127.0.0.1:8000": address})
    assert names["reply"].choices[0].message.content
    assert names["reply"].usage.completion_tokens <= 20


def test_embeddings(work, monkeypatch):
    monkeypatch.chdir(work)
    names = run("sentence_transformers")
    assert names["encoder"].similarity(names["texts"], names["pictures"]).shape == (2, 2)


def test_every_snippet_is_run():
    assert len(SNIPPETS) == 3
