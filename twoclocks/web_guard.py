"""Who may use Locust's web UI.

Locust lets any page of the web read its routes and start a test (CORS), and takes every option of the command line from
a form. Here the UI answers its own pages alone, takes what its form has, and, where others than this machine can reach
it, asks for a password.
"""

import hmac
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flask import Response, abort, jsonify, redirect, request, session, url_for
from flask_login import LoginManager, UserMixin, current_user, login_user

from twoclocks.errors import ExperimentError, TwoclocksError, plain
from twoclocks.hosts import address_of, is_near_name, is_wide, shown

log = logging.getLogger("twoclocks")
PASSWORD, PASSWORD_FILE = "TWOCLOCKS_WEB_PASSWORD", "TWOCLOCKS_WEB_PASSWORD_FILE"
MIN_PASSWORD_CHARS = 8
FORM = {"user_count", "spawn_rate", "host", "run_time", "user_classes", "shape_class", "profile"}
"""What Locust's own form sends. Any other of its options would be a way to name files of this machine."""
MAX_FORM_BYTES = 64 * 1024
WRONG_S = 1.0  # a wrong password costs this; meanwhile no other is looked at
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # with none at all a form would not say where it is from
}


def web_password(environ: Mapping[str, str] = os.environ) -> str | None:
    """The password for the web UI, from a file or the environment. Raises TwoclocksError if it cannot be used."""
    path, password = environ.get(PASSWORD_FILE), environ.get(PASSWORD)
    if path:
        try:
            password = Path(path).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "is no text"
            raise TwoclocksError(f"{PASSWORD_FILE}: {path}: {why}") from None
    if password is None or (not path and not password):
        return None
    if len(password) < MIN_PASSWORD_CHARS:
        where = PASSWORD_FILE if path else PASSWORD
        raise TwoclocksError(f"{where}: expected {MIN_PASSWORD_CHARS} characters or more, found {len(password)}")
    return password


def check(host: str, port: int, password: str | None, *, login: bool, is_open: bool, tls: bool) -> list[str]:
    """What the user should know of who can reach the web UI. Raises TwoclocksError where it would be anybody."""
    if login and password is None:
        raise TwoclocksError(f"--web-login: set {PASSWORD}, or {PASSWORD_FILE} to the path of a file that holds it")
    if not is_wide(host):
        return []
    where = f"{shown(host)}:{port}"
    if password is None and not is_open:
        raise TwoclocksError(
            f"--web-host {host or '*'}: whoever reaches {where} could send load and read all results; set {PASSWORD} "
            f"(or {PASSWORD_FILE}) for a login, or leave --web-host out and use `ssh -L {port}:127.0.0.1:{port} "
            "THIS_HOST`, or add --web-open if something else keeps others out, such as a container's port that is "
            "published on 127.0.0.1 only"
        )
    if password is None:
        return [f"web UI: whoever reaches {where} can send load and read all results; --web-open says that nobody does"]
    if not tls:
        return [
            f"web UI: {where} is open to others, and the password goes there unencrypted; see --tls-cert, --tls-key"
        ]
    return []


def guard(
    web_ui: Any,
    base_path: str | None,
    password: str | None,
    names: set[str],
    display: str,
    may_send: Callable[[str], None],
    more: set[str],
) -> None:
    """Close the UI to others. To be called before it starts.

    ``names``: hosts by which it is called, beside addresses and names of local networks; ``display``: the host by which
    a browser calls it, with a port where there is one. ``may_send`` raises ExperimentError for a host of the form that
    load must not go to. ``more``: options that stand in its form, too.
    """
    app = web_ui.app
    app.config["MAX_CONTENT_LENGTH"] = MAX_FORM_BYTES

    @app.before_request
    def refuse_others() -> Response | None:
        origin = request.headers.get("Origin")
        if origin is not None and _netloc(origin) not in {request.host, display or request.host}:
            abort(403, "asked for by a page of another site; behind a proxy, give --web-host-display-name its name")
        # a name that a stranger owns may lead here, and its pages would count as this one's own
        if password is None and not _is_ours(request.host, names):
            abort(403, "called by a name that is not known; use 127.0.0.1, or give it with --web-host-display-name")
        if request.endpoint == "locust.update_user" and not web_ui.userclass_picker_is_active:
            abort(403, "user classes can be changed with --class-picker only")
        if _is_form(web_ui):
            return _refuse_form(web_ui, may_send, FORM | more)
        return None

    @app.after_request
    def with_headers(response: Response) -> Response:
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        response.headers.setdefault("Content-Security-Policy", "frame-ancestors 'none'")
        return response

    if password is not None:
        _ask_for_password(web_ui, base_path or "", password)


def only_in_turn(web_ui: Any, may_begin: Callable[[str], None]) -> None:
    """Refuse forms that come at a wrong time. To be called before it starts.

    ``may_begin`` raises TwoclocksError where a run, or other users of one, cannot be had; told the number of users.
    """

    @web_ui.app.before_request
    def refuse() -> Response | None:
        if _is_form(web_ui):
            try:
                may_begin(request.form.get("user_count", ""))
            except TwoclocksError as error:
                return _refusal(web_ui, error)
        return None


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _is_ours(host: str, names: set[str]) -> bool:
    name = urlsplit(f"//{host}").hostname or ""
    return name in names or address_of(name) is not None or is_near_name(name)


def _is_form(web_ui: Any) -> bool:
    """Of a run, by somebody who may send it; others are told nothing, and led to the login."""
    return request.endpoint == "locust.swarm" and (not web_ui.web_login or current_user.is_authenticated)


def _refuse_form(web_ui: Any, may_send: Callable[[str], None], known: set[str]) -> Response | None:
    """What is wrong with a form, if something is."""
    unknown = sorted(request.form.keys() - known)
    try:
        if unknown:
            raise ExperimentError(f"{', '.join(unknown)[:200]}: not an option of this form")
        if "host" in request.form:
            may_send(request.form["host"])
    except TwoclocksError as error:
        return _refusal(web_ui, error)
    return None


def _refusal(web_ui: Any, error: TwoclocksError) -> Response:
    """In Locust's own words; and in its log, since a form that changes users shows none."""
    log.warning("not done: %s", plain(error)[:300])
    return jsonify({"success": False, "message": str(error), "host": web_ui.environment.host})


class _User(UserMixin):  # type: ignore[misc]
    """Whoever knows the password."""

    id = "user"


def _ask_for_password(web_ui: Any, base_path: str, password: str) -> None:
    app, one_at_a_time = web_ui.app, threading.Lock()
    app.secret_key = secrets.token_bytes(32)  # a session ends with this process
    secure = bool(web_ui.tls_cert and web_ui.tls_key)
    app.config.update(
        SESSION_COOKIE_NAME=f"twoclocks-{web_ui.port}",  # cookies are a host's, whatever its ports
        SESSION_COOKIE_SAMESITE="Strict",
        SESSION_COOKIE_SECURE=secure,
    )
    manager = LoginManager(app)
    manager.login_view = "locust.login"
    manager.user_loader(lambda name: _User() if name == _User.id else None)
    web_ui.login_manager, web_ui.web_login = manager, True
    web_ui.auth_args = {
        "custom_form": {
            "inputs": [{"label": "Password", "name": "password", "is_secret": True, "is_required": True}],
            "callback_url": "./twoclocks/login",
            "submit_button_text": "Log in",
        }
    }

    @app.route(f"{base_path}/twoclocks/login", methods=["POST"])
    def check_password() -> Any:
        given = request.form.get("password", "")
        if not one_at_a_time.acquire(blocking=False):  # also a right one, or many at once would be many tries a second
            abort(429, "another try to log in is under way; go back and try again in a second")
        try:
            if hmac.compare_digest(given.encode(), password.encode()):
                login_user(_User())
                session["auth_error"] = None
                return redirect(url_for("locust.index"))
            time.sleep(WRONG_S)
        finally:
            one_at_a_time.release()
        session["auth_error"] = "That is not the password."
        return redirect(url_for("locust.login"))
