# Copyright 2026 The blip2-hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Pictures of every kind to 8-bit RGB, and errors that say which picture is broken."""

import base64
import binascii
import contextlib
import functools
import importlib
import io
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from .image_fetching import FetchError, fetch, read_at_most


if TYPE_CHECKING:
    import torch


_BASE64_SPECIMEN = 40  # characters of a base64 string that an error message shows
_LONGEST_HEAD = 16 * 2**20  # bytes that are read of a file before it is known to be an image
_LONGEST_URL = 1000  # that an error message shows in full
_PLUGINS = {  # of PIL, by the format: module, function that adds the format, package
    "AVIF": ("pillow_avif", None, "pillow-avif-plugin"),
    "HEIC": ("pillow_heif", "register_heif_opener", "pillow-heif"),
    "JPEG XL": ("pillow_jxl", None, "pillow-jxl-plugin"),
}
_FLOAT_SLACK = 1e-3  # rounding and resampling leave values a little outside [0, 1]


class ImageLoadError(ValueError):
    """A picture that cannot be read. The message names it, says what was given and what to do about it."""


def load_image(
    image: Any,
    name: str | None = None,
    timeout: float | None = 30.0,
    allow_urls: bool | Sequence[str] | None = None,
) -> Image.Image:
    """
    Load one picture as upright 8-bit RGB: EXIF rotation applied, transparency put on white, the first frame of an
    animation, 16-bit values scaled (not clipped).

    Args:
        image (`str`, `os.PathLike`, `bytes`, `PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `dict` or binary file):
            A path, an http(s) URL, a data URI, a base64 string, the bytes of an image file, a PIL image, a
            `{"bytes": ..., "path": ...}` record as in `datasets`, or an array of shape `(height, width)`,
            `(height, width, channels)` or `(channels, height, width)` with 1 to 4 channels (L, LA, RGB, RGBA), as
            `uint8`, `uint16`, `bool` or floats in [0, 1]. If both ends of the shape could be the channels, a NumPy
            array is taken as channels last and a tensor as channels first.
        name (`str`, *optional*):
            What an error calls the picture, such as `"image 3 of 8"`. The path or URL is always added.
        timeout (`float`, *optional*, defaults to 30.0):
            Seconds that fetching a URL may take. `None` waits for ever.
        allow_urls (`bool` or `list[str]`, *optional*):
            Which URLs are fetched: with `None` any, because the user typed them; with `False` none; with `True` those
            of public addresses, without a proxy; with a list also those of the hosts in it, such as `["localhost"]`.

    Returns:
        `PIL.Image.Image`: mode RGB, width and height as stored (after rotation).

    Raises:
        `ImageLoadError`: if the picture can't be fetched or read: it is missing, empty, truncated, no image, or larger
            than `PIL.Image.MAX_IMAGE_PIXELS` allows. No other error comes out, except for a lack of memory.
    """
    with _errors_that_name(image, name):
        return _to_rgb(_open(image, timeout, allow_urls))


def load_images(images: Iterable[Any], timeout: float | None = 30.0) -> list[Image.Image]:
    """
    Load a batch of pictures with [`load_image`]; an error says which one is broken: `image 3 of 8 ('x.jpg'): ...`.

    Args:
        images (iterable of anything that [`load_image`] takes):
            The pictures. An array or tensor of shape `(batch_size, ...)` counts as `batch_size` pictures.
        timeout (`float`, *optional*, defaults to 30.0):
            Seconds that fetching each URL may take. `None` waits for ever.

    Returns:
        `list[PIL.Image.Image]`: mode RGB, in the order given.
    """
    if isinstance(images, (str, bytes, os.PathLike, Mapping, Image.Image)):
        raise TypeError(f"load_images takes a list of images, got one {type(images).__name__}; use load_image for it")
    images = list(images)
    return [load_image(image, f"image {i} of {len(images)}", timeout) for i, image in enumerate(images, start=1)]


def load_image_for(
    image_processor: Any, image: Any, name: str | None = None, timeout: float | None = 30.0, **image_kwargs
) -> "Image.Image | torch.Tensor":
    """
    Load one picture as an image processor takes it: as [`load_image`] does, or, if the image processor does not
    rescale (`do_rescale=False`) and the picture has floats, with its values as they are.

    Args:
        image_processor (`BaseImageProcessor`):
            The image processor that is given the picture.
        image:
            Anything that [`load_image`] takes. Floats that are not rescaled may have any range, and 1 or 3 channels.
        name (`str`, *optional*):
            What an error calls the picture.
        timeout (`float`, *optional*, defaults to 30.0):
            Seconds that fetching a URL may take. `None` waits for ever.
        image_kwargs (`dict`):
            Arguments of the image processor's call. Only `do_rescale`, `do_normalize` and `image_mean` are read.

    Returns:
        `PIL.Image.Image`: mode RGB; or `torch.Tensor` of shape `(3, height, width)`, float32.

    Raises:
        `ImageLoadError`: if the picture can't be read.
        ValueError: if the picture has 8 bits, is not rescaled, and is then normalised with the mean of pictures in
            [0, 1].
    """
    if _setting(image_processor, image_kwargs, "do_rescale") is not False:
        return load_image(image, name, timeout)
    with _errors_that_name(image, name):
        picture = image if _has_floats(image) else _open(image, timeout)
        if _has_floats(picture):
            return _from_floats(picture)
        picture = _to_rgb(picture)
    if _setting(image_processor, image_kwargs, "do_normalize") and _is_for_fractions(image_processor, image_kwargs):
        raise ValueError(f"{name or _describe(image)}: {_NOT_RESCALED}")
    return picture


def check_reads_8_bit(image_processor: Any):
    """
    Refuse an image processor that takes pictures for floats in [0, 1], or may do so: those of a dataset or a folder
    have 8 bits, whatever they had there.

    Args:
        image_processor (`BaseImageProcessor`):
            The image processor.

    Raises:
        ValueError: if it does not rescale, unless it normalises with a mean of 8-bit values.
    """
    if _setting(image_processor, {}, "do_rescale") is not False:
        return
    if not _setting(image_processor, {}, "do_normalize") or _is_for_fractions(image_processor, {}):
        raise ValueError(f"Pictures of a dataset or a folder: {_NOT_RESCALED}")


_NOT_RESCALED = (
    "values of 8 bits, 0 to 255, would reach the model as they are, because the image processor has do_rescale=False. "
    "It then expects floats in [0, 1]. Leave do_rescale at True (in a saved image processor: set it and save it). If "
    "the model wants 0 to 255, give rescale_factor=1.0 with it."
)


def _setting(image_processor: Any, image_kwargs: Mapping[str, Any], name: str) -> Any:
    """Return a setting of a call, otherwise of the image processor; `None` if there is none (timm, Pix2Struct)."""
    value = image_kwargs.get(name)
    return getattr(image_processor, name, None) if value is None else value


def _is_for_fractions(image_processor: Any, image_kwargs: Mapping[str, Any]) -> bool:
    """Return whether the mean belongs to values in [0, 1], not to 0 to 255."""
    mean = _setting(image_processor, image_kwargs, "image_mean")
    return mean is not None and bool(np.max(mean) <= 1)


class _Problem(Exception):
    """What is wrong with a picture; `load_image` adds which picture it is."""


@contextlib.contextmanager
def _errors_that_name(image: Any, name: str | None) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # decoders, HTTP clients and file systems raise whatever they like
        cause = error.__cause__ if isinstance(error, (_Problem, FetchError)) else error
        raise as_load_error(error, image, name) from cause


def as_load_error(error: Exception | str, image: Any, name: str | None = None) -> ImageLoadError:
    """
    Return the error of a picture that names it, whatever was raised while it was fetched or read.

    Args:
        error (`Exception` or `str`):
            What was raised, or what is wrong.
        image:
            The picture, as it was given.
        name (`str`, *optional*):
            What the error calls it, such as `"row 3"`.

    Returns:
        [`ImageLoadError`]: with a message that can be printed, also if a path in it is not UTF-8.
    """
    try:
        source = _describe(image)
    except Exception:  # a path-like object may raise too
        source = type(image).__name__
    label = source if name is None else f"{name} ({source})"
    problem = str(error)
    if not isinstance(error, (_Problem, FetchError, str)):
        problem = f"cannot be read ({type(error).__name__}: {error}). Check that the path or URL leads to an image"
    return ImageLoadError(f"{label}: {problem}".encode("utf-8", "backslashreplace").decode("utf-8"))


def _describe(image: Any) -> str:
    """Return short words for a picture in an error message: its path or URL, otherwise its type and shape."""
    if isinstance(image, str):
        if is_url(image):
            return repr(image) if len(image) <= _LONGEST_URL else f"{image[:_LONGEST_URL]!r}..."
        if image.startswith("data:") or len(image) > 256:
            return f"{image[:_BASE64_SPECIMEN]!r}..."
        return repr(image)
    if isinstance(image, os.PathLike):
        return repr(os.fspath(image))
    if isinstance(image, Mapping) and image.get("path"):
        return repr(image["path"])
    if isinstance(image, Image.Image):
        filename = getattr(image, "filename", "")
        return repr(filename) if filename else f"PIL image, mode {image.mode}, {image.width}x{image.height}"
    if isinstance(image, np.ndarray) or _is_tensor(image):
        return f"{type(image).__name__} of shape {tuple(image.shape)}, {image.dtype}"
    if isinstance(image, (bytes, bytearray, memoryview)):
        return f"{len(image)} bytes"
    return type(image).__name__


def _is_tensor(image: Any) -> bool:
    # whoever passes a tensor has imported torch
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(image, torch.Tensor)


def _has_floats(image: Any) -> bool:
    if isinstance(image, Image.Image):
        return image.mode == "F"
    if isinstance(image, np.ndarray):
        return np.issubdtype(image.dtype, np.floating)
    return _is_tensor(image) and image.is_floating_point()


def _from_floats(image: Any) -> "torch.Tensor":
    """Return an array, a tensor or a PIL image of floats as a tensor of shape (3, height, width), values unchanged."""
    import torch

    is_tensor = _is_tensor(image)
    array = image.detach().cpu().float().numpy() if is_tensor else np.asarray(image, dtype=np.float32)
    array = _to_channels_last(array, channels_last=not is_tensor)
    if array.ndim == 2:
        array = array[..., None]
    if array.shape[-1] not in (1, 3):
        raise _Problem(
            f"floats that are not rescaled (do_rescale=False) have 1 or 3 channels, these have {array.shape[-1]}. "
            "Leave out the transparency"
        )
    if not np.isfinite(array).all():
        raise _Problem("some of the float values are NaN or infinite. Give finite ones")
    channels_first = np.broadcast_to(array, (*array.shape[:2], 3)).transpose(2, 0, 1)
    return torch.from_numpy(np.array(channels_first, order="C"))


def is_url(image: Any) -> bool:
    """
    Tell whether a picture is given by a URL that is fetched.

    Args:
        image:
            The picture, as it was given.

    Returns:
        `bool`.
    """
    return isinstance(image, str) and image.startswith(("http://", "https://"))


def _open(image: Any, timeout: float | None, allow_urls: bool | Sequence[str] | None = None) -> Image.Image:
    """Open any kind of input as a PIL image of any mode, fully decoded."""
    if isinstance(image, str):
        return _open_url(image, timeout, allow_urls) if is_url(image) else _open_string(image)
    if isinstance(image, os.PathLike):
        return _open_path(os.fspath(image))
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(image))
    if isinstance(image, Image.Image):
        return _decode_pil(image)
    if isinstance(image, np.ndarray):
        return _from_array(image, channels_last=True)
    if _is_tensor(image):
        tensor = image.detach().cpu()
        # NumPy has no bfloat16
        return _from_array((tensor.float() if tensor.is_floating_point() else tensor).numpy(), channels_last=False)
    if isinstance(image, Mapping):
        return _open_record(image)
    if isinstance(image, io.IOBase):
        return _decode(io.BytesIO(read_at_most(image)))
    raise _Problem(
        f"cannot make an image of a {type(image).__name__}. Give a path, an http(s) URL, bytes, base64, a PIL image, "
        "an array or a tensor"
    )


def _open_url(url: str, timeout: float | None, allow_urls: bool | Sequence[str] | None) -> Image.Image:
    if allow_urls is False:
        raise _Problem(
            "a URL in a row of a dataset is fetched only if that is asked for. Give allow_urls=True (--allow-urls), "
            "or download the pictures first"
        )
    public_except = () if isinstance(allow_urls, bool) else allow_urls
    data = fetch(url, timeout, [public_except] if isinstance(public_except, str) else public_except)
    return _decode(io.BytesIO(data), quotes=False)


def _open_string(image: str) -> Image.Image:
    if image.startswith("data:"):
        header, comma, payload = image.partition(",")
        if not comma or not header.endswith(";base64"):
            raise _Problem("this data URI is not 'data:<type>;base64,<data>'. Encode the file's bytes with base64")
        data = _from_base64(payload)
        if data is None:
            raise _Problem("the data URI does not hold valid base64. Encode the file's bytes again")
        return _decode(io.BytesIO(data))
    if os.path.exists(image):
        return _open_path(image)
    data = _from_base64(image)
    # a short name such as "cat" is valid base64 too, but of no image
    if data and (len(image) > 256 or _is_image(data)):
        return _decode(io.BytesIO(data))
    raise _Problem(
        "no such file. Give the path of an existing file, a URL that starts with http:// or https://, a data URI or "
        "a base64 string of an image file"
    )


def _from_base64(text: str) -> bytes | None:
    """Return the bytes of a standard or URL-safe base64 string, with or without padding and line breaks, else None."""
    compact = "".join(text.split()).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


def _is_image(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).close()
    except Exception:  # decoders raise whatever they like
        return False
    return True


def _open_path(path: str | bytes) -> Image.Image:
    if os.path.isdir(path):
        raise _Problem("this is a folder. Give the path of one image file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise _Problem("this is a FIFO, a device or a socket. Give the path of one image file")
    try:
        with open(path, "rb", buffering=0) as file:
            return _decode(file)
    except FileNotFoundError:
        raise _Problem("no such file. Check the path") from None
    except OSError as error:
        raise _Problem(f"cannot open the file ({error.strerror}). Check its permissions") from error


def _open_record(record: Mapping) -> Image.Image:
    """Open a `datasets` image that was not decoded: its bytes or, if they are `None`, its path."""
    data, path = record.get("bytes"), record.get("path")
    if data is not None:
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise _Problem(f"'bytes' is {_with_type(data)}. Give the bytes of an image file")
        return _decode(io.BytesIO(data))
    if path is not None:
        if not isinstance(path, (str, os.PathLike)):
            # A number would be a file that is open already
            raise _Problem(f"'path' is {_with_type(path)}. Give the path of an image file")
        return _open_path(os.fspath(path))
    raise _Problem(
        f"the keys of this dict are {sorted(map(str, record))}, and neither 'bytes' nor 'path' holds an image. Pass "
        "the image itself, or a record such as {'bytes': ..., 'path': ...}"
    )


def _with_type(value: Any) -> str:
    shown = repr(value)
    shown = shown if len(shown) <= _BASE64_SPECIMEN else f"{shown[:_BASE64_SPECIMEN]}..."
    return f"{shown}, of type {type(value).__name__}"


class _Headed(io.RawIOBase):
    """A file whose head alone can be read at first: PIL looks for some formats line by line, to the end of a text."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.left: float = _LONGEST_HEAD

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        size = self.file.readinto(buffer)  # type: ignore[attr-defined]
        self.left -= size
        if self.left < 0:
            raise _Problem(f"there is no image in the first {_LONGEST_HEAD:,} bytes. Give an image file")
        return size

    def readall(self) -> bytes:  # of a format that is known by its first bytes
        return self.file.read()


def _decode(file: BinaryIO, quotes: bool = True, is_retry: bool = False) -> Image.Image:
    """
    Decode the first frame of an image file, which is read on only if its head is that of an image. Errors quote from
    the file unless `quotes` is False. A plug-in for PIL is loaded when a picture needs it.
    """
    headed = _Headed(file)
    try:
        image = Image.open(io.BufferedReader(headed))
        headed.left = math.inf
    except _Problem:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(f"more than {Image.MAX_IMAGE_PIXELS} pixels") from error
    except Image.UnidentifiedImageError:
        if not is_retry and (kind := _find_kind(file)) is not None and _load_plugin(*_PLUGINS[kind][:2]):
            return _decode(file, quotes, is_retry=True)
        raise _no_image(file, quotes) from None
    except Exception as error:  # decoders raise whatever they like
        raise _broken(error, quotes) from (error if quotes else None)
    limit = Image.MAX_IMAGE_PIXELS
    # PIL itself only warns up to twice its limit, which its error tells
    if limit is not None and image.width * image.height > limit:
        raise _too_large(f"{image.width}x{image.height} pixels, the limit is {limit}")
    return _decode_pil(image, quotes)


def _decode_pil(image: Image.Image, quotes: bool = True) -> Image.Image:
    try:
        image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(f"more than {Image.MAX_IMAGE_PIXELS} pixels") from error
    except Exception as error:  # decoders raise whatever they like
        raise _broken(error, quotes) from (error if quotes else None)
    if image.width == 0 or image.height == 0:
        raise _Problem(f"the image has no pixels ({image.width}x{image.height}). Give one of at least 1x1")
    return image


def _find_kind(file: BinaryIO) -> str | None:
    """Return the format of a file, if it is one that PIL reads with a plug-in."""
    file.seek(0)
    head = file.read(64)
    file.seek(0)
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL"
    if head[4:8] != b"ftyp":
        return None
    brands = head[8 : int.from_bytes(head[:4], "big")]
    if b"avif" in brands or b"avis" in brands:
        return "AVIF"
    return "HEIC" if any(brand in brands for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")) else None


@functools.cache
def _load_plugin(module: str, function: str | None) -> bool:
    """Load a plug-in for PIL, and tell whether it is installed."""
    try:
        plugin = importlib.import_module(module)
    except ImportError:
        return False
    if function is not None:
        getattr(plugin, function)()
    return True


def _no_image(file: BinaryIO, quotes: bool) -> _Problem:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size == 0:
        return _Problem("the file is empty (0 bytes). Fetch or save it again")
    if (kind := _find_kind(file)) is not None and not _load_plugin(*_PLUGINS[kind][:2]):
        return _Problem(
            f"this is a picture in {kind}, which PIL reads with a plug-in: pip install {_PLUGINS[kind][2]}"
        )
    start = f", beginning with {file.read(12)!r}" if quotes else ""
    return _Problem(
        f"not an image that PIL can read ({size} bytes{start}). Give an image file, or install the PIL plug-in for "
        "its format"
    )


def _broken(error: Exception, quotes: bool) -> _Problem:
    details = f"{type(error).__name__}: {error}" if quotes else type(error).__name__
    return _Problem(f"the image is broken or truncated ({details}). Fetch or save it again")


def _too_large(reason: str) -> _Problem:
    return _Problem(
        f"the image is too large and could be a decompression bomb ({reason}). Scale it down or, if you trust the "
        "file, raise PIL.Image.MAX_IMAGE_PIXELS (--max-pixels of `blip2-hf caption`)"
    )


def _from_array(array: np.ndarray, channels_last: bool) -> Image.Image:
    """Convert an array of shape (height, width[, channels]) or (channels, height, width) to L, LA, RGB or RGBA."""
    array = _to_uint8(_to_channels_last(array, channels_last))
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return Image.fromarray(np.ascontiguousarray(array))


def _to_channels_last(array: np.ndarray, channels_last: bool) -> np.ndarray:
    """Return the same values in the shape (height, width) or (height, width, channels), of 1 to 4 channels."""
    if array.ndim not in (2, 3):
        hint = ". Give the images of a batch as a list" if array.ndim == 4 else ""
        raise _Problem(
            f"an image has 2 or 3 dimensions, (height, width), (height, width, channels) or (channels, height, "
            f"width), this array has {array.ndim}{hint}"
        )
    if array.size == 0:
        raise _Problem("the image has no pixels. Give one of at least 1x1")
    if array.ndim == 2:
        return array
    last, first = array.shape[-1] <= 4, array.shape[0] <= 4
    if not last and not first:
        raise _Problem("neither the first nor the last dimension is a channel one. An image has 1 to 4 channels")
    if not last or (first and not channels_last):
        array = array.transpose(1, 2, 0)
    return array


def _to_uint8(array: np.ndarray) -> np.ndarray:
    """Scale values of any numeric type to 8 bits by what the type says: full scale for unsigned, [0, 1] for floats."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if np.issubdtype(array.dtype, np.uint16):
        return _scale_16_bit(array)
    low, high = array.min(), array.max()
    if np.issubdtype(array.dtype, np.floating):
        # not (a <= b) is true of NaN too
        if not (low >= -_FLOAT_SLACK and high <= 1 + _FLOAT_SLACK):
            raise _Problem(
                f"float values must lie in [0, 1], these span {low:g} to {high:g}. Divide by 255, or undo the "
                "normalization, or convert to uint8"
            )
        return (array.clip(0, 1) * 255).round().astype(np.uint8)
    if np.issubdtype(array.dtype, np.integer):
        if low < 0 or high > 255:
            raise _Problem(
                f"{array.dtype} values must lie in 0..255, these span {low} to {high}. Convert to uint8, or to uint16 "
                "if they are 16-bit"
            )
        return array.astype(np.uint8)
    raise _Problem(f"values of type {array.dtype} are no image. Convert to uint8")


def _scale_16_bit(array: np.ndarray) -> np.ndarray:
    # 65535 / 255 = 257
    return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded PIL image of any mode to upright RGB, on white if it is transparent."""
    # older PIL opens 16-bit PNG as mode I, and PPM still is
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    with contextlib.suppress(Exception):  # EXIF data that cannot be parsed says nothing about rotation
        image = ImageOps.exif_transpose(image)
    if is_16_bit:
        # convert("RGB") would clip at 255
        return Image.fromarray(_scale_16_bit(np.asarray(image))).convert("RGB")
    if image.mode in ("I", "F"):
        return _wide_to_l(image).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    try:
        if "transparency" not in image.info and image.mode not in ("RGBA", "RGBa", "LA", "PA"):
            return image.convert("RGB")
        image = image.convert("RGBA")
    except ValueError as error:
        raise _Problem(f"mode {image.mode} cannot be converted to RGB ({error}). Convert it first") from error
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _wide_to_l(image: Image.Image) -> Image.Image:
    """Convert modes I (32-bit integers) and F (floats), which hold 8-bit, 16-bit or [0, 1] values, to 8-bit grey."""
    array = np.asarray(image)
    low, high = array.min(), array.max()
    if image.mode == "F" and low >= -_FLOAT_SLACK and high <= 1 + _FLOAT_SLACK:
        return Image.fromarray(_to_uint8(array))
    if low >= 0 and high <= 255:
        return Image.fromarray(array.round().astype(np.uint8))
    if low >= 0 and high <= 65535:
        return Image.fromarray(_scale_16_bit(array.round()))
    raise _Problem(f"values span {low:g} to {high:g}, which is neither [0, 1], 8-bit nor 16-bit. Convert to 8 bits")
