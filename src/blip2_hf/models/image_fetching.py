"""Files by URL within limits of time and of bytes and, for a URL that no user typed, from public addresses alone."""

import contextlib
import io
import ipaddress
import math
import queue
import socket
import threading
import time
import zlib
from collections.abc import Collection, Iterable
from http.client import responses
from typing import Any


MAX_BYTES = 256 * 2**20  # of one file after decompression; PIL's own limit of pixels is as many bytes of RGB

_MAX_REDIRECTS = 10
_SLICE = 0.2  # seconds that Ctrl-C may wait: Windows passes it on between two waits
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # addresses of IPv6 that stand for one of IPv4
# Other addresses of IPv6 that stand for one of IPv4, and site-local ones: out of use, and global to some Pythons
_OUT_OF_USE = [ipaddress.ip_network(network) for network in ("2002::/16", "::/96", "fec0::/10")]
_USER_AGENT = "blip2-hf image loader"  # some hosts refuse the nameless default of an HTTP client


class FetchError(Exception):
    """Why a file was not fetched. The message quotes nothing that a server sent."""


def fetch(url: str, timeout: float | None, public_except: Collection[str] | None = None) -> bytes:
    """
    Fetch a file by HTTP or HTTPS. A thread of its own does it, so that neither the limit of time nor Ctrl-C waits for
    the network: a name that does not resolve, a server that sends a byte now and then, a body without end.

    Args:
        url (`str`):
            A URL that starts with `http://` or `https://`.
        timeout (`float`, *optional*):
            Seconds that the whole of it may take, redirects included. `None` waits for ever.
        public_except (`Collection[str]`, *optional*):
            If given, only hosts with public addresses are connected to, and these hosts, whatever their address is.
            Each redirect is checked, and the address that is connected to in the end. Proxies of the environment are
            not used, because a proxy would choose the address.

    Returns:
        `bytes`: the content, decompressed.

    Raises:
        FetchError: if it can't be fetched, takes longer than `timeout`, has more than `MAX_BYTES` bytes, or has an
            address that is not allowed.
    """
    download = _Download(_import_httpx(), url, timeout, public_except)
    try:
        threading.Thread(target=download.run, name="fetch", daemon=True).start()
        result = download.wait()
    finally:
        download.stop()
    if isinstance(result, BaseException):
        raise result
    return result


def read_at_most(file: io.IOBase) -> bytes:
    """
    Read an open file of unknown length from where it stands.

    Args:
        file (`io.IOBase`):
            A file that was opened to read bytes.

    Returns:
        `bytes`: all that is left of it.

    Raises:
        FetchError: if that is more than `MAX_BYTES` bytes.
    """
    data = bytearray()
    while chunk := file.read(2**20):  # type: ignore[attr-defined]
        data += chunk
        _check_length(data)
    return bytes(data)


class _Download:
    """A download, which another thread waits for and may stop."""

    def __init__(self, httpx: Any, url: str, timeout: float | None, public_except: Collection[str] | None):
        self.httpx = httpx
        self.url = url
        self.timeout = timeout
        self.public_except = public_except
        self.result: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()
        self._connections = contextlib.ExitStack()
        self._connection: socket.socket | None = None
        self._is_stopped = False
        self._host = ""

    def run(self):
        try:
            with self._connections:
                result = self._fetch()
        except BaseException as error:  # belongs to the thread that waits
            result = error
        self.result.put(result)

    def wait(self) -> bytes | BaseException:
        """Return what the thread has made, in time."""
        deadline = math.inf if self.timeout is None else time.monotonic() + self.timeout
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                return self.result.get(timeout=min(left, _SLICE))
        raise _late(self.timeout)

    def stop(self):
        """End the thread, whatever it waits for; only the resolution of a name is left to end by itself."""
        self._is_stopped = True
        if self._connection is not None:
            with contextlib.suppress(OSError):  # it has ended
                self._connection.shutdown(socket.SHUT_RDWR)

    def _fetch(self) -> bytes:
        httpx = self.httpx
        try:
            # With a transport of its own the client takes no proxy from the environment
            transport = None if self.public_except is None else httpx.HTTPTransport()
            headers = {"user-agent": _USER_AGENT, "accept-encoding": "identity"}
            with httpx.Client(transport=transport, timeout=self.timeout, headers=headers) as client:
                return self._follow(client)
        except (FetchError, MemoryError):
            raise
        except httpx.TimeoutException:
            raise _late(self.timeout) from None
        except (httpx.ConnectError, httpx.InvalidURL, UnicodeError) as error:
            raise FetchError(f"the download failed ({error}). Check the URL and the network") from None
        except Exception as error:  # the text of others may quote what a server sent
            name = type(error).__name__
            raise FetchError(f"the download failed ({name}). Check the URL and the network") from None

    def _follow(self, client: Any) -> bytes:
        # The client itself would read the body of a redirect, of any length
        request = client.build_request("GET", self.url, extensions={"trace": self._trace})
        for _ in range(_MAX_REDIRECTS + 1):
            with contextlib.closing(client.send(request, stream=True)) as response:
                if response.next_request is None:
                    return self._read(response)
                request = response.next_request
        raise FetchError(f"there are more than {_MAX_REDIRECTS} redirects. Give the URL of the file itself")

    def _read(self, response: Any) -> bytes:
        if not response.is_success:
            phrase = responses.get(response.status_code, "")
            raise FetchError(f"the server answered {response.status_code} {phrase}".rstrip() + ". Check the URL")
        data = bytearray()
        for chunk in response.iter_raw():
            data += chunk
            _check_length(data)
            if self._is_stopped:  # what had been received can still be read
                raise _late(self.timeout)
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        return bytes(data) if encoding == "identity" else _decompress(data, encoding)

    def _trace(self, event: str, info: dict[str, Any]):
        """Check where a connection leads before it is made and before anything is sent, and keep it for `stop`."""
        if event.endswith("connect_tcp.started"):
            self._host = info["host"]
            self._check(_resolve(info["host"], info["port"]))
        elif event.endswith("connect_tcp.complete"):
            stream = info["return_value"]
            try:
                self._check([stream.get_extra_info("server_addr")[0]])
                # TLS would take the socket itself over
                self._connection = self._connections.enter_context(stream.get_extra_info("socket").dup())
                if self._is_stopped:
                    raise _late(self.timeout)
            except BaseException:
                stream.close()
                raise

    def _check(self, addresses: Iterable[str]):
        """Refuse an address that is not public, unless its host was named."""
        if self.public_except is None or _plain_host(self._host) in map(_plain_host, self.public_except):
            return
        for address in addresses:
            if not _is_public(address):
                raise FetchError(
                    f"{self._host} has the address {address}, which is not public but that of this machine or of a "
                    f"private network. If it is to be fetched from, name the host: allow_urls=[{self._host!r}] "
                    f"(--allow-urls {self._host})"
                )


def _import_httpx() -> Any:
    # transformers downloads with the same client: httpx, from huggingface_hub 2 on httpx2
    try:
        from huggingface_hub.utils import httpx
    except ImportError:  # the first versions do not pass its name on
        import httpx  # type: ignore
    return httpx


def _resolve(host: str, port: int) -> list[str]:
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except OSError:  # to connect gives the same error
        return []


def _plain_host(host: str) -> str:
    return host.lower().strip("[]").rstrip(".")


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.version == 6 and ip in _NAT64:
        ip = ipaddress.IPv4Address(int(ip) % 2**32)
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _OUT_OF_USE)


def _decompress(data: bytearray, encoding: str) -> bytes:
    """Decompress what a server compressed unasked."""
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise FetchError("the server compresses the file in a way that was not asked for. Download the file first")
    decompressor = zlib.decompressobj(wbits=47)  # gzip or zlib
    try:
        content = decompressor.decompress(data, MAX_BYTES + 1)
    except zlib.error:
        raise FetchError("the compressed file is broken. Check the URL") from None
    _check_length(content)
    if not decompressor.eof:
        raise FetchError("the compressed file is cut off. Check the URL or try again")
    return content


def _check_length(data: bytes | bytearray):
    if len(data) > MAX_BYTES:
        raise FetchError(
            f"there are more than {MAX_BYTES:,} bytes, too many for a picture. Scale it down or, if you trust the "
            "source, raise blip2_hf.models.image_fetching.MAX_BYTES"
        )


def _late(timeout: float | None) -> FetchError:
    return FetchError(f"not fetched within {timeout} seconds. Raise the timeout or try again")
