"""Nothing outside comes in or goes out: files, uploads, accounts, drafts, the network."""

from __future__ import annotations

import base64
import http.client
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from app_server import AppServer, draw_pictures

SECRET = "this-must-stay-inside"
UPS = ("../", "..%2f", "%2e%2e/", "%2e%2e%2f", "..%252f", "....//", "..\\", "..%5c", "..;/", "%c0%ae%c0%ae/")
ROUTES = (
    *("files/runs/", "files/library/", "files/datasets/", "files/jobs/", "files/pictures/", "files/", "files/queue/"),
    *("gradio_api/file=", "gradio_api/file/", "file=", "file/", "static/", "assets/", "theme/", "custom_component/"),
)
NAMES = ("../../out.png", "..\\..\\out.png", "/tmp/out.png", "%2e%2e%2fout.png", "a/../../../out.png", "..", ".", "",
         "out.png\0.safetensors", "C:\\out.png", "..%2f..%2fout.png", "\u2025/out.png")  # fmt: skip
UPLOADED = "gradio_api/upload"


def get(server: AppServer, path: str, **headers: str) -> tuple[int, bytes]:
    """What a path answers, sent exactly as it stands."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest("GET", f"/{path}", skip_host=False)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def upload(server: AppServer, name: str, content: bytes) -> tuple[int, Any]:
    """Sends a file as the page does, under any name."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    connection.request("POST", f"/{UPLOADED}", head + content + b"\r\n--x--\r\n", kind)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, json.loads(body) if answer.status == 200 else None


def hide_secrets(home: Path) -> list[str]:
    """Files that no page may give out; as paths from the workspace, and whole."""
    outside = home.parent / "secret.txt"
    inside = [home / "secret.json", home / "queue" / "secret.json", home / "runs" / ".hidden" / "secret.txt"]
    for file in (outside, *inside):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(SECRET)
    (home / "library").mkdir(exist_ok=True)
    (home / "library" / "link.txt").symlink_to(outside)
    (home / "library" / "folder").symlink_to(home.parent)
    (home / "runs" / "note.txt").write_text("a note")
    return [str(outside), *map(str, inside)]


def attempts(home: Path, secrets: list[str]) -> list[str]:
    """Paths that try to come by a secret, on every route of files."""
    targets = ("secret.txt", "../secret.txt", "secret.json", "queue/secret.json", "etc/passwd")
    found = [
        f"{route}{up * depth}{target}" for route in ROUTES for up in UPS for depth in (1, 2, 6) for target in targets
    ]
    found += [f"{route}{secret}" for route in ROUTES for secret in (*secrets, "/etc/passwd", "//etc/passwd")]
    found += [f"{route}{home}/library/{link}" for route in ROUTES for link in ("link.txt", "folder/secret.txt")]
    found += ["files/library/link.txt", "files/library/folder/secret.txt", "files/runs/.hidden/secret.txt"]
    found += [f"files/runs/note.txt%00{target}" for target in targets]
    return [path.replace(" ", "%20") for path in found]


def test_no_path_brings_anything_from_outside(serve: Callable[..., AppServer]) -> None:
    server = serve()
    paths = attempts(server.workspace, hide_secrets(server.workspace))
    assert get(server, "files/runs/note.txt") == (200, b"a note")
    assert len(paths) >= 30 * len(ROUTES)
    for path in paths:
        status, content = get(server, path)
        assert SECRET.encode() not in content and b"root:x:" not in content, path
        assert status != 500, path
    print(f"{len(paths)} attempts, nothing came back")


def test_no_name_of_an_upload_leads_outside(serve: Callable[..., AppServer], tmp_path: Path) -> None:
    server = serve()
    known = set(tmp_path.rglob("*"))
    for name in NAMES:
        status, places = upload(server, name, b"content")
        assert status in (200, 400, 422), name
        for place in places or []:
            assert Path(place).resolve().is_relative_to(server.workspace / ".uploads"), name
    new = [file for file in set(tmp_path.rglob("*")) - known if file.is_file() and file != server.log]
    assert all(file.is_relative_to(server.workspace / ".uploads") for file in new), new
    assert not Path("/tmp/out.png").exists()


def test_without_the_password_there_is_nothing(serve: Callable[..., AppServer]) -> None:
    server = serve("--auth", "somebody:a long password")
    paths = [
        *("", "config", "files/runs/a.txt", "gradio_api/info", "gradio_api/queue/data", "gradio_api/file=/etc/passwd"),
        *("api/v1/jobs", "api/docs", "api/openapi.json", "theme.css", "static/img/logo.svg", UPLOADED),
    ]
    right, wrong = (base64.b64encode(f"somebody:{word}".encode()).decode() for word in ("a long password", "a guess"))
    for path in paths:
        assert get(server, path)[0] == 401, path
        assert get(server, path, Authorization=f"Basic {wrong}")[0] == 401, path
    assert upload(server, "a.png", b"content")[0] == 401
    assert get(server, "", Authorization=f"Basic {right}")[0] == 200
    assert get(server, "api/v1/jobs", Authorization=f"Basic {right}")[0] == 200


def test_two_people_do_not_see_each_other_s_drafts(serve: Callable[..., AppServer], browser: Any) -> None:
    server = serve()
    words = ("the first one's prompt", "the second one's prompt")
    contexts = [browser.new_context() for _ in words]
    pages = [context.new_page() for context in contexts]
    box = "#generate-prompt textarea"
    for page in pages:
        page.goto(server.url)
        page.locator("#tab-generate-button").click()
    for page, word in zip(pages, words, strict=True):
        assert page.locator(box).input_value() == ""
        page.locator(box).fill(word)
        page.locator(box).blur()
    for page, word in zip(pages, words, strict=True):
        page.wait_for_timeout(1500)  # the draft goes into the browser's store
        page.reload()
        page.locator("#tab-generate-button").click()
        page.wait_for_function("([box, word]) => document.querySelector(box)?.value === word", arg=[box, word])
    for context in contexts:
        context.close()


def test_five_hundred_pictures_come_in(serve: Callable[..., AppServer], page: Any, tmp_path: Path) -> None:
    server = serve()
    files = draw_pictures(tmp_path / "many", 500, size=64)
    page.goto(server.url)
    page.locator("#train-upload input[type=file]").set_input_files([str(file) for file in files])
    page.wait_for_function("document.querySelectorAll('#train-captions article').length === 500", timeout=120_000)
    (dataset,) = (server.workspace / "datasets").iterdir()
    assert len(list(dataset.glob("*.png"))) == 500
    assert not list((server.workspace / ".uploads").rglob("*.png")), "what came in twice stays twice"


def test_a_page_asks_nobody_else(serve: Callable[..., AppServer], page: Any) -> None:
    server, asked, wrong = serve(), set(), []
    page.on("request", lambda request: asked.add(urlsplit(request.url)[:2]))
    page.on("pageerror", lambda problem: wrong.append(str(problem)))
    page.goto(server.url)
    for tab in ("train", "runs", "generate", "blend", "library"):
        page.locator(f"#tab-{tab}-button").click()
        page.wait_for_timeout(1000)
    hosts = {host for scheme, host in asked if scheme not in ("data", "blob")}
    assert hosts == {f"127.0.0.1:{server.port}"} and not wrong


LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
    fcntl.ioctl(one, 0x8914, struct.pack("16sh14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_the_app_works_without_any_network() -> None:
    """In a network namespace that has a loopback alone."""
    alone = ["unshare", "--net"]
    try:
        possible = subprocess.run([*alone, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("this user may not make a network namespace")
    test = f"{__file__}::{test_a_page_asks_nobody_else.__name__}"
    inner = ["-m", "pytest", "-rs", "-p", "no:cacheprovider", test]
    done = subprocess.run([*alone, sys.executable, "-c", LOOPBACK_UP, *inner], capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_the_password_stands_in_no_file(serve: Callable[..., AppServer]) -> None:
    word = "a-password-of-its-own"
    server = serve("--auth", f"somebody:{word}")
    headers = {"Authorization": "Basic " + base64.b64encode(f"somebody:{word}".encode()).decode()}
    assert get(server, "", **headers)[0] == 200
    files = [server.log, *(file for file in server.workspace.rglob("*") if file.is_file())]
    assert not [file for file in files if word.encode() in file.read_bytes()]
