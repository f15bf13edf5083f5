"""The scripts for training tell mistakes in a line, before they load a model."""

import runpy
import sys
from pathlib import Path

import pytest
import transformers
from paths import EXAMPLES
from saved_models import save_captioner, save_stage1


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_captioner(folder / "captioner")
    save_stage1(folder / "stage1")
    (folder / "photos").mkdir()
    (folder / "photos" / "a.txt").write_text("a dog")
    return folder


LINES = {
    "finetune_captioning": "--model captioner --data photos --validation photos:validation --output_dir out",
    "finetune_vqa": "--model captioner --data photos --validation photos:validation --output_dir out",
    "pretrain_stage1": "--vision_model stage1 --text_encoder stage1 --data photos --output_dir out",
    "pretrain_stage2": "--stage1 stage1 --language_model captioner --data photos --output_dir out",
}


WRONG = {
    "photos": ("phtos", "There is no file or folder phtos. Did you mean photos?"),
    "captioner": ("./captoiner", "There is no folder ./captoiner. Did you mean captioner?"),
    "stage1": ("./stage", "There is no folder ./stage. Did you mean stage1?"),
}
CASES = [(script, name) for script, line in LINES.items() for name in WRONG if f" {name} " in line]


@pytest.mark.parametrize(("script", "name"), CASES)
def test_names_that_lead_nowhere(place, script, name, monkeypatch):
    wrong, message = WRONG[name]
    arguments = [wrong if argument == name else argument for argument in LINES[script].split()]
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", None)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    assert stopped.value.code == f"{script}.py: {message}"
