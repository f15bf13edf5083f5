"""The page of questions: its snippets as written, its quotations and its sizes, and what it claims."""

import math
import re
import shlex

import pytest
import torch
import transformers
from docs_world import fill_folder, fill_hub_cache, run_snippets
from hub_cache import use_hub_cache
from paths import DOCS
from theirs import full_size_text_config
from tiny import NUM_QUERIES, make_image, make_model, make_processor

from blip2_hf import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval
from blip2_hf.cli import main, make_parser
from blip2_hf.training import train_only


PAGE = (DOCS / "faq.md").read_text(encoding="utf-8")
QUESTION = "Question: what is it? Answer:"


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the page's snippets leave, with small models under the names that they use."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("faq")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        use_hub_cache(patch, folder / "hub")
        fill_hub_cache(folder / "hub")
        (folder / "work").mkdir()
        fill_folder(folder / "work")
        patch.chdir(folder / "work")
        yield run_snippets("faq.md")


def quotations(beginning: str) -> str:
    """Return the quotation of the page that begins so, in one line."""
    (found,) = re.findall(rf'"({re.escape(beginning)}[^"]*)"', " ".join(PAGE.split()))
    return found


@pytest.mark.parametrize("command", re.findall(r"`(blip2-hf [^`]*--model [^`]*)`", " ".join(PAGE.split())))
def test_commands_have_the_options_that_are_shown(command):
    assert callable(make_parser().parse_known_args(shlex.split(command)[1:])[0].run)


def test_a_prompt_is_not_part_of_the_answer(names):
    model, processor, inputs, generated = (names[name] for name in ("model", "processor", "inputs", "generated"))
    shown = processor.decode(generated[0], skip_special_tokens=True)
    (answer,) = processor.post_process_image_text_to_text(generated, input_ids=inputs["input_ids"])
    assert model.dtype == torch.bfloat16 and len(answer) > 0 and QUESTION not in answer
    assert shown.startswith(QUESTION) and shown.removeprefix(QUESTION).strip() == answer.strip()


def test_commands_take_what_was_quantised_once(names, capsys):
    main(["caption", "cat.jpg", "--model", "opt-8bit", "--max-new-tokens", "3"])
    assert capsys.readouterr().out.count("\n") == 1
    small = Blip2ForConditionalGeneration.from_pretrained("opt-8bit")
    kinds = {name: type(module).__name__ for name, module in small.named_modules()}
    assert kinds["language_model.model.decoder.layers.0.fc1"] == "Linear8bitLt"
    whole = [
        name for name in kinds if name.startswith("qformer") or name == "language_projection" or "lm_head" in name
    ]
    assert whole and not {kinds[name] for name in whole} & {"Linear8bitLt", "Linear4bit"}


def test_scores_and_features(names):
    cosine, logits, features = names["cosine"], names["logits"], names["features"]
    assert cosine.shape == (1, 2) and logits.shape == (1, 2, 2) and names["probability"].shape == (1, 2)
    assert features.shape == (1, NUM_QUERIES, 16)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(1, NUM_QUERIES))
    texts = names["retriever"].get_text_features(**names["texts"]).pooler_output
    torch.testing.assert_close((features @ texts.T).amax(dim=1), cosine)
    assert not torch.allclose(features.mean(dim=1) @ texts.T, cosine, atol=1e-3)
    found = names["retriever"].get_qformer_features(names["pixels"])
    assert found.shape == (1, NUM_QUERIES, 32)
    width = names["model"].get_input_embeddings().weight.shape[1]
    pixels = names["pixels"].to(torch.bfloat16)
    assert names["model"].get_image_features(pixels).pooler_output.shape == (1, NUM_QUERIES, width)


def test_the_side_of_padding_does_not_matter():
    torch.manual_seed(0)
    model, processor = make_model("opt"), make_processor()
    alone = processor(images=make_image(1), text="a photo of", return_tensors="pt")
    expected = model.generate(**alone, max_new_tokens=5)[0, -5:]
    for side in ("left", "right"):
        processor.tokenizer.padding_side = side
        batch = processor(images=[make_image(0), make_image(1)], text=[QUESTION, "a photo of"], return_tensors="pt")
        assert batch["attention_mask"][1, 0] == 0
        assert torch.equal(model.generate(**batch, max_new_tokens=5)[1, -5:], expected)


def test_repeats_are_banned_among_words_alone():
    torch.manual_seed(0)
    model, processor = make_model("opt"), make_processor()
    inputs = processor(images=make_image(), text="a photo of", return_tensors="pt")

    def write(**options) -> list[int]:
        new = model.generate(**inputs, min_new_tokens=25, max_new_tokens=25, **options)
        return new[0, inputs["input_ids"].shape[1] :].tolist()

    def repeats(tokens: list[int]) -> int:
        triples = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
        return len(triples) - len(set(triples))

    assert repeats(write()) > 0 and repeats(write(no_repeat_ngram_size=3)) == 0
    with pytest.raises(ValueError, match="`max_length` is set to 6.*max_new_tokens"):
        model.generate(**inputs, max_length=6)


@pytest.mark.parametrize("language_model", ["opt", "t5"])
def test_what_float16_keeps_in_float32(language_model, tmp_path):
    make_model(language_model).save_pretrained(tmp_path)
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path, dtype="float16")
    kept = ("query_tokens", "qformer", "language_projection")
    for name, parameter in model.named_parameters():
        is_kept = name.startswith(kept) or name.endswith("wo.weight")
        assert parameter.dtype == (torch.float32 if is_kept else torch.float16), name
    inputs = make_processor(language_model == "t5")(images=make_image(), text="a photo of", return_tensors="pt")
    assert model(**inputs, labels=inputs["input_ids"]).loss.isfinite()


def test_larger_pictures_have_as_many_queries():
    model = make_model("opt")
    for size in (28, 56):
        features = model.get_image_features(torch.randn(1, 3, size, size)).pooler_output
        assert features.shape[1] == NUM_QUERIES


def test_errors_that_are_quoted():
    model = make_model("opt")
    few = make_processor(num_query_tokens=NUM_QUERIES - 1)
    expected = quotations("Each image needs one").replace("32.", f"{NUM_QUERIES}.")
    with pytest.raises(ValueError, match=re.escape(expected)):
        model.generate(**few(images=make_image(), text=QUESTION, return_tensors="pt"))
    inputs = make_processor()(images=make_image(), text=QUESTION, return_tensors="pt")
    with pytest.raises(ValueError, match=quotations("but no image was given")):
        model.generate(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match=quotations("but no image was given")):
        model.generate(**make_processor()(text="<image>what is it?", return_tensors="pt"))
    assert model.generate(**make_processor()(text=QUESTION, return_tensors="pt"), max_new_tokens=3).shape[0] == 1


@pytest.mark.parametrize(
    ("language_model", "targets"),
    [("opt", {"q_proj", "v_proj"}), ("llama", {"q_proj", "v_proj"}), ("t5", {"q", "v"})],
)
def test_names_for_adapters(language_model, targets):
    peft = pytest.importorskip("peft")

    def adapted(model) -> set[str]:
        return {name.split(".lora_A")[0].split(".")[-1] for name, _ in model.named_parameters() if ".lora_A" in name}

    model = peft.get_peft_model(make_model(language_model), peft.LoraConfig(target_modules=list(targets)))
    assert adapted(model) == targets
    assert targets < adapted(train_only(make_model(language_model), "lora_language_model"))
    of_queries = peft.LoraConfig(target_modules=r"qformer\..*\.(query|value)")
    assert adapted(peft.get_peft_model(make_model(language_model), of_queries)) == {"query", "value"}


def vicuna():
    return transformers.LlamaConfig(vocab_size=32001, hidden_size=4096, intermediate_size=11008)


def full_size(name: str) -> torch.nn.Module:
    """Return a model of the published shape, without memory."""
    qformer = {"use_qformer_text_input": True, "vocab_size": 30523, "bos_token_id": 30522}
    with torch.device("meta"):
        if "itm" in name:
            return Blip2ForImageTextRetrieval(Blip2Config(qformer_config=qformer, text_config=None))
        shape = name.removeprefix("blip2-").removeprefix("instructblip-").removesuffix("-coco")
        text_config = vicuna() if shape == "vicuna-7b" else full_size_text_config(shape)
        qformer = qformer if name.startswith("instruct") else {}
        model = Blip2ForConditionalGeneration(Blip2Config(qformer_config=qformer, text_config=text_config))
        if shape.startswith("flan"):  # whose files have a head of its own
            head = model.language_model.lm_head
            head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
        return model


def gigabytes(name: str, bits: int) -> float:
    """Return the size of the weights, of which bitsandbytes quantises what it does by default."""
    model = full_size(name)
    if bits < 16:
        pytest.importorskip("bitsandbytes")
        config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
        quantizer = transformers.quantizers.auto.AutoHfQuantizer.from_config(config, pre_quantized=False)
        quantizer.preprocess_model(model, device_map=None)
    size, seen = 0.0, set()
    for module in model.modules():
        is_quantised = type(module).__name__ in ("Linear8bitLt", "Linear4bit")
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if not is_quantised or parameter.dim() == 1:
                size += 2 * parameter.numel()
            elif bits == 8:
                size += parameter.numel() + 4 * len(parameter)  # a float32 for each row
            else:
                size += math.prod((module.in_features, module.out_features)) * (1 / 2 + 4 / 64)  # and for 64 weights
    return size / 1e9


def test_the_number_of_parameters_is_that_of_the_published():
    """As PEFT printed it, with adapters, in an issue (38) of Retrieval-Augmented-Visual-Question-Answering."""
    assert sum(p.numel() for p in full_size("blip2-flan-t5-xl").parameters()) == 3948922368 - 6475776


ROWS = re.findall(
    r"^\|.*\| `((?:instruct)?blip2?-[^`]+)`.*?\| ([\d.]+) \| ([\d.]*) ?\| ([\d.]*) ?\|$", PAGE, re.MULTILINE
)


@pytest.mark.parametrize(("name", "sizes"), [(name, sizes) for name, *sizes in ROWS])
def test_sizes_in_the_table(name, sizes):
    assert len(ROWS) == 8
    for bits, size in zip((16, 8, 4), sizes, strict=True):
        if size:
            assert f"{gigabytes(name, bits):.1f}" == size
