"""One comparison of settings, and hashes that tell data from other data."""

import pytest
import torch
from torch import nn

from blip2_hf.jobs.atomic_files import write_json
from blip2_hf.jobs.errors import CollectionError, MadeOtherwiseError, StateFileError
from blip2_hf.jobs.fingerprints import check_settings_file, fingerprint, model_fingerprint, sampled_rows


GIVEN = {"prompt": "a", "size": {"height": 28, "width": 28}, "model": "here", "beams": (1, 2)}
ADVICE = "Give the same, or --overwrite."


def check(path, found: dict, **kwargs):
    write_json(path, found)
    check_settings_file(path, GIVEN, "captions.jsonl", ADVICE, **kwargs)


def test_settings_that_are_the_same(tmp_path):
    same = {**GIVEN, "beams": [1, 2]}
    check(tmp_path / "settings.json", same)
    check(tmp_path / "settings.json", {**same, "model": "there"}, free=("model",))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompt": None}, "prompt: None there, 'a' now"),
        ({"size": {"height": 28, "width": 42}}, "size: width: 42 there, 28 now"),
        ({"size": {"height": 28, "width": 28, "depth": 1}}, "size: depth: 1 there, None now"),
        ({"size": 28}, "size: 28 there, {'height': 28, 'width': 28} now"),
        ({"old": 1}, "old: 1 there, None now"),
        ({"prompt": "b", "model": "there"}, "model: 'there' there, 'here' now; prompt: 'b' there, 'a' now"),
        (
            dict.fromkeys(["--z", *"bcdefghi"], 1),
            "; ".join(f"{name}: 1 there, None now" for name in ["--z", *"bcdefgh"]) + "; and 1 more",
        ),
        ({"prompt": f"{'x' * 200}y"}, f"prompt: '{'x' * 39}...{'x' * 38}y' there, 'a' now"),
    ],
)
def test_settings_that_differ(tmp_path, change, told):
    with pytest.raises(MadeOtherwiseError) as error:
        check(tmp_path / "settings.json", {**GIVEN, **change}, free=("model",))
    assert str(error.value) == f"captions.jsonl was made otherwise ({told}). {ADVICE}"
    assert isinstance(error.value, CollectionError)


def test_hashes_are_not_told(tmp_path):
    write_json(tmp_path / "settings.json", {"weights": fingerprint([b"1"])})
    with pytest.raises(MadeOtherwiseError, match=r"made otherwise \(weights: some there, others now\)\."):
        check_settings_file(tmp_path / "settings.json", {"weights": fingerprint([b"2"])}, "captions.jsonl", ADVICE)


def test_settings_that_are_not_known(tmp_path):
    path = tmp_path / "settings.json"
    with pytest.raises(
        MadeOtherwiseError, match="captions.jsonl is there already, without settings.json.*--overwrite"
    ):
        check_settings_file(path, GIVEN, "captions.jsonl", ADVICE)
    path.write_text("")
    with pytest.raises(
        StateFileError,
        match="settings.json can't be read.*what made captions.jsonl: restore it, or delete both.*--overwrite",
    ):
        check_settings_file(path, GIVEN, "captions.jsonl", ADVICE)


def test_sampled_rows():
    assert sampled_rows(0) == [] and sampled_rows(3) == [0, 1, 2]
    assert len(sampled_rows(1000)) == 32 and sampled_rows(1000)[-1] < 1000
    assert fingerprint([b"ab", b"c"]) == fingerprint([b"a", b"bc"]) != fingerprint([b"abd"])


def test_a_model_is_known_by_its_weights():
    torch.manual_seed(0)
    model, other = nn.Linear(100, 100), nn.Linear(100, 100)
    assert model_fingerprint(model) != model_fingerprint(other)
    other.load_state_dict(model.state_dict())
    assert model_fingerprint(model) == model_fingerprint(other)
