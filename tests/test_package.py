"""What `import blip2_hf` does, and does not, in a fresh process."""

import subprocess
import sys
import textwrap

from paths import REPOSITORY


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_costs_no_more_than_transformers():
    code = """
        import sys
        import transformers
        before = set(sys.modules)
        import blip2_hf
        print(sorted(name for name in set(sys.modules) - before if not name.startswith("blip2_hf")))
        print("torch" in sys.modules)
    """
    assert run(code).splitlines() == ["[]", "False"]


def test_import_alone_brings_no_heavy_module():
    code = """
        import sys
        import blip2_hf
        print([name for name in ("torch", "transformers", "numpy", "PIL") if name in sys.modules])
    """
    assert run(code) == "[]"


ORDERS = {
    "theirs in the middle of an import": "import blip2_hf; from transformers import Blip2ForConditionalGeneration",
    "their configuration": "import blip2_hf; from transformers import Blip2Config",
    "generation": "import blip2_hf; from transformers.generation import GenerationMixin",
    "pipelines": "import blip2_hf; from transformers import pipeline",
    "our model": "from blip2_hf.models.modeling_qformer import Blip2QFormerModel; import blip2_hf",
    "our processor": "from blip2_hf import Blip2Processor; import blip2_hf",
    "all of theirs": "from transformers import Trainer, pipeline, AutoModel, AutoProcessor; import blip2_hf",
}


IN_EACH_ORDER = """
    import os, sys, traceback
    # Without a say in the order, and long to import
    import torch, torch._dynamo, torch.distributed.tensor

    for order in sys.argv[1:]:
        if os.fork() == 0:
            try:
                exec(order)
                from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
                from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
                from transformers.pipelines import PIPELINE_REGISTRY
                kind = type(AutoConfig.for_model("blip2"))
                assert kind is blip2_hf.Blip2Config
                assert AutoModel._model_mapping[kind] is blip2_hf.Blip2Model
                assert AutoModelForImageTextToText._model_mapping[kind] is blip2_hf.Blip2ForConditionalGeneration
                assert PROCESSOR_MAPPING[kind] is blip2_hf.Blip2Processor
                assert "image-to-text" in PIPELINE_REGISTRY.get_supported_tasks()
            except BaseException:
                print(order, traceback.format_exc(), sep="\\n", flush=True)
                os._exit(1)
            os._exit(0)
        print(os.wait()[1], flush=True)
"""


def test_auto_classes_know_ours_whatever_is_imported_first():
    printed = run(IN_EACH_ORDER, *ORDERS.values())
    assert printed.splitlines() == ["0"] * len(ORDERS), printed


# Packages of the extras, by which none of the modules must be stopped
EXTRAS = "bitsandbytes evaluate faiss fastapi gguf onnx onnxruntime onnxscript openai pillow_heif scipy selenium"
EXTRAS += " sklearn spacy tensorboard trl uvicorn"
# Those of which a module is a part
FRAMEWORKS = {"multi_vector": "sentence_transformers", "web_page": "gradio"}


def test_a_base_installation_imports_every_module():
    code = """
        import importlib.machinery, pkgutil, sys

        class Others(importlib.machinery.PathFinder):
            @classmethod
            def find_spec(cls, name, *args, **kwargs):
                return None if name in sys.argv[1:] else super().find_spec(name, *args, **kwargs)

        sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Others
        import blip2_hf

        def fail(name):
            raise

        names = [module.name for module in pkgutil.walk_packages(blip2_hf.__path__, "blip2_hf.", onerror=fail)]
        names.remove("blip2_hf.cli.__main__")  # runs the command
        names.remove("blip2_hf.evaluation.metrics.evaluate_module")  # of load_metric alone
        for name in ("multi_vector", "web_page"):
            names.remove(f"blip2_hf.{name}")
            try:
                importlib.import_module(f"blip2_hf.{name}")
            except ModuleNotFoundError as error:
                print(error.name)
        for name in names:
            importlib.import_module(name)
        from blip2_hf.evaluation.metrics import load_metric
        try:
            load_metric("cider_d")
        except ImportError as error:
            print(len(names) > 100, error)
    """
    expected = [*FRAMEWORKS.values(), 'True Modules of evaluate need it: pip install "blip2-hf[evaluation]".']
    assert run(code, *EXTRAS.split(), *FRAMEWORKS.values()).splitlines() == expected


def test_an_installation_holds_all_files(tmp_path):
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    source = REPOSITORY / "src"
    files = {path.relative_to(source) for path in (source / "blip2_hf").rglob("*") if path.is_file()}
    files = {path for path in files if "__pycache__" not in path.parts}
    assert files == {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}


def test_modules_are_found_under_their_names_from_before():
    code = """
        import importlib
        import blip2_hf
        moved = {"losses": "models.losses", "modeling_qformer": "models.modeling_qformer", "parts": "models.backbones"}
        moved |= {"image_loading": "models.image_loading", "generation_presets": "models.generation_presets"}
        moved |= {"model_card": "hub.model_card", "processing_blip2": "models.processing_blip2"}
        for before, now in moved.items():
            found = importlib.import_module(f"blip2_hf.{before}")
            assert found is importlib.import_module(f"blip2_hf.{now}"), before
            assert found.__name__ == found.__spec__.name == f"blip2_hf.{now}", before
        from blip2_hf.losses import image_text_similarity
        from blip2_hf import losses
        print(losses.image_text_similarity is image_text_similarity)
    """
    assert run(code) == "True"
