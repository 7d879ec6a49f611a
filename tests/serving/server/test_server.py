"""Who is served at which address, and what the process around the app sees to."""

import inspect
import json
import logging
import os
import re
import signal
import socket

import pytest
import uvicorn
from typer.testing import CliRunner

from serving.cli import app
from serving.cli.serve import serve
from serving.server.process import _connections, _listen, _signals_taken, host_names, run
from serving.settings import Settings, from_values
from serving.telemetry.logs import LINES_A_MINUTE, Sparing
from trainer.errors import UserError

KEY = "a-key-of-this-very-test"


def settings(**values):
    return from_values({"embedder": "e", "store": "s", **values})


@pytest.mark.parametrize(
    ("host", "values", "names"),
    [
        ("127.0.0.1", {}, {"127.0.0.1", "localhost", "::1", "[::1]"}),
        ("::1", {"api_key": KEY}, {"127.0.0.1", "localhost", "::1", "[::1]"}),
        ("localhost", {"allowed_hosts": "a.test, *.b.test"}, {"a.test", "*.b.test"}),
        ("0.0.0.0", {"api_key": KEY}, {"*"}),
        ("0.0.0.0", {"api_key": KEY, "allowed_hosts": "a.test"}, {"a.test"}),
        ("10.0.0.7", {"anonymous": True, "allowed_hosts": "a.test"}, {"a.test"}),
    ],
)
def test_the_names_that_are_answered(host, values, names):
    assert set(host_names(settings(**values), host)) == names


@pytest.mark.parametrize(
    ("host", "values", "told"),
    [
        ("0.0.0.0", {}, "HYPERSPHERE_API_KEY"),
        ("::", {"api_key": None}, "--anonymous"),
        ("10.0.0.7", {"anonymous": True}, "--allowed-hosts"),
        ("127.0.0.1", {"trusted_proxies": "127.0.0.1"}, "HYPERSPHERE_API_KEY"),
        ("127.0.0.1", {"trusted_proxies": "*", "anonymous": True}, "--allowed-hosts"),
    ],
)
def test_nobody_else_is_served_by_oversight(host, values, told):
    with pytest.raises(UserError, match=told):
        run(settings(**values), host, 0)


@pytest.mark.parametrize(
    "values",
    [
        *({name: value} for name in ("head_timeout_s", "body_timeout_s", "decode_cpu_s") for value in ("inf", 1e12)),
        *({"idempotency_hours": value} for value in ("inf", 1e13)),
        *({name: 10**14} for name in ("keep_alive_s", "shutdown_s")),
        *({"allowed_hosts": value} for value in ("a*b.test", "https://a.test", "a.test:80", "a.test,*.*")),
        *({"trusted_proxies": value} for value in ("10.0.0.0/33", "proxy.test", "10.0.0.1/8")),
        {"store": "/"},
    ],
    ids=str,
)
def test_values_that_would_fail_later_are_refused_at_once(values):
    with pytest.raises(UserError, match=next(iter(values))):
        settings(**values)


def test_names_and_networks_are_taken():
    settings(allowed_hosts="a.test, *.b.test,127.0.0.1,[::1], ::1,*", trusted_proxies="10.0.0.0/8, ::1,127.0.0.1")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_loop_runs_is_obeyed(number):
    server = uvicorn.Server(uvicorn.Config(None))
    with _signals_taken(server):
        signal.raise_signal(number)
    assert server.should_exit


@pytest.mark.parametrize("key", ["", " \n", "short", "\n".join(["a" * 20] * 20)])
def test_a_key_that_is_none_does_not_open_the_service(key):
    with pytest.raises(UserError, match="api_key") as refused:
        settings(api_key=key)
    assert "aaaa" not in str(refused.value)
    assert "items" not in str(refused.value)


def test_a_key_from_a_file_may_end_in_a_newline():
    assert settings(api_key=KEY + "\r\n").api_key.get_secret_value() == KEY


def test_the_listener_says_that_it_is_tcp():
    """asyncio turns Nagle's algorithm off only then, and answers on kept-alive connections wait 40 ms otherwise."""
    with _listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_the_key_is_taken_out_of_the_environment(monkeypatch):
    """Other processes inherit it."""
    seen = []
    monkeypatch.setattr("serving.server.process.run", lambda *taken: seen.append((taken[0], dict(os.environ))))
    monkeypatch.setenv("HYPERSPHERE_API_KEY", KEY)
    CliRunner().invoke(app, ["serve", "--embedder", "e"], catch_exceptions=False)
    ((taken, environment),) = seen
    assert taken.api_key.get_secret_value() == KEY
    assert KEY not in str(environment)


def test_an_empty_key_is_an_oversight(monkeypatch):
    monkeypatch.setenv("HYPERSPHERE_API_KEY", "")
    with pytest.raises(UserError, match="empty"):
        CliRunner().invoke(app, ["serve", "--embedder", "e"], catch_exceptions=False)


OTHERS = {  # than the defaults; whole numbers are one more
    **{
        "embedder": "e",
        "store": "s.sqlite",
        "api_key": KEY,
        "keys": "k",
        "audit": "a",
        "tls_cert": "c",
        "tls_key": "ck",
        "allowed_hosts": "a.example",
        "trusted_proxies": "10.0.0.1",
    },
    **{"template": "mean", "index": "fp16", "encryption_key_file": "k", "below_threshold": "always"},
    **{"verify_threshold": 0.25, "identify_threshold": 0.5, "rate_limit": 4.0},
    **{"decode_cpu_s": 2.5, "head_timeout_s": 3.5, "body_timeout_s": 4.5, "idempotency_hours": 5.5},
    **{
        "detector": "d",
        "min_quality": "size=9",
        "keep_images": True,
        "log_format": "json",
        "traces": "http://t",
        "detect_cpu_s": 1.5,
    },
    **{"anonymous": True, "restored": True, "max_image_bytes": 2048},
}


@pytest.mark.parametrize("way", ["option", "variable", "settings.yaml", "settings.toml"])
def test_every_setting_is_an_option_a_variable_and_in_a_file(way, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("serving.server.process.run", lambda *taken: seen.append(taken))
    given = {name: OTHERS.get(name) or field.default + 1 for name, field in Settings.model_fields.items()}
    as_options = given if way == "option" else {"restored": True}  # which is for one start
    line = ["serve", "--host", "::1", "--port", "0"]
    for name, value in as_options.items():
        flag = f"--{name.replace('_', '-')}"
        line += [flag] if value is True else [flag, str(value)]
    others = {name: value for name, value in given.items() if name not in as_options}
    if way == "variable":
        for name, value in others.items():
            monkeypatch.setenv(f"HYPERSPHERE_{name.upper()}", str(value))
    elif others:
        sign = " =" if way.endswith("toml") else ":"  # JSON's values are YAML's and TOML's as well
        (tmp_path / way).write_text("".join(f"{name}{sign} {json.dumps(value)}\n" for name, value in others.items()))
        line += ["--settings", str(tmp_path / way)]
    CliRunner().invoke(app, line, catch_exceptions=False)
    ((taken, host, port),) = seen
    assert (host, port) == ("::1", 0)
    assert taken == from_values(given)


@pytest.mark.parametrize(("variable", "near"), [("MAX_IMGES", "MAX_IMAGES"), ("KEY", "KEYS"), ("STORES", "STORE")])
def test_a_variable_that_is_nearly_a_settings_is_refused(variable, near, monkeypatch):
    monkeypatch.setattr("serving.server.process.run", lambda *taken: None)
    for other in ("TEST", "SERVICE_HOST", "SERVICE_PORT", "PORT_8000_TCP_ADDR", "RESTORED"):
        monkeypatch.setenv(f"HYPERSPHERE_{other}", "3")  # Kubernetes sets such ones, too
    CliRunner().invoke(app, ["serve", "-e", "e"], catch_exceptions=False)
    monkeypatch.setenv(f"HYPERSPHERE_{variable}", "3")
    with pytest.raises(UserError, match=f"HYPERSPHERE_{variable} is no setting; the nearest is HYPERSPHERE_{near}$"):
        CliRunner().invoke(app, ["serve", "-e", "e"], catch_exceptions=False)


def test_an_option_goes_before_a_variable_and_a_variable_before_the_file(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("serving.server.process.run", lambda *taken: seen.append(taken))
    file = tmp_path / "s.yaml"
    file.write_text("embedder: [a, b]\nport: 1\nhost: ::1\nmax_images: 3\nworkers: 3\nanonymous: true\n")
    monkeypatch.setenv("HYPERSPHERE_SETTINGS", str(file))
    monkeypatch.setenv("HYPERSPHERE_WORKERS", "4")
    monkeypatch.setenv("HYPERSPHERE_PORT", "2")
    CliRunner().invoke(app, ["serve", "--port", "3"], catch_exceptions=False)
    ((taken, host, port),) = seen
    assert (host, port, taken.workers, taken.max_images, taken.anonymous) == ("::1", 3, 4, 3, True)
    assert [path.name for path in taken.embedder] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("max_imges: 3", "the nearest is 'max_images'"),
        ("max-images: 3", "the nearest is 'max_images'"),
        ("restored: true", "is no setting"),
        ("settings: other.yaml", "is no setting"),
        ("max_images: [3]", "neither a text nor a number"),
        ("embedder: [{}]", "neither a text nor a number"),
        ("- 3", "no names with values"),
        ("api_key: 'hidden-and-secret\n", "line 2"),
        ("api_key: {hidden-and-secret: 1}", "neither a text"),
        ("embedder: !!python/object:os.system hidden-and-secret", "line 1"),
        ("api_key: hidden", "api_key"),
        ("\x00", "cannot be read"),
    ],
)
def test_what_is_no_setting_in_a_file_is_said(text, told, tmp_path):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError, match=told) as refused:
        CliRunner().invoke(app, ["serve", "-e", "e", "--settings", str(tmp_path / "s.yaml")], catch_exceptions=False)
    assert "hidden" not in str(refused.value)
    with pytest.raises(UserError, match="cannot be read"):
        CliRunner().invoke(app, ["serve", "--settings", str(tmp_path / "none.toml")], catch_exceptions=False)


def test_a_setting_that_is_not_given_has_its_default(monkeypatch):
    seen = []
    monkeypatch.setattr("serving.server.process.run", lambda *taken: seen.append(taken))
    CliRunner().invoke(app, ["serve", "-e", "e"], catch_exceptions=False)
    assert seen == [(Settings(embedder="e", store="gallery.sqlite"), "127.0.0.1", 8000)]


def test_help_says_what_every_setting_is_for():
    done = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 0
    assert inspect.getdoc(serve).splitlines()[0] in done.output
    panels = re.split(r"─ ([A-Z][a-z ]+) ─", done.output)
    assert panels[1::2] == ["Options", "Who is served", "Limits", "Times"]
    for name, field in Settings.model_fields.items():
        (line,) = (line for line in done.output.splitlines() if re.match(rf"│[ *]+--{name.replace('_', '-')} ", line))
        words = field.description.replace("`", "").partition("null")[0]
        assert words[1:] in line, name
    first = panels[2]
    assert all(f"--{name} " in first for name in ("embedder", "store", "host", "port", "restored", "workers"))
    assert all(f"--{name} " not in first for name in ("api-key", "max-images", "shutdown-s"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["serve"], "Missing option '--embedder'"),
        (["serve", "-e", "e", "--port", "70000"], "--port"),
        (["serve", "-e", "e", "--max-imges", "3"], "No such option: --max-imges"),
        (["serve", "-e", "e", "more"], "unexpected extra argument"),
    ],
)
def test_a_command_line_that_is_wrong_ends_with_a_sentence(line, words):
    done = CliRunner().invoke(app, line, env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 2
    assert words in done.output


@pytest.mark.parametrize(("workers", "connections"), [(2, 512), (100, 512), (200, 1024 - 64 - 4 * 200), (256, 8)])
def test_decoders_leave_descriptors_to_the_connections(workers, connections, monkeypatch):
    """Without one left, no connection is accepted and no idle one makes room."""
    limits = [(1024, 1024)]
    monkeypatch.setattr("resource.getrlimit", lambda _: limits[-1])
    monkeypatch.setattr("resource.setrlimit", lambda _, both: limits.append(both))
    assert _connections(settings(workers=workers, max_connections=512)) == connections


def test_logs_are_spared_of_repetitions(caplog):
    sparing = Sparing()
    lines = [logging.LogRecord("x", logging.WARNING, "", 0, "a wrong key came from %s", (k,), None) for k in range(100)]
    let_through = [record for record in lines if sparing.filter(record)]
    assert len(let_through) == LINES_A_MINUTE + 1
    assert "more lines like this are left out until" in let_through[-1].getMessage()
    other = logging.LogRecord("x", logging.WARNING, "", 0, "another", (), None)
    assert sparing.filter(other)
    later = logging.LogRecord("x", logging.WARNING, "", 0, "a wrong key came from %s", (1,), None)
    later.created += 61
    assert sparing.filter(later)
