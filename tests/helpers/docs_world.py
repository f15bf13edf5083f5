"""What the snippets of the README and of the docs find: tiny models under published names, and files of all kinds."""

import json
import re
import tarfile
from pathlib import Path

import benchmark_files
import datasets
import transformers
from hub_cache import add_to_hub_cache
from paths import DOCS, REPOSITORY
from saved_models import save_stage1
from stage1 import Processor
from tiny import (
    LANGUAGE_MODELS,
    VOCAB_SIZE,
    make_cropping_image_processor,
    make_image,
    make_image_processor,
    make_model,
    make_processor,
    make_tokenizer,
    randomize,
)

from blip2_hf import Blip2ForPreTraining, Blip2Processor
from blip2_hf.capfilt import capfilt_dataset
from blip2_hf.data import cache_features, load_rows


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CAPTIONS = ["a dog", "a red bus"]


def fill_hub_cache(cache: Path):
    """Write models under the names that the docs use."""
    for name in ("Salesforce/blip2-opt-2.7b", "Salesforce/blip2-opt-2.7b-coco"):
        blip2 = add_to_hub_cache(cache, name)
        make_model("opt").save_pretrained(blip2, transformers_compatible=True)
        theirs = transformers.Blip2Processor(make_image_processor(), make_tokenizer(), num_query_tokens=4)
        theirs.save_pretrained(blip2)

    flan_t5 = add_to_hub_cache(cache, "Salesforce/blip2-flan-t5-xl")
    make_model("t5").save_pretrained(flan_t5)
    make_processor(is_encoder_decoder=True).save_pretrained(flan_t5)
    save_stage1(add_to_hub_cache(cache, "Salesforce/blip2-itm-vit-g"))
    save_clip(add_to_hub_cache(cache, "openai/clip-vit-large-patch14"))

    tower = add_to_hub_cache(cache, "facebook/dinov2-small")
    transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, image_size=28)).save_pretrained(tower)
    make_cropping_image_processor().save_pretrained(tower)

    bert = add_to_hub_cache(cache, "google-bert/bert-base-uncased")
    transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=64)).save_pretrained(bert)
    Processor().tokenizer.save_pretrained(bert)

    language_model = add_to_hub_cache(cache, "HuggingFaceTB/SmolLM2-135M-Instruct")
    randomize(transformers.LlamaForCausalLM(LANGUAGE_MODELS["llama"]())).save_pretrained(language_model)
    make_tokenizer().save_pretrained(language_model)


def save_clip(folder: Path):
    """Write a CLIP of random weights, with its processor."""
    special = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    text_config = {**SIZES, **special, "vocab_size": VOCAB_SIZE}
    vision_config = {**SIZES, "image_size": 28, "patch_size": 14}
    config = transformers.CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPProcessor(make_image_processor(), make_tokenizer(eos=True)).save_pretrained(folder)


def write_table(path: Path, **columns: list):
    """Write pictures and texts as Parquet."""
    rows = {"image": [make_image(0), make_image(1)], **columns}
    features = {"image": datasets.Image()} | {name: datasets.Value("string") for name in columns}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)


def write_coco(folder: Path):
    """Write pictures and their captions as COCO has them."""
    for name in ("annotations", "val2017"):
        (folder / name).mkdir(parents=True)
    images = [{"id": number, "file_name": f"{number:012}.jpg"} for number in range(len(CAPTIONS))]
    for image in images:
        make_image(image["id"]).save(folder / "val2017" / image["file_name"])
    annotations = [{"id": number, "image_id": number, "caption": text} for number, text in enumerate(CAPTIONS)]
    content = json.dumps({"images": images, "annotations": annotations})
    (folder / "annotations" / "captions_val2017.json").write_text(content)


def write_shard(path: Path, photos: Path):
    """Write the files of a folder, a picture and a text for each key, as WebDataset."""
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for file in sorted(photos.iterdir()):
            tar.add(file, file.name)


def fill_folder(folder: Path):
    """Write the pictures, tables and models that the docs name."""
    for name in ("captioner", "outputs/demo/model", "stage2"):
        make_model("llama").save_pretrained(folder / name)
        make_processor().save_pretrained(folder / name)
    for name in ("stage1", "retriever", "outputs/demo/retriever"):
        save_stage1(folder / name)
    for seed, name in enumerate(["picture", "cat", "dog", "bus"]):
        for ending in ("png", "jpg"):
            make_image(seed).save(folder / f"{name}.{ending}")
    for name in ("photos", "holidays"):
        (folder / name).mkdir()
        for seed, text in enumerate(CAPTIONS):
            make_image(seed).save(folder / name / f"{seed}.png")
            (folder / name / f"{seed}.txt").write_text(text)
    for name in ("pictures", "train", "val"):
        write_table(folder / f"{name}.parquet", caption=CAPTIONS)
    write_table(folder / "questions.parquet", question=["what is it?"] * 2, answer=CAPTIONS)
    write_coco(folder / "coco")
    write_shard(folder / "shards" / "00000.tar", folder / "photos")
    write_results(folder)
    write_benchmarks(folder)


def write_results(folder: Path):
    """Write what the commands make of pictures.parquet: captions, captions ranked by CapFilt, features."""
    rows = load_rows(folder / "pictures.parquet")
    lines = [json.dumps({"row": number, "caption": f"caption {number}"}) for number in (1, 0)]
    (folder / "row_captions.jsonl").write_text("\n".join(lines) + "\n")

    # The original caption is clearly better than all others in the first row, and clearly worse in the second
    def propose(pictures):
        return [["a cat on a mat", "two dogs", "clouds"]] * len(pictures)

    def score(pictures, captions):
        return [[{"a dog": 3.0, "a red bus": -2.0, "clouds": -1.0}.get(text, 1.0) for text in own] for own in captions]

    capfilt_dataset(rows, propose, score, folder / "filtered")
    capfilt_dataset(rows, None, score, folder / "scored")
    model, processor = (each.from_pretrained(folder / "stage1") for each in (Blip2ForPreTraining, Blip2Processor))
    cache_features(rows, model, processor, folder / "features")


def write_benchmarks(folder: Path):
    """Write files of benchmarks, and the pictures of COCO that they name."""
    names = [f"val2014/COCO_val2014_{number:012d}.jpg" for number in (7, 9, 42)]
    benchmark_files.make_pictures(folder / "coco", *names)
    entries = [benchmark_files.karpathy_entry(number, "test") for number in (7, 9)]
    benchmark_files.write(folder / "dataset_coco.json", {"images": entries})
    benchmark_files.vqa_files(folder)
    benchmark_files.coco_files(folder)
    benchmark_files.synonyms_file(folder / "synonyms.txt")
    for kind in ("random", "popular", "adversarial"):
        benchmark_files.pope_file(folder / f"coco_pope_{kind}.json", {}, {})


def snippets(page: str) -> list[str]:
    """Return the Python of a page of the docs, or of README.md."""
    path = REPOSITORY / page if page == "README.md" else DOCS / page
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """Return the lines of the shell of a page of the docs, each with its continuations."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(blocks).replace("\\\n", " ").splitlines()


def run_snippets(page: str) -> dict:
    """Run the Python of a page in the current folder, and return the names that it leaves."""
    namespace: dict = {}
    for number, snippet in enumerate(snippets(page), 1):
        exec(compile(snippet, f"{page}, snippet {number}", "exec"), namespace)
    return namespace
