"""The API reference: that it has all that is public, and where references lead."""

import re

import pytest
from paths import REPOSITORY

import blip2_hf


griffe = pytest.importorskip("griffe", reason="it comes with the extra docs")
reference = pytest.importorskip("docs_site.reference")


def load(path, name):
    extensions = griffe.load_extensions(reference.HuggingFaceDocstrings())
    return griffe.load(name, search_paths=[path], extensions=extensions)


@pytest.fixture(scope="module")
def package():
    return load(REPOSITORY / "src", "blip2_hf")


@pytest.fixture(scope="module")
def documented(package):
    return reference.read_pages(package)


def test_all_that_is_public_is_documented(package, documented):
    rooms = [room for room in package.members.values() if not room.is_alias and room.is_module]
    public = [package[name] for name in blip2_hf.__all__] + [
        room[name] for room in rooms for name in room.exports or ()
    ]
    assert len(public) > 100
    assert {found.canonical_path for found in public} <= {found.path for found in documented.values()}
    assert all(found.docstring for found in documented.values() if found.is_class or found.is_function)


def test_classes_have_their_public_names(package):
    assert package["Blip2Config"].is_class and package["Blip2Config"].name == "Blip2Config"
    assert package["Blip2Model"].final_target.path == "blip2_hf.models.modeling_base.Blip2Model"
    assert package["models.modeling_base.Blip2HfModel"].final_target is package["Blip2Model"].final_target


def test_functions_come_before_modules_of_their_name(package):
    assert package["evaluation.metrics"].members["chair"].is_function


def test_classes_have_what_their_mixins_give(package):
    model = package["Blip2ForConditionalGeneration"]
    assert {"generate", "score_texts", "forward"} <= set(model.members)
    assert "get_image_embeds" not in model.members  # Blip2PreTrainedModel has it, and is documented


def test_every_reference_of_the_package_leads_somewhere(package):
    objects = [package, *reference.objects_of(package)]
    lost = {
        found.path: re.findall(r"\[`[\w.~]+`\](?!\[)", found.docstring.value) for found in objects if found.docstring
    }
    assert {path: names for path, names in lost.items() if names} == {}


@pytest.fixture
def names(tmp_path):
    """Names of a package of two modules with a function `load` each, one of which is documented."""
    package = tmp_path / "lib"
    package.mkdir()
    (package / "__init__.py").write_text("from .data import Pairs\n")
    (package / "_mixins.py").write_text("class Mixin:\n    def shuffle(self): ...\n")
    (package / "data.py").write_text(
        "from elsewhere import Batch\n\nfrom ._mixins import Mixin\n\n\ndef load(): ...\n\n\n"
        "class Pairs(Mixin):\n    def batch(self): ...\n"
    )
    (package / "other.py").write_text("def load(): ...\n\n\ndef save(): ...\n")
    (tmp_path / "page.md").write_text("# Page\n\n::: lib.Pairs\n\n::: lib.data.load\n")
    loader = griffe.GriffeLoader(search_paths=[tmp_path])
    found = loader.load("lib")
    loader.resolve_aliases(external=False)
    documented = reference.read_pages(found, tmp_path)
    reference.adopt_members(documented)
    return found, reference.Names(documented, list(reference.objects_of(found)))


@pytest.mark.parametrize(
    ("module", "name", "path"),
    [
        ("data", "Pairs", "lib.Pairs"),
        ("other", "data.Pairs", "lib.Pairs"),
        ("other", "Pairs.batch", "lib.Pairs.batch"),
        ("other", "Pairs.shuffle", "lib.Pairs.shuffle"),  # of a mixin
        ("data", "load", "lib.data.load"),
        ("other", "load", ""),  # its own, which is not documented
        ("other", "data.load", "lib.data.load"),
        ("data", "save", ""),
        ("data", "Batch", ""),  # imported from elsewhere
        ("other", "Batch", None),
        ("other", "Pairs.bacth", None),
        ("other", "transformers.Trainer", ""),
    ],
)
def test_names(names, module, name, path):
    package, meanings = names
    assert meanings.find(name, package[module]) == path


def test_a_name_of_two_things_is_lost(names):
    package, meanings = names
    meanings.definitions["lib.other.load"] = meanings.documented["lib.other.load"] = "lib.other.load"
    assert meanings.find("load", package) is None
