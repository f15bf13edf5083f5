"""Fetching ends in time, reads no more than it may, tells nothing of what it read, and goes where it may."""

import os
import queue
import signal
import threading
import time

import numpy as np
import pytest
from picture_server import PICTURE, SECRET, picture_server

from blip2_hf.models import image_fetching
from blip2_hf.models.image_loading import ImageLoadError, load_image


@pytest.fixture
def server():
    with picture_server() as server:
        yield server
    assert_no_thread_is_left()


def assert_no_thread_is_left():
    deadline = time.monotonic() + 2
    while any(thread.name == "fetch" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a thread still fetches"
        time.sleep(0.01)


def same(image):
    np.testing.assert_array_equal(np.asarray(image), np.asarray(PICTURE))


# --- bytes ---


@pytest.mark.parametrize("path", ["picture.png", "gzip", "deflate", "hop", "to-address", "endless-hop"])
def test_a_picture_is_fetched(server, path):
    same(load_image(f"{server.url}/{path}"))


def test_compression_is_not_asked_for(server):
    load_image(f"{server.url}/picture.png")
    assert b"accept-encoding: identity" in server.requests[0].lower()


@pytest.mark.parametrize("path", ["bomb", "large", "endless"])
def test_no_more_bytes_are_read_than_a_picture_may_have(server, path, monkeypatch):
    monkeypatch.setattr(image_fetching, "MAX_BYTES", 2**20)
    with pytest.raises(ImageLoadError, match=rf"{path}'\): there are more than 1,048,576 bytes.*MAX_BYTES"):
        load_image(f"{server.url}/{path}", "row 3")
    if path == "endless":
        assert server.hung_up.wait(2)


def test_a_picture_may_have_as_many_bytes_as_the_limit(server, monkeypatch):
    for path in ("large", "bomb"):
        monkeypatch.setattr(image_fetching, "MAX_BYTES", 2**24)
        assert image_fetching.fetch(f"{server.url}/{path}", 10.0) == bytes(2**24)
        monkeypatch.setattr(image_fetching, "MAX_BYTES", 2**24 - 1)
        with pytest.raises(image_fetching.FetchError, match="more than 16,777,215 bytes"):
            image_fetching.fetch(f"{server.url}/{path}", 10.0)


def test_what_is_compressed_twice_is_refused(server):
    with pytest.raises(ImageLoadError, match="compresses the file in a way that was not asked for"):
        load_image(f"{server.url}/bomb-in-bomb")


@pytest.mark.parametrize("path", ["cut-gzip", "cut-deflate", "empty-gzip"])
def test_what_is_compressed_and_cut_off_is_refused(server, path):
    with pytest.raises(image_fetching.FetchError, match="the compressed file is cut off"):
        image_fetching.fetch(f"{server.url}/{path}", 10.0)


# --- what messages tell ---


@pytest.mark.parametrize(
    "path, words",
    [
        ("text", "not an image that PIL can read"),
        ("empty", "the file is empty"),
        ("broken.png", "broken or truncated"),
        ("broken.pgm", "broken or truncated|not an image"),
        ("no-gzip", "the compressed file is broken"),
        ("missing", "the server answered 404 Not Found"),
        ("unknown-status", r"the server answered 599\."),
        ("nowhere", "the server answered 302 Found"),
        ("banner", "the download failed"),
        ("bad-header", "the download failed"),
        ("bad-length", "the download failed"),
        ("to-file", "the download failed"),
        ("loop", "more than 10 redirects"),
    ],
)
def test_no_message_quotes_what_a_server_sent(server, path, words):
    with pytest.raises(ImageLoadError, match=rf"row 3 \('{server.url}/{path}'\).*({words})") as error:
        load_image(f"{server.url}/{path}", "row 3")
    seen, cause = [str(error.value)], error.value.__cause__
    while cause is not None:
        seen.append(repr(cause))
        cause = cause.__cause__
    for start in range(len(SECRET) - 3):
        part = SECRET[start : start + 4].decode()
        assert not any(part in text for text in seen)


def test_a_long_url_is_cut(server):
    with pytest.raises(ImageLoadError, match="404") as error:
        load_image(f"{server.url}/missing?{'x' * 10_000}/missing")
    assert len(str(error.value)) < 1200


# --- time ---


@pytest.mark.parametrize("path", ["silent", "drip", "drip-head", "endless"])
def test_the_time_of_the_whole_is_limited(server, path, monkeypatch):
    monkeypatch.setattr(image_fetching, "_check_length", lambda data: data.clear())  # no limit, and no memory for it
    start = time.monotonic()
    with pytest.raises(ImageLoadError, match=f"{path}'.*not fetched within 0.5 seconds. Raise the timeout"):
        load_image(f"{server.url}/{path}", timeout=0.5)
    assert 0.4 < time.monotonic() - start < 2
    assert server.hung_up.wait(2)  # the thread that fetched has ended too


def test_a_name_that_does_not_resolve_in_time(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: release.wait(5) and [])
    start = time.monotonic()
    with pytest.raises(ImageLoadError, match="not fetched within 0.3 seconds"):
        load_image("http://pictures.invalid/x.png", timeout=0.3)
    assert time.monotonic() - start < 2
    release.set()
    assert_no_thread_is_left()


@pytest.mark.parametrize("timeout", [None, 30.0])
@pytest.mark.parametrize("path", ["silent", "drip", "drip-head"])
def test_the_first_interrupt_ends_it(server, path, timeout):
    interrupt = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    start = time.monotonic()
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        load_image(f"{server.url}/{path}", timeout=timeout)
    assert time.monotonic() - start < 2
    assert server.hung_up.wait(2)


def test_waiting_is_short_at_a_time(server, monkeypatch):
    """Windows passes an interrupt on between two waits."""
    waits = []

    class Queue(queue.SimpleQueue):
        def get(self, block=True, timeout=None):
            waits.append(timeout)
            return super().get(block, timeout)

    monkeypatch.setattr(image_fetching.queue, "SimpleQueue", Queue)
    with pytest.raises(ImageLoadError, match="not fetched within 0.5 seconds"):
        load_image(f"{server.url}/silent", timeout=0.5)
    assert len(waits) >= 3 and max(waits) <= 0.2


# --- addresses ---


def local(server):
    return server.url.replace("127.0.0.1", "localhost")


def test_what_a_user_types_may_lead_anywhere(server):
    same(load_image(f"{server.url}/picture.png"))
    same(load_image(f"{local(server)}/to-address"))


def test_no_url_is_fetched_unasked(server):
    with pytest.raises(ImageLoadError, match=rf"row 3 \('{server.url}/picture.png'\).*allow_urls=True \(--allow-urls"):
        load_image(f"{server.url}/picture.png", "row 3", allow_urls=False)
    assert server.connections == 0


@pytest.mark.parametrize("allow_urls", [True, [], ["example.com", "localhost"]])
def test_an_address_of_this_machine_is_refused_unless_its_host_is_named(server, allow_urls):
    words = r"127\.0\.0\.1 has the address 127\.0\.0\.1, which is not public.*allow_urls=\['127\.0\.0\.1'\]"
    with pytest.raises(ImageLoadError, match=words):
        load_image(f"{server.url}/picture.png", allow_urls=allow_urls)
    assert server.connections == 0  # it was not even connected to
    same(load_image(f"{server.url}/picture.png", allow_urls=["127.0.0.1"]))
    same(load_image(f"{server.url}/picture.png", allow_urls="127.0.0.1"))
    same(load_image(f"{local(server)}/picture.png", allow_urls=["LocalHost."]))


def test_a_redirect_is_checked_too(server):
    with pytest.raises(ImageLoadError, match=r"127\.0\.0\.1 has the address 127\.0\.0\.1, which is not public"):
        load_image(f"{local(server)}/to-address", allow_urls=["localhost"])
    assert server.connections == 1
    same(load_image(f"{local(server)}/to-address", allow_urls=["localhost", "127.0.0.1"]))


def test_a_name_that_resolves_otherwise_the_second_time(server, monkeypatch):
    """The address that is connected to is looked at, and nothing is sent to it."""
    monkeypatch.setattr(image_fetching, "_resolve", lambda host, port: ["93.184.215.14"])
    with pytest.raises(ImageLoadError, match=r"localhost has the address 127\.0\.0\.1, which is not public"):
        load_image(f"{local(server)}/picture.png", allow_urls=True)
    deadline = time.monotonic() + 2
    while not server.requests and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.requests == [b""]


@pytest.mark.parametrize(
    "address, is_public",
    [
        ("93.184.215.14", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("::ffff:93.184.215.14", True),
        ("64:ff9b::5db8:d70e", True),
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("ff02::1", False),
        ("2002:7f00:1::", False),
        ("::7f00:1", False),
        ("fec0::1", False),
    ],
)
def test_which_addresses_are_public(address, is_public):
    assert image_fetching._is_public(address) is is_public


@pytest.mark.parametrize("spelling", ["127.1", "2130706433", "0x7f000001", "[::ffff:127.0.0.1]", "0"])
def test_other_spellings_of_an_address(server, spelling):
    url = server.url.replace("127.0.0.1", spelling)
    with pytest.raises(ImageLoadError, match="which is not public|the download failed"):
        load_image(f"{url}/picture.png", allow_urls=True)
    assert server.requests == []


def test_a_proxy_is_taken_only_for_what_a_user_types(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", server.url)
    monkeypatch.setenv("NO_PROXY", "")
    same(load_image("http://pictures.invalid/picture.png"))
    assert server.requests[0].startswith(b"GET http://pictures.invalid/picture.png")
    with pytest.raises(ImageLoadError, match="the download failed"):
        load_image("http://pictures.invalid/picture.png", allow_urls=True)
    assert server.connections == 1
