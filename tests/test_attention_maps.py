"""Where the model looks: maps against the obvious computation, and a trained model's on pictures of known objects."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageDraw
from stage1 import STAGE1_QFORMER, make_inputs, make_stage1
from tiny import make_config, make_image, make_image_processor, make_model, randomize

from blip2_hf import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, Blip2Model, Blip2Processor
from blip2_hf.attention_maps import feature_grid, normalize_heat_map, overlay, query_attention_map, text_heat_map
from blip2_hf.cli import main
from blip2_hf.models.modeling_base import Blip2PreTrainedModel


SIDE, PATCH = 40, 5
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (220, 220, 30)}
NAMES = list(COLOURS)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "square", *NAMES]


def draw_squares(rng, names):
    """A picture of squares that do not touch, on grey, and the share of each patch that each covers."""
    picture = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
    boxes = []
    while len(boxes) < len(names):
        side = int(rng.integers(10, 15))
        left, top = (int(x) for x in rng.integers(0, SIDE - side, 2))
        box = np.zeros((SIDE, SIDE), dtype=np.float32)
        box[top : top + side, left : left + side] = 1
        if all((box * other).max() == 0 for other in boxes):
            corner = (left + side - 1, top + side - 1)
            ImageDraw.Draw(picture).rectangle((left, top, *corner), fill=COLOURS[names[len(boxes)]])
            boxes.append(box)
    cells = SIDE // PATCH
    return picture, np.stack([box.reshape(cells, PATCH, cells, PATCH).mean(axis=(1, 3)) for box in boxes])


def make_processor():
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    image_processor = make_image_processor(SIDE)
    image_processor.image_mean = image_processor.image_std = [0.5] * 3
    return Blip2Processor(image_processor, tokenizer)


def make_trainable_model():
    """Its tower embeds patches, and nothing else: no feature knows of another patch."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 0, "num_attention_heads": 4}
    qformer = {**STAGE1_QFORMER, "num_hidden_layers": 2, "cross_attention_frequency": 1, "initializer_range": 0.1}
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    config = make_config(
        None,
        vision_config={**vision, "image_size": SIDE, "patch_size": PATCH, "initializer_range": 0.5},
        qformer_config={**qformer, **dropout},
        image_token_index=None,
        initializer_range=0.3,
    )
    return Blip2ForImageTextRetrieval(config)


def train_to_match(model, processor, steps=200, num_pictures=512, batch_size=32):
    """Is a square of this colour in the picture, of one or two? Nothing says where."""
    rng = np.random.default_rng(0)
    names = [list(rng.permutation(NAMES)[: 1 + i % 2]) for i in range(num_pictures)]
    pictures = [draw_squares(rng, some)[0] for some in names]
    texts = processor.tokenizer([f"a {name} square" for name in NAMES], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        image_embeds = model.get_image_embeds(processor(images=pictures, return_tensors="pt")["pixel_values"])
    is_there = torch.tensor([[name in some for name in NAMES] for some in names]).long()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        rows = torch.from_numpy(rng.integers(0, num_pictures, batch_size))
        asked = torch.from_numpy(rng.integers(0, len(NAMES), (batch_size, 2)))
        logits = model.get_matching_logits(texts[asked.flatten()], image_embeds=image_embeds[rows])
        loss = torch.nn.functional.cross_entropy(logits, is_there[rows[:, None], asked].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model that has learned which colours are in a picture, and its processor."""
    torch.manual_seed(2)
    processor = make_processor()
    model = train_to_match(make_trainable_model(), processor)
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor, folder


def held_out(trained, count, objects):
    """Model, `pixel_values`, a text for each object, and how much of each patch each object covers."""
    model, processor, _ = trained
    rng = np.random.default_rng(99)
    names = [list(rng.permutation(NAMES)[:objects]) for _ in range(count)]
    drawn = [draw_squares(rng, some) for some in names]
    inputs = processor(images=[picture for picture, _ in drawn], return_tensors="pt")
    texts = processor.tokenizer([f"a {name} square" for some in names for name in some], return_tensors="pt")
    covered = torch.from_numpy(np.stack([boxes for _, boxes in drawn]))
    return model, inputs["pixel_values"], texts["input_ids"], covered


def share_in(covered, heat_map):
    return (heat_map * covered).sum(dim=(-2, -1)) / heat_map.sum(dim=(-2, -1))


@pytest.mark.parametrize(("method", "times_area"), [("gradcam", 3), ("attention", 2)])
def test_a_trained_model_looks_at_the_object(trained, method, times_area):
    model, pixel_values, input_ids, covered = held_out(trained, 100, objects=1)
    heat_map = text_heat_map(model, input_ids, pixel_values=pixel_values, method=method, normalize=False)
    covered = covered[:, 0]
    hottest = covered.flatten(1).gather(1, heat_map.flatten(1).argmax(dim=1, keepdim=True))
    assert covered.mean() < 0.12
    assert (hottest > 0).float().mean() >= 0.8
    assert share_in(covered, heat_map).mean() > times_area * covered.mean()


@pytest.mark.parametrize("method", ["gradcam", "attention"])
def test_of_two_objects_it_looks_at_the_one_that_is_named(trained, method):
    model, pixel_values, input_ids, covered = held_out(trained, 100, objects=2)
    heat_map = text_heat_map(model, input_ids, pixel_values=pixel_values, method=method, normalize=False)
    heat_map = heat_map.unflatten(0, (100, 2))[:, :, None]  # by text, then by object
    density = (heat_map * covered[:, None]).sum(dim=(-2, -1)) / covered.sum(dim=(-2, -1))[:, None]
    own, other = density.diagonal(dim1=1, dim2=2), density.flip(2).diagonal(dim1=1, dim2=2)
    assert (own > other).float().mean() > 0.75


def test_the_queries_look_at_objects_a_little_more_than_at_the_ground(trained):
    """Without a text they do not know what is asked for: far less than with one."""
    model, pixel_values, _, covered = held_out(trained, 100, objects=1)
    heat_map = query_attention_map(model, pixel_values, normalize=False)
    assert share_in(covered[:, 0], heat_map).mean() > 1.2 * covered.mean()


def make_random_model():
    """Cross-attention in layers 0 and 2 of 3; 2x2 patches and a class token."""
    return make_stage1().eval()


def obvious_maps(model, inputs, method, layers):
    """Each pair alone, through hooks and `backward()`, the class token left out."""
    model.qformer.set_attn_implementation("eager")
    maps = []
    for row in range(len(inputs["input_ids"])):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
        seen = []
        hooks = [
            model.qformer.encoder.layer[layer].crossattention.attention.register_forward_hook(
                lambda module, args, output, seen=seen: seen.append(output[1])
            )
            for layer in layers
        ]
        logits = model.get_matching_logits(ids, image_embeds=inputs["image_embeds"][row : row + 1])
        for hook in hooks:
            hook.remove()
        for probabilities in seen:
            probabilities.retain_grad()
        logits[0, 1].backward()
        attended = [
            probabilities * probabilities.grad.clamp(min=0) if method == "gradcam" else probabilities
            for probabilities in seen
        ]
        maps.append(sum(a.detach()[0].mean(dim=(0, 1)) for a in attended)[1:].view(2, 2) / len(layers))
    model.zero_grad()
    model.qformer.set_attn_implementation("sdpa")
    return torch.stack(maps)


@pytest.mark.parametrize("method", ["gradcam", "attention"])
@pytest.mark.parametrize("layer", [None, 0, 2])
def test_maps_of_a_batch_are_those_of_each_pair_alone(method, layer):
    model, inputs = make_random_model(), make_inputs()
    expected = obvious_maps(model, inputs, method, [0, 2] if layer is None else [layer])
    found = text_heat_map(model, **inputs, method=method, layer=layer, normalize=False)
    assert expected.std() > 1e-3 * expected.mean() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(
        text_heat_map(model, **inputs, method=method, layer=layer), normalize_heat_map(expected), rtol=0, atol=1e-3
    )


def test_several_texts_of_an_image_lie_next_to_one_another():
    model, inputs = make_random_model(), make_inputs(6)
    images = inputs.pop("image_embeds")[:2]
    found = text_heat_map(model, **inputs, image_embeds=images)
    expected = text_heat_map(model, **inputs, image_embeds=images.repeat_interleave(3, dim=0))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found[0], found[1], atol=1e-2)


def test_the_model_is_left_as_it_was():
    model, inputs = make_random_model(), make_inputs()
    expected = text_heat_map(model, **inputs)
    implementation = model.qformer.config._attn_implementation
    assert implementation != "eager"
    model.train()
    model.qformer.encoder.layer[1].eval()
    training = [module.training for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    torch.testing.assert_close(text_heat_map(model, **inputs), expected)
    with pytest.raises(ValueError, match="no cross-attention"):
        text_heat_map(model, **inputs, layer=1)
    query_attention_map(model, image_embeds=inputs["image_embeds"])
    assert model.qformer.config._attn_implementation == implementation
    assert [module.training for module in model.modules()] == training
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())


MAPS = {
    "gradcam": lambda model, inputs: text_heat_map(model, **inputs),
    "attention": lambda model, inputs: text_heat_map(model, **inputs, method="attention"),
    "queries": lambda model, inputs: query_attention_map(model, image_embeds=inputs["image_embeds"]),
}


@pytest.mark.parametrize("kind", MAPS)
def test_maps_in_two_threads_at_the_same_time(kind, monkeypatch):
    model, inputs = make_random_model(), make_inputs()
    expected, scores = MAPS[kind](model, inputs), model.get_matching_logits(**inputs)
    both_are_inside, implementations = Barrier(2, timeout=60), []
    query_tokens = model.query_tokens.forward

    def wait(batch_size):
        both_are_inside.wait()
        implementations.append(model.qformer.config._attn_implementation)
        return query_tokens(batch_size)

    monkeypatch.setattr(model.query_tokens, "forward", wait)
    with ThreadPoolExecutor(2) as threads:
        maps = [threads.submit(MAPS[kind], model, inputs) for _ in range(2)]
    for found in maps:
        torch.testing.assert_close(found.result(), expected)
    assert {*implementations, model.qformer.config._attn_implementation} == {"sdpa"}
    with ThreadPoolExecutor(2) as threads:
        # Each waits for the other inside, and goes on as if it were alone
        found, own = threads.submit(MAPS[kind], model, inputs), threads.submit(model.get_matching_logits, **inputs)
    torch.testing.assert_close(found.result(), expected)
    torch.testing.assert_close(own.result(), scores)


@pytest.mark.parametrize("kind", MAPS)
def test_maps_in_threads_leave_training_mode_as_it_was(kind):
    model, inputs = make_stage1(qformer_dropout=0.5).eval(), make_inputs()
    expected = MAPS[kind](model, inputs)
    model.train()
    training = [module.training for module in model.modules()]
    with ThreadPoolExecutor(4) as threads:
        maps = [threads.submit(MAPS[kind], model, inputs) for _ in range(8)]
    for found in maps:
        torch.testing.assert_close(found.result(), expected)
    assert [module.training for module in model.modules()] == training


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attentions_that_are_asked_for_are_there(dropout):
    model, inputs = make_stage1(qformer_dropout=dropout).train(), make_inputs()
    model.qformer.set_attn_implementation("eager")
    torch.manual_seed(0)
    expected = model(**inputs, output_attentions=True)
    model.qformer.set_attn_implementation("sdpa")
    torch.manual_seed(0)
    actual = model(**inputs, output_attentions=True)
    assert len(actual.attentions) == 3 and len(actual.cross_attentions) == 2
    torch.testing.assert_close(
        actual.attentions + actual.cross_attentions, expected.attentions + expected.cross_attentions
    )


def test_texts_and_instructions_with_padding_on_either_side():
    model, inputs = make_random_model(), make_inputs()
    expected = text_heat_map(model, **inputs)
    lengths = inputs["attention_mask"].sum(1).tolist()
    left = {
        name: torch.stack([row.roll(-n) for row, n in zip(inputs[name], lengths, strict=True)])
        for name in ("input_ids", "attention_mask")
    }
    torch.testing.assert_close(text_heat_map(model, **inputs | left), expected)
    of_queries = [
        query_attention_map(
            model,
            image_embeds=inputs["image_embeds"],
            qformer_input_ids=texts["input_ids"],
            qformer_attention_mask=texts["attention_mask"],
        )
        for texts in (inputs, left)
    ]
    torch.testing.assert_close(*of_queries)


def test_a_frozen_model_and_inference_mode():
    model, inputs = make_random_model(), make_inputs()
    expected = text_heat_map(model, **inputs)
    model.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(text_heat_map(model, **inputs), expected)
    with torch.inference_mode():
        made_there = {name: tensor.clone() for name, tensor in inputs.items()}
        found = text_heat_map(model, **made_there)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected)


def test_half_precision():
    model = Blip2ForImageTextRetrieval(make_stage1().config).eval().to(torch.bfloat16)
    found = text_heat_map(model, **make_inputs())
    assert found.dtype == torch.float32
    assert found.amin(dim=(1, 2)).eq(0).all() and found.amax(dim=(1, 2)).eq(1).all()


def conditional_generation():
    return make_model()


def image_side():
    return randomize(Blip2Model(make_config(None))).eval()


def retrieval():
    config = make_config(None, qformer_config=dict(STAGE1_QFORMER))
    return randomize(Blip2ForImageTextRetrieval(config)).eval()


@pytest.mark.parametrize("make", [conditional_generation, image_side, retrieval, make_random_model])
@pytest.mark.parametrize("size", [(28, 28), (28, 42)])
def test_what_the_queries_attend_to(make, size):
    torch.manual_seed(0)
    model, pixel_values = make(), torch.randn(2, 3, *size)
    image_embeds = model.get_image_embeds(pixel_values)
    model.qformer.set_attn_implementation("eager")
    attentions = model.qformer(
        model.query_tokens(2),
        encoder_hidden_states=model.vision_model.post_layernorm(image_embeds),
        output_attentions=True,
    ).cross_attentions
    model.qformer.set_attn_implementation("sdpa")
    rows, columns = size[0] // 14, size[1] // 14
    expected = ((attentions[0] + attentions[1]) / 2).mean(dim=1)[..., 1:].reshape(2, 4, rows, columns)
    per_query = query_attention_map(model, pixel_values, per_query=True, normalize=False)
    torch.testing.assert_close(per_query, expected)
    torch.testing.assert_close(query_attention_map(model, pixel_values, normalize=False), expected.mean(dim=1))
    first = query_attention_map(model, image_embeds=image_embeds, image_size=size, layer=0)
    torch.testing.assert_close(
        first, normalize_heat_map(attentions[0].mean(dim=(1, 2))[..., 1:].reshape(2, rows, columns))
    )


def test_queries_that_have_read_an_instruction():
    config = make_config("opt", qformer_config=dict(STAGE1_QFORMER))
    model = randomize(Blip2ForConditionalGeneration(config)).eval()
    image_embeds, ids = torch.randn(2, 5, 32), torch.randint(4, 60, (2, 6))
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    together = query_attention_map(model, None, image_embeds, ids, mask)
    alone = query_attention_map(model, None, image_embeds[1:], ids[1:, :3])
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-4)
    assert not torch.allclose(together, query_attention_map(model, image_embeds=image_embeds), atol=1e-2)


TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
TOWERS = {
    "registers": (transformers.Dinov2WithRegistersConfig(**TINY, image_size=56, patch_size=14), 5, (2, 3)),
    "no class token": (transformers.SiglipVisionConfig(**TINY, image_size=28, patch_size=14), 0, (2, 2)),
    "feature map": (
        transformers.ConvNextConfig(num_stages=2, hidden_sizes=[16, 32], depths=[1, 1], image_size=32),
        0,
        (4, 6),
    ),
}


@pytest.mark.parametrize("name", TOWERS)
def test_other_towers(name):
    vision_config, prefix, (rows, columns) = TOWERS[name]
    config = make_config(None, vision_config=vision_config, qformer_config=dict(STAGE1_QFORMER))
    model = randomize(Blip2ForImageTextRetrieval(config)).eval()
    cell = 8 if name == "feature map" else 14
    pixel_values, inputs = torch.randn(5, 3, rows * cell, columns * cell), make_inputs()
    image_embeds = model.get_image_embeds(pixel_values)
    assert image_embeds.shape[1] == prefix + rows * columns
    del inputs["image_embeds"]
    found = text_heat_map(model, **inputs, pixel_values=pixel_values)
    assert found.shape == (5, rows, columns)
    # With a grid, the last features are taken; one column is all features in a row
    flat = text_heat_map(model, **inputs, image_embeds=image_embeds, grid=(rows * columns, 1))
    torch.testing.assert_close(found.flatten(1), flat.flatten(1))


@pytest.mark.parametrize(
    ("config", "num_features", "size", "grid"),
    [
        (transformers.CLIPVisionConfig(image_size=224, patch_size=14), 257, None, (16, 16)),
        (transformers.Dinov2Config(image_size=518, patch_size=14), 257, 224, (16, 16)),
        (transformers.ViTConfig(image_size=224, patch_size=16), 14 * 20 + 1, (224, 320), (14, 20)),
        (transformers.SiglipVisionConfig(image_size=384, patch_size=14), 27 * 27, None, (27, 27)),
        (transformers.SwinConfig(image_size=224, patch_size=4), 49, None, (7, 7)),
        (transformers.ConvNextConfig(image_size=224), 7 * 10, (224, 320), (7, 10)),
        (transformers.ResNetConfig(), 8 * 10, (240, 320), (8, 10)),  # 240 / 32, rounded up
    ],
)
def test_grids(config, num_features, size, grid):
    assert feature_grid(config, num_features, size) == grid


@pytest.mark.parametrize(
    ("config", "num_features", "size"),
    [
        (transformers.Dinov2Config(image_size=518, patch_size=14), 1 + 10 * 12, None),  # made of 140x168 pixels
        (transformers.CLIPVisionConfig(image_size=224, patch_size=14), 577, None),
        (transformers.ConvNextConfig(image_size=224), 50, None),
        (transformers.ResNetConfig(), 49, None),
    ],
)
def test_grids_that_cannot_be_told(config, num_features, size):
    with pytest.raises(ValueError, match=f"{num_features} features .* Give image_size"):
        feature_grid(config, num_features, size)


def test_what_does_not_fit():
    model, inputs = make_random_model(), make_inputs()
    with pytest.raises(ValueError, match="'rollout'.*'gradcam', 'attention'"):
        text_heat_map(model, **inputs, method="rollout")
    with pytest.raises(ValueError, match=r"Layer 1 .*\[0, 2\]"):
        text_heat_map(model, **inputs, layer=1)
    with pytest.raises(ValueError, match="5 texts for 2 images"):
        text_heat_map(model, **(inputs | {"image_embeds": inputs["image_embeds"][:2]}))
    with pytest.raises(ValueError, match="either pixel_values or image_embeds"):
        text_heat_map(model, inputs["input_ids"])
    with pytest.raises(ValueError, match="3x2, but an image has 5"):
        text_heat_map(model, **inputs, grid=(3, 2))
    with pytest.raises(ValueError, match="does not match images with texts"):
        text_heat_map(make_model(), **inputs)


def test_a_flat_map_is_zero():
    flat, other = torch.full((2, 2), 0.3), torch.tensor([[1.0, 3.0], [2.0, 5.0]])
    torch.testing.assert_close(
        normalize_heat_map(torch.stack([flat, other])), torch.stack([torch.zeros(2, 2), (other - 1) / 4])
    )


def test_overlay():
    image, heat_map = make_image(size=(40, 30)), torch.zeros(3, 4)
    assert overlay(image, heat_map).tobytes() == image.tobytes()
    heat_map[0, 3] = 1
    drawn = np.asarray(overlay(image, heat_map)).astype(int)
    changed = np.abs(drawn - np.asarray(image).astype(int)).sum(axis=2)
    assert changed[:8, 32:].mean() > 50 and changed[20:, :20].max() == 0
    assert drawn[2, 37, 0] > 170 and drawn[2, 37, 2] < 170  # towards yellow
    assert np.asarray(overlay(image, heat_map, opacity=0.0)).tobytes() == image.tobytes()
    for wrong in (heat_map * 2, heat_map - 1, heat_map[None], heat_map * torch.nan):
        with pytest.raises(ValueError, match="values from 0 to 1"):
            overlay(image, wrong)


def test_the_command(trained, tmp_path, capsys):
    _, _, folder = trained
    picture, covered = draw_squares(np.random.default_rng(5), ["blue", "red"])
    picture.resize((160, 120)).save(tmp_path / "picture.png")
    arguments = ["--model", str(folder), "--device", "cpu"]
    output = tmp_path / "maps" / "map.png"
    main(["look", str(tmp_path / "picture.png"), "red square", *arguments, "--output", str(output), "--per-word"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["red square", "red", "square", f"drawn in {output}"]
    assert list(output.parent.iterdir()) == [output]
    drawing = Image.open(output).convert("RGB")
    assert drawing.height == 120 + 24 and drawing.width > 3 * 160
    drawn = np.asarray(drawing)[24:, :160].astype(float)
    original = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB")).astype(float)
    changed = np.abs(drawn - original).mean(axis=2)
    blue, red = (np.asarray(Image.fromarray(box).resize((160, 120))) > 0.5 for box in covered)
    assert changed[red].mean() > 1.5 * changed[blue].mean()


def test_the_command_without_a_text(tmp_path, capsys):
    make_model().save_pretrained(tmp_path / "captioner")
    make_image_processor().save_pretrained(tmp_path / "captioner")
    make_image().save(tmp_path / "picture.png")
    arguments = [str(tmp_path / "picture.png"), "--model", str(tmp_path / "captioner"), "--image-size", "56"]
    main(["look", *arguments, "--output", str(tmp_path / "map.png"), "--layer", "2"])
    assert Image.open(tmp_path / "map.png").height == make_image().height + 24
    arguments += ["--output", str(tmp_path / "other.png")]
    with pytest.raises(SystemExit, match="has not learned to match.*stage 1"):
        main(["look", *arguments[:1], "a dog", *arguments[1:]])
    with pytest.raises(SystemExit, match="no cross-attention"):
        main(["look", *arguments, "--layer", "1"])
    with pytest.raises(SystemExit, match="--per-word goes with TEXT"):
        main(["look", *arguments, "--per-word"])
    with pytest.raises(SystemExit, match="ends in .png"):
        main(["look", *arguments, "--output", "map.jpg"])
    with pytest.raises(SystemExit, match="missing.png"):
        main(["look", str(tmp_path / "missing.png"), *arguments[1:]])
    with pytest.raises(SystemExit, match="blip2-hf: .*nosuch"):
        main(["look", *arguments, "--model", str(tmp_path / "nosuch")])
    assert not (tmp_path / "other.png").exists()


@pytest.fixture
def seen(monkeypatch):
    """What the tower and matching are given."""
    seen = {}
    get_image_embeds, get_matching_logits = Blip2Model.get_image_embeds, Blip2ForImageTextRetrieval.get_matching_logits

    def spy_on_images(self, pixel_values, *args, **kwargs):
        seen["size"], seen["dtype"] = tuple(pixel_values.shape[-2:]), self.vision_model.dtype
        return get_image_embeds(self, pixel_values, *args, **kwargs)

    def spy_on_texts(self, input_ids, *args, **kwargs):
        seen["input_ids"] = input_ids.tolist()
        return get_matching_logits(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(Blip2PreTrainedModel, "get_image_embeds", spy_on_images)
    monkeypatch.setattr(Blip2ForImageTextRetrieval, "get_matching_logits", spy_on_texts)
    return seen


def test_the_size_and_the_precision_that_the_command_takes(tmp_path, seen):
    make_model().save_pretrained(tmp_path)
    make_image(size=(60, 40)).save(tmp_path / "picture.png")
    arguments = ["look", str(tmp_path / "picture.png"), "--model", str(tmp_path), "--device", "cpu"]
    arguments += ["--output", str(tmp_path / "map.png")]
    make_image_processor(42).save_pretrained(tmp_path)
    main(arguments)
    assert (seen["size"], seen["dtype"]) == ((42, 42), torch.float32)
    main([*arguments, "--image-size", "56", "--dtype", "bfloat16"])
    assert (seen["size"], seen["dtype"]) == ((56, 56), torch.bfloat16)
    cropping = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil(
        size={"shortest_edge": 60}, crop_size={"height": 28, "width": 28}
    )
    cropping.save_pretrained(tmp_path)
    main(arguments)
    assert seen["size"] == (28, 28)


def test_the_command_reads_texts_with_the_tokenizer_of_the_q_former(trained, tmp_path, seen):
    model, processor, _ = trained
    model.save_pretrained(tmp_path)
    other = transformers.BertTokenizer(vocab={word: i for i, word in enumerate([*WORDS[:4], *WORDS[:3:-1]])})
    Blip2Processor(processor.image_processor, other, qformer_tokenizer=processor.tokenizer).save_pretrained(tmp_path)
    make_image().save(tmp_path / "picture.png")
    output = ["--output", str(tmp_path / "map.png"), "--device", "cpu"]
    main(["look", str(tmp_path / "picture.png"), "a red square", "--model", str(tmp_path), *output])
    assert seen["input_ids"] == [processor.tokenizer("a red square")["input_ids"]]
    assert seen["input_ids"] != [other("a red square")["input_ids"]]
