"""Ray Jobs: a training run is sent to a cluster, which runs it without this process."""

import asyncio
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.job_submission import JobSubmissionClient

from trainer.config import Config
from trainer.errors import UserError


@dataclass(frozen=True)
class Job:
    """A training run on a cluster. Stopping this process leaves it running."""

    identity: str
    client: Any

    def follow(self, write: Callable[[str], object]) -> str:
        """Write its log as it grows; returns, when it has ended, Ray's name for how, such as SUCCEEDED."""

        async def log() -> None:
            async for part in self.client.tail_job_logs(self.identity):
                write(str(part))

        asyncio.run(log())
        while not (status := self.client.get_job_status(self.identity)).is_terminal():
            time.sleep(0.5)
        return str(status.value)


def submit(address: str, config: Config, command: str, resume: bool, env: Sequence[str] = ()) -> Job:
    """Send a training run to a cluster through Ray Jobs.

    Args:
        address: of the cluster's dashboard, http://HEAD:8265.
        config: the resolved tree, sent along as a file.
        command: the program on the cluster that runs it, usually `hypersphere`.
        env: names of variables of this process that the job and its workers get, such as a bucket's credentials. Ray
            logs them on its nodes, and shows them to whoever may ask it about the job.

    Raises:
        UserError: nothing answers at the address, or a variable is not set.
    """
    if missing := [name for name in env if name not in os.environ]:
        raise UserError(f"--env {missing[0]}: the variable is not set here; set it, or leave --env out")
    words = [command, "train", "--config", "config.yaml", *(["--resume"] if resume else [])]
    with tempfile.TemporaryDirectory() as folder:  # becomes the job's working directory on the cluster
        Path(folder, "config.yaml").write_text(config.to_yaml())
        try:
            client = JobSubmissionClient(address)
            identity = client.submit_job(
                entrypoint=shlex.join(words),
                runtime_env={"working_dir": folder, "env_vars": {name: os.environ[name] for name in env}},
                metadata={"project": "hypersphere", "experiment": config.tracking.experiment},
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"the Ray cluster at '{address}' did not take the job: {str(error).splitlines()[0]}; give its "
                "dashboard's address, such as http://HEAD:8265, and its token in RAY_AUTH_TOKEN if it wants one"
            ) from error
    return Job(str(identity), client)
