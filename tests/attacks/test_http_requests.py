"""Requests at the edge of HTTP: each is answered by a problem, harms no other, and is not believed."""

import http.client
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from service.runtime.chunk_limit import TINY_BYTES
from tests.attacks.harness import bystander
from tests.attacks.raw_http import connected, head, read_all, read_status
from tests.integration.pictures import in_base64, picture
from tests.integration.processes import ServiceProcess

PROBES = ("/livez", "/readyz", "/startupz", "/health", "/version", "/metrics")
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: test\r\n"
MEGABYTE = 2**20
CHUNKED = b"0\r\n\r\n"


def exchange(server: ServiceProcess, request: bytes) -> tuple[int | None, bytes]:
    """Send bytes, and return the status and all else until the service closes the connection."""
    with connected(server) as connection:
        connection.sendall(request)
        return read_status(connection), read_all(connection)


@pytest.mark.parametrize("path", ["/caption", "/livez"])
@pytest.mark.parametrize("te_first", [True, False])
def test_a_body_of_two_lengths_is_refused_and_nothing_after_it_is_read(
    attacked: ServiceProcess, path: str, te_first: bool
) -> None:
    lengths = [b"Transfer-Encoding: chunked", b"Content-Length: 5"]
    lines = [b"POST %s HTTP/1.1" % path.encode(), b"Host: test", *(lengths if te_first else lengths[::-1])]
    status, rest = exchange(attacked, b"\r\n".join([*lines, b"", b""]) + CHUNKED + LIVEZ + b"\r\n")
    assert status == 400
    assert b'"code":"ambiguous_length"' in rest
    assert b"HTTP/1.1" not in rest  # the smuggled request got no answer


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST /caption HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /caption HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"POST /caption HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /caption HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost : a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /" + b"a" * 70_000,
    ],
)
def test_what_is_no_http_is_answered_by_a_problem_and_the_connection_closes(
    attacked: ServiceProcess, request_bytes: bytes
) -> None:
    status, rest = exchange(attacked, request_bytes)
    assert status == 400
    assert b"content-type: application/problem+json" in rest.lower()
    assert b"x-content-type-options: nosniff" in rest.lower()


def chunked(pieces: Iterable[bytes]) -> bytes:
    request = b"POST /caption HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return request + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + CHUNKED


@pytest.mark.parametrize(("num_chunks", "status"), [(250, 200), (251, 400)])
def test_a_body_has_at_most_250_tiny_chunks(attacked: ServiceProcess, num_chunks: int, status: int) -> None:
    body = b'{"image": "%s", "num_beams": 1}' % in_base64(picture(0)).encode()
    pieces = [b" "] * (num_chunks - 1)
    answered, rest = exchange(attacked, chunked([*pieces, body]))
    assert answered == status, rest


def test_many_chunks_of_a_fair_size_are_read(attacked: ServiceProcess) -> None:
    body = (b'{"image": "%s", "num_beams": 1}' % in_base64(picture(0)).encode()).ljust(TINY_BYTES * 3000)
    pieces = [body[start : start + TINY_BYTES] for start in range(0, len(body), TINY_BYTES)]
    status, rest = exchange(attacked, chunked(pieces))
    assert status == 200, rest


@pytest.mark.serial
def test_a_crowd_that_sends_byte_by_byte_holds_up_nobody(attacked: ServiceProcess) -> None:
    request = chunked([b" "] * 100_000)

    def attack(_: int) -> int | None:
        try:
            return exchange(attacked, request)[0]
        except ConnectionError:  # the service closes while much is still to be sent
            return None

    with bystander(attacked), ThreadPoolExecutor(20) as pool:
        statuses = set(pool.map(attack, range(200)))
    assert statuses <= {400, None}


def test_garbage_behind_a_request_does_not_cost_its_answer(attacked: ServiceProcess) -> None:
    body = b'{"image": "%s", "num_beams": 1}' % in_base64(picture(0)).encode()
    status, rest = exchange(attacked, head("/caption", len(body)) + body + b"\x00\x00\r\n\r\n")
    assert status == 200
    assert b'"captions"' in rest


@pytest.mark.parametrize(("num_headers", "status"), [(100, 200), (101, 431)])
def test_a_request_has_at_most_a_hundred_headers(
    attacked: ServiceProcess, num_headers: int, status: int
) -> None:
    with connected(attacked) as connection:
        connection.sendall(LIVEZ + b"A: b\r\n" * (num_headers - 1) + b"\r\n")
        assert read_status(connection) == status


@pytest.mark.parametrize(("num_bytes", "status"), [(32 * 1024, 200), (32 * 1024 + 1, 431)])
def test_headers_have_a_size_together(attacked: ServiceProcess, num_bytes: int, status: int) -> None:
    others = len("host") + len("test") + len("a")
    with connected(attacked) as connection:
        connection.sendall(LIVEZ + b"A: " + b"b" * (num_bytes - others) + b"\r\n\r\n")
        assert read_status(connection) == status


@pytest.mark.parametrize("path", PROBES)
def test_probes_answer_head_as_get_without_a_body(attacked: ServiceProcess, path: str) -> None:
    with httpx.Client(base_url=attacked.url) as client:  # one connection: a body would be taken for an answer
        answer = client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["content-type"] == client.get(path).headers["content-type"]
        refused = client.post(path)
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")


def test_a_target_in_absolute_form_is_read_by_its_path(attacked: ServiceProcess) -> None:
    status, rest = exchange(
        attacked, b"GET http://any.example:81/livez HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
    )
    assert (status, b"any.example" in rest) == (200, False)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:99999", "[", "", "a b", "\\@[::"])
@pytest.mark.parametrize("path", ["/docs/", "/livez/", "//evil.example/", "http://evil.example/livez/"])
def test_no_answer_leads_to_what_host_says(attacked: ServiceProcess, path: str, host: str) -> None:
    with connected(attacked) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"location:" not in answer.lower()


@pytest.mark.parametrize(
    ("method", "path", "fields"),
    [
        ("GET", "/livez", {}),
        ("GET", "/docs", {}),
        ("GET", "/", {}),
        ("GET", "/nowhere", {}),
        ("DELETE", "/caption", {}),
        ("POST", "/caption", {"json": {}}),
        ("POST", "/caption", {"json": {"image": in_base64(picture(0))}}),
    ],
)
def test_no_answer_may_be_sniffed(
    attacked: ServiceProcess, method: str, path: str, fields: dict[str, Any]
) -> None:
    answer = httpx.request(method, attacked.url + path, timeout=30, **fields)
    assert answer.headers["x-content-type-options"] == "nosniff"


LONG = "x" * 3000


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", f"/{LONG}", {}),
        ("X" * 3000, "/livez", {}),
        ("POST", "/caption", {"Content-Type": f"a/{LONG}"}),
        ("POST", "/caption", {"Content-Type": f"multipart/form-data; charset={LONG}; boundary=X"}),
        ("POST", "/caption", {"Content-Encoding": LONG}),
        ("POST", "/caption", {"X-Request-Timeout-Ms": LONG}),
        ("POST", "/caption", {"Content-Length": "9" * 20}),
    ],
)
def test_no_answer_repeats_more_than_sixty_characters(
    attacked: ServiceProcess, method: str, path: str, headers: dict[str, str]
) -> None:
    lines = [f"{method} {path} HTTP/1.1", "Host: test", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    with connected(attacked) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        answer = read_all(connection)
    assert re.match(rb"HTTP/1.1 4\d\d ", answer)
    assert re.search(rb"(?i)x{61}", answer) is None
    assert len(answer) < 1500


def test_a_connection_is_kept_after_an_error_that_read_the_whole_body(attacked: ServiceProcess) -> None:
    url = httpx.URL(attacked.url)
    connection = http.client.HTTPConnection(url.host, url.port, timeout=30)
    connection.connect()
    kept = connection.sock
    for _ in range(3):
        connection.request("POST", "/caption", b"{}")
        answer = connection.getresponse()
        assert (answer.status, len(answer.read()) > 0) == (422, True)
    assert connection.sock is kept
    connection.close()


@pytest.mark.parametrize("num_bytes", [2 * MEGABYTE, 20 * MEGABYTE, 63 * MEGABYTE])
@pytest.mark.parametrize("path", ["/nowhere", "/caption"])
def test_no_request_is_lost_after_an_answer_before_the_end_of_the_body(
    attacked: ServiceProcess, path: str, num_bytes: int
) -> None:
    with httpx.Client(base_url=attacked.url) as client:
        refused = client.post(path, content=bytes(num_bytes), headers={"Content-Type": "image/png"})
        assert (refused.status_code, refused.headers.get("Connection")) == (
            404 if path == "/nowhere" else 415,
            "close",
        )
        assert client.get("/livez").status_code == 200


@pytest.mark.parametrize(("num_unread", "is_kept"), [(MEGABYTE, True), (MEGABYTE + 1, False)])
def test_a_connection_is_kept_where_little_of_a_body_is_unread(
    attacked: ServiceProcess, num_unread: int, is_kept: bool
) -> None:
    with connected(attacked) as connection:
        last = LIVEZ + b"Connection: close\r\n\r\n"
        connection.sendall(head("/nowhere", num_unread) + bytes(num_unread) + last)
        statuses = re.findall(rb"HTTP/1\.1 (\d+)", read_all(connection))
    assert statuses == ([b"404", b"200"] if is_kept else [b"404"])


def test_a_body_of_unknown_length_that_is_not_read_ends_the_connection(attacked: ServiceProcess) -> None:
    lines = b"POST /nowhere HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
    status, rest = exchange(attacked, lines + b"5\r\nabcde\r\n")
    assert (status, b"connection: close" in rest.lower()) == (404, True)
