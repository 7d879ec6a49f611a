"""Many hostile clients at once: none may keep what all need."""

import threading
import time

from tests.serving.hostile import crowds
from tests.serving.hostile.crowds import Met, crowd
from tests.serving.hostile.site import LONG, Outcome
from tests.serving.hostile.wire import http, json, speak, statuses

MIB = 2**20
SLACK_S = 5  # on a machine with other work
# The long form attacks the defaults; the short one a server that is as patient, in smaller measure.
QUICK = {} if LONG else {"head_timeout_s": 1, "body_timeout_s": 2}
HEAD_S, BODY_S = (10, 30) if LONG else (1, 2)
CLIENTS = 200 if LONG else 40


def _closed(outcome: Outcome, met: list[Met], within: float) -> None:
    """None of them may stay."""
    outcome.answers = [one.status for one in met]
    stayed = [one for one in met if one.seconds > within + SLACK_S]
    if stayed:
        outcome.faults.append(f"{len(stayed)} of {len(met)} connections were open after {within + SLACK_S} s")


def _refused(outcome: Outcome, *allowed: int) -> None:
    wrong = set(outcome.answers) - set(allowed)
    if wrong:
        outcome.faults.append(f"answered {sorted(wrong)}, allowed {allowed}")


def test_silent_connections_are_closed(open_site):
    site = open_site(**QUICK)
    with site.attacked(f"{CLIENTS} silent connections") as outcome:
        _closed(outcome, crowd(site.address, [crowds.nothing() for _ in range(CLIENTS)], HEAD_S + SLACK_S + 1), HEAD_S)


def test_slow_heads_are_closed(open_site):
    site = open_site(**QUICK)
    request = http("GET", "/healthz", b"", "X-Padding: " + "a" * 200)
    with site.attacked(f"{CLIENTS} heads, a byte a second") as outcome:
        members = [crowds.drip(request) for _ in range(CLIENTS)]
        _closed(outcome, crowd(site.address, members, HEAD_S + SLACK_S + 1), HEAD_S)
        _refused(outcome, 0, 408)


def test_slow_second_heads_are_closed(open_site):
    """A kept-alive connection is no way around the time limit."""
    site = open_site(**QUICK)
    good = http("GET", "/healthz").replace(b"Connection: close\r\n", b"")

    async def member():
        yield good
        async for byte in crowds.drip(http("GET", "/healthz", b"", "X-Padding: " + "a" * 200)):
            yield byte

    with site.attacked(f"{CLIENTS} second heads, a byte a second") as outcome:
        _closed(outcome, crowd(site.address, [member() for _ in range(CLIENTS)], HEAD_S + SLACK_S + 1), HEAD_S)


def test_slow_bodies_are_refused_and_closed(open_site):
    site = open_site(**QUICK)
    clients = 40  # fewer than max_requests, so that none is refused at the door
    for kind, body in (("JSON", json(b" " * 1000)), ("form", crowds.large_form(1000))):
        with site.attacked(f"{clients} {kind} bodies, a byte a second") as outcome:
            members = [crowds.after_head(body) for _ in range(clients)]
            _closed(outcome, crowd(site.address, members, BODY_S + SLACK_S + 1), BODY_S)
            _refused(outcome, 408)


def test_idle_connections_do_not_shut_others_out(open_site):
    """More of them than the usual limit of open files."""
    site = open_site()
    with site.attacked("1,100 idle connections") as outcome:
        seen: list[list[int]] = []

        def look() -> None:
            time.sleep(2)
            seen.append(statuses(speak(site.address, [http("GET", "/healthz")])))

        looker = threading.Thread(target=look)
        looker.start()
        met = crowd(site.address, [crowds.nothing() for _ in range(1100)], 5)
        looker.join()
        outcome.answers = [one.status for one in met]
        if seen != [[200]]:
            outcome.faults.append(f"a good client among them was answered {seen}")


def test_a_flood_of_bodies_stays_within_the_memory_for_bodies(open_site):
    site = open_site() if LONG else open_site(max_buffered_bytes=64 * MIB, **QUICK)
    clients, most_mb = (60, 256 * MIB / 1e6) if LONG else (8, 64 * MIB / 1e6)
    request = crowds.large_form(31 * MIB)
    with site.attacked(f"{clients} bodies of 31 MiB together") as outcome:
        outcome.memory_mb = most_mb + 200
        outcome.requests = clients
        met = crowd(site.address, [crowds.hold_back(request, 3) for _ in range(clients)], BODY_S + SLACK_S)
        outcome.answers = [one.status for one in met]
        _refused(outcome, 0, 408, 413, 415, 422, 503)


def test_readers_who_do_not_read_cost_little(open_site):
    site = open_site(**QUICK)
    large = http("GET", "/docs-assets/swagger-ui-bundle.js").replace(b"close", b"keep-alive")
    with site.attacked(f"{CLIENTS} clients who do not read") as outcome:
        outcome.requests = CLIENTS
        with crowds.deaf(site.address, CLIENTS, large * 20):
            time.sleep(2)


def test_a_long_pipeline_is_answered_in_turn_or_cut_off(open_site):
    site = open_site()
    many = 2000
    with site.attacked(f"{many} requests in one go") as outcome:
        keep = http("GET", "/healthz").replace(b"Connection: close\r\n", b"")
        outcome.answers = statuses(speak(site.address, [keep * many]))
        _refused(outcome, 200, 400)


def test_clients_who_hang_up_leave_nothing_behind(open_site):
    site = open_site()
    many = 100 if LONG else 20
    request = crowds.large_form(8 * MIB)
    with site.attacked(f"{many} clients who hang up") as outcome:
        outcome.requests = many
        for _ in range(many):
            crowds.hang_up_midway(site.address, request)


KEY = "correct-horse-battery-staple"


def test_who_has_no_key_cannot_crowd_out_who_has(open_site):
    site = open_site(api_key=KEY)
    clients, each = 80, 5
    with site.attacked(f"{clients} clients at /readyz and /metrics without a key") as outcome:
        outcome.requests = clients
        stop, good = threading.Event(), []

        def work() -> None:
            with site.server.client() as client:
                while not stop.is_set():
                    good.append(client.get("/v1/subjects", headers={"Authorization": f"Bearer {KEY}"}).status_code)

        worker = threading.Thread(target=work)
        worker.start()

        async def ask(target: str):
            for _ in range(each):
                yield http("GET", target).replace(b"Connection: close\r\n", b"")
            yield http("GET", target)

        targets = ["/readyz", "/metrics"] * (clients // 2)
        outcome.answers = [one.status for one in crowd(site.address, [ask(target) for target in targets], 20)]
        stop.set()
        worker.join()
        _refused(outcome, 200, 401, 429)
        if not good or set(good) != {200}:
            outcome.faults.append(f"who has the key was answered {sorted(set(good))}")
    for target in ("/readyz", "/metrics"):
        said = speak(site.address, [http("GET", target)])
        assert b"gallery" not in said, f"{target} tells a stranger about the gallery"


def test_guessing_keys_is_slowed_down_and_logged(open_site):
    site = open_site(api_key=KEY)
    guesses = 300

    def guess(number: int) -> int:
        request = http("GET", "/v1/subjects", b"", f"Authorization: Bearer guess-{number:012d}")
        return statuses(speak(site.address, [request], source="127.0.0.2"))[-1]

    with site.attacked(f"{guesses} keys guessed") as outcome:
        outcome.answers = [guess(number) for number in range(guesses)]
        _refused(outcome, 401, 429)
        if outcome.answers[0] != 401 or outcome.answers[-1] != 429:
            outcome.faults.append("guessing goes on without end")
    log = "".join(site.server.output)
    assert "127.0.0.2" in log, "nobody learns of it"
    assert KEY not in log
    assert "guess-" not in log
