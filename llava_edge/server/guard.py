"""Who may talk to the server: checked for every request before anything else looks at it.

A browser on this machine runs pages of strangers. They can send requests to the loopback address too, so an address
alone is no protection: the Host header stops names that were pointed here (DNS rebinding), the Origin and
Sec-Fetch-Site headers stop other pages, the content type stops forms. No answer has a CORS header but those to pages of
origins that were allowed by name, which may use the API alone: neither the log nor the chat page.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from llava_edge.errors import UsageError
from llava_edge.server.problems import Problem

Headers = list[tuple[bytes, bytes]]
_NAMES = ("localhost", "127.0.0.1", "[::1]")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_FOREIGN = "Pages of other origins may not use this server. Start it with --allow-origin to let one use the API."
_PORTS = {"http": ":80", "https": ":443"}  # which browsers leave out


@dataclass(frozen=True)
class Guard:
    """hosts: what the Host header may be. key: what clients must know; empty for everyone on this machine.

    allowed: names that were allowed; a proxy with TLS may be in front of them, so that their pages come by https.
    pages: origins whose pages may use the API.
    """

    hosts: frozenset[str]
    key: str = ""
    allowed: tuple[str, ...] = ()
    pages: frozenset[str] = frozenset()

    def check(self, method: str, target: bytes, headers: Headers) -> None:
        """Raises `Problem` (400, 401, 403, 415) unless the request may go on."""
        self._check_host(target, headers)
        if not self._page(target, headers):
            self._check_origin(method, target, headers)
        if self.key and target != b"/health" and not self.is_preflight(method, target, headers):
            self._check_key(headers)
        if method in ("POST", "PUT"):
            _check_content(headers)

    def is_preflight(self, method: str, target: bytes, headers: Headers) -> bool:
        """Whether a browser asks, for an allowed page and always without a key, what it may send."""
        asks = method == "OPTIONS" and bool(_all(headers, b"access-control-request-method"))
        return asks and bool(self._page(target, headers))

    def cors_headers(self, method: str, target: bytes, headers: Headers) -> Headers:
        """The CORS headers of an answer, whatever it is: a page shall be able to read why it was refused."""
        page = self._page(target, headers)
        shared = [(b"vary", b"Origin")] if self.pages else []
        if page:
            shared.append((b"access-control-allow-origin", page.encode("ascii")))
        if self.is_preflight(method, target, headers):
            wanted = ", ".join(_all(headers, b"access-control-request-headers")).encode("latin-1")
            shared += [(b"access-control-allow-methods", b"GET, POST"), (b"access-control-allow-headers", wanted)]
            shared.append((b"access-control-max-age", b"600"))
        return shared

    def _page(self, target: bytes, headers: Headers) -> str:
        """The allowed origin whose page asks for something that it may use; empty if there is none."""
        path, origins = target.partition(b"?")[0], _all(headers, b"origin")
        is_api = path.startswith(b"/v1/") or path == b"/health"
        return origins[0] if is_api and len(origins) == 1 and origins[0] in self.pages else ""

    def _check_host(self, target: bytes, headers: Headers) -> None:
        values = _all(headers, b"host")
        if len(values) != 1 or values[0].lower() not in self.hosts:
            raise Problem(403, "This server does not answer to that Host. Start it with --allow-host to add one.")
        if not target.startswith(b"/"):
            raise Problem(400, "The request's target must be a path.")

    def _check_origin(self, method: str, target: bytes, headers: Headers) -> None:
        origins = {f"http://{host}" for host in self.hosts} | {f"https://{name.lower()}" for name in self.allowed}
        if any(value.lower() not in origins for value in _all(headers, b"origin")):
            raise Problem(403, _FOREIGN)
        follows_a_link = method == "GET" and target == b"/" and _all(headers, b"sec-fetch-mode") == ["navigate"]
        if any(site not in ("same-origin", "none") for site in _all(headers, b"sec-fetch-site")) and not follows_a_link:
            raise Problem(403, _FOREIGN)

    def _check_key(self, headers: Headers) -> None:
        """`Bearer KEY`, or as browsers ask for it: `Basic`, any name and the key as password."""
        values = _all(headers, b"authorization")
        scheme, _, given = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode("utf-8").partition(":")[2]
            except (binascii.Error, ValueError):
                given = ""
        known = scheme.lower() in ("bearer", "basic")
        if not hmac.compare_digest(given.encode("utf-8", "replace"), self.key.encode()) or not known:
            raise Problem(401, "A valid API key is needed.", code="invalid_api_key")


def hosts(address: str, port: int, allowed: Iterable[str]) -> frozenset[str]:
    """The Host headers to answer to: this machine's own names, the address, what was allowed; each with its port."""
    names = [*_NAMES, *([] if ipaddress.ip_address(address).is_unspecified else [bracketed(address)]), *allowed]
    if wrong := [name for name in names if not name or any(mark in name for mark in "/*@ ,")]:
        raise UsageError(
            f"--allow-host {wrong[0]!r} is no host name; one like 'box.local' or 'box.local:8080' was expected."
        )
    found = {name.lower() for name in names} if port == 80 else {name.lower() for name in allowed}
    return frozenset(found | {f"{name.lower()}:{port}" for name in names})


def origins(named: Iterable[str]) -> frozenset[str]:
    """As browsers write them. Neither `*` nor `null` is one: both would be pages of anybody."""
    found = set()
    for name in named:
        origin = name.lower()
        if not _ORIGIN.fullmatch(origin):
            raise UsageError(
                f"--allow-origin {name!r} is no origin; a scheme, a host and perhaps a port were expected, like "
                "'http://localhost:3000' or 'tauri://localhost'."
            )
        found.add(origin.removesuffix(_PORTS.get(origin.partition(":")[0], "")))
    return frozenset(found)


def bracketed(address: str) -> str:
    """An address as it stands before a port."""
    return f"[{address}]" if ":" in address else address


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach it. Raises `UsageError` if it is no address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        raise UsageError(f"--host {address!r} is not an IP address; 127.0.0.1 is this machine only.") from None


def _check_content(headers: Headers) -> None:
    kinds = [value.partition(";")[0].strip().lower() for value in _all(headers, b"content-type")]
    if kinds != ["application/json"]:
        raise Problem(415, "The content type must be application/json.")
    if any(value.lower() != "identity" for value in _all(headers, b"content-encoding")):
        raise Problem(415, "The body must not be compressed.")


def _all(headers: Headers, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in headers if key == name]
