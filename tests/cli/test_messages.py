"""Mistakes that people make, in every command: each is told in a line, in time, and says what to do."""

import builtins
import errno
import io
import json
import re
import resource
import shlex
import shutil
import sys
from pathlib import Path

import datasets
import pytest
import transformers
from benchmark_files import aokvqa_file, coco_files, make_pictures, pope_file, synonyms_file
from saved_models import save_captioner, save_stage1
from tiny import make_image

from blip2_hf.cli import COMMANDS, main, make_parser


WRITER, MATCHER, ANY = "writer", "matcher", "any"
# Of each command: its line, the class of model that it needs, and what its data are
LINES = {
    "ask": ("ask {data} 'what is it?' --model {model}", WRITER, "picture"),
    "cache-features": ("cache-features {data} --model {model} --output {output} --size 28", ANY, "rows"),
    "capfilt": ("capfilt {data} --filter {model} --output {output} --num-captions 0", MATCHER, "rows"),
    "caption": ("caption {data} --model {model} --output {output}.jsonl", WRITER, "rows"),
    "convert": ("convert {model} --output {output}", ANY, None),
    "evaluate": ("evaluate caption --data {data} --model {model} --output {output}", WRITER, "rows"),
    "export": ("export {model} --output {output}.pt2", ANY, None),
    "finetune": ("finetune {data} --model {model} --output {output} --max-steps 1", WRITER, "rows"),
    "index": ("index {data} --model {model} --index {output}", MATCHER, "folder"),
    "look": ("look {data} cat --model {model} --output {output}.png", MATCHER, "picture"),
    "pretrain": (
        "pretrain {data} --stage 1 --model {model} --output {output} --image-size 28 --max-steps 1",
        MATCHER,
        "rows",
    ),
    "search": ("search cat --index {data} --model {model} --sheet {output}.png", MATCHER, "index"),
    "demo": ("demo --captioner {model}", WRITER, None),
    "serve": ("serve {model}", WRITER, None),
}
# That do the same with another option
MORE_LINES = {
    "ask": ("ask {data} 'what is it?' --model {model}", WRITER, "picture"),
    "captioner": (
        "capfilt pairs.parquet --filter stage1 --captioner {model} --output {output} --num-captions 1",
        None,
        None,
    ),
    "tower": ("cache-features pairs.parquet --vision-model {model} --output {output} --size 28", None, None),
    "retrieval": ("evaluate retrieval --data {data} --model {model} --output {output}", MATCHER, "rows"),
    "queries": ("look {data} --model {model} --output {output}.png", ANY, "picture"),
    "vqa": ("evaluate vqa --data {data} --model {model} --output {output}", WRITER, "rows"),
    "aokvqa": (
        "evaluate aokvqa --questions aokvqa.json --images photos --model {model} --output {output}",
        WRITER,
        None,
    ),
    "pope": ("evaluate pope --questions pope.json --images photos --model {model} --output {output}", WRITER, None),
    "chair": (
        "evaluate chair --annotations captions_val2014.json --instances instances_val2014.json "
        "--synonyms synonyms.txt --images coco --model {model} --output {output}",
        WRITER,
        None,
    ),
    "reranker": ("caption {data} --model captioner --rerank {model} --output {output}.jsonl", MATCHER, "rows"),
    "retriever": (
        "finetune {data} --task retrieval --model {model} --output {output} --image-size 28",
        MATCHER,
        "rows",
    ),
}
ALL_LINES = LINES | MORE_LINES
DATA = {"rows": "pairs.parquet", "folder": "photos", "picture": "photos/0.png", "index": "photos", None: ""}
GOOD = {WRITER: "captioner", MATCHER: "stage1", ANY: "stage1", None: "captioner"}
# What a run writes to stderr besides: progress, advice
PROGRESS = re.compile(
    r"\d+%\||^\s*\x1b\[A$|examples/s|pictures, of which|pictures are to be computed|The paper's have"
)


def names(*kinds, of=ALL_LINES) -> list[str]:
    """The lines whose data are of one of the kinds."""
    return [name for name, (_, _, data) in of.items() if data in kinds]


def spoilt(folder: Path, name: str, source: str, change=lambda copy: None, without: tuple[str, ...] = ()) -> None:
    """A copy of a model in which something is wrong."""
    copy = folder / name
    shutil.copytree(folder / source, copy)
    for file in [file for file in copy.iterdir() if file.name in without]:
        file.unlink()
    change(copy)


def cut_off(copy: Path):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def break_config(copy: Path):
    (copy / "config.json").write_text('{"model_type": ')


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with models and data, good ones and others."""
    folder = tmp_path_factory.mktemp("place")
    save_captioner(folder / "captioner")
    save_stage1(folder / "stage1")
    parts = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**parts, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config={**parts, "image_size": 28, "patch_size": 14})
    transformers.CLIPModel(config).save_pretrained(folder / "clip")
    transformers.BertModel(transformers.BertConfig(vocab_size=50, **parts)).save_pretrained(folder / "bert")
    tokens = ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
    for kind in ("captioner", "stage1"):
        spoilt(folder, f"cut-{kind}", kind, cut_off)
        spoilt(folder, f"weightless-{kind}", kind, without=("model.safetensors",))
        spoilt(folder, f"bare-{kind}", kind, without=tokens)
        spoilt(folder, f"broken-{kind}", kind, break_config)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "gone"}')
    (folder / "photos").mkdir()
    rows = []
    for number in range(4):
        make_image(number).save(folder / "photos" / f"{number}.png")
        rows.append(
            {
                "image": str(folder / "photos" / f"{number}.png"),
                "caption": "a dog",
                "question": "what ?",
                "answer": "a dog",
            }
        )
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    pairs.to_parquet(folder / "pairs.parquet")
    pope_file(folder / "pope.json", {"image": "0.png"})
    make_image(42).save(folder / "photos" / f"{42:012d}.jpg")
    aokvqa_file(folder / "aokvqa.json", {})
    coco_files(folder)
    synonyms_file(folder / "synonyms.txt")
    make_pictures(folder / "coco", *(f"COCO_val2014_{number:012d}.jpg" for number in (7, 9)))
    (folder / "empty").mkdir()
    (folder / "file").write_text("no table")
    (folder / "broken.csv").write_bytes(b'image,caption\n"a,b\n1,2,3,4\n\x00\xff')
    (folder / "broken.json").write_text('{"image": ')
    (folder / "broken.jsonl").write_text('{"image": "a.png"}\n{"image": ')
    (folder / "broken.parquet").write_bytes(b"PAR1")
    (folder / "broken.arrow").write_bytes(b"ARROW1")
    return folder


@pytest.fixture
def told(place, tmp_path, monkeypatch, capfd):
    """Run a line with a mistake in it: `told(line)` is the one message, after which no model was loaded."""
    monkeypatch.chdir(place)
    loaded = []
    from_pretrained = transformers.PreTrainedModel.from_pretrained.__func__

    def counted(cls, name, *args, **kwargs):
        loaded.append(name)
        return from_pretrained(cls, name, *args, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(counted))

    def run(name: str, extra: str = "", before_loading: bool = True, drop: str | None = None, **given) -> str:
        line, kind, data = ALL_LINES[name]
        values = {"data": DATA[data], "model": GOOD[kind], "output": str(tmp_path / "out")} | given
        arguments = [part.format(**values) for part in shlex.split(line)] + shlex.split(extra)
        if drop is not None:
            place = arguments.index(drop)
            del arguments[place : place + 2]
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        captured = capfd.readouterr()
        is_message = isinstance(stopped.value.code, str)
        assert is_message or stopped.value.code in (1, 2), captured.err
        lines = [line for line in captured.err.splitlines() if line.strip() and not PROGRESS.search(line)]
        lines += [stopped.value.code] if is_message else []
        assert len(lines) == 1, "\n".join(lines)
        if "needs gradio" in lines[0]:
            pytest.importorskip("gradio")
        assert lines[0].startswith("blip2-hf") and "\n" not in lines[0]
        assert 30 < len(lines[0]) <= 400 + captured.err.count("/tmp"), lines[0]
        assert not (before_loading and loaded), f"{loaded} loaded before: {lines[0]}"
        return lines[0]

    return run


def test_the_table_has_every_command():
    parser = make_parser()
    known = next(action for action in parser._actions if action.choices)
    assert {*LINES} == {*known.choices} and len(known.choices) == len(COMMANDS)


# --- models ---


@pytest.mark.parametrize("name", ["cache-features", "capfilt", "caption", "evaluate", "finetune", "look", "pretrain"])
def test_no_model(told, name):
    option = "--filter" if name == "capfilt" else "--model"
    assert option in told(name, drop=option)


@pytest.mark.parametrize("name", [name for name in ALL_LINES if name != "search"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./captoiner", "There is no folder ./captoiner. Did you mean captioner?"),
        ("captoiner", "There is no folder captoiner here, .*Did you mean captioner?"),
        ("some/where/captioner", "There is no folder some/where/captioner."),
        ("empty", "The folder empty holds no model, because it has no config.json"),
        ("photos", "The folder photos holds no model, because it has no config.json"),
        ("adapter", "adapter holds adapters of gone, which"),
    ],
)
def test_a_model_that_is_not_there(told, name, model, message):
    assert re.search(message, told(name, model=model))


@pytest.mark.parametrize("name", [name for name in ALL_LINES if name not in ("search", "tower", "captioner")])
def test_a_model_of_another_kind(told, name):
    assert re.search("clip.* of type 'clip': a BLIP-2", told(name, model="clip"))


@pytest.mark.parametrize("name", [name for name in names("rows", "folder", "picture") if ALL_LINES[name][1] != ANY])
def test_a_model_of_another_stage(told, name):
    needs_writer = ALL_LINES[name][1] == WRITER
    message = told(name, model="stage1" if needs_writer else "captioner")
    if needs_writer:
        assert re.search(r"stage1 is a model of stage 1 \(Blip2ForPreTraining\), which has no language model", message)
    else:
        assert re.search(
            r"captioner is a model of stage 2 \(Blip2ForConditionalGeneration\), which (lacks|has not)", message
        )


def test_a_tower_that_reads_no_pictures(told):
    assert "no known vision tower" in told("tower", model="bert")


@pytest.mark.parametrize("name", [name for name in ALL_LINES if name not in ("search", "captioner", "tower")])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("cut", "weights of cut-.* cut off or damaged.*again"),
        ("weightless", "weightless-.* can't be loaded.*again"),
        ("broken", "broken-.*config.json.* not a valid JSON"),
    ],
)
def test_a_model_whose_files_are_damaged(told, name, wrong, message):
    model = f"{wrong}-{GOOD[ALL_LINES[name][1]]}"
    assert re.search(message, told(name, model=model, before_loading=wrong == "broken"))


@pytest.mark.parametrize("name", names("rows", "folder", "picture"))
def test_a_model_without_its_processor(told, name):
    model = f"bare-{GOOD[ALL_LINES[name][1]]}"
    assert re.search(f"{model} has no (image )?processor", told(name, model=model))


# --- data ---


@pytest.mark.parametrize("name", names("rows", "folder", "index"))
def test_data_that_are_not_there(told, name):
    assert re.search(r"There is no .*folder phtos\. Did you mean photos\?", told(name, data="phtos"))
    assert re.search(r"empty", told(name, data="empty"))


@pytest.mark.parametrize(
    ("name", "extra", "message"),
    [
        ("aokvqa", "--questions pope.json", "pope.json: a list was expected, got dict"),
        ("aokvqa", "--images coco", "coco lacks 1 pictures, the first of them val2017/000000000042.jpg or 0000000000"),
        ("aokvqa", "--generate num_beams=2", "aokvqa has no use for --generate"),
        ("vqa", "--normalization mean", "vqa has no use for --normalization"),
        ("pope", "--questions pop.json", "There is no file pop.json. Did you mean pope.json?"),
        ("pope", "--questions broken.json", "broken.json, line 1 can't be read as JSON"),
        ("pope", "--images coco", "coco lacks 1 pictures, the first of them 0.png"),
        ("chair", "--instances captions_val2014.json", "captions_val2014.json has no 'categories'"),
        ("chair", "--instances instances_val2014.json ins.json", "There is no file ins.json"),
        ("chair", "--synonyms synonym.txt", "There is no file synonym.txt. Did you mean synonyms.txt?"),
        ("chair", "--synonyms broken.json", "broken.json, line 1 has .*the words of an object"),
        ("chair", "--images photos", "photos lacks 2 pictures"),
    ],
)
def test_files_of_what_is_there(told, name, extra, message):
    assert re.search(message, told(name, extra))


@pytest.mark.parametrize("name", names("rows"))
@pytest.mark.parametrize("data", ["broken.csv", "broken.json", "broken.jsonl", "broken.parquet", "broken.arrow"])
def test_a_table_that_is_broken(told, name, data):
    assert data in told(name, data=data)


@pytest.mark.parametrize("name", names("rows"))
@pytest.mark.parametrize("data", ["file", "captioner"])
def test_data_that_are_none(told, name, data):
    assert data in told(name, data=data)


@pytest.mark.parametrize("name", names("folder", "index"))
def test_a_file_in_place_of_a_folder(told, name):
    assert "photos/0.png is a file: a folder was expected" in told(name, data="photos/0.png")


@pytest.mark.parametrize("name", names("picture"))
@pytest.mark.parametrize("data", ["photos/9.png", "photos", "file"])
def test_a_picture_that_is_none(told, name, data):
    # Of several pictures, `ask` tells which can't be read when their turn has come
    assert data in told(name, data=data, before_loading=name != "ask")


def test_a_folder_without_an_index(told):
    assert "photos has no index. Name the folder of one (--index FOLDER), or build one: blip2-hf index" in told(
        "search"
    )


# --- options ---


@pytest.mark.parametrize("name", [name for name in ALL_LINES if name not in ("convert", "export")])
def test_a_device_that_is_not_there(told, name):
    message = told(name, "--device cuda:99")
    assert "cuda:99" in message and "cpu" in message


@pytest.mark.parametrize("name", [name for name in LINES if name != "serve"])  # transformers tells it, see test_serve
def test_an_option_that_is_not_there(told, name):
    assert "there is no option --modle. Did you mean --model?" in told(name, "--modle x") or name in (
        "convert",
        "export",
        "capfilt",
        "demo",
    )


@pytest.mark.parametrize("name", names("rows"))
@pytest.mark.parametrize("extra", ["--batch-size 0", "--batch_size -1", "--batch-size many", "--num-workers -1"])
def test_numbers_out_of_bounds(told, name, extra):
    assert "was given, a whole number of at least" in told(name, extra)


@pytest.mark.parametrize("name", ["caption", "evaluate"])
@pytest.mark.parametrize("extra", ["--generate num_beam=2", "--generate num_beams=0", "--generate beams"])
def test_settings_of_generation(told, name, extra):
    assert re.search("num_beam|NAME=VALUE", told(name, extra))


@pytest.mark.parametrize("name", ["caption", "capfilt", "evaluate", "finetune", "look"])
def test_a_choice_that_is_not_there(told, name):
    option = {"capfilt": "--score itx", "look": "--method gradcm"}.get(name, "--preset captoin")
    assert re.search("was given, one of .* was expected", told(name, option))


@pytest.mark.parametrize("name", ["captioner", "finetune", "pretrain", "tower"])
def test_a_seed_that_is_none(told, name):
    assert re.search("--seed: '-4' was given, a whole number of at least 0", told(name, "--seed -4"))


@pytest.mark.parametrize(
    ("name", "extra", "message"),
    [
        ("caption", "--image-column img", "pairs.parquet has no column 'img'; its columns are .* --image-column"),
        ("evaluate", "--caption-column txt", "pairs.parquet has no column 'txt'; .* --caption-column"),
        ("vqa", "--question-column q", "pairs.parquet has no column 'q'; .* --question-column"),
        ("vqa", "--answer-column a", "pairs.parquet has no column 'a'; .* --answer-column"),
        ("finetune", "--id-column ids", "pairs.parquet has no column 'ids'; .* --id-column"),
        ("pretrain", "--text-column txt", "pairs.parquet has no column 'txt'; .* --text-column"),
    ],
)
def test_a_column_that_is_not_there(told, name, extra, message):
    assert re.search(message, told(name, extra))


@pytest.mark.parametrize(
    ("name", "extra"), [("finetune", "--lr 1"), ("pretrain", "--merge"), ("caption", "--zeal 3"), ("index", "--sead")]
)
def test_no_guess_is_better_than_a_bad_one(told, name, extra):
    assert f"there is no option {extra.split()[0]}. See" in told(name, extra)


@pytest.mark.parametrize("model", ["pairs", "brokn.csv-model", "clp2-model"])
def test_no_file_is_guessed_for_a_model(told, model):
    assert "Did you mean" not in told("caption", model=model)


def test_a_text_and_a_picture_to_search_for(told, monkeypatch):
    monkeypatch.setitem(ALL_LINES, "line", ("search cat --image photos/0.png --index photos", None, None))
    assert "the text 'cat' and --image photos/0.png were given. Give one of the two." in told("line")
    monkeypatch.setitem(ALL_LINES, "line", ("search --index photos", None, None))
    assert "nothing to search for was given" in told("line")


# --- outputs ---


@pytest.mark.parametrize("name", [name for name in ALL_LINES if name not in ("ask", "demo", "serve")])
@pytest.mark.parametrize("output", ["file/out", "/proc/nothing/out"])
def test_an_output_that_cant_be_written(told, name, output):
    message = told(name, output=output)
    assert output in message and re.search("can't be written", message)


@pytest.mark.parametrize(
    "name", ["cache-features", "capfilt", "convert", "evaluate", "finetune", "index", "pretrain", "retrieval"]
)
def test_a_file_in_place_of_an_output_folder(told, name):
    assert re.search("file is a file.* a folder was expected", told(name, output="file"))


@pytest.mark.parametrize("name", ["cache-features", "capfilt", "evaluate", "finetune", "pretrain", "retriever"])
def test_the_data_in_place_of_an_output(told, name):
    assert "--output photos is what is read, too. Give another folder." in told(name, data="photos", output="photos")


def test_an_output_inside_of_what_is_read(told):
    for name in ("finetune", "evaluate", "cache-features"):
        model = GOOD[LINES[name][1]]
        message = f"--output {model}/sub is inside of {model}, which is read. Give another folder."
        assert message in told(name, output=f"{model}/sub")


@pytest.mark.parametrize(("data", "model"), [("captioner", "photos"), ("stage1", "photos/0.png")])
def test_data_and_model_the_other_way_round(told, data, model):
    message = "photos holds no model" if model == "photos" else "photos/0.png is a file: the folder of a model"
    for name in ("caption", "capfilt", "evaluate"):
        assert message in told(name, data=data, model=model)


# --- packages ---


@pytest.mark.parametrize(
    ("line", "package", "message"),
    [
        ("index photos --model stage1 --approximate", "faiss", r'pip install "blip2-hf\[search\]"'),
        ("export stage1 --output {output}.onnx", "onnx", r'pip install "blip2-hf\[export\]"'),
        (
            "finetune pairs.parquet --model captioner --output {output} --load-in-4bit",
            "bitsandbytes",
            r'pip install "blip2-hf\[quantization\]"',
        ),
        (
            "finetune pairs.parquet --model captioner --output {output} --report-to tensorboard",
            "tensorboard",
            r'pip install "blip2-hf\[training\]"',
        ),
        (
            "evaluate vqa --data pairs.parquet --model captioner --output {output} --lemmatize",
            "spacy",
            r'pip install "blip2-hf\[okvqa\]"',
        ),
    ],
)
def test_a_package_that_is_missing(told, monkeypatch, line, package, message):
    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return import_plainly(name, *args, **kwargs)

    import_plainly = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    if package == "spacy":  # datasets would take None for the module
        monkeypatch.delitem(sys.modules, package, raising=False)
    else:
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(ALL_LINES, "line", (line, None, None))
    assert re.search(message, told("line"))


# --- the disk ---


@pytest.mark.parametrize("name", ["caption", "capfilt", "evaluate", "index", "look", "retrieval"])
def test_a_full_disk(told, tmp_path, monkeypatch, name):
    def full(path, mode="r", *args, **kwargs):
        if set(mode) & set("wxa+") and isinstance(path, (str, Path)) and str(path).startswith(str(tmp_path)):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return open_plainly(path, mode, *args, **kwargs)

    open_plainly = open
    monkeypatch.setattr("builtins.open", full)
    monkeypatch.setattr(io, "open", full)
    data = {"evaluate": "--generate max_new_tokens=3 min_new_tokens=0 --split train", "retrieval": "--split train"}
    assert "No space left on device" in told(name, data.get(name, ""), before_loading=False)


@pytest.mark.parametrize("name", ["convert", "export", "finetune", "search"])
def test_a_full_disk_for_libraries_that_write_themselves(told, monkeypatch, name):
    """A limit on the size of files is as a full disk for code that is not Python's."""
    if name == "search":
        monkeypatch.setitem(ALL_LINES, name, ("search cat --index photos/index --sheet {output}.png", None, None))
        main(["index", "photos", "--model", "stage1", "--index", "photos/index", "--num-workers", "0"])
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000 if name == "search" else 40_000, most))
    try:
        assert re.search(
            "can't be (read or )?written.*File too large|File too large", told(name, before_loading=False)
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
