"""Every kind of picture comes out as the right RGB, and every broken one as an error that names it."""

import base64
import io
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from tiny import encode

from blip2_hf.models import image_fetching, image_loading
from blip2_hf.models.image_loading import ImageLoadError, load_image, load_images


RED, WHITE = (255, 0, 0), (255, 255, 255)


@pytest.fixture(scope="module")
def picture():
    """5 rows, 6 columns, every value different; no side could be taken for the channels."""
    array = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3) * 2
    return Image.fromarray(array)


def png_header(width, height):
    """A PNG that claims a size; its pixels are missing."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def server(picture):
    """Serves the picture at /picture.png, text at /text, nothing in time at /slow, 404 elsewhere."""
    release = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/slow":
                release.wait(10)
            found = self.path in ("/picture.png", "/text", "/slow")
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(encode(picture) if self.path == "/picture.png" else b"no picture here")

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield f"http://127.0.0.1:{http.server_port}"
    release.set()
    http.shutdown()
    http.server_close()


def same(image, expected):
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


# --- where the picture comes from ---

SOURCES = {
    "path": lambda path: str(path),
    "pathlib": lambda path: path,
    "bytes": lambda path: path.read_bytes(),
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "binary file": lambda path: io.BytesIO(path.read_bytes()),
    "pil": lambda path: Image.open(path),
    "base64": lambda path: base64.b64encode(path.read_bytes()).decode(),
    "base64 in lines": lambda path: base64.encodebytes(path.read_bytes()).decode(),
    "base64 url-safe, unpadded": lambda path: base64.urlsafe_b64encode(path.read_bytes()).decode().rstrip("="),
    "data uri": lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
    "record of bytes": lambda path: {"bytes": path.read_bytes(), "path": None},
    "record of a path": lambda path: {"bytes": None, "path": str(path)},
}

ARRAYS = {
    "hwc": lambda array: array,
    "chw": lambda array: array.transpose(2, 0, 1),
    "not contiguous": lambda array: np.asfortranarray(array),
    "float64": lambda array: array / 255,
    "float32 that overshoots": lambda array: (array / 255).astype(np.float32) + 1e-5,
    "int64": lambda array: array.astype(np.int64),
    "uint16": lambda array: array.astype(np.uint16) * 257,
    "uint16 big-endian": lambda array: (array.astype(np.uint16) * 257).astype(">u2"),
    "tensor chw": lambda array: torch.tensor(array).permute(2, 0, 1),
    "tensor hwc": lambda array: torch.tensor(array),
    "tensor float with gradient": lambda array: (torch.tensor(array).permute(2, 0, 1) / 255).requires_grad_(),
    "tensor uint16": lambda array: torch.tensor(array.astype(np.uint16) * 257),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_of_a_file_gives_its_pixels(source, picture, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(encode(picture))
    same(load_image(SOURCES[source](path)), picture)


@pytest.mark.parametrize("layout", ARRAYS)
def test_arrays_and_tensors_give_their_pixels(layout, picture):
    same(load_image(ARRAYS[layout](np.asarray(picture))), picture)


def test_bfloat16_tensor_is_read(picture):
    tensor = (torch.tensor(np.asarray(picture)) / 255).bfloat16()
    loaded = np.asarray(load_image(tensor)).astype(int)
    assert np.abs(loaded - np.asarray(picture)).max() <= 1  # bfloat16 has 8 bits


@pytest.mark.parametrize("channels, mode", [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_channel_count_of_an_array_is_the_mode(channels, mode):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    expected = load_image(Image.fromarray(array if channels > 1 else array[..., 0], mode=mode))
    same(load_image(array), expected)
    same(load_image(array.transpose(2, 0, 1)), expected)


def test_two_dimensional_array_is_grey():
    array = np.array([[0, 128], [255, 7]], dtype=np.uint8)
    same(load_image(array), np.stack([array] * 3, axis=-1))
    same(load_image(torch.tensor(array) / 255), np.stack([array] * 3, axis=-1))
    same(load_image(array > 100), np.stack([(array > 100) * 255] * 3, axis=-1))


def test_ambiguous_shape_follows_the_library_it_comes_from():
    array = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    same(load_image(array), array)  # NumPy: height 3, width 4
    same(load_image(torch.tensor(array)), array.transpose(1, 2, 0))  # torch: height 4, width 3


def test_url_is_downloaded(server, picture):
    same(load_image(f"{server}/picture.png"), picture)


# --- what kind of picture it is ---


def test_rgba_lies_on_white():
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    same(load_image(encode(image)), [[RED, WHITE, (127, 127, 127)]])


def test_la_and_premultiplied_modes_lie_on_white():
    image = Image.new("LA", (2, 1), (0, 255))
    image.putpixel((1, 0), (0, 0))
    same(load_image(encode(image)), [[(0, 0, 0), WHITE]])
    same(load_image(image.convert("La")), [[(0, 0, 0), WHITE]])
    same(load_image(image.convert("RGBA").convert("RGBa")), [[(0, 0, 0), WHITE]])


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palette_with_a_transparent_entry_lies_on_white(format):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    same(load_image(encode(image, format)), [[RED, (0, 0, 255)]])
    same(load_image(encode(image, format, transparency=1)), [[RED, WHITE]])


@pytest.mark.parametrize("mode, hidden, shown", [("L", 9, (8, 8, 8)), ("RGB", (1, 2, 3), (8, 8, 8))])
def test_transparent_colour_of_a_png_lies_on_white(mode, hidden, shown):
    image = Image.new(mode, (2, 1), shown if mode == "RGB" else 8)
    image.putpixel((0, 0), hidden)
    same(load_image(encode(image, transparency=hidden)), [[WHITE, shown]])


def test_grey_and_one_bit():
    same(load_image(encode(Image.new("L", (2, 1), 77))), [[(77, 77, 77)] * 2])
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    same(load_image(encode(image)), [[(0, 0, 0), WHITE]])


def test_cmyk_jpeg():
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixel = np.asarray(load_image(encode(red, "JPEG", quality=95)))[8, 8].astype(int)
    assert np.abs(pixel - RED).max() <= 3


def test_16_bit_png_is_scaled_and_not_clipped():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    expected = np.array([[0, 1, 128, 255]], dtype=np.uint8)[..., None].repeat(3, axis=-1)
    same(load_image(encode(Image.fromarray(values))), expected)
    same(load_image(values), expected)


def test_16_bit_tiff_of_either_byte_order():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    little = Image.fromarray(values)
    big = Image.frombytes("I;16B", (4, 1), values.astype(">u2").tobytes())
    assert little.mode == "I;16" and big.mode == "I;16B"
    same(load_image(encode(little, "TIFF")), load_image(values))
    same(load_image(encode(big, "TIFF")), load_image(values))


def test_dark_16_bit_pgm_stays_dark():
    # PIL opens it as 32-bit integers
    data = b"P5 2 1 65535\n" + np.array([[257, 200]], dtype=">u2").tobytes()
    assert Image.open(io.BytesIO(data)).mode == "I"
    same(load_image(data), [[(1, 1, 1), (1, 1, 1)]])


@pytest.mark.parametrize(
    "mode, values, expected",
    [
        ("I", [0, 255], [0, 255]),
        ("I", [0, 65535], [0, 255]),
        ("F", [0.0, 1.0], [0, 255]),
        ("F", [0.0, 200.0], [0, 200]),
        ("F", [0.0, 65535.0], [0, 255]),
    ],
)
def test_wide_modes_are_scaled_by_their_range(mode, values, expected):
    image = Image.fromarray(np.array([values], dtype=np.int32 if mode == "I" else np.float32))
    assert image.mode == mode
    same(load_image(image), [[(value,) * 3 for value in expected]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation, picture):
    turns = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    same(load_image(encode(picture, exif=exif)), turns[orientation](np.asarray(picture)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_stop_a_good_picture(picture):
    data = encode(picture, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    same(load_image(data), picture)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    same(load_image(data), frames[0])


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (3, 3), (20000, 1), (1, 20000), (5000, 2)])
def test_tiny_and_thin_pictures(size):
    image = Image.new("RGB", size, RED)
    loaded = load_image(encode(image))
    assert loaded.size == size
    assert loaded.getpixel((size[0] - 1, size[1] - 1)) == RED
    same(load_image(np.asarray(image)), image)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", "GIF", "BMP", "PPM", "ICO"])
def test_a_file_gives_what_its_bytes_give(format, picture, tmp_path):
    """A file is decoded from the disk, and turned after it was closed."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = {"exif": exif} if format in ("JPEG", "PNG", "WEBP", "TIFF", "MPO") else {}
    # Pillow before 13 writes an icon of no pictures unless it is told the size of a small one
    data = encode(picture, format, **({"sizes": [picture.size]} if format == "ICO" else turned))
    path = tmp_path / "picture"
    path.write_bytes(data)
    loaded = load_image(path)
    same(loaded, load_image(data))
    assert loaded.size == ((5, 6) if format in ("JPEG", "PNG", "WEBP", "TIFF", "MPO") else picture.size)


def test_a_picture_with_a_long_head(picture, tmp_path):
    """What is read before a picture is known to be one is limited, not the picture."""
    path = tmp_path / "picture.tiff"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2500, 2500, 3), dtype=np.uint8))
    noise.save(path)
    assert path.stat().st_size > image_loading._LONGEST_HEAD
    same(load_image(path), noise)
    same(load_image(path.read_bytes()), noise)


# --- pictures that cannot be read ---


def broken_files(picture):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    png, jpeg = encode(Image.fromarray(noise)), encode(Image.fromarray(noise), "JPEG")
    return {
        "truncated.png": png[: len(png) // 2],
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "header_only.png": png_header(8, 8),
        "empty.png": b"",
        "text.jpg": b"this is no picture at all",
        "page.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "zeros.gif": b"GIF89a" + bytes(100),
        "bit_flip.png": png[:60] + bytes([png[60] ^ 255]) + png[61:],
    }


@pytest.mark.parametrize("name", broken_files(None))
def test_broken_file_is_named(name, picture, tmp_path):
    path = tmp_path / name
    path.write_bytes(broken_files(picture)[name])
    with pytest.raises(ImageLoadError, match=re.escape(repr(str(path)))) as error:
        load_image(path)
    assert isinstance(error.value, ValueError)
    assert len(str(error.value)) > len(repr(str(path))) + 20  # says what is wrong, too


def count_reads(monkeypatch):
    """What is read of files that image_loading opens, as a list of numbers of bytes."""
    sizes = []

    class Counted(io.FileIO):
        def readinto(self, buffer):
            sizes.append(super().readinto(buffer))
            return sizes[-1]

        def readall(self):
            pytest.fail("the whole file is read")

    monkeypatch.setattr(image_loading, "open", lambda path, *args, **kwargs: Counted(path), raising=False)
    return sizes


@pytest.mark.parametrize("start", [b"", b"a text\n" * 2**19, b"%!PS-Adobe\n" * 2**19, b"\xff" * 2**20])
def test_a_huge_file_that_is_no_image_is_read_at_its_head_alone(start, tmp_path, monkeypatch):
    path = tmp_path / "huge"
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(2**33)
    sizes = count_reads(monkeypatch)
    monkeypatch.setattr(image_loading, "_LONGEST_HEAD", 2**20)
    with pytest.raises(ImageLoadError, match="huge'.*(not an image|no image in the first 1,048,576 bytes)"):
        load_image(path)
    assert 0 < sum(sizes) < 2**21


def test_a_picture_whose_size_is_refused_is_read_at_its_head_alone(tmp_path, monkeypatch):
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(100_000, 100_000))
    os.truncate(path, 2**33)
    sizes = count_reads(monkeypatch)
    with pytest.raises(ImageLoadError, match="MAX_IMAGE_PIXELS"):
        load_image(path)
    assert 0 < sum(sizes) < 2**16


@pytest.mark.parametrize("given", [str, Path, lambda path: {"path": str(path)}], ids=["str", "Path", "record"])
def test_a_fifo_and_a_device_are_no_pictures(given, tmp_path):
    fifo, link, endpoint = tmp_path / "fifo.png", tmp_path / "link.png", tmp_path / "socket.png"
    os.mkfifo(fifo)
    link.symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(endpoint))
        for path in (fifo, link, endpoint, Path("/dev/zero"), Path("/dev/null")):
            with pytest.raises(ImageLoadError, match=f"{path}'.*a FIFO, a device or a socket"):
                load_image(given(path))


def test_a_stream_without_end_is_read_no_further_than_a_picture_may_go(monkeypatch):
    monkeypatch.setattr(image_fetching, "MAX_BYTES", 2**20)
    with open("/dev/zero", "rb") as file, pytest.raises(ImageLoadError, match="more than 1,048,576 bytes"):
        load_image(file)
    with open("/dev/zero", "rb", buffering=0) as file, pytest.raises(ImageLoadError, match="more than 1,048,576 by"):
        load_image(file)


def test_a_pipe_that_was_opened_is_read_to_its_end(picture):
    reading, writing = os.pipe()
    data = encode(picture)

    def write():
        for start in range(0, len(data), 50):  # what one call reads is less than all of it
            os.write(writing, data[start : start + 50])
            time.sleep(0.005)
        os.close(writing)

    threading.Thread(target=write).start()
    with os.fdopen(reading, "rb", buffering=0) as file:
        same(load_image(file), picture)


@pytest.mark.parametrize(
    "image, words",
    [
        ("no/such/picture.jpg", "'no/such/picture.jpg': no such file"),
        ("picture", "'picture': no such file"),
        (Path("no/such/picture.jpg"), "no such file"),
        (".", "folder"),
        ("A" * 1000, "not an image"),
        ("data:image/png,abc", "data URI"),
        ("data:image/png;base64,?!", "base64"),
        (b"", r"0 bytes: the file is empty"),
        (b"no picture", "10 bytes: not an image"),
        ({"image": 1}, r"\['image'\]"),
        ({"bytes": None, "path": None}, "'bytes' nor 'path'"),
        (None, "NoneType"),
        (3, "int"),
        (np.zeros((2, 3, 4, 4), np.uint8), "4.*list"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros((5, 6, 7), np.uint8), r"shape \(5, 6, 7\).*1 to 4 channels"),
        (np.full((4, 4, 3), 200.0), r"\[0, 1\].*200 to 200"),
        (np.full((4, 4), np.nan), "nan"),
        (np.full((4, 4), 300), r"0\.\.255"),
        (np.full((4, 4), -1), r"0\.\.255"),
        (np.zeros((4, 4), complex), "complex128"),
        (torch.full((3, 4, 4), -2.0), r"Tensor of shape \(3, 4, 4\).*\[0, 1\].*normalization"),
        (Image.fromarray(np.full((2, 2), 1e6, np.float32)), "span 1e\\+06"),
    ],
)
def test_message_says_what_was_given(image, words):
    with pytest.raises(ImageLoadError, match=words):
        load_image(image)


class Unnameable(os.PathLike):
    def __fspath__(self):
        raise RuntimeError("no path today")


@pytest.mark.parametrize(
    "image, words",
    [
        ("http://a..b/x.png", r"'http://a\.\.b/x\.png'\): the download failed"),
        ("https://\udc80.com/x.png", "the download failed"),
        ("http://[::1/x.png", "the download failed"),
        (Path("a\0b.png"), "embedded null byte"),
        ("a\0b.png", "no such file"),
        (Path("a\ud800.png"), r"'a\\ud800\.png'"),
        ("data:image/png;base64,\udc80", "base64"),
        ({"bytes": None, "path": 0}, "'path' is 0, of type int. Give the path of an image file"),
        ({"path": 1}, r"row 3 \(1\): 'path' is 1, of type int. Give the path of an image file"),
        ({"path": True}, "'path' is True, of type bool"),
        ({"path": ["x.png"]}, r"'path' is \['x.png'\], of type list"),
        ({"bytes": "text", "path": None}, "'bytes' is 'text', of type str. Give the bytes of an image file"),
        ({"bytes": 1}, "'bytes' is 1, of type int"),
        ({"bytes": np.zeros(3), "path": None}, "'bytes' is array.*, of type ndarray"),
        (Unnameable(), "Unnameable.*no path today"),
        (torch.zeros(3, 4, 4, device="meta"), "meta tensor"),
        (np.array([["a"]]), "minimum"),
    ],
)
def test_whatever_is_raised_is_an_error_that_names_the_picture(image, words):
    with pytest.raises(ImageLoadError, match=words) as error:
        load_image(image, "row 3")
    message = str(error.value)
    assert message.startswith("row 3 (") and message.encode("utf-8")


def test_a_lack_of_memory_is_no_fault_of_the_picture(monkeypatch):
    def run_out(*args):
        raise MemoryError

    monkeypatch.setattr("blip2_hf.models.image_loading._open", run_out)
    with pytest.raises(MemoryError):
        load_image("x.png")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "PPM", "TGA", "PCX"])
def test_damaged_files_are_pictures_or_errors_that_name_them(format):
    """Nothing but an ImageLoadError comes out, whichever bytes are changed, cut off or added."""
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    whole, failed = np.frombuffer(encode(noise, format), np.uint8), 0
    for _ in range(150):
        data = whole.copy()
        places = generator.integers(0, min(len(data), 200), generator.integers(1, 6))
        data[places] = generator.integers(0, 256, len(places))
        data = data[: generator.integers(1, len(data) + 1)].tobytes() if generator.random() < 0.3 else data.tobytes()
        try:
            assert load_image(data, "row 3").mode == "RGB"
        except ImageLoadError as error:
            failed += 1
            assert str(error).startswith(f"row 3 ({len(data)} bytes): ")
    assert failed > 0


def test_mode_that_pil_cannot_convert_is_an_error_that_names_it(monkeypatch):
    def convert(image, mode):
        raise ValueError(f"conversion from {image.mode} to {mode} not supported")

    monkeypatch.setattr(Image.Image, "convert", convert)  # older versions of PIL say this of LAB
    with pytest.raises(ImageLoadError, match="mode LAB.*Convert it first"):
        load_image(Image.new("LAB", (2, 2)))


def test_long_data_is_not_printed():
    with pytest.raises(ImageLoadError) as error:
        load_image("data:image/png;base64," + "A" * 100_000)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("pixels", [1.5, 3])  # PIL warns up to twice its limit and raises above
def test_decompression_bomb_is_an_error(pixels, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(100, int(100 * pixels)))
    with pytest.raises(ImageLoadError, match=r"bomb\.png'.*MAX_IMAGE_PIXELS"):
        load_image(path)
    assert Image.MAX_IMAGE_PIXELS == 10_000


def test_size_limit_is_the_users(monkeypatch):
    data = encode(Image.new("RGB", (20, 20)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    assert load_image(data).size == (20, 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(data).size == (20, 20)
    assert Image.MAX_IMAGE_PIXELS is None


def test_url_errors_name_the_url(server):
    with pytest.raises(ImageLoadError, match=rf"'{server}/missing\.png'.*404"):
        load_image(f"{server}/missing.png")
    with pytest.raises(ImageLoadError, match=rf"'{server}/text'.*not an image"):
        load_image(f"{server}/text")
    with pytest.raises(ImageLoadError, match="download failed"):
        load_image("http://127.0.0.1:1/picture.png")


def test_url_times_out(server):
    with pytest.raises(ImageLoadError, match="not fetched within 0.2 seconds"):
        load_image(f"{server}/slow", timeout=0.2)


# --- batches ---


def test_batch_is_loaded_in_order(picture):
    red = Image.new("RGB", (2, 2), RED)
    loaded = load_images([picture, encode(red)])
    same(loaded[0], picture)
    same(loaded[1], red)
    assert load_images([]) == []
    tensor = torch.rand(3, 3, 8, 9)
    assert [image.size for image in load_images(tensor)] == [(9, 8)] * 3
    assert len(load_images(picture for _ in range(2))) == 2


def test_batch_error_says_which(picture, tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(encode(picture, "JPEG")[:200])
    with pytest.raises(ImageLoadError, match=rf"^image 3 of 4 \('{re.escape(str(path))}'\): the image is broken"):
        load_images([picture, picture, path, picture])
    with pytest.raises(ImageLoadError, match=r"^image 1 of 2 \(4 bytes\): "):
        load_images([b"junk", picture])


def test_one_picture_is_no_batch(picture):
    with pytest.raises(TypeError, match="load_image"):
        load_images(picture)
    with pytest.raises(TypeError, match="load_image"):
        load_images("picture.png")


def test_import_does_not_load_torch():
    package = Path(sys.modules["blip2_hf.models.image_loading"].__file__).parents[1]
    code = "import models.image_loading, sys; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=package, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40


@pytest.fixture
def without_plugins(monkeypatch):
    for module in ("pillow_avif", "pillow_heif", "pillow_jxl"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("OPEN", "ID", "EXTENSION"):
        monkeypatch.setattr(Image, name, getattr(Image, name).copy())
    image_loading._load_plugin.cache_clear()
    yield
    image_loading._load_plugin.cache_clear()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (HEIC, "a picture in HEIC, which PIL reads with a plug-in: pip install pillow-heif"),
        (b"\xff\x0a" + b"\0" * 40, "a picture in JPEG XL, .*: pip install pillow-jxl-plugin"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0" * 40, "a picture in JPEG XL"),
    ],
)
def test_a_picture_that_needs_a_plugin_says_which(data, message, without_plugins, tmp_path):
    (tmp_path / "x.heic").write_bytes(data)
    for image in (data, tmp_path / "x.heic", {"bytes": data, "path": None}):
        with pytest.raises(ImageLoadError, match=message):
            load_image(image)


def test_a_plugin_is_loaded_once_and_when_a_picture_needs_it(without_plugins, monkeypatch):
    class HeicFile(ImageFile.ImageFile):
        format = "HEIC"

        def _open(self):
            self._size, self._mode = (5, 7), "RGB"
            self.tile = []
            self.im = Image.core.fill("RGB", self._size, (9, 8, 7))

        def load(self):
            return self.im.pixel_access(False)

    calls = []

    def register_heif_opener():
        calls.append(1)
        Image.register_open("HEIC", HeicFile, lambda head: head[4:12] == b"ftypheic")

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register_heif_opener))
    with pytest.raises(ImageLoadError, match="not an image"):
        load_image(b"no picture")
    assert calls == []
    for _ in range(2):
        picture = load_image(HEIC)
        assert picture.size == (5, 7) and picture.getpixel((0, 0)) == (9, 8, 7)
    assert calls == [1]
