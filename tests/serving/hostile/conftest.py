"""Sites to attack, and the table of what the attacks did."""

import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.serving import write_embedder
from tests.serving.conftest import Server
from tests.serving.hostile.site import LONG, THRESHOLDS, Outcome, Site

FILES = 1024  # the usual soft limit of open files
TABLE: list[tuple[str, Outcome]] = []


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Embedder of 512 numbers, as people use them: how large a JSON body may be grows with them."""
    return write_embedder(tmp_path_factory.mktemp("embedder") / "made-up")


@pytest.fixture(scope="module")
def open_site(embedder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Site]]:
    """Opens sites by their settings; one is used until it dies. In the end all must stop and have lost nothing."""
    sites: list[tuple[dict[str, object], Site]] = []

    def open_one(**settings: object) -> Site:
        for known, site in sites:
            if known == settings and site.lives:
                return site
        store = tmp_path_factory.mktemp("store") / "gallery.db"
        server = _start(embedder=embedder, store=store, **THRESHOLDS, **settings)
        sites.append((settings, Site(server, str(settings.get("api_key") or ""))))
        return sites[-1][1]

    yield open_one
    faults = []
    for settings, site in sites:
        TABLE.extend(site.table)
        faults += site.close()
        again = Server(embedder=embedder, store=site.server.store, **THRESHOLDS, **settings)
        faults += [f"lost: {name}" for name in site.lost(again)]
        again.kill()
    assert not faults


def _start(**settings: object) -> Server:
    """A server with the usual limit of open files."""
    ours = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, ours[1]))
    try:
        return Server(**settings)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, ours)


@pytest.fixture(scope="module", autouse=True)
def many_files() -> Iterator[None]:
    """For crowds, we may have more files open than the server."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def site(open_site: Callable[..., Site]) -> Site:
    """A server with the settings that people get who set nothing."""
    return open_site()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not LONG or not TABLE:
        return
    terminalreporter.section("attacks")
    form = "{:44} {:>22} {:>7} {:>6} {:>7} {:>6}  {}"
    terminalreporter.line(form.format("attack", "answered", "CPU s", "MB", "worst", "noise", "verdict"))
    for name, outcome in TABLE:
        cost, answers = outcome.cost, sorted(set(outcome.answers))
        counted = ", ".join(f"{outcome.answers.count(status)}x{status}" for status in answers) or "-"
        numbers = [f"{cost.cpu_s:.2f}", f"{cost.growth_mb:.0f}", f"{cost.worst_ms:.0f}", f"{cost.noise_ms:.0f}"]
        verdict = "; ".join(outcome.faults)[:160] or "held"
        terminalreporter.line(form.format(name[:44], counted[:22], *numbers, verdict))
