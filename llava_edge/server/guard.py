"""Access checks, made before anything else looks at a request.

Web pages in a browser on this machine can send requests to the loopback address too, so the address alone is no
protection: checking Host stops DNS rebinding, Origin and Sec-Fetch-Site stop other pages, the content type stops forms
of browsers that send neither. Other programs may leave the content type out, as `curl -d` and some Ollama clients do.
Only pages of origins that were allowed by name get CORS headers; they may use the API, but not the log or the chat
page.
"""

from __future__ import annotations

import base64
import hmac
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from llava_edge.errors import UsageError
from llava_edge.server.problems import Problem

Headers = list[tuple[bytes, bytes]]
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_CROSS_ORIGIN = "Pages of other origins may not use this server. Start it with --allow-origin to allow one."
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}  # browsers omit these


@dataclass(frozen=True)
class Guard:
    """hosts: accepted Host headers. key: the API key; empty if none is needed.

    allowed_names: host names that were allowed; a TLS proxy may serve them, so their origin may be https.
    allowed_origins: origins whose pages may use the API.
    """

    hosts: frozenset[str]
    key: str = ""
    allowed_names: tuple[str, ...] = ()
    allowed_origins: frozenset[str] = frozenset()

    def check(self, method: str, target: bytes, headers: Headers) -> None:
        """Raise `Problem` (400, 401, 403, 415) unless the request is allowed."""
        self._check_host(target, headers)
        if not self._allowed_origin(target, headers):
            self._check_origin(method, target, headers)
        if self.key and target != b"/health" and not self.is_preflight(method, target, headers):
            self._check_key(headers)
        if method in ("POST", "PUT"):
            _check_content_type(headers)

    def is_preflight(self, method: str, target: bytes, headers: Headers) -> bool:
        """Whether this is a CORS preflight for an allowed page; browsers send those without the key."""
        preflight = method == "OPTIONS" and bool(_values(headers, b"access-control-request-method"))
        return preflight and bool(self._allowed_origin(target, headers))

    def cors_headers(self, method: str, target: bytes, headers: Headers) -> Headers:
        """The CORS headers of any response, refusals included, so that a page can read the reason."""
        origin = self._allowed_origin(target, headers)
        cors = [(b"vary", b"Origin")] if self.allowed_origins else []
        if origin:
            cors.append((b"access-control-allow-origin", origin.encode("ascii")))
        if self.is_preflight(method, target, headers):
            requested = ", ".join(_values(headers, b"access-control-request-headers")).encode("latin-1")
            cors += [(b"access-control-allow-methods", b"GET, POST"), (b"access-control-allow-headers", requested)]
            cors.append((b"access-control-max-age", b"600"))
        return cors

    def _allowed_origin(self, target: bytes, headers: Headers) -> str:
        """The allowed origin of a request for the API; empty if there is none."""
        path, origins = target.partition(b"?")[0], _values(headers, b"origin")
        is_api = path.startswith((b"/v1/", b"/api/")) or path == b"/health"
        return origins[0] if is_api and len(origins) == 1 and origins[0] in self.allowed_origins else ""

    def _check_host(self, target: bytes, headers: Headers) -> None:
        values = _values(headers, b"host")
        if len(values) != 1 or values[0].lower() not in self.hosts:
            raise Problem(403, "This server does not accept that Host header. Start it with --allow-host to add one.")
        if not target.startswith(b"/"):
            raise Problem(400, "The request's target must be a path.")

    def _check_origin(self, method: str, target: bytes, headers: Headers) -> None:
        origins = {f"http://{host}" for host in self.hosts} | {f"https://{name.lower()}" for name in self.allowed_names}
        if any(value.lower() not in origins for value in _values(headers, b"origin")):
            raise Problem(403, _CROSS_ORIGIN)
        is_link = method == "GET" and target == b"/" and _values(headers, b"sec-fetch-mode") == ["navigate"]
        if any(site not in ("same-origin", "none") for site in _values(headers, b"sec-fetch-site")) and not is_link:
            raise Problem(403, _CROSS_ORIGIN)

    def _check_key(self, headers: Headers) -> None:
        """`Bearer KEY`, or `Basic` with any user name and the key as password, which browsers can prompt for."""
        values = _values(headers, b"authorization")
        scheme, _, key = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        if scheme.lower() == "basic":
            try:
                key = base64.b64decode(key, validate=True).decode("utf-8").partition(":")[2]
            except ValueError:
                key = ""
        scheme_known = scheme.lower() in ("bearer", "basic")
        if not hmac.compare_digest(key.encode("utf-8", "replace"), self.key.encode()) or not scheme_known:
            raise Problem(401, "A valid API key is required.", code="invalid_api_key")


def accepted_hosts(address: str, port: int, allowed_names: Iterable[str]) -> frozenset[str]:
    """The Host headers to accept: loopback names, the address and the allowed names, each with the port."""
    own_address = [] if ipaddress.ip_address(address).is_unspecified else [url_host(address)]
    names = [*_LOOPBACK_NAMES, *own_address, *allowed_names]
    if invalid := [name for name in names if not name or any(character in name for character in "/*@ ,")]:
        raise UsageError(
            f"--allow-host {invalid[0]!r} is not a host name; expected one like 'box.local' or 'box.local:8080'."
        )
    hosts = {name.lower() for name in names} if port == 80 else {name.lower() for name in allowed_names}
    return frozenset(hosts | {f"{name.lower()}:{port}" for name in names})


def parse_origins(names: Iterable[str]) -> frozenset[str]:
    """Origins as browsers write them. `*` and `null` are refused: either would allow every page."""
    found = set()
    for name in names:
        origin = name.lower()
        if not _ORIGIN.fullmatch(origin):
            raise UsageError(
                f"--allow-origin {name!r} is not an origin; expected a scheme, a host and optionally a port, like "
                "'http://localhost:3000' or 'tauri://localhost'."
            )
        found.add(origin.removesuffix(_DEFAULT_PORTS.get(origin.partition(":")[0], "")))
    return frozenset(found)


def url_host(address: str) -> str:
    """An address as URLs write it: IPv6 in brackets."""
    return f"[{address}]" if ":" in address else address


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach the address. Raises `UsageError` if it is not an IP address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        raise UsageError(f"--host {address!r} is not an IP address; use 127.0.0.1 for this machine only.") from None


def _check_content_type(headers: Headers) -> None:
    types = [value.partition(";")[0].strip().lower() for value in _values(headers, b"content-type")]
    if types != ["application/json"] and _from_browser(headers):
        raise Problem(415, "The content type must be application/json.")
    if any(value.lower() != "identity" for value in _values(headers, b"content-encoding")):
        raise Problem(415, "The body must not be compressed.")


def _from_browser(headers: Headers) -> bool:
    """Whether a page may have sent it. All browsers call themselves Mozilla, and forms cannot change that."""
    marks = (b"origin", b"referer", b"sec-fetch-site", b"sec-fetch-mode")
    agents = " ".join(_values(headers, b"user-agent"))
    return "mozilla" in agents.lower() or any(_values(headers, mark) for mark in marks)


def _values(headers: Headers, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in headers if key == name]
