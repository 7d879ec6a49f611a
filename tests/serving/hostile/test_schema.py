"""What the OpenAPI document promises, put to the running service by schemathesis: no 5xx, and answers as described."""

import os
import subprocess
import sys

from serving.client import Client
from tests.serving.hostile.site import LONG

KEY = "correct-horse-battery-staple"
EXAMPLES = 100 if LONG else 3
# A schema can say neither that a vector must have length 1 nor that bytes must be a picture, so what it allows may be
# refused. The reverse, and all else that can be checked, must hold.
NOT_SAID = "positive_data_acceptance"
CONFIG = """
[checks] # 413: what is too long is told by its size, before it is parsed
negative_data_rejection.expected-statuses = ["400", "401", "404", "405", "409", "413", "415", "422"]
"""

HOOKS = """
import json, schemathesis

@schemathesis.serializer("application/x-ndjson")
def lines(context, value):
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else json.dumps(value)).encode(errors="surrogatepass")
"""


def test_the_service_answers_as_its_schema_says(open_site, tmp_path):
    site = open_site(api_key=KEY, wrong_keys_a_minute=1_000_000)  # it sends many, and 429 is no 401
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{site.server.url}/openapi.json", "--no-color"]
    command += ["--header", f"Authorization: Bearer {KEY}", "--checks", "all", "--exclude-checks", NOT_SAID]
    command += ["--max-examples", str(EXAMPLES), "--generation-database", "none", "--warnings", "off"]
    command += ["--continue-on-failure"] if LONG else ["--seed", "1", "--no-shrink"]
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    (tmp_path / "lines.py").write_text(HOOKS)
    variables = {**os.environ, "SCHEMATHESIS_HOOKS": "lines", "PYTHONPATH": str(tmp_path)}
    with site.attacked(f"schemathesis, {EXAMPLES} examples a route") as outcome:
        outcome.requests = 100 * EXAMPLES
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
        site.enrolled.clear()  # it erases and merges whom it finds
        with Client(site.server.url, KEY) as client:
            for subject in client.subjects():
                client.delete(subject.subject_id)
        if done.returncode:
            outcome.faults.append(done.stdout[-20_000:])
