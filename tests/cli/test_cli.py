"""The command `blip2-hf`, from its arguments to its files."""

import subprocess
import sys

import datasets
import pytest
import torch
import transformers
from picture_server import picture_server
from tiny import make_config, make_image, make_image_processor, randomize

# In transformers 5.17 the name in the package itself asks for torchvision
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from blip2_hf import Blip2Model
from blip2_hf.cli import main, make_parser
from blip2_hf.data import load_cached_features, read_cached_features


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A folder with a tiny DINOv2 and an image processor that would cut out the centre."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14
    )
    folder = tmp_path_factory.mktemp("tower")
    randomize(transformers.Dinov2Model(config)).save_pretrained(folder)
    transformers.models.bit.image_processing_pil_bit.BitImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dataset():
    return datasets.Dataset.from_list([{"picture": make_image(i), "caption": f"number {i}"} for i in range(4)])


def cache(data, tower, output, *arguments):
    main(
        [
            "cache-features",
            str(data),
            "--vision-model",
            str(tower),
            "--output",
            str(output),
            "--size",
            "28",
            *arguments,
        ]
    )
    return load_cached_features(output)


def expected_features(tower, size=28, layer=None):
    model = transformers.Dinov2Model.from_pretrained(tower).eval()
    processor = AutoImageProcessor.from_pretrained(tower, size={"height": size, "width": size}, do_center_crop=False)
    with torch.no_grad():
        outputs = model(**processor(images=[make_image(1)], return_tensors="pt"), output_hidden_states=True)
    return (outputs.last_hidden_state if layer is None else outputs.hidden_states[layer])[0]


def test_a_parquet_file(dataset, tower, tmp_path):
    dataset.to_parquet(tmp_path / "pictures.parquet")
    options = ["--image-column", "picture", "--views", "3", "--dtype", "float32", "--rows-per-shard", "2"]
    options += ["--vision-feature-layer", "2"]
    cached = cache(tmp_path / "pictures.parquet", tower, tmp_path / "out", *options)
    assert cached["caption"] == dataset["caption"]
    assert cached[0]["image_embeds_shape"] == [3, 5, 32]
    found = read_cached_features(cached[1])
    torch.testing.assert_close(found, expected_features(tower, layer=2), rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, read_cached_features(cached[1], 1))


def test_a_folder_of_pictures(tower, tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        make_image(i).save(tmp_path / "pictures" / f"{i}.png")
    cached = cache(tmp_path / "pictures", tower, tmp_path / "out", "--size", "42", "--tower-dtype", "bfloat16")
    assert cached[0]["image_embeds_shape"] == [1, 10, 32]
    expected = expected_features(tower, size=42)
    difference = (read_cached_features(cached[1]).float() - expected).norm() / expected.norm()
    assert 1e-4 < difference < 0.05


def test_a_saved_data_set_and_parts(dataset, tower, tmp_path):
    dataset.rename_column("picture", "image").save_to_disk(tmp_path / "saved")
    options = ["--rows-per-shard", "1", "--num-parts", "2", "--part-index"]
    with pytest.raises(FileNotFoundError, match="lacks 2 of 4 files"):
        cache(tmp_path / "saved", tower, tmp_path / "out", *options, "0")
    assert len(cache(tmp_path / "saved", tower, tmp_path / "out", *options, "1")) == 4


def test_the_tower_of_a_blip2(dataset, tmp_path):
    torch.manual_seed(0)
    model = randomize(Blip2Model(make_config(None))).eval()
    model.save_pretrained(tmp_path / "model")
    make_image_processor().save_pretrained(tmp_path / "model")
    dataset.to_parquet(tmp_path / "pictures.parquet")
    arguments = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--size", "28"]
    main(["cache-features", str(tmp_path / "pictures.parquet"), *arguments, "--image-column", "picture"])
    pixel_values = make_image_processor()(images=[make_image(1)], return_tensors="pt")["pixel_values"]
    found = read_cached_features(load_cached_features(tmp_path / "out")[1])
    torch.testing.assert_close(found.float(), model.get_image_embeds(pixel_values)[0], rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["cache-features", "x", "--output", "y"], "--model --vision-model"),
        (["cache-features", "x", "--output", "y", "--model", "a", "--vision-model", "b"], "not allowed with"),
        (["cache-features", "x", "--output", "y", "--vision-model", "b", "--dtype", "int8"], "bfloat16"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_files_and_options_that_do_not_fit(tower, tmp_path):
    with pytest.raises(SystemExit, match="--vision-feature-layer goes with --vision-model"):
        main(["cache-features", str(tower), "--output", "y", "--model", str(tower), "--vision-feature-layer", "1"])
    (tmp_path / "pictures.txt").write_text("")
    with pytest.raises(SystemExit, match="pictures.txt.*\\.parquet"):
        cache(tmp_path / "pictures.txt", tower, tmp_path / "out")


def test_the_command_starts_without_torch():
    code = (
        "import sys, runpy; sys.argv = ['blip2-hf', '--help']; runpy.run_module('blip2_hf.cli', run_name='__main__')"
    )
    probe = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); exec({code!r})"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    for command in (
        "cache-features",
        "capfilt",
        "caption",
        "convert",
        "evaluate",
        "export",
        "index",
        "look",
        "search",
    ):
        assert f"\n    {command}" in result.stdout
    assert result.stdout.strip().endswith("False")


def test_pictures_by_url_are_fetched_if_that_is_asked_for(tower, tmp_path):
    with picture_server() as server:
        datasets.Dataset.from_dict({"image": [f"{server.url}/picture.png"] * 2}).to_json(tmp_path / "rows.json")
        arguments = tmp_path / "rows.json", tower, tmp_path / "features"
        with pytest.raises(SystemExit, match=rf"row 0 \('{server.url}/picture.png'\).*\(--allow-urls\)"):
            cache(*arguments)
        with pytest.raises(SystemExit, match=r"row 0 .*which is not public.*\(--allow-urls 127.0.0.1\)"):
            cache(*arguments, "--allow-urls")
        assert server.connections == 0
        assert len(cache(*arguments, "--allow-urls", "localhost", "127.0.0.1")) == 2


@pytest.mark.parametrize(
    "command",
    [
        "caption data --model m",
        "capfilt data --filter m --output o",
        "cache-features data --model m --output o",
        "evaluate caption --data data --model m --output o",
    ],
)
def test_all_that_reads_rows_has_the_option(command):
    parse = make_parser().parse_args
    assert parse(command.split()).allow_urls is False
    assert parse([*command.split(), "--allow-urls"]).allow_urls == []
    assert parse([*command.split(), "--allow-urls", "localhost", "10.0.0.7"]).allow_urls == ["localhost", "10.0.0.7"]


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_told_before_anything_is_loaded(tmp_path, device):
    with pytest.raises(SystemExit, match=f"blip2-hf: --device {device} is not there .*Give cpu"):
        main(["caption", str(tmp_path), "--model", str(tmp_path / "missing"), "--device", device])
