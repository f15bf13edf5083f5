"""A server on this machine that answers with a picture, and in every way that a server should not."""

import contextlib
import gzip
import io
import itertools
import socketserver
import threading
import time
import zlib

import pytest
from PIL import Image


SECRET = b"the-secret"  # what no message may tell
PICTURE = Image.new("RGB", (5, 4), (10, 20, 30))


class PictureServer(socketserver.ThreadingTCPServer):
    """Says what it was sent (`requests`), how many connections were made, and when a client hung up on a stream."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.connections = 0
        self.requests: list[bytes] = []
        self.is_closed = False
        self.hung_up = threading.Event()


@contextlib.contextmanager
def picture_server():
    """Run a server, without a proxy in front of it."""
    with pytest.MonkeyPatch.context() as patch, PictureServer() as server:
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.is_closed = True
        server.shutdown()


def picture_bytes() -> bytes:
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    return buffer.getvalue()


class _Handler(socketserver.BaseRequestHandler):
    def handle(self):
        self.server.connections += 1
        request = self.request.recv(2**16)
        self.server.requests.append(request)
        if not request:
            return
        path = request.split(b" ")[1].decode().rpartition("/")[2]
        try:
            for piece in _answer(path, self.server.url):
                if self.server.is_closed:
                    return
                self.request.sendall(piece)
            if path == "silent":
                self.request.recv(1)  # until the client hangs up
                self.server.hung_up.set()
        except OSError:
            self.server.hung_up.set()


def _answer(path: str, url: str):
    picture, zeros = picture_bytes(), bytes(2**24)
    answers = {
        "picture.png": lambda: [_head(), picture],
        "gzip": lambda: [_head(b"Content-Encoding: gzip"), gzip.compress(picture)],
        "deflate": lambda: [_head(b"Content-Encoding: Deflate"), zlib.compress(picture)],
        "cut-gzip": lambda: [_head(b"Content-Encoding: gzip"), gzip.compress(picture)[:-1]],
        "cut-deflate": lambda: [_head(b"Content-Encoding: deflate"), zlib.compress(picture)[:-9]],
        "empty-gzip": lambda: [_head(b"Content-Encoding: gzip")],
        "bomb": lambda: [_head(b"Content-Encoding: gzip"), gzip.compress(zeros)],
        "bomb-in-bomb": lambda: [_head(b"Content-Encoding: gzip, gzip"), gzip.compress(gzip.compress(zeros))],
        "no-gzip": lambda: [_head(b"Content-Encoding: gzip"), SECRET],
        "large": lambda: [_head(), zeros],
        "endless": lambda: itertools.chain([_head(_CHUNKED)], _chunks()),
        "text": lambda: [_head(), SECRET],
        "empty": lambda: [_head()],
        "broken.png": lambda: [_head(), picture[:45] + SECRET],
        "broken.pgm": lambda: [_head(), b"P5 " + SECRET + b" 1 255\n\0"],
        "missing": lambda: [_head(status=b"404 " + SECRET), SECRET],
        "unknown-status": lambda: [_head(status=b"599 " + SECRET), SECRET],
        "banner": lambda: [SECRET + b"\r\n"],
        "bad-header": lambda: [b"HTTP/1.1 200 OK\r\n" + SECRET + b"\r\n\r\n"],
        "bad-length": lambda: [_head(b"Content-Length: " + SECRET)],
        "hop": lambda: [_redirect(b"/picture.png")],
        "endless-hop": lambda: itertools.chain([_redirect(b"/picture.png", _CHUNKED)], _chunks()),
        "loop": lambda: [_redirect(b"/loop")],
        "to-file": lambda: [_redirect(b"file:///etc/passwd")],
        "to-address": lambda: [_redirect(f"{url}/picture.png".encode())],
        "nowhere": lambda: [_head(status=b"302 Found")],
        "silent": list,
        "drip": lambda: itertools.chain([_head()], _drip()),
        "drip-head": lambda: itertools.chain([b"HTTP/1.1 200 OK\r\nX: "], _drip()),
    }
    return answers[path]()


_CHUNKED = b"Transfer-Encoding: chunked"


def _head(*lines: bytes, status: bytes = b"200 OK") -> bytes:
    return b"\r\n".join([b"HTTP/1.1 " + status, *lines, b"Connection: close", b"", b""])


def _redirect(location: bytes, *lines: bytes) -> bytes:
    return _head(b"Location: " + location, *lines, status=b"302 Found")


def _chunks():
    return itertools.repeat(b"10000\r\n" + bytes(2**16) + b"\r\n")


def _drip():
    while True:
        time.sleep(0.02)
        yield b"x"
