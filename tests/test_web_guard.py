"""Who may use the web UI: its own pages, and who knows the password where others can reach it. Hosts to ask about."""

import contextlib
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from browser import CHROMIUM, browser
from fake_server import FakeServer, plain_answer
from locust_runs import ROOT, free_port, run, started, wait_for

from twoclocks.errors import ExperimentError, TwoclocksError
from twoclocks.hosts import Agreed, agree, is_far, is_near_name, is_public, origin_of
from twoclocks.web_guard import check, web_password

PASSWORD = "correct horse"


def answers(url) -> bool:
    try:
        return httpx.get(url).status_code < 500
    except httpx.HTTPError:
        return False


@contextlib.contextmanager
def ui(place, port, *words, **environ):
    """Locust with its web UI, and with these variables, which are not there for what is started later."""
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            stack.enter_context(started(place, *words, headless=False))
        wait_for(lambda: answers(f"http://127.0.0.1:{port}"))
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def server():
    with FakeServer(lambda body: plain_answer(3, gap_s=0.02)) as one:
        yield one


@pytest.fixture(scope="module")
def open_ui(tmp_path_factory, server):
    """The UI on loopback, of an experiment with a key."""
    port = free_port()
    words = ("-H", server.url, "--web-port", str(port), "--no-report", "--web-host-display-name", "load.example:8443")
    with ui(tmp_path_factory.mktemp("open"), port, *words, OPENAI_API_KEY="sk-0123456789") as url:
        yield url


@pytest.fixture(scope="module")
def closed_ui(tmp_path_factory, server):
    """The UI where others can reach it, with a password."""
    port, place = free_port(), tmp_path_factory.mktemp("closed")
    (place / "password").write_text(PASSWORD + "\n")
    words = ("-H", server.url, "--web-host", "0.0.0.0", "--web-port", str(port), "--no-report")  # noqa: S104
    with ui(place / "runs", port, *words, TWOCLOCKS_WEB_PASSWORD_FILE=str(place / "password")) as url:
        yield url


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Origin": "https://load.example:8443"}, 200),  # of a proxy before it, which sends its own name for Host
        ({"Origin": "https://load.example"}, 403),  # another port there, another site
        ({"Host": "evil.example"}, 403),  # a stranger's name that leads to this machine
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        ({"Host": "localhost:8089"}, 200),
        ({"Host": "tester:8089"}, 200),  # in a network of containers
        ({"Host": "192.168.1.2:8089"}, 200),  # published; an address cannot be a stranger's name
    ],
)
@pytest.mark.parametrize("path", ["/", "/stats/requests", "/twoclocks/live.json", "/logs"])
def test_pages_of_other_sites_get_nothing(open_ui, path, headers, status):
    assert httpx.get(open_ui + path, headers=headers).status_code == status


def test_no_page_puts_the_ui_into_a_frame(open_ui):
    headers = httpx.get(open_ui).headers

    assert headers["content-security-policy"] == "frame-ancestors 'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"run_folder": "/somewhere"}, "run_folder: not an option of this form"),
        ({"locustfile": "x.py", "started": "y"}, "locustfile, started: not an option of this form"),
        ({"host": "http://127.0.0.1:9"}, "the key and the headers are for "),
        ({"host": "http://user:planted@127.0.0.1:9"}, "holds a password"),
        ({"host": "gopher://127.0.0.1:9"}, "expected http://HOST:PORT"),
    ],
)
def test_the_form_names_no_files_and_sends_the_key_nowhere_else(open_ui, server, more, message):
    before = len(server.requests)
    form = {"user_count": "1", "spawn_rate": "1", "host": server.url, **more}
    told = httpx.post(f"{open_ui}/swarm", data=form, headers={"Origin": open_ui}).json()

    assert (told["success"], message in told["message"]) == (False, True), told
    assert "planted" not in str(told) + httpx.get(open_ui).text
    assert len(server.requests) == before
    assert httpx.get(f"{open_ui}/stats/requests").json()["state"] == "ready"


def test_a_form_is_bounded(open_ui):
    assert httpx.post(f"{open_ui}/swarm", data={"host": "x" * 100_000}).status_code == 413


def test_user_classes_are_not_changed_from_outside(open_ui):
    assert httpx.post(f"{open_ui}/user", json={"user_class_name": "StreamingUser", "host": "x"}).status_code == 403


def test_without_the_password_there_is_nothing_but_the_login(closed_ui):
    paths = ["/", "/tasks", "/logs", "/exceptions", "/exceptions/csv", "/stats/requests", "/stats/requests/csv"]
    paths += ["/stats/failures/csv", "/stats/report", "/worker-count", "/twoclocks/live.json", "/twoclocks/live.js"]
    for path in [*paths, "/twoclocks/requests.jsonl", "/stats/requests_full_history/csv"]:
        told = httpx.get(closed_ui + path)
        assert (told.status_code, told.headers["location"].partition("?")[0]) == (302, "/login"), path
    for path in ("/swarm", "/stop", "/stats/reset"):
        assert httpx.post(closed_ui + path).headers["location"].startswith("/login"), path
    odd = httpx.post(f"{closed_ui}/swarm", data={"host": "no address", "csv": "x"})
    assert odd.headers["location"].startswith("/login")  # and not what is wrong with it, and where the load goes
    assert httpx.get(f"{closed_ui}/login", headers={"Host": "load.example"}).status_code == 200  # any name will do


def test_a_wrong_password_costs_time_and_opens_nothing(closed_ui):
    with httpx.Client(base_url=closed_ui) as client:
        told = client.post("/twoclocks/login", data={"password": "wrong"})

        assert told.elapsed.total_seconds() >= 1
        assert told.headers["location"] == "/login"
        assert "That is not the password." in client.get("/login").text
        assert client.get("/logs").status_code == 302


def test_passwords_are_tried_one_at_a_time(closed_ui):
    over = threading.Event()

    def try_wrong_ones():
        while not over.is_set():
            httpx.post(f"{closed_ui}/twoclocks/login", data={"password": "wrong"}, timeout=60)

    trying = threading.Thread(target=try_wrong_ones)
    trying.start()
    try:
        right = {"password": PASSWORD}
        wait_for(lambda: httpx.post(f"{closed_ui}/twoclocks/login", data=right, timeout=60).status_code == 429)
    finally:
        over.set()
        trying.join()
    assert httpx.post(f"{closed_ui}/twoclocks/login", data=right, timeout=60).headers["location"] == "/"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_person_logs_in(closed_ui):
    with browser() as page:
        page.size(1280)
        page.call("Page.navigate", url=closed_ui)
        page.wait("!!document.querySelector('input[type=password]')")
        page.ask("document.querySelector('input[type=password]').focus()")
        for letter in PASSWORD:
            page.press(letter)
        page.ask("document.querySelector('button[type=submit]').click()")
        page.wait("!!document.body?.innerText.includes('START')")
        told = page.ask("fetch('/stats/requests').then((r) => r.json()).then((told) => told.state)")

    assert told == "ready"


def test_the_session_is_for_this_ui_alone(closed_ui):
    with httpx.Client(base_url=closed_ui) as client:
        told = client.post("/twoclocks/login", data={"password": PASSWORD})

        assert re.match(
            rf"twoclocks-{httpx.URL(closed_ui).port}=\S+; HttpOnly; Path=/; SameSite=Strict$",
            told.headers["set-cookie"],
        )
        assert client.get("/logs").status_code == 200
        assert client.get("/logs", headers={"Origin": "http://evil.example"}).status_code == 403


def test_a_ui_that_anybody_could_use_is_not_started(tmp_path):
    code, output = run(tmp_path, "-H", "http://127.0.0.1:9", "--web-host", "0.0.0.0", "--web-port", "0", headless=False)  # noqa: S104

    assert code == 2
    assert "twoclocks: --web-host 0.0.0.0: whoever reaches" in output
    assert "TWOCLOCKS_WEB_PASSWORD" in output
    assert "--web-open" in output


@pytest.mark.parametrize(
    ("host", "password", "login", "is_open", "tls", "told"),
    [
        ("127.0.0.1", None, False, False, False, []),
        ("::1", None, False, False, False, []),
        ("0.0.0.0", PASSWORD, False, False, True, []),  # noqa: S104
        ("0.0.0.0", PASSWORD, False, False, False, ["the password goes there unencrypted"]),  # noqa: S104
        ("", None, False, True, False, ["whoever reaches *:8089 can send load"]),
    ],
)
def test_what_is_told_of_who_can_reach_it(host, password, login, is_open, tls, told):
    texts = check(host, 8089, password, login=login, is_open=is_open, tls=tls)

    assert len(texts) == len(told)
    assert all(part in text for part, text in zip(told, texts, strict=True))


@pytest.mark.parametrize("host", ["0.0.0.0", "", "*", "10.0.0.1", "host.example"])  # noqa: S104
def test_others_need_a_password(host):
    with pytest.raises(TwoclocksError, match="whoever reaches"):
        check(host, 8089, None, login=False, is_open=False, tls=True)
    with pytest.raises(TwoclocksError, match="set TWOCLOCKS_WEB_PASSWORD"):
        check("127.0.0.1", 8089, None, login=True, is_open=False, tls=False)


def test_the_password_is_in_a_file_or_in_the_environment(tmp_path):
    path = tmp_path / "password"
    path.write_text("of the file\n")

    assert web_password({}) is None
    assert web_password({"TWOCLOCKS_WEB_PASSWORD": ""}) is None
    assert web_password({"TWOCLOCKS_WEB_PASSWORD": PASSWORD}) == PASSWORD
    assert web_password({"TWOCLOCKS_WEB_PASSWORD": PASSWORD, "TWOCLOCKS_WEB_PASSWORD_FILE": str(path)}) == "of the file"
    path.write_text("")
    for environ in (
        {"TWOCLOCKS_WEB_PASSWORD": "short"},
        {"TWOCLOCKS_WEB_PASSWORD_FILE": str(path)},
        {"TWOCLOCKS_WEB_PASSWORD_FILE": str(tmp_path / "none")},
    ):
        with pytest.raises(TwoclocksError) as caught:
            web_password(environ)
        assert "short" not in str(caught.value).replace("shorter", "")


# hosts


@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("127.0.0.1", False),
        ("127.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("172.32.0.1", True),
        ("192.168.1.1", False),
        ("169.254.1.1", False),
        ("100.64.0.1", False),  # shared by a provider's customers, or an overlay network
        ("8.8.8.8", True),
        ("134744072", True),  # 8.8.8.8, as the system also reads it
        ("0x8080808", True),
        ("::1", False),
        ("fd00::1", False),
        ("fe80::1", False),
        ("2001:4860:4860::8888", True),
        ("::ffff:8.8.8.8", True),
        ("::ffff:10.0.0.1", False),
        ("localhost", False),
        ("vllm", False),
        ("vllm.default.svc", False),
        ("vllm.default.svc.cluster.local.", False),
        ("box.local", False),
        ("inside.example", False),
        ("outside.example", True),
        ("both.example", True),
        ("nowhere.example", False),
    ],
)
def test_hosts_that_are_not_the_users_own(host, public):
    names = {
        "inside.example": ["10.0.0.1", "fd00::1"],
        "outside.example": ["8.8.8.8"],
        "both.example": ["10.0.0.1", "8.8.8.8"],
    }

    assert is_public(host, lambda name: names.get(name, [])) == public


def test_a_name_that_a_proxy_looks_up_is_far(monkeypatch):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")

    assert is_far("http://nowhere.invalid:8000")
    assert not is_far("http://10.0.0.1:8000")
    assert not is_near_name("localhost.evil.example")
    assert origin_of("http://a") == ("http", "a", 80)


def test_a_far_host_is_asked_about_once(tmp_path):
    agreed, said = Agreed(tmp_path / "state" / "hosts.txt"), []
    with pytest.raises(ExperimentError, match="repeat with --yes, once for each host"):
        agree("http://8.8.8.8:1", agreed, yes=False, interactive=True, say=said.append)
    agree("http://8.8.8.8:1", agreed, yes=False, interactive=False, say=said.append)  # a job must not hang
    agree("http://8.8.8.8:1", agreed, yes=True, interactive=True, say=said.append)
    agree("http://8.8.8.8:2/v1", agreed, yes=False, interactive=True, say=said.append)
    with pytest.raises(ExperimentError, match=r"8\.8\.4\.4"):
        agree("http://8.8.4.4:1", agreed, yes=False, interactive=True, say=said.append)
    agree("http://10.0.0.1:1", agreed, yes=False, interactive=True, say=said.append)
    agree("http://8.8.4.4:1", Agreed(Path("/proc/none/hosts.txt")), yes=True, interactive=True, say=said.append)

    assert said == ["the load goes to 8.8.8.8, which is neither this machine nor in a private network"]
    assert agreed.path.read_text() == "8.8.8.8\n"


@pytest.mark.parametrize("command", ["locust", "twoclocks"])
def test_in_a_terminal_a_far_host_is_asked_about_before_anything_is_sent(tmp_path, command):
    """A public address, by its form. Nothing is sent there; if it were, it would come to a proxy that is not there."""
    words = [sys.executable, "-m", command]
    words += ["-f", str(ROOT / "load_test.py"), "--headless", "-H"] if command == "locust" else ["run", "--url"]
    mine, others = pty.openpty()
    environ = os.environ | {"XDG_STATE_HOME": str(tmp_path), "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    process = subprocess.Popen(
        [*words, "http://203.0.114.1:9"], cwd=ROOT, stdin=others, stdout=others, stderr=others, env=environ
    )
    os.close(others)
    said = b""
    while True:
        try:
            said += (part := os.read(mine, 65536))
        except OSError:  # the end of a terminal
            break
        if not part:
            break
    os.close(mine)

    assert process.wait(60) == 2
    assert b"repeat with --yes, once for each host" in said
    assert list(tmp_path.iterdir()) == []
