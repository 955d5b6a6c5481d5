"""What the server refuses by default: other hosts, other pages, addresses, files, and too much of anything."""

from __future__ import annotations

import base64
import contextlib
import gc
import http.client
import json
import os
import random
import shutil
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from processes import largest_file
from serving import Server, data_url, image_question, png, question, running

from llava_edge import cli
from llava_edge.errors import MissingError, UsageError
from llava_edge.server import data_url as data_urls
from llava_edge.server import guard, json_body, supervisor
from llava_edge.server.limits import Limits
from llava_edge.server.problems import Problem
from llava_edge.server.serve import read_key
from llava_edge.server.votes import MAX_BYTES, VoteLog
from llava_edge.templates import TEMPLATES

pytest.importorskip("starlette", reason="the extra [serve] is not installed")

KEY = "0123456789abcdef"

# Imported by every Python process of the server: writes each opening of a file, connection or program to a file.
SPY = """
import os, sys
_log = os.open(os.environ["SPY_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
def _spy(event, arguments):
    if event in ("open", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.listdir", "urllib.Request"):
        os.write(_log, (event + " " + repr(arguments[:2])[:300] + "\\n").encode())
sys.addaudithook(_spy)
"""


@pytest.fixture(scope="module")
def server(micro_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose processes note what they open, in `spy.log`."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "spy").mkdir()
    (folder / "spy" / "sitecustomize.py").write_text(SPY)
    log = folder / "spy.log"
    with running(micro_bundle, folder, environment={"SPY_LOG": str(log)}, first=(str(folder / "spy"),)) as started:
        yield started


@pytest.fixture(scope="module")
def locked(micro_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that needs a key."""
    folder = tmp_path_factory.mktemp("locked")
    with running(micro_bundle, folder, environment={"LLAVA_EDGE_API_KEY": KEY}) as started:
        yield started


def status_of(said: bytes) -> int:
    return int(said.split(b" ", 2)[1])


# Host and Origin.

GOOD_HOSTS = ["127.0.0.1:{port}", "localhost:{port}", "LocalHost:{port}", "[::1]:{port}"]
BAD_HOSTS = [
    *("evil.com", "evil.com:{port}", "localhost.evil.com:{port}", "127.0.0.1.evil.com:{port}", "evil-localhost:{port}"),
    *("2130706433:{port}", "0x7f000001:{port}", "0177.0.0.1:{port}", "127.1:{port}", "0.0.0.0:{port}", "[::]:{port}"),
    *("127.0.0.1", "localhost", "127.0.0.1:1", "127.0.0.1:0{port}", "localhost.:{port}", "box.local:{port}"),
    *("[::1%25lo]:{port}", "127.0.0.2:{port}", "user@localhost:{port}", "localhost:{port}@evil.com", ""),
    *("localhost:{port}, evil.com", "localhost\t:{port}", "[::ffff:127.0.0.1]:{port}", "xn--lcalhost-54a:{port}"),
]
GOOD_ORIGINS = ["http://127.0.0.1:{port}", "http://localhost:{port}", "http://[::1]:{port}"]
BAD_ORIGINS = [
    *("null", "http://evil.com", "https://127.0.0.1:{port}", "http://127.0.0.1", "http://127.0.0.1:1", "file://"),
    *("http://localhost.evil.com:{port}", "http://127.0.0.1:{port}.evil.com", "chrome-extension://abc", "*"),
    *("http://127.0.0.1:{port}/", "http://127.0.0.1:{port} http://evil.com"),
]
BAD_SITES = ["cross-site", "same-site", "", "same-origin, cross-site"]


@pytest.mark.parametrize("host", GOOD_HOSTS)
def test_own_hosts(host: str, server: Server) -> None:
    assert server.request("GET", "/health", headers={"Host": host.format(port=server.port)})[0] == 200


@pytest.mark.parametrize("host", BAD_HOSTS)
def test_other_hosts(host: str, server: Server) -> None:
    for path, body in (("/health", None), ("/", None), ("/v1/chat/completions", question())):
        given = {"Host": host.format(port=server.port)}
        status, headers, answer = server.request("POST" if body else "GET", path, body, given)
        assert status in (400, 403)
        assert "access-control-allow-origin" not in headers
        assert "error" in json.loads(answer)


@pytest.mark.parametrize("origin", GOOD_ORIGINS)
def test_own_origins(origin: str, server: Server) -> None:
    given = {"Origin": origin.format(port=server.port), "Sec-Fetch-Site": "same-origin"}
    assert server.chat(question(max_tokens=1), given)[0] == 200


@pytest.mark.parametrize("origin", BAD_ORIGINS)
@pytest.mark.parametrize("method", ["POST", "OPTIONS"])
def test_other_origins(method: str, origin: str, server: Server) -> None:
    given = {"Origin": origin.format(port=server.port), "Access-Control-Request-Method": "POST"}
    body = question() if method == "POST" else None
    status, headers, _ = server.request(method, "/v1/chat/completions", body, given)
    assert status == 403
    assert not [name for name in headers if name.startswith("access-control")]


@pytest.mark.parametrize("site", BAD_SITES)
def test_requests_that_browsers_mark_as_foreign(site: str, server: Server) -> None:
    assert server.request("GET", "/v1/models", headers={"Sec-Fetch-Site": site})[0] == 403
    assert server.request("GET", "/", headers={"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"})[0] == 403


def test_a_link_from_elsewhere_leads_to_the_page(server: Server) -> None:
    given = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert server.request("GET", "/", headers=given)[0] == 200
    assert server.request("GET", "/metrics", headers=given)[0] == 403


# Pages of origins that were allowed by name.

PAGES = ("http://localhost:3000", "tauri://localhost")


@pytest.fixture(scope="module")
def shared(micro_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that needs a key and lets the pages of two origins in."""
    allowed = [word for page in PAGES for word in ("--allow-origin", page)]
    folder = tmp_path_factory.mktemp("shared")
    with running(micro_bundle, folder, *allowed, environment={"LLAVA_EDGE_API_KEY": KEY}) as started:
        yield started


def cors(headers: dict[str, str]) -> dict[str, str]:
    return {name.removeprefix("access-control-"): value for name, value in headers.items() if "access-control" in name}


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("site", ["same-site", "cross-site"])
def test_an_allowed_page_asks_as_browsers_do(page: str, site: str, shared: Server) -> None:
    """First what it may send, without the key; then with it."""
    given = {"Origin": page, "Sec-Fetch-Site": site, "Sec-Fetch-Mode": "cors"}
    asked = {"Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-os"
    status, headers, body = shared.request("OPTIONS", "/v1/chat/completions", headers=given | asked)
    assert (status, body, headers["vary"]) == (204, b"", "Origin")
    assert cors(headers) == {
        "allow-origin": page,
        "allow-methods": "GET, POST",
        "allow-headers": "authorization,content-type,x-stainless-os",
        "max-age": "600",
    }
    key = {"Authorization": f"Bearer {KEY}"}
    status, headers, _ = shared.chat(question(max_tokens=1), given | key)
    assert (status, cors(headers), headers["vary"]) == (200, {"allow-origin": page}, "Origin")
    status, headers, body = shared.chat(question(max_tokens=0), given | key)
    assert (status, cors(headers)) == (400, {"allow-origin": page})
    for path in ("/v1/models?x=1", "/api/tags"):
        status, headers, _ = shared.request("GET", path, headers=given | key)
        assert (status, cors(headers)) == (200, {"allow-origin": page})


def test_an_allowed_page_needs_the_key_and_reads_why(shared: Server) -> None:
    for method, body in (("POST", question()), ("OPTIONS", None)):  # the second asks for no permission: no preflight
        status, headers, _ = shared.request(method, "/v1/chat/completions", body, {"Origin": PAGES[0]})
        assert (status, cors(headers)) == (401, {"allow-origin": PAGES[0]})


NEARLY = ["https://localhost:3000", "http://localhost:3001", "http://localhost", "http://localhost:3000.evil.com"]
NEARLY += ["HTTP://LOCALHOST:3000", "tauri://localhost:3000", "http://localhost:3000, tauri://localhost"]


@pytest.mark.parametrize("origin", BAD_ORIGINS + NEARLY)
@pytest.mark.parametrize("method", ["POST", "OPTIONS"])
def test_pages_that_were_not_allowed(method: str, origin: str, shared: Server) -> None:
    given = {"Origin": origin.format(port=shared.port), "Authorization": f"Bearer {KEY}"}
    body = question() if method == "POST" else None
    asked = {"Access-Control-Request-Method": "POST"}
    status, headers, _ = shared.request(method, "/v1/chat/completions", body, given | asked)
    assert (status, cors(headers), headers["vary"]) == (403, {}, "Origin")


@pytest.mark.parametrize(
    "path", ["/", "/log", "/log/state", "/metrics", "/examples/x.jpg", "/v1", "/healthy", "//v1/", "/api"]
)
def test_an_allowed_page_gets_the_api_alone(path: str, shared: Server) -> None:
    given = {"Origin": PAGES[0], "Authorization": f"Bearer {KEY}", "Access-Control-Request-Method": "GET"}
    for method in ("GET", "OPTIONS", "DELETE"):
        status, headers, _ = shared.request(method, path, headers=given)
        assert (status, cors(headers)) == (403, {}), method


def test_an_allowed_page_changes_nothing_else(shared: Server) -> None:
    asked = {"Origin": PAGES[0], "Access-Control-Request-Method": "POST"}
    assert shared.request("OPTIONS", "/v1/models", headers=asked | {"Host": f"evil.com:{shared.port}"})[0] == 403
    key = {"Authorization": f"Bearer {KEY}"}
    assert shared.request("GET", "/v1/models", headers=key | {"Sec-Fetch-Site": "cross-site"})[0] == 403  # no Origin
    form = key | {"Origin": PAGES[0], "Content-Type": "text/plain"}
    assert shared.chat(b"{}", form)[0] == 415
    own = key | {"Origin": f"http://127.0.0.1:{shared.port}", "Sec-Fetch-Site": "same-origin"}
    status, headers, _ = shared.request("GET", "/log/state", headers=own)
    assert (status, cors(headers)) == (200, {})


def test_without_the_option_no_answer_speaks_of_origins(server: Server) -> None:
    for origin in (*PAGES, f"http://127.0.0.1:{server.port}"):
        for method in ("GET", "OPTIONS"):
            asked = {"Origin": origin, "Access-Control-Request-Method": "GET"}
            status, headers, _ = server.request(method, "/v1/models", headers=asked)
            assert status == (403 if origin in PAGES else {"GET": 200, "OPTIONS": 405}[method])
            assert (cors(headers), headers.get("vary")) == ({}, None)


def test_another_method_is_told_which_there_are(server: Server) -> None:
    status, headers, _ = server.request("OPTIONS", "/v1/models")
    assert (status, {method.strip() for method in headers["allow"].split(",")}) == (405, {"GET", "HEAD"})


NO_ORIGINS = ["*", "null", "", "localhost:3000", "http://", "http://a:3000/", "file://", "http://a/b", "http://a b"]
NO_ORIGINS += ["http://*.a.com", "http://a,http://b", "http://u@a"]


@pytest.mark.parametrize("name", NO_ORIGINS)
def test_what_is_no_origin_cannot_be_allowed(name: str) -> None:
    with pytest.raises(UsageError, match="is not an origin"):
        guard.parse_origins([name])


def test_origins_are_written_as_browsers_do() -> None:
    given = ["HTTP://LocalHost:80", "https://a.example:443", "http://[::1]:3000", "chrome-extension://abc"]
    assert guard.parse_origins(given) == {"http://localhost", "https://a.example", *given[2:]}


RAW = {
    "two hosts": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nHost: evil.com\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "old, without a host": b"GET /health HTTP/1.0\r\n\r\n",
    "absolute": b"GET http://evil.com/health HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: close\r\n\r\n",
    "proxy": b"CONNECT evil.com:443 HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: close\r\n\r\n",
    "two origins": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nOrigin: http://127.0.0.1:%d\r\n"
    b"Origin: http://evil.com\r\nConnection: close\r\n\r\n",
    "folded": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n evil.com\r\nConnection: close\r\n\r\n",
    "smuggled": b"POST /health HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n"
    b"Connection: close\r\n\r\n0\r\n\r\nGET",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "long head": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: close\r\nX: "
    + b"x" * (Limits().head + 100)
    + b"\r\n\r\n",
}


@pytest.mark.parametrize("name", RAW)
def test_odd_heads(name: str, server: Server) -> None:
    request = RAW[name].replace(b"%d", str(server.port).encode())
    assert status_of(server.raw(request)) in (400, 403, 404, 405, 415, 431)


# Forms and types.


def test_nothing_after_a_body_of_two_lengths_is_a_request(server: Server) -> None:
    """A proxy that goes by the other length takes the answer to what follows for the next client's."""
    head = server.post + b"Content-Length: 40\r\nTransfer-Encoding: chunked\r\n\r\n"
    host = f"Host: 127.0.0.1:{server.port}\r\n\r\n".encode()
    answer = server.raw(head + b"2\r\n{}\r\n0\r\n\r\nGET /health HTTP/1.1\r\n" + host, timeout=8)
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "application/jsonx"],
)
def test_browsers_must_send_json(kind: str, server: Server) -> None:
    own = f"http://127.0.0.1:{server.port}"
    agent = {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:60.0) Gecko/20100101 Firefox/60.0"}
    for path, method in (("/v1/chat/completions", "POST"), ("/log", "POST"), ("/log/state", "PUT")):
        body = json.dumps({**question(), "on": True}).encode()
        for mark in (agent, {"Origin": own}, {"Referer": own + "/"}, {"Sec-Fetch-Site": "none"}):
            assert server.request(method, path, body, {"Content-Type": kind} | mark)[0] == 415


def test_other_programs_need_not_say_what_they_send(server: Server) -> None:
    expected = server.text("What colour?")
    body = json.dumps(question("What colour?")).encode()
    for kind in ("application/x-www-form-urlencoded", "text/plain"):  # the first one is what curl -d says
        status, _, answer = server.chat(body, {"Content-Type": kind, "User-Agent": "curl/7.88.1"})
        assert (status, json.loads(answer)["choices"][0]["message"]["content"]) == (200, expected)
    head = server.post.replace(b"Content-Type: application/json\r\n", b"Connection: close\r\n")
    assert status_of(server.raw(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)) == 200
    assert server.chat(b"messages=1", {"Content-Type": "application/x-www-form-urlencoded"})[0] == 400


def test_a_compressed_body_is_refused(server: Server) -> None:
    assert server.chat(question(), {"Content-Encoding": "gzip"})[0] == 415


def test_every_answer_forbids_guessing_and_embedding(server: Server) -> None:
    for path in ("/", "/health", "/v1/models", "/nowhere"):
        _, headers, _ = server.request("GET", path)
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert (headers["cache-control"], headers["referrer-policy"]) == ("no-store", "no-referrer")
        assert "server" not in headers
    policy = server.request("GET", "/")[1]["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy


# Addresses and files.

PICTURE = base64.b64encode(png()).decode()
ADDRESSES = [
    *("http://127.0.0.1:9/x.png", "https://example.com/x.png", "http://169.254.169.254/latest/meta-data/"),
    *("http://[::1]:9/x.png", "http://2130706433/x.png", "http://localhost:{port}/metrics", "HTTP://127.0.0.1/x.png"),
    *("file:///etc/passwd", "file://localhost/etc/passwd", "FILE:///etc/passwd", "/etc/passwd", "../../etc/passwd"),
    *("etc/passwd", "C:\\Windows\\win.ini", "\\\\evil.com\\share\\x.png", "~/.ssh/id_rsa", "/proc/self/environ"),
    *("/dev/zero", "/dev/stdin", "ftp://127.0.0.1/x.png", "gopher://127.0.0.1:9/_x", "dict://127.0.0.1:9/x"),
    *("jar:file:///x.jar!/x.png", "blob:http://127.0.0.1/x", "javascript:alert(1)", "about:blank", "ws://127.0.0.1/"),
    *("//evil.com/x.png", "http:/evil.com/x.png", " http://evil.com/x.png", "http\u3002//evil.com", "unix:/tmp/x.sock"),
    *("data:image/svg+xml;base64," + PICTURE, "data:text/html;base64," + PICTURE, "data:text/plain," + PICTURE),
    *("data:image/png," + PICTURE, "data:image/png;base64;x," + PICTURE, "data:image/png;charset=utf-8;base64,x"),
    *("data:image/png;base64," + PICTURE + "!!!", "data:image/png;base64,, " + PICTURE, "data:image/png;base64,"),
    *("data:image/tiff;base64," + PICTURE, "data:image/png;base64,%2fetc%2fpasswd", "data:image/png;base64"),
    *("data://image/png;base64," + PICTURE, "data:application/pdf;base64," + PICTURE, ""),
]


def opened_files(server: Server) -> list[str]:
    return (server.log.parent / "spy.log").read_text().splitlines()


def test_addresses_and_files_are_refused_unopened(server: Server) -> None:
    # First that the spy sees both processes: an answered request reads /proc/self/status in the child.
    before = len(opened_files(server))
    server.text("Hello", (png(),))
    assert any("/proc/self/status" in line for line in opened_files(server)[before:])
    assert any("language.gguf" in line for line in opened_files(server)[:before])
    before = len(opened_files(server))
    for address in ADDRESSES:
        for source in ({"url": address.format(port=server.port)}, address.format(port=server.port)):
            status, _, answer = server.chat(image_question(source))
            assert (status, json.loads(answer)["error"]["type"]) == (400, "invalid_request_error"), address
    assert opened_files(server)[before:] == []


@pytest.mark.parametrize(
    "path",
    ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/examples/..%2findex.html", "/examples/index.html", "//etc"],
)
def test_no_path_names_a_file(path: str, server: Server) -> None:
    before = len(opened_files(server))
    assert server.request("GET", path)[0] == 404
    assert server.request("GET", f"/v1/models/{path}")[0] == 404
    assert opened_files(server)[before:] == []


def test_a_schema_fetches_nothing(server: Server) -> None:
    before = len(opened_files(server))
    for target in ("http://127.0.0.1:9/s.json", "https://example.com/s.json", "file:///etc/passwd", "other.json#/a"):
        schema = {"type": "json_schema", "json_schema": {"schema": {"$ref": target}}}
        assert server.chat(question(response_format=schema))[0] == 400
    assert opened_files(server)[before:] == []


# The key.


def test_every_route_but_health_needs_the_key(locked: Server) -> None:
    routes = ["GET /", "GET /v1/models", "GET /metrics", "POST /v1/chat/completions", "GET /log", "DELETE /log"]
    routes += ["GET /api/tags", "POST /api/chat", "POST /api/show"]
    for route in (*routes, "POST /v1/completions", "GET /examples/x.jpg", "GET /nowhere"):
        method, path = route.split()
        status, headers, _ = locked.request(method, path, question() if method == "POST" else None)
        assert (status, headers["www-authenticate"][:5]) == (401, "Basic"), route
    assert locked.request("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    "given",
    [
        *("Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"bearer{KEY}", KEY, f"Token {KEY}", "Bearer é"),
        *("Basic", "Basic !!!", f"Basic {KEY}", "Basic " + base64.b64encode(KEY.encode()).decode()),
        "Basic " + base64.b64encode(b"x:" + KEY.encode()[:-1]).decode(),
    ],
)
def test_wrong_keys(given: str, locked: Server) -> None:
    headers = {"Authorization": given.encode("utf-8").decode("latin-1")}
    assert locked.request("GET", "/v1/models", headers=headers)[0] == 401


def test_the_right_key(locked: Server) -> None:
    basic = base64.b64encode(f"anyone:{KEY}".encode()).decode()
    for given in (f"Bearer {KEY}", f"bearer {KEY}", f"Basic {basic}"):
        assert locked.request("GET", "/v1/models", headers={"Authorization": given})[0] == 200
    assert KEY not in locked.log.read_text()
    for process, file in ((locked.process.pid, "cmdline"), (locked.child(), "cmdline"), (locked.child(), "environ")):
        assert KEY.encode() not in Path(f"/proc/{process}/{file}").read_bytes()


@pytest.fixture
def unserved(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No model is loaded in the tests' own process to be served. A socket that stays open fails the test."""
    monkeypatch.setattr(supervisor.Supervisor, "start", lambda self: pytest.fail("it would serve"))
    yield
    gc.collect()


@pytest.mark.usefixtures("unserved")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--host", "0.0.0.0"], "a key is needed"),
        (["--host", "::"], "a key is needed"),
        (["--host", "192.0.2.1"], "a key is needed"),
        (["--host", "example.com"], "not an IP address"),
        (["--allow-host", "*.local"], "is not a host name"),
        (["--allow-host", "http://box"], "is not a host name"),
        (["--allow-origin", "*"], "is not an origin"),
    ],
)
def test_settings_that_would_open_it(
    options: list[str], says: str, micro_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.execute(["serve", "--model", str(micro_bundle), "--port", "0", *options]) == 2
    out, err = capsys.readouterr()
    assert (out, says in err) == ("", True)


def test_a_key_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="No such file"):
        read_key(tmp_path / "key", "")


@pytest.mark.usefixtures("unserved")
@pytest.mark.parametrize(
    ("content", "says"), [(b"\xff", "is not UTF-8"), (b" \n", "needs a key"), (b"short", "needs a key of at least 16")]
)
def test_a_key_file_without_a_key(
    content: bytes, says: str, micro_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_bytes(content)
    command = ["serve", "--model", micro_bundle, "--host", "0.0.0.0", "--port", "0", "--api-key-file", tmp_path / "key"]
    assert cli.execute([str(word) for word in command]) == 65
    assert f"{tmp_path / 'key'} {says}" in capsys.readouterr().err


def test_one_of_two_keys_is_not_chosen(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    assert read_key(tmp_path / "key", "") == read_key(None, KEY) == KEY
    with pytest.raises(UsageError, match="give only one of them"):
        read_key(tmp_path / "key", "another key of mine")


@pytest.mark.usefixtures("unserved")
def test_a_taken_port(server: Server, micro_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.execute(["serve", "--model", str(micro_bundle), "--port", str(server.port)]) == 69
    assert "in use" in capsys.readouterr().err


def test_hosts_are_exact() -> None:
    found = guard.accepted_hosts("127.0.0.1", 8080, ["box.local", "box:9000"])
    assert found == {
        *("localhost:8080", "127.0.0.1:8080", "[::1]:8080", "box.local", "box.local:8080", "box:9000", "box:9000:8080")
    }
    assert "localhost" in guard.accepted_hosts("127.0.0.1", 80, [])
    assert "0.0.0.0:80" not in guard.accepted_hosts("0.0.0.0", 80, [])
    with pytest.raises(UsageError):
        guard.accepted_hosts("127.0.0.1", 80, ["*"])


def test_a_page_behind_a_proxy_with_tls() -> None:
    """Only under a name that was allowed: nothing here speaks TLS under this machine's own names."""
    names = ("Box.local", "box:9000")
    checked = guard.Guard(guard.accepted_hosts("0.0.0.0", 8080, names), allowed_names=names)

    def status(host: str, origin: str) -> int:
        headers = [(b"host", host.encode()), (b"origin", origin.encode()), (b"content-type", b"application/json")]
        try:
            checked.check("POST", b"/v1/chat/completions", headers)
        except Problem as problem:
            return problem.status
        return 200

    assert status("box.local", "https://box.local") == 200
    assert status("box:9000", "https://box:9000") == 200
    assert status("box.local", "http://box.local:8080") == 200
    for origin in ("https://127.0.0.1:8080", "https://localhost", "https://box.local.evil.com", "https://evil.com"):
        assert status("box.local", origin) == 403


# Too much, too slow.


def error_of(body: object, server: Server) -> tuple[int, str]:
    status, _, answer = server.chat(body)
    return status, json.loads(answer)["error"]["message"]


def test_bodies(server: Server) -> None:
    limits = Limits()
    good = json.dumps(question()).encode()
    cases = [
        (b"", 400, "not valid JSON"),
        (b"[]", 400, "must be a JSON object"),
        (b"\xff\xfe{}", 400, "not UTF-8"),
        (good.decode().encode("utf-16"), 400, "not UTF-8"),
        (b"\xef\xbb\xbf" + good, 400, "not valid JSON"),
        (b'{"model": "micro", "model": "micro"}', 400, "same name twice"),
        (b'{"temperature": NaN}', 400, "NaN is not valid JSON"),
        (b'{"metadata": {"a": -1e999}}', 400, "number that is too large"),
        (b'{"a": ' + b"[" * 33 + b"]" * 33 + b"}", 400, "deeper than 32"),
        (b"[" * 100_000, 400, "deeper than 32"),
        (b'{"a": [' + b"1," * (limits.structure // 2) + b"1]}", 413, "JSON outside of strings"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", 400, "not valid JSON"),
        (good[:-5], 400, "not valid JSON"),
        (good + b"{}", 400, "not valid JSON"),
    ]
    for body, status, says in cases:
        got, message = error_of(body, server)
        assert (got, says in message) == (status, True), message


def test_texts_are_told_from_what_is_between_them() -> None:
    generator = random.Random(7)

    def made(depth: int) -> Any:
        kind = generator.randrange(6 if depth else 3)
        if kind < 2:
            return "".join(generator.choices('\\"[]{},:\n\x7fé/u0', k=generator.randrange(9)))
        return generator.randrange(99) if kind == 2 else [made(depth - 1) for _ in range(generator.randrange(5))]

    def emptied(value: Any) -> Any:
        return "" if isinstance(value, str) else [emptied(one) for one in value] if isinstance(value, list) else value

    for _ in range(300):
        value = made(4)
        for ascii_only in (True, False):
            body = json.dumps(value, ensure_ascii=ascii_only).encode()
            structure = json.dumps(emptied(value)).encode().replace(b'"', b"")
            assert json_body._strip_strings(body, Limits()) == structure
            assert json_body.parse(b'{"a": ' + body + b"}", Limits()) == {"a": value}


@pytest.mark.parametrize("piece", [b'"', b"\\", b'\\"', b'\\""', b'"",'])
def test_refusing_a_body_takes_little_memory(piece: bytes) -> None:
    body = piece * (Limits().body // 8 // len(piece))
    tracemalloc.start()
    try:
        with pytest.raises(Problem):
            json_body.parse(body, Limits())
        assert tracemalloc.get_traced_memory()[1] < 4 * len(body) + 80 * Limits().structure
    finally:
        tracemalloc.stop()


def test_spaces_in_base64_take_little_memory() -> None:
    url = "data:;base64," + "AA \n" * (1 << 18)
    tracemalloc.start()
    try:
        assert len(data_urls.decode(url, "images")) == (1 << 19) // 4 * 3
        assert tracemalloc.get_traced_memory()[1] < 4 * len(url)
    finally:
        tracemalloc.stop()


def test_a_body_over_the_limit_is_answered(server: Server) -> None:
    """Not reset: the client is told, declared length or not."""
    body = b'{"a": "' + b"x" * Limits().body + b'"}'
    assert error_of(body, server)[0] == 413
    chunk = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    data = server.post + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunk * 24 + b"0\r\n\r\n"
    assert status_of(server.raw(data)) == 413


def test_heads_over_the_limit(server: Server) -> None:
    """Refused at once, whole or without an end."""
    head = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: close\r\nX: " % server.port
    long = head + b"x" * (3 * Limits().head)
    started = time.monotonic()
    assert status_of(server.raw(long + b"\r\n\r\n")) in (400, 431)
    assert status_of(server.raw(long)) == 400
    assert time.monotonic() - started < Limits().head_seconds / 2


def test_texts_over_the_limit(server: Server) -> None:
    status, message = error_of(question("x" * (Limits().prompt + 1)), server)
    assert (status, "bytes" in message) == (400, True)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 200
    for count in (256, 257):  # far too long for the model, in any case
        status, message = error_of(question() | {"messages": messages[:count]}, server)
        assert (status, "a list of 1 to 256 messages" in message) == (400, count > 256)


def test_slow_clients_are_left(micro_bundle: Path, tmp_path: Path) -> None:
    """Ones that never finish their head or their body, or never read the answer; others do not notice."""
    with running(micro_bundle, tmp_path, limits="head_seconds=0.5, body_seconds=0.5, stall_seconds=0.5") as server:
        torn = server.post + b"Content-Length: 100\r\n\r\n{"
        with ThreadPoolExecutor(4) as clients:
            sent = (b"", b"GET /hea", torn, torn.replace(b"127.0.0.1", b"evil"))
            silent, begun, late, stranger = clients.map(server.raw, sent)
        assert silent == begun == b""
        assert status_of(late) == 408
        assert b"\r\nconnection: close\r\n" in late  # or it would be used for the next request
        assert status_of(stranger) == 403  # nor is the body of a wrong host waited for
        drip = socket.create_connection(("127.0.0.1", server.port))
        start = time.monotonic()
        with drip, contextlib.suppress(OSError):
            while time.monotonic() - start < 20:
                drip.sendall(b"G")
                time.sleep(0.05)
        assert time.monotonic() - start < 10
        assert server.text("Hello")


def test_who_is_late_with_a_body_is_told_so_at_its_limit(micro_bundle: Path, tmp_path: Path) -> None:
    with running(micro_bundle, tmp_path, limits="body_seconds=3") as server:
        start = time.monotonic()
        assert status_of(server.raw(server.post + b"Content-Length: 100\r\n\r\n{")) == 408
        assert time.monotonic() - start < 5.5  # not after the limit twice


def test_who_leaves_within_a_body_is_no_bug(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(server.post + b"Content-Length: 100\r\n\r\n{")
        time.sleep(0.1)
    server.wait_until(lambda: "POST /v1/chat/completions 499 " in server.log.read_text())
    assert "Traceback" not in server.log.read_text()


def test_who_does_not_read_is_left(micro_bundle: Path, tmp_path: Path) -> None:
    """Exporting a large log and reading nothing of it: soon the rest is gone, and so is the connection."""
    with running(micro_bundle, tmp_path, limits="stall_seconds=0.5") as server:

        def files() -> int:
            return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))

        before, log = files(), tmp_path / "home" / "log"
        log.mkdir(parents=True)
        (log / "votes.jsonl").write_bytes(b"x" * (30 << 20))
        request = b"GET /log HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: close\r\n\r\n" % server.port
        assert len(server.raw(request)) > 30 << 20  # who reads gets all
        paused = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        paused.request("GET", "/log")
        answer = paused.getresponse()
        time.sleep(0.2)
        assert len(answer.read()) == 30 << 20
        time.sleep(1)
        paused.request("GET", "/health")  # and who has read can go on
        assert paused.getresponse().status == 200
        paused.close()
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.settimeout(20)
        got = 0
        with connection, contextlib.suppress(ConnectionResetError):
            connection.sendall(request)
            server.wait_until(lambda: files() > before)
            server.wait_until(lambda: files() == before)
            while part := connection.recv(1 << 20):
                got += len(part)
        assert got < 30 << 20


def test_too_many_at_once_are_refused(micro_bundle: Path, tmp_path: Path) -> None:
    with running(micro_bundle, tmp_path, limits="requests=4") as server:
        slow = []
        for _ in range(4):
            slow.append(socket.create_connection(("127.0.0.1", server.port)))
            slow[-1].sendall(server.post + b"Content-Length: 100\r\n\r\n{")
        server.wait_until(lambda: server.request("GET", "/v1/models")[0] == 503)
        status, headers, _ = server.request("GET", "/v1/models")
        assert (status, int(headers["retry-after"]) > 0) == (503, True)
        for connection in slow:
            connection.close()
        server.wait_until(lambda: server.request("GET", "/v1/models")[0] == 200)


# What it says.


def test_the_log_has_no_prompts_and_cannot_be_forged(server: Server) -> None:
    server.text("a secret question")
    server.request("GET", "/x%0a%1b[31mGET%20/forged%20200")
    server.raw(b"EVIL\x1b[31m /health HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: close\r\n\r\n" % server.port)
    said = server.log.read_text()
    assert "secret" not in said
    assert "forged" not in said
    assert "\x1b" not in said
    assert "GET (other) 404" in said


# Mutated requests.


ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 5, 2**31, 2**63, 2**64, -(2**63), 1e308, -0.0, 0.5, "", "5", "x" * 300),
    *([], {}, [[]], [None], {"a": 1}, "\0", "\ud800", "😀", "<image>", "<|im_end|>", [1] * 50, ["a"] * 20, "null"),
]


def mutations(count: int, seed: int) -> Iterator[bytes]:
    """A good request with one to three of its values, or bytes, replaced by something else."""
    chosen = random.Random(seed)
    names = ["max_tokens", "temperature", "top_p", "seed", "stop", "n", "stream", "stream_options", "response_format"]
    names += ["logprobs", "top_logprobs", "model", "messages", "max_completion_tokens", "tools", "logit_bias", "user"]
    names += ["frequency_penalty", "modalities", "__class__", "grammar", "options", "id", "cancel"]
    names += ["json_schema", "top_k", "min_p", "image_tokens", "repeat_penalty", "repetition_penalty", "n_predict"]
    for _ in range(count):
        body: dict[str, Any] = question("Hi", (png(),) if chosen.random() < 0.3 else (), max_tokens=2)
        for _ in range(chosen.randint(1, 3)):
            way = chosen.randrange(4)
            if way == 0:
                body[chosen.choice(names)] = chosen.choice(ODD)
            elif way == 1:
                body["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema(chosen, ODD, 3)}}
            elif way == 2 and isinstance(body.get("messages"), list) and body["messages"]:
                message = chosen.choice(body["messages"])
                if isinstance(message, dict):
                    message[chosen.choice(["role", "content", "name", "images"])] = chosen.choice(ODD)
            elif isinstance(body.get("messages"), list):
                kind, source = chosen.choice(["text", "image_url", 5]), chosen.choice(ODD)
                part = {"type": kind, "image_url": source, "text": "x"}
                body["messages"] = [*body["messages"], {"role": "user", "content": [part]}][-chosen.randint(1, 2) :]
        data = bytearray(json.dumps(body).encode())
        if chosen.random() < 0.3:
            for _ in range(chosen.randint(1, 4)):
                data[chosen.randrange(len(data))] = chosen.randrange(256)
        yield bytes(data[: chosen.randrange(len(data))] if chosen.random() < 0.05 else data)


def schema(chosen: random.Random, values: list[Any], depth: int) -> Any:
    """Something like a JSON schema."""
    if depth == 0 or chosen.random() < 0.2:
        return chosen.choice([*values, {"type": "string"}, {"enum": ["a"]}, {"$ref": "#"}, {"const": 1}])
    inner = schema(chosen, values, depth - 1)
    kinds = ["object", "array", "string", "integer", "null", "boolean", "number", ["object", "null"], "any"]
    words = ["properties", "items", "prefixItems", "anyOf", "enum", "$ref", "required", "additionalProperties"]
    word = chosen.choice(words)
    limit = chosen.choice(["minItems", "maxLength", "minimum", "maximum", "exclusiveMinimum", "title", "pattern"])
    value = chosen.choice([inner, {"a": inner}, [inner], ["a"], "#", "#/$defs/a"])
    return {"type": chosen.choice(kinds), word: value, limit: chosen.choice(values), "$defs": {"a": inner}}


def send_all(server: Server, count: int, seed: int) -> None:
    found: dict[int, int] = {}
    for body in mutations(count, seed):
        status, _, answer = server.chat(body)
        found[status] = found.get(status, 0) + 1
        assert status in (200, 400, 404, 413, 415), (status, answer, body)
        if status != 200:
            assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}
            assert b"Traceback" not in answer
            assert b".py" not in answer
    print(found)
    assert found[200] > count / 20  # they are not all refused at the first look
    assert server.health()["crashes"] == 0
    assert "Traceback" not in server.log.read_text()


def test_mutated_requests(server: Server) -> None:
    send_all(server, 150, seed=1)


@pytest.mark.slow
def test_two_thousand_mutated_requests(server: Server) -> None:
    send_all(server, 2000, seed=2)


def replaced(value: Any, chosen: random.Random) -> Any:
    """A copy of `value` in which something, at any depth, is something else."""
    if not value or not isinstance(value, dict | list) or chosen.random() < 0.1:
        return chosen.choice(ODD)
    copy, key = value.copy(), chosen.choice([*value] if isinstance(value, dict) else range(len(value)))
    copy[key] = replaced(value[key], chosen)
    return copy


NUMBER = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
PICTURE = base64.b64encode(png()).decode()
CONVERSATION = [
    {"role": "user", "content": [{"type": "input_image", "image_url": data_url(png())}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Red"}]},
    {"role": "user", "content": [{"type": "input_text", "text": "Why?"}]},
]
MODEL: dict[str, Any] = {"model": "micro", "stream": False}
OTHER_APIS: dict[str, dict[str, Any]] = {
    "/v1/responses": MODEL
    | {"input": CONVERSATION, "max_output_tokens": 2, "metadata": {"a": "b"}, "instructions": "Be kind.", "tools": []}
    | {"include": ["message.output_text.logprobs"], "top_logprobs": 1, "temperature": 1, "truncation": "disabled"}
    | {"text": {"format": {"type": "json_schema", "name": "a", "schema": NUMBER}, "verbosity": "medium"}},
    "/api/chat": MODEL
    | {"messages": [{"role": "user", "content": "Hi", "images": [PICTURE]}, {"role": "assistant", "content": "No"}]}
    | {"options": {"num_predict": 2, "stop": ["x"], "seed": 1}, "think": False, "format": NUMBER, "tools": []}
    | {"keep_alive": "5m", "logprobs": True, "top_logprobs": 1},
    "/api/generate": MODEL
    | {"prompt": "Hi", "system": "Be kind.", "images": [PICTURE], "format": "json", "context": [], "suffix": ""}
    | {"options": {"num_predict": 2, "top_k": 3}, "template": "", "raw": False},
    "/api/show": MODEL | {"verbose": True},
}


@pytest.mark.parametrize("path", OTHER_APIS)
def test_mutated_requests_of_other_apis(path: str, server: Server) -> None:
    chosen = random.Random(8)
    found = set()
    for _ in range(100):
        body = replaced(OTHER_APIS[path], chosen)
        if chosen.random() < 0.5:
            body = replaced(body, chosen)
        status, _, answer = server.request("POST", path, json.dumps(body).encode())
        found.add(status)
        assert status in (200, 400, 404), (status, answer, body)
        if status != 200:
            error = json.loads(answer)["error"]
            assert isinstance(error, str if path.startswith("/api/") else dict)
    assert {200, 400} <= found
    assert "Traceback" not in server.log.read_text()


def test_bytes_that_are_no_http(server: Server) -> None:
    chosen = random.Random(3)
    good = b"POST /v1/models HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Length: 2\r\n" % server.port
    good += b"Connection: close\r\n\r\n{}"
    threads = []

    def send(data: bytes) -> None:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            try:
                said = connection.recv(65536)
            except OSError:
                return
            assert not said or 200 <= status_of(said) < 500 or b" 405 " in said

    for _ in range(60):
        data = bytearray(good)
        for _ in range(chosen.randint(1, 6)):
            data[chosen.randrange(len(data))] = chosen.choice(b"\0\r\n :/\xff\x80aZ0")
        threads.append(threading.Thread(target=send, args=(bytes(data),)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert server.text("Hello")


def test_a_text_without_end_is_refused_at_once(server: Server) -> None:
    """Escaped quotes, and the body cut off within them: sought from each of them anew, its end took minutes."""
    head = b'{"model": "micro", "messages": [{"role": "user", "content": "'
    for body in (head + b'\\"' * 500_000, head + b'"' * 100_001):
        sent = server.post + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        assert server.raw(sent, timeout=15).startswith(b"HTTP/1.1 400 ")


def test_who_may_not_be_here_takes_nobodys_place(server: Server) -> None:
    """As many as there is room for, each with a body that does not come."""
    head = server.post.replace(b"127.0.0.1", b"evil.example")
    strangers = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(70)]
    try:
        for stranger in strangers:
            stranger.sendall(head + b"Content-Length: 1000000\r\n\r\n")
        time.sleep(0.2)
        assert server.request("GET", "/v1/models")[0] == 200
        strangers[0].settimeout(10)
        assert strangers[0].recv(100).startswith(b"HTTP/1.1 403 ")
    finally:
        for stranger in strangers:
            stranger.close()


def test_votes_that_cannot_be_kept_are_said_and_none_has_another_address(micro_bundle: Path, tmp_path: Path) -> None:
    """What a client says of its address is not believed."""
    vote = {"type": "upvote", "messages": [["user", "Hello"], ["assistant", "Yes"]]}
    file = tmp_path / "home" / "log" / "votes.jsonl"
    with running(micro_bundle, tmp_path) as server:
        assert server.request("PUT", "/log/state", {"on": True})[0] == 200
        assert server.request("POST", "/log", vote, {"X-Forwarded-For": "192.0.2.1"})[0] == 204
        assert json.loads(file.read_bytes())["ip"] == "127.0.0.1"
        os.truncate(file, MAX_BYTES)
        status, _, answer = server.request("POST", "/log", vote)
        assert (status, "is full" in json.loads(answer)["error"]["message"]) == (507, True)
        assert file.stat().st_size == MAX_BYTES
        shutil.rmtree(file.parent)
        file.parent.write_text("a file in the place of the folder")
        status, _, answer = server.request("POST", "/log", vote)
        assert (status, "cannot be written" in json.loads(answer)["error"]["message"]) == (507, True)


def test_a_server_without_a_home_answers_and_takes_no_votes(micro_bundle: Path, tmp_path: Path) -> None:
    """As in a container whose user has neither HOME nor an entry in /etc/passwd."""
    environment = {"LLAVA_EDGE_HOME": "~nobody-has-this-name/models"}
    vote = {"type": "upvote", "messages": [["user", "Hello"], ["assistant", "Yes"]]}
    with running(micro_bundle, tmp_path, environment=environment) as server:
        assert server.ask("Hello", max_tokens=2)["usage"]["completion_tokens"]
        assert json.loads(server.request("PUT", "/log/state", {"on": True})[2]) == {"on": True, "bytes": 0}
        status, _, answer = server.request("POST", "/log", vote)
        assert (status, "set LLAVA_EDGE_HOME" in json.loads(answer)["error"]["message"]) == (507, True)
        assert server.request("GET", "/log")[2] == b""
        assert server.request("DELETE", "/log")[0] == 204


def test_a_vote_that_a_full_disk_took_in_part_spoils_no_other(tmp_path: Path) -> None:
    votes = VoteLog(tmp_path / "votes.jsonl", "micro", TEMPLATES["vicuna_v1"])
    votes.enabled = True
    for text in ("first", "lost", "last"):
        vote = {"type": "upvote", "messages": [["user", text]]}
        if text == "lost":
            with largest_file(votes.size() + 20), pytest.raises(Problem, match="The log cannot be written: File too"):
                votes.add(vote, "")
        else:
            votes.add(vote, "")
    kept = [json.loads(line)["state"]["messages"][0][1] for line in votes.read().splitlines()]
    assert kept == ["first", "last"]


def test_a_log_that_cannot_be_used_is_said_and_no_bug(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    votes = VoteLog(tmp_path / "log" / "votes.jsonl", "micro", TEMPLATES["vicuna_v1"])
    with pytest.raises(Problem, match="The log cannot be deleted: Not a directory"):
        votes.delete()
    votes.path = tmp_path
    with pytest.raises(Problem, match="The log cannot be read: Is a directory"):
        votes.read()


@pytest.mark.parametrize(("most", "kept"), [(256, 64), (1024, 300)])
def test_more_connections_than_open_files_stop_nothing(
    most: int, kept: int, micro_bundle: Path, tmp_path: Path
) -> None:
    """256 is what macOS gives a program that does not ask for more; `most` is what it may ask for."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, {most}))"
    (tmp_path / "sitecustomize.py").write_text(limit, "utf-8")
    with (
        running(micro_bundle, tmp_path, first=(str(tmp_path),), limits="head_seconds=100") as server,
        ExitStack() as stack,
    ):
        clients = []
        for _ in range(6):
            for _ in range(50):
                clients.append(socket.create_connection(("127.0.0.1", server.port), timeout=10))
                stack.enter_context(clients[-1]).setblocking(False)
            time.sleep(0.05)  # or the system lets some wait for a second
        server.wait_until(lambda: sum(map(is_open, clients)) == kept)
        clients[0].close()
        assert server.health()["status"] == "ok"
        assert "Traceback" not in server.log.read_text()


def is_open(client: socket.socket) -> bool:
    try:
        return client.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False
