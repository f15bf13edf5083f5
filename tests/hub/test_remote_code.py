"""A folder with its code: the same output where the package cannot be imported, and our classes where it can."""

import json
import os
import re
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from paths import FIXTURES
from stage1 import STAGE1_QFORMER, make_retrieval, make_stage1
from tiny import make_config, make_image, make_image_processor, make_model, make_processor, make_tokenizer
from transformers import AutoModel, AutoProcessor, pipeline
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

import blip2_hf
from blip2_hf import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2ForPreTraining,
    Blip2Model,
    Blip2Processor,
    ImageToTextPipeline,
    VisualQuestionAnsweringPipeline,
)
from blip2_hf.hub import write_code


FIVE_WORDS = {"max_new_tokens": 5, "do_sample": False}
LABELS = ["a dog", "two people", "the street"]
QUESTION = "what colour is the bus?"

WITHOUT_THE_PACKAGE = """
    import json, sys
    from pathlib import Path


    class NotInstalled:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "blip2_hf":
                raise ImportError(f"No module named {name!r}")


    sys.meta_path.insert(0, NotInstalled())
    import torch
    import transformers
    from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    folder, report, classes = Path(sys.argv[1]), {}, {}
    image = str(folder / "image.png")

    def load(auto_class, name):
        loaded = auto_class.from_pretrained(folder / name, trust_remote_code=True)
        classes[f"{auto_class.__name__} {name}"] = f"{type(loaded).__module__.split('.')[0]} {type(loaded).__name__}"
        return loaded
"""
TEXTS = """
    for name in ("opt", "t5"):
        load(AutoConfig, name), load(AutoModel, name)
        model, processor = load(transformers.AutoModelForImageTextToText, name), load(AutoProcessor, name)
        inputs = processor(images=image, text="a photo of", return_tensors="pt")
        report[name] = model.generate(**inputs, max_new_tokens=5, do_sample=False).tolist()
        for task, question in (("image-to-text", {}), ("visual-question-answering", {"question": "%s"})):
            pipe = pipeline(task, model=str(folder / name), trust_remote_code=True)
            classes[f"{task} {name}"] = f"{type(pipe.model).__module__.split('.')[0]} {type(pipe).__name__}"
            report[f"{task} {name}"] = pipe(image, **question, max_new_tokens=5, do_sample=False)
"""
COMPARISONS = """
    load(AutoModel, "retrieval"), load(transformers.AutoModelForZeroShotImageClassification, "stage1")
    auto_classes = {
        "stage1": transformers.AutoModelForPreTraining,
        "retrieval": transformers.AutoModelForZeroShotImageClassification,
    }
    for name, auto_class in auto_classes.items():
        model, processor = load(auto_class, name).eval(), load(AutoProcessor, name)
        inputs = processor(images=image, text="a dog", return_tensors="pt")
        with torch.no_grad():
            options = {"return_loss": False} if name == "stage1" else {}
            report[name] = model(**inputs, **options).logits_per_image.tolist()
        pipe = pipeline("zero-shot-image-classification", model=str(folder / name), trust_remote_code=True)
        report[f"zero-shot {name}"] = pipe(image, candidate_labels=json.loads(sys.argv[2]))
"""
SAVED_AGAIN = """
    model = load(transformers.AutoModelForImageTextToText, "opt")
    model.save_pretrained(folder / "again")
    try:
        model.save_pretrained(folder / "again", with_code=True)
    except ImportError as error:
        report["with_code"] = str(error)
    again = load(transformers.AutoModelForImageTextToText, "again")
    report["again"] = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
"""


def run_without_the_package(code, folder, *arguments):
    code = textwrap.dedent(WITHOUT_THE_PACKAGE) + textwrap.dedent(code)
    code += "\nprint(json.dumps([report, classes]))\n"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-c", code, str(folder), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def without_the_package(folder):
    """What a process that cannot import the package makes of the folders, and which classes it finds there."""
    return run_without_the_package(TEXTS % QUESTION + COMPARISONS + SAVED_AGAIN, folder, json.dumps(LABELS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("remote")
    make_image().save(folder / "image.png")
    for name in ("opt", "t5"):
        model, processor = make_model(name), make_processor(is_encoder_decoder=name == "t5")
        ImageToTextPipeline(model, processor=processor).save_pretrained(folder / name, with_code=True)
    stage1 = make_stage1(qformer_config={**STAGE1_QFORMER, "vocab_size": 320})
    for name, model in (("stage1", stage1), ("retrieval", make_retrieval())):
        model.save_pretrained(folder / name, with_code=True)
        Blip2Processor(make_image_processor(), make_tokenizer()).save_pretrained(folder / name, with_code=True)
    return folder


def test_captions_and_answers_are_the_same_without_the_package(folder, without_the_package):
    report, classes = without_the_package
    image = str(folder / "image.png")
    for name in ("opt", "t5"):
        model = Blip2ForConditionalGeneration.from_pretrained(folder / name)
        processor = Blip2Processor.from_pretrained(folder / name)
        inputs = processor(images=image, text="a photo of", return_tensors="pt")
        assert report[name] == model.generate(**inputs, **FIVE_WORDS).tolist()
        captioner = ImageToTextPipeline(model, processor=processor)
        assert report[f"image-to-text {name}"] == captioner(image, **FIVE_WORDS)
        oracle = VisualQuestionAnsweringPipeline(model, processor=processor)
        assert report[f"visual-question-answering {name}"] == oracle(image, question=QUESTION, **FIVE_WORDS)
        expected = {
            "AutoConfig": "Blip2HfConfig",
            "AutoModel": "Blip2HfModel",
            "AutoModelForImageTextToText": "Blip2HfForConditionalGeneration",
            "AutoProcessor": "Blip2HfProcessor",
            "image-to-text": "ImageToTextPipeline",
            "visual-question-answering": "VisualQuestionAnsweringPipeline",
        }
        for loader, class_name in expected.items():
            assert classes[f"{loader} {name}"] == f"transformers_modules {class_name}"


def test_comparisons_are_the_same_without_the_package(folder, without_the_package):
    report, classes = without_the_package
    assert classes["AutoModelForPreTraining stage1"] == "transformers_modules Blip2HfForPreTraining"
    for name in ("stage1", "retrieval"):
        key = f"AutoModelForZeroShotImageClassification {name}"
        assert classes[key] == "transformers_modules Blip2HfForImageTextRetrieval"
        model = Blip2ForImageTextRetrieval.from_pretrained(folder / name).eval()
        processor = Blip2Processor.from_pretrained(folder / name)
        inputs = processor(images=str(folder / "image.png"), text="a dog", return_tensors="pt")
        with torch.no_grad():
            if name == "stage1":
                expected = Blip2ForPreTraining.from_pretrained(folder / name)(**inputs, return_loss=False)
            else:
                expected = model(**inputs)
        torch.testing.assert_close(torch.tensor(report[name]), expected.logits_per_image)
        texts = processor.tokenizer(
            [f"This is a photo of {label}." for label in LABELS], padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            outputs = model(inputs["pixel_values"], **{key: texts[key] for key in ("input_ids", "attention_mask")})
            scores = model.temperature(outputs.logits_per_image)[0].softmax(-1)
        found = {entry["label"]: entry["score"] for entry in report[f"zero-shot {name}"]}
        torch.testing.assert_close(torch.tensor([found[label] for label in LABELS]), scores, rtol=1e-3, atol=1e-5)


def test_transformers_saves_its_copy_of_the_code(without_the_package):
    report, classes = without_the_package
    assert "needs the package" in report["with_code"]
    assert report["again"]
    assert classes["AutoModelForImageTextToText again"] == "transformers_modules Blip2HfForConditionalGeneration"


def test_with_the_package_the_same_folder_needs_no_trust(folder):
    model = AutoModel.from_pretrained(folder / "opt")
    assert type(model) is Blip2Model
    assert type(AutoProcessor.from_pretrained(folder / "opt")) is Blip2Processor
    pipelines = {"image-to-text": ImageToTextPipeline, "visual-question-answering": VisualQuestionAnsweringPipeline}
    for task, pipeline_class in pipelines.items():
        for trust_remote_code in (None, True):
            pipe = pipeline(task, model=str(folder / "opt"), trust_remote_code=trust_remote_code)
            assert type(pipe) is pipeline_class and type(pipe.model) is Blip2ForConditionalGeneration
    classifier = pipeline("zero-shot-image-classification", model=str(folder / "retrieval"))
    assert type(classifier.model) is Blip2ForImageTextRetrieval


def test_a_plain_save_has_no_code_even_of_what_came_with_code(folder, tmp_path):
    Blip2ForConditionalGeneration.from_pretrained(folder / "opt").save_pretrained(tmp_path)
    Blip2Processor.from_pretrained(folder / "opt").save_pretrained(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".py", ".md")]
    for name in ("config.json", "processor_config.json"):
        content = json.loads((tmp_path / name).read_text())
        assert "auto_map" not in content and "custom_pipelines" not in content


def test_code_is_the_files_that_are_needed_and_no_more(folder):
    for name in ("opt", "retrieval", "stage1"):
        config = json.loads((folder / name / "config.json").read_text())
        processor = json.loads((folder / name / "processor_config.json").read_text())
        references = [*config["auto_map"].values(), *processor["auto_map"].values()]
        references += [entry["impl"] for entry in config["custom_pipelines"].values()]
        needed = set()
        for reference in references:
            module, class_name = reference.split(".")
            assert re.search(rf"^class {class_name}\(", (folder / name / f"{module}.py").read_text(), re.MULTILINE)
            needed |= {
                f"{module}.py",
                *(Path(p).name for p in get_relative_import_files(folder / name / f"{module}.py")),
            }
        found = {path.name for path in (folder / name).glob("*.py")}
        assert found == needed
        source = Path(blip2_hf.__file__).parent / "models"
        assert all((folder / name / file).read_bytes() == (source / file).read_bytes() for file in found)
        assert ("modeling_pretraining.py" in found) == (name == "stage1")


def test_code_imports_what_transformers_users_have(folder):
    allowed = {"PIL", "huggingface_hub", "numpy", "safetensors", "torch", "transformers"}
    for file in [*(folder / "opt").glob("*.py"), *(folder / "stage1").glob("*.py")]:
        assert set(get_imports(file)) - set(sys.stdlib_module_names) <= allowed, file


def test_auto_map_says_what_registration_says(folder):
    for name in ("opt", "stage1", "retrieval"):
        auto_map = json.loads((folder / name / "config.json").read_text())["auto_map"]
        for auto_class, reference in auto_map.items():
            class_name = reference.split(".")[1]
            if auto_class == "AutoConfig":
                assert class_name == Blip2Config.__name__
            else:
                assert getattr(transformers, auto_class)._model_mapping[Blip2Config].__name__ == class_name


def test_code_goes_with_our_format_alone(tmp_path):
    with pytest.raises(ValueError, match="needs no code"):
        make_model().save_pretrained(tmp_path, with_code=True, transformers_compatible=True)
    with pytest.raises(ValueError, match="needs no code"):
        make_processor().save_pretrained(tmp_path, with_code=True, transformers_compatible=True)


def test_code_of_other_classes_is_not_ours_to_write(tmp_path):
    class Blip2OfAUser(Blip2ForConditionalGeneration):
        pass

    model = Blip2OfAUser(make_config())
    with pytest.raises(ValueError, match="Blip2OfAUser is none of"):
        model.save_pretrained(tmp_path, with_code=True)


def test_a_pipeline_around_another_model_brings_its_own_code(tmp_path):
    config = transformers.GitConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28},
    )
    model = transformers.GitForCausalLM(config)
    pipe = ImageToTextPipeline(model, tokenizer=make_tokenizer(), image_processor=make_image_processor())
    pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    write_code(tmp_path, pipe)
    content = json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in content and set(content["custom_pipelines"]) == {"image-to-text"}
    assert (tmp_path / "pipeline_blip2.py").exists() and not (tmp_path / "modeling_blip2.py").exists()


PUSHED_BEFORE = """
    pipe = pipeline("image-to-text", model=str(folder / "captioner"), trust_remote_code=True)
    report["image-to-text"] = pipe(image, max_new_tokens=5, do_sample=False)
    model, processor = load(transformers.AutoModelForPreTraining, "stage1").eval(), load(AutoProcessor, "stage1")
    with torch.no_grad():
        outputs = model(**processor(images=image, text="a dog", return_tensors="pt"), return_loss=False)
    report["stage1"] = outputs.logits_per_image.tolist()
"""


@pytest.fixture
def pushed_before(tmp_path):
    """Folders that this package wrote with their code when its modules lay in one folder (commit aecc087)."""
    with zipfile.ZipFile(FIXTURES / "pushed_before_models.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path, json.loads((tmp_path / "expected.json").read_text())


def assert_as_before(report, expected):
    assert report["image-to-text"] == expected["image-to-text"]
    torch.testing.assert_close(torch.tensor(report["stage1"]), torch.tensor(expected["stage1"]))


def test_what_was_pushed_before_loads_without_the_package(pushed_before):
    folder, expected = pushed_before
    report, classes = run_without_the_package(PUSHED_BEFORE, folder)
    assert_as_before(report, expected)
    assert classes["AutoModelForPreTraining stage1"] == "transformers_modules Blip2HfForPreTraining"


def test_what_was_pushed_before_loads_with_the_package(pushed_before):
    folder, expected = pushed_before
    image = str(folder / "image.png")
    captioner = pipeline("image-to-text", model=str(folder / "captioner"))
    assert type(captioner.model) is Blip2ForConditionalGeneration
    model, processor = (
        Auto.from_pretrained(folder / "stage1") for Auto in (transformers.AutoModelForPreTraining, AutoProcessor)
    )
    assert type(model) is Blip2ForPreTraining
    with torch.no_grad():
        outputs = model.eval()(**processor(images=image, text="a dog", return_tensors="pt"), return_loss=False)
    report = {"image-to-text": captioner(image, **FIVE_WORDS), "stage1": outputs.logits_per_image.tolist()}
    assert_as_before(report, expected)


def test_code_from_before_saves_with_the_code_of_today(pushed_before):
    folder, expected = pushed_before
    code = """
        import transformers

        # The package is there, and is not imported before the code asks for it
        model = transformers.AutoModelForImageTextToText.from_pretrained("captioner", trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        model.save_pretrained("again", with_code=True)
        transformers.AutoProcessor.from_pretrained("captioner").save_pretrained("again")
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    assert (folder / "again" / "backbones.py").exists()
    captioner = pipeline("image-to-text", model=str(folder / "again"))
    assert captioner(str(folder / "image.png"), **FIVE_WORDS) == expected["image-to-text"]
