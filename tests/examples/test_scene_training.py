"""examples/scene_training.py: batches of twins, learning rates, resumption, and the start of the projection."""

import pytest
import torch
from stage1 import Processor, make_inputs, make_pairs, make_stage1
from tiny import make_model, make_pixel_values, make_tokenizer
from tiny_examples import tiny_examples

from blip2_hf import Blip2ForConditionalGeneration
from blip2_hf.data import ImageTextCollator, ImageTextPairs
from blip2_hf.training import Stage1Arguments


ROWS, BATCH, SEED = 16, 4, 5
EPOCH = ROWS // BATCH  # steps


@pytest.fixture(scope="module", autouse=True)
def examples(tmp_path_factory):
    with tiny_examples(tmp_path_factory.mktemp("cache")):
        yield


class Recorded:
    """A collator that remembers the rows of each batch."""

    def __init__(self):
        self.collate, self.batches = ImageTextCollator(Processor()), []

    def __call__(self, items):
        self.batches.append([item["image_id"] for item in items])
        return self.collate(items)


class Stopped(Exception):
    pass


def train_on_twins(folder, model, collator, steps, stop_before=None, **arguments) -> list:
    """Train, unless it is stopped before a step, and return the trainer in a list."""
    import scene_training

    trainers = []

    class Trainer(scene_training.LearnsFromTwins):
        def training_step(self, *args, **kwargs):
            trainers[:] = [self]
            if self.state.global_step == stop_before:
                raise Stopped
            return super().training_step(*args, **kwargs)

    pairs = ImageTextPairs(make_pairs(ROWS), seed=SEED)
    options = (folder, Stage1Arguments, steps, BATCH, 3e-4, scene_training.NEW_PARTS, 5e-4, Trainer)
    scene_training.train(model, pairs, collator, *options, seed=SEED, disable_tqdm=True, **arguments)
    return trainers


def are_twins(first: int, second: int) -> bool:
    return first % 2 == 0 and second == first + 1


def test_half_of_the_scenes_come_with_their_twins():
    from scene_training import Twins

    orders = {}
    for seed in (0, 1):
        for epoch in range(4):
            sampler, again = Twins(ROWS, seed), Twins(ROWS, seed)
            for one in (sampler, again):
                one.set_epoch(epoch)
            orders[seed, epoch] = tuple(sampler)
            assert orders[seed, epoch] == tuple(again) and len(sampler) == ROWS
            assert sorted(orders[seed, epoch]) == list(range(ROWS))
    assert len(set(orders.values())) == len(orders)
    fours = [order[i : i + 4] for order in orders.values() for i in range(0, ROWS, 4)]
    assert all(are_twins(*four[:2]) for four in fours)
    assert sum(are_twins(*four[2:]) for four in fours) < len(fours) / 3


def test_some_scenes_come_alone_before_the_twins():
    from scene_training import Twins

    sampler = Twins(ROWS, SEED, alone=8)
    order = list(sampler)
    assert len(order) == len(sampler) == ROWS and len(set(order[:8])) == 8
    assert not all(are_twins(*order[i : i + 2]) for i in (0, 4))
    assert all(are_twins(*order[i : i + 2]) for i in (8, 12))
    sampler.set_epoch(1)
    twins = Twins(ROWS, SEED)
    twins.set_epoch(1)
    assert list(sampler) == list(twins)


def test_without_matching_there_are_two_losses_and_one_pass():
    from scene_training import ChosenLosses

    model = make_stage1()
    without, batch, passes = ChosenLosses(model.config), make_inputs(), []
    without.losses = ("itc", "itg")
    without.load_state_dict(model.state_dict())
    without.qformer.register_forward_hook(lambda *_: passes.append(1))
    outputs, expected = without.eval()(**batch), model.eval()(**batch)
    torch.testing.assert_close(outputs.loss, expected.loss_itc + expected.loss_itg)
    assert len(passes) == 1


def test_training_tells_the_sampler_its_epoch(tmp_path):
    from scene_training import Twins

    collator = Recorded()
    train_on_twins(tmp_path, make_stage1(), collator, 3 * EPOCH)
    # A quarter of the steps
    sampler = Twins(ROWS, SEED, alone=3 * EPOCH // 4 * BATCH)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        found = collator.batches[epoch * EPOCH : (epoch + 1) * EPOCH]
        assert [row for batch in found for row in batch] == list(sampler)


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path):
    steps, saves = 4 * EPOCH, {"save_strategy": "steps", "save_steps": 5}
    torch.manual_seed(0)
    undisturbed, stopped = make_stage1(qformer_dropout=0.1), make_stage1(qformer_dropout=0.1)
    stopped.load_state_dict(undisturbed.state_dict())
    collators = [Recorded(), Recorded()]
    train_on_twins(tmp_path / "undisturbed", undisturbed, collators[0], steps, **saves)
    with pytest.raises(Stopped):
        train_on_twins(tmp_path / "stopped", stopped, Recorded(), steps, stop_before=13, **saves)
    # A checkpoint that was not written to its end is passed over
    (tmp_path / "stopped" / "checkpoint-13").mkdir()
    resumed = make_stage1(qformer_dropout=0.1)
    train_on_twins(tmp_path / "stopped", resumed, collators[1], steps, **saves)
    assert collators[1].batches[-6:] == collators[0].batches[10:]
    for name, weight in resumed.state_dict().items():
        assert torch.equal(weight, undisturbed.state_dict()[name]), name


def test_new_parts_learn_at_their_own_rate(tmp_path):
    from scene_training import NEW_PARTS

    model = make_stage1()
    model.embeddings.word_embeddings.requires_grad_(False)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    (trainer,) = train_on_twins(tmp_path, model, Recorded(), 2)
    names = {id(weight): name for name, weight in model.named_parameters()}
    new, rest = ([names[id(weight)] for weight in group["params"]] for group in trainer.optimizer.param_groups)
    assert trainer.lr_scheduler.base_lrs == [5e-4, 3e-4]
    rates = trainer.lr_scheduler.get_last_lr()
    assert rates[0] < 5e-4 and rates[0] / rates[1] == pytest.approx(5 / 3)
    for part in NEW_PARTS:
        assert any(part in name for name in new) and not any(part in name for name in rest), part
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert sorted(new + rest) == sorted(trained) and "embeddings.word_embeddings.weight" not in trained
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) == (name not in trained), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_set_beside_a_tower_that_has_none(attention, monkeypatch):
    import scene_training
    from efficientnet_lite import pretrained_folder
    from real_assets import real_assets

    monkeypatch.setattr(scene_training, "training_attention", lambda: attention)
    assets = real_assets()._asdict() | {"vision_model": pretrained_folder()}
    model = Blip2ForConditionalGeneration.from_pretrained_parts(**assets)
    assert model.vision_model is not None
    scene_training.set_training_attention(model)
    assert model.qformer.config._attn_implementation == attention
    assert model.language_model.config._attn_implementation == attention
    model = make_stage1()
    scene_training.set_training_attention(model)
    assert model.qformer.config._attn_implementation == attention


def test_the_projection_starts_from_what_captions_say():
    from scene_training import start_projection

    torch.manual_seed(0)
    model = make_model("llama")
    embeds = model.get_image_embeds(make_pixel_values(8))
    with torch.no_grad():
        queries = model.encode_image(None, embeds)[2].last_hidden_state
        # Captions whose embeddings follow from the picture by a linear map
        targets = 0.1 + queries.mean(dim=1) @ torch.randn(queries.shape[-1], model.language_projection.out_features)
        start_projection(model, embeds, targets)
        outputs = model.language_projection(queries)
    torch.testing.assert_close(outputs.mean(dim=(0, 1)), targets.mean(dim=0), atol=1e-4, rtol=1e-4)
    wanted = (targets - targets.mean(dim=0)).repeat_interleave(queries.shape[1], dim=0)
    torch.testing.assert_close((outputs - targets.mean(dim=0)).std(), wanted.std())
    own = torch.nn.functional.cosine_similarity(
        outputs.mean(dim=1) - targets.mean(dim=0), targets - targets.mean(dim=0)
    )
    assert own.min() > 0.5


def test_a_caption_counts_as_the_mean_of_its_word_embeddings():
    from scene_training import caption_embeddings

    model, tokenizer = make_model("llama"), make_tokenizer()
    words = model.get_input_embeddings().weight
    ids = tokenizer(" a dog")["input_ids"]
    expected = sum(words[token] for token in ids) / len(ids)
    torch.testing.assert_close(caption_embeddings(model, tokenizer, ["a dog", "x"])[0], expected.detach())
