"""Crafted images over HTTP. What decoders do with them is tested beside the decoders; here, that nobody notices."""

import os
import random
import threading
import time

import httpx
import numpy as np
import pytest

from tests.serving.hostile.images import ATTACKS, MANY_PIXELS, good
from tests.serving.hostile.site import LONG
from tests.serving.hostile.wire import REFUSED, Attack, image_form

# One of a kind in the short form: what holds a decoder for longest, what is largest, and what lies.
SHORT = (
    "jpeg: 3,000 scans of 16 MP",
    "jpeg: as many scans of colour as are allowed",
    "png: 16 MP of 64-bit pixels, interlaced",
    "png: iCCP",
    "tiff: strips that overlap",
    "webp: 16 MP with losses",
)
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
MUTATIONS = 33_000 if LONG else 150
DECODED = REFUSED | {200}


@pytest.mark.parametrize("name", ATTACKS if LONG else SHORT)
def test_a_crafted_image_costs_little(site, name):
    site.attack(name, {name: Attack(lambda: image_form(ATTACKS[name]()), DECODED)})


def test_headers_that_promise_too_much_are_refused(site):
    attacks = {name: Attack(lambda make=make: image_form(make())) for name, make in MANY_PIXELS.items()}
    site.attack("headers that promise too much", attacks)


def test_many_bombs_at_once_do_not_shut_others_out(open_site):
    """Both decoders are busy with bombs all the time; a good picture is read nevertheless."""
    site = open_site()
    bomb = ATTACKS["jpeg: as many scans of colour as are allowed"]()
    clients = 16 if LONG else 4
    with site.attacked(f"{clients} bombs at once") as outcome:
        outcome.requests = clients + 1
        outcome.memory_mb *= 2  # two at a time
        answers = outcome.answers

        def throw() -> None:
            with site.server.client() as client:
                answers.append(client.post("/v1/identify", files={"image": ("a", bomb)}, timeout=120).status_code)

        throwers = [threading.Thread(target=throw) for _ in range(clients)]
        for thrower in throwers:
            thrower.start()
        time.sleep(0.2)
        with site.server.client() as client:
            found = client.post("/v1/identify", files={"image": ("a", good("PNG"))}, timeout=120)
        for thrower in throwers:
            thrower.join()
        if found.status_code != 200:
            outcome.faults.append(f"a good picture was answered {found.status_code}: {found.text[:200]}")
        if not set(answers) <= DECODED | {503}:
            outcome.faults.append(f"bombs were answered {sorted(set(answers))}")


def _mutated(image: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut out, doubled or added."""
    spoiled = bytearray(image)
    for _ in range(rng.randint(1, 8)):
        start = rng.randrange(len(spoiled))
        end = min(len(spoiled), start + rng.choice((1, 1, 2, 4, 16)))
        kind = rng.randrange(4)
        if kind == 0:
            spoiled[start:end] = rng.randbytes(end - start)
        elif kind == 1 and len(spoiled) > 40:
            del spoiled[start:end]
        elif kind == 2:
            spoiled[start:start] = spoiled[start:end]
        else:
            spoiled[start] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
    return bytes(spoiled)


@pytest.mark.timeout(1800)
def test_mutated_images_are_decoded_or_refused(open_site):
    """The seed is told, so that a fault can be made again: HOSTILE_SEED."""
    site = open_site()
    seed = int(os.environ.get("HOSTILE_SEED", np.random.SeedSequence().entropy % 2**32))  # type: ignore[operator]
    images = [good(format, side) for format in FORMATS for side in (16, 40)]
    with site.attacked(f"{MUTATIONS} mutated images, seed {seed}") as outcome:
        outcome.requests = MUTATIONS
        workers = [threading.Thread(target=_post_mutations, args=(site, images, seed + n, outcome)) for n in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()


def _post_mutations(site, images, seed, outcome):
    rng = random.Random(seed)
    with site.server.client() as client:
        for number in range(MUTATIONS // 3):
            image = _mutated(rng.choice(images), rng)
            try:
                status = client.post("/v1/identify", files={"image": ("a", image)}).status_code
            except httpx.TransportError as error:
                outcome.faults.append(f"seed {seed}, image {number}: {error!r}")
                return
            outcome.answers.append(status)
            if status not in DECODED:
                outcome.faults.append(f"seed {seed}, image {number} was answered {status}")
