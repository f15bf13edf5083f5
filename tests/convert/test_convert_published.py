"""The eleven checkpoints that LAVIS has published, at their full size on the meta device: no memory is taken."""

import re
from dataclasses import dataclass

import pytest
import torch
import transformers
from lavis_shapes import eva_shapes, layernorm, linear, of_tower, qformer_shapes
from theirs import full_size_text_config

from blip2_hf import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2ForPreTraining,
    Blip2VisionConfig,
    Blip2VisionModel,
    load_lavis_checkpoint,
)
from blip2_hf.convert import load_lavis_tower


@dataclass
class Published:
    """What a file holds: the Q-Former and what belongs to it always, frozen parts never."""

    tower: str  # "eva" or "clip"
    language_model: str | None = None
    has_tower: bool = False  # where it was trained, at 364 pixels


PUBLISHED = {
    "blip2_pretrained": Published("eva"),
    "blip2_pretrained_vitL": Published("clip"),
    "blip2_finetune_coco": Published("eva", has_tower=True),
    "blip2_pretrained_opt2.7b": Published("eva", "opt-2.7b"),
    "blip2_pretrained_opt6.7b": Published("eva", "opt-6.7b"),
    "blip2_caption_opt2.7b": Published("eva", "opt-2.7b", has_tower=True),
    "blip2_caption_opt6.7b": Published("eva", "opt-6.7b", has_tower=True),
    "blip2_pretrained_flant5xl": Published("eva", "flan-t5-xl"),
    "blip2_pretrained_flant5xl_vitL": Published("clip", "flan-t5-xl"),
    "blip2_pretrained_flant5xxl": Published("eva", "flan-t5-xxl"),
    "blip2_caption_flant5xl": Published("eva", "flan-t5-xl", has_tower=True),
}
WIDTHS = {"eva": 1408, "clip": 1024}
LANGUAGE_MODEL_WIDTHS = {"opt-2.7b": 2560, "opt-6.7b": 4096, "flan-t5-xl": 2048, "flan-t5-xxl": 4096}


def clip_shapes(depth: int) -> dict[str, tuple[int, ...]]:
    """Of CLIP ViT-L/14, under OpenAI's names, which are LAVIS's."""
    shapes = {"class_embedding": (1024,), "positional_embedding": (257, 1024), "conv1.weight": (1024, 3, 14, 14)}
    shapes |= layernorm("ln_pre", 1024)
    for index in range(depth):
        block = f"transformer.resblocks.{index}"
        shapes |= layernorm(f"{block}.ln_1", 1024) | layernorm(f"{block}.ln_2", 1024)
        shapes |= {f"{block}.attn.in_proj_weight": (3072, 1024), f"{block}.attn.in_proj_bias": (3072,)}
        shapes |= linear(f"{block}.attn.out_proj", 1024, 1024)
        shapes |= linear(f"{block}.mlp.c_fc", 1024, 4096) | linear(f"{block}.mlp.c_proj", 4096, 1024)
    return shapes


def tower_file(tower: str) -> dict[str, torch.Tensor]:
    """LAVIS's own file of a tower: one block more than it takes, and what is behind the blocks."""
    if tower == "eva":
        shapes = (
            eva_shapes(1408, layers=40, side=16, mlp_width=6144) | layernorm("norm", 1408) | linear("head", 1408, 1024)
        )
    else:
        shapes = clip_shapes(24) | layernorm("ln_post", 1024) | {"proj": (1024, 768)}
    return on_meta(shapes)


def stage1_shapes() -> dict[str, tuple[int, ...]]:
    head = "Qformer.cls.predictions"
    shapes = {"temp": (), f"{head}.bias": (30523,)} | linear(f"{head}.decoder", 768, 30523)
    shapes |= linear(f"{head}.transform.dense", 768, 768) | layernorm(f"{head}.transform.LayerNorm", 768)
    return shapes | linear("vision_proj", 768, 256) | linear("text_proj", 768, 256) | linear("itm_head", 768, 2)


def on_meta(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def checkpoint(published: Published) -> dict[str, torch.Tensor]:
    is_stage1 = published.language_model is None
    sizes = {"width": 768, "layers": 12, "every": 2, "mlp_width": 3072, "queries": 32}
    shapes = qformer_shapes(
        **sizes, tower_width=WIDTHS[published.tower], text=is_stage1, vocabulary=30523, positions=512
    )
    shapes |= {"Qformer.bert.embeddings.position_ids": (1, 512)}
    if is_stage1:
        shapes |= stage1_shapes()
    else:
        kind = "opt" if published.language_model.startswith("opt") else "t5"
        shapes |= linear(f"{kind}_proj", 768, LANGUAGE_MODEL_WIDTHS[published.language_model])
    if published.has_tower:
        shapes |= of_tower(eva_shapes(1408, layers=39, side=26, mlp_width=6144))
    return on_meta(shapes)


def language_model(name: str | None):
    if name is None:
        return None
    config = full_size_text_config(name)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    return auto.from_config(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_file_at_full_size(name):
    published = PUBLISHED[name]
    state_dict = checkpoint(published)
    with torch.device("meta"):
        tower = None if published.has_tower else load_lavis_tower(tower_file(published.tower))
        given = language_model(published.language_model)
        model, report = load_lavis_checkpoint(
            state_dict, vision_model=tower, language_model=given, output_loading_info=True
        )
    assert type(model) is (Blip2ForPreTraining if given is None else Blip2ForConditionalGeneration)
    assert all(parameter.is_meta for parameter in model.parameters())
    # All that is in the file is somewhere, and all that the model has is from the file or was given
    assert report.taken.keys() | report.left.keys() == state_dict.keys()
    assert set(report.left) == {"Qformer.bert.embeddings.position_ids"}
    tied = {new for pair in model.all_tied_weights_keys.items() for new in pair}
    expected = model.state_dict()
    assert set(report.taken.values()) | set(report.missing) | tied == expected.keys()
    assert not set(report.taken.values()) & set(report.missing)
    prefixes = ("language_model.",) if published.has_tower else ("language_model.", "vision_model.")
    assert all(missing.startswith(prefixes) for missing in report.missing)
    assert not any("post_layernorm" in missing for missing in report.missing)
    for old, new in report.taken.items():
        if new not in report.reshaped:
            assert state_dict[old].shape == expected[new].shape
    check_sizes(model, published)


def check_sizes(model, published: Published):
    vision, qformer = model.config.vision_config, model.config.qformer_config
    sizes = (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.intermediate_size)
    assert sizes == ((1408, 39, 16, 6144) if published.tower == "eva" else (1024, 23, 16, 4096))
    assert len(model.vision_model.encoder.layers) == sizes[1]
    assert vision.image_size == (364 if published.has_tower else 224)
    assert (vision.hidden_act, vision.use_pre_layernorm, vision.interpolate_align_corners) == (
        ("gelu", False, False) if published.tower == "eva" else ("quick_gelu", True, True)
    )
    assert vision.post_layernorm_eps == model.vision_model.post_layernorm.eps == 1e-5
    assert (qformer.hidden_size, qformer.num_hidden_layers, qformer.num_attention_heads) == (768, 12, 12)
    assert (qformer.cross_attention_frequency, qformer.encoder_hidden_size) == (2, sizes[0])
    assert model.config.num_query_tokens == 32
    is_stage1 = published.language_model is None
    assert qformer.use_qformer_text_input is is_stage1
    if is_stage1:
        assert (qformer.vocab_size, qformer.bos_token_id, qformer.eos_token_id) == (30523, 30522, 102)
        assert model.temperature.weight.shape == (1,) and model.lm_head.decoder.weight.shape == (30523, 768)
        assert model.config.image_text_hidden_size == 256 and model.config.text_config is None
    else:
        assert model.config.text_config.model_type == ("opt" if "opt" in published.language_model else "t5")
        width = LANGUAGE_MODEL_WIDTHS[published.language_model]
        assert model.language_projection.weight.shape == (width, 768)


def test_clip_of_transformers_at_full_size():
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = transformers.CLIPVisionConfig(**sizes, patch_size=14, image_size=224)
    with torch.device("meta"):
        model, report = load_lavis_checkpoint(
            checkpoint(PUBLISHED["blip2_pretrained_vitL"]),
            vision_model=transformers.CLIPVisionModel(config),
            output_loading_info=True,
        )
    assert type(model.vision_model) is Blip2VisionModel
    check_sizes(model, PUBLISHED["blip2_pretrained_vitL"])


def test_the_file_fine_tuned_on_coco_for_retrieval_alone():
    state_dict = checkpoint(PUBLISHED["blip2_finetune_coco"])
    with torch.device("meta"):
        model, report = load_lavis_checkpoint(
            state_dict, model_class=Blip2ForImageTextRetrieval, output_loading_info=True
        )
    assert type(model) is Blip2ForImageTextRetrieval and report.missing == []
    left = {name for name in report.left if not name.endswith("position_ids")}
    assert left == {name for name in state_dict if name.startswith("Qformer.cls.")}
    assert all("has no lm_head" in report.left[name] for name in left)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_frozen_part_that_is_missing_is_asked_for_by_name(name):
    published = PUBLISHED[name]
    state_dict = checkpoint(published)
    if not published.has_tower:
        wanted = {"eva": "1408: EVA-CLIP ViT-g.*eva_vit_g.pth", "clip": "1024: CLIP ViT-L.*clip_vit_L.pth"}
        with pytest.raises(ValueError, match=f"visual_encoder.*as vision_model.*{wanted[published.tower]}"):
            load_lavis_checkpoint(state_dict)
    if published.language_model is not None:
        owner = "facebook" if "opt" in published.language_model else "google"
        tower = None if published.has_tower else object()
        with pytest.raises(ValueError, match=f"as language_model.*{owner}/{re.escape(published.language_model)}"):
            load_lavis_checkpoint(state_dict, vision_model=tower)


def test_parts_that_the_file_was_not_trained_with_are_refused():
    opt, t5 = PUBLISHED["blip2_caption_opt6.7b"], PUBLISHED["blip2_caption_flant5xl"]
    with torch.device("meta"):
        with pytest.raises(ValueError, match="type 'opt', but the one given is of type 't5'"):
            load_lavis_checkpoint(checkpoint(opt), language_model=language_model("flan-t5-xxl"))
        with pytest.raises(ValueError, match=r"t5_proj.weight \(2048, 768\) for \(4096, 768\)"):
            load_lavis_checkpoint(checkpoint(t5), language_model=language_model("flan-t5-xxl"))
        with pytest.raises(ValueError, match=r"crossattention.*\(768, 1024\)|\(1024,\) for \(1408,\)"):
            load_lavis_checkpoint(
                checkpoint(PUBLISHED["blip2_pretrained_vitL"]), vision_model=load_lavis_tower(tower_file("eva"))
            )


@pytest.mark.parametrize("tower", ["eva", "clip"])
def test_the_towers_own_files(tower):
    state_dict = tower_file(tower)
    with torch.device("meta"):
        model = load_lavis_tower(state_dict)
    assert type(model) is Blip2VisionModel and model.config.image_size == 224
    assert model.config.num_hidden_layers == {"eva": 39, "clip": 23}[tower]
    assert model.config.num_attention_heads == 16 and model.config.hidden_size == WIDTHS[tower]
    with torch.device("meta"):
        make = Blip2VisionConfig if tower == "eva" else Blip2VisionConfig.clip_vit_l
        larger = load_lavis_tower(state_dict, make(image_size=364))
    assert larger.embeddings.position_embedding.shape == (1, 677, WIDTHS[tower])
    assert larger.config.image_size == larger.embeddings.image_size == 364
