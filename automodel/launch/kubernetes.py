"""Print the manifest of a PyTorchJob (Kubeflow's training operator), with torchrun in every pod."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import NonNegativeInt, PositiveInt

from automodel.launch.job_checks import job_problems
from automodel.launch.submission import Submission
from automodel.types import UserError

if TYPE_CHECKING:
    from automodel.config import Config

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SAVING_SECONDS = 60
"""Between TERM and KILL of a pod: torchrun itself waits 30 s for its ranks."""


@dataclass(frozen=True)
class KubernetesLaunch:
    """What ``launch=kubernetes`` configures; the defaults are in ``conf/launch/kubernetes.yaml``."""

    dry_run: bool
    image: str
    nodes: PositiveInt
    nproc_per_node: PositiveInt
    gpus_per_node: PositiveInt | None
    cpus_per_node: PositiveInt | None
    mem: str | None
    namespace: str | None
    job_name: str | None
    environment: dict[str, str | int | float]
    secrets: list[str]
    volumes: dict[str, str]
    working_dir: str | None
    max_restarts: NonNegativeInt

    @staticmethod
    def problems(section: dict[str, Any], cfg: Config, *, key: str, world_size: int) -> Iterator[str]:
        """Yield what does not fit together, or into a manifest; see ``config/targets.py``."""
        yield from job_problems(section)
        if section.get("dry_run") is False:
            yield (
                "launch=kubernetes prints a manifest and submits nothing: add launch.dry_run=true, and pass what it "
                "prints to kubectl apply -f -"
            )
        for name in ("job_name", "namespace"):
            value = section.get(name)
            if value is not None and not _NAME.fullmatch(value):
                yield f"launch.{name}={value} must have lower-case letters, digits and - alone, 63 at most"
        for value in (*section.get("secrets", ()), *section.get("volumes", ())):
            if not _NAME.fullmatch(value):
                yield f"launch: {value!r} is not the name of a Secret or a PersistentVolumeClaim"

    def submit(self, submission: Submission) -> None:
        """Print the manifest, and on stderr what to do with it.

        Raises:
            UserError: ``dry_run`` is false.
        """
        if not self.dry_run:
            raise UserError("launch=kubernetes submits nothing: add launch.dry_run=true, then kubectl apply -f -")
        print(yaml.safe_dump(self.manifest(submission), sort_keys=False), end="")
        print("nothing was submitted; do so with: kubectl apply -f FILE", file=sys.stderr)

    def manifest(self, submission: Submission) -> dict[str, Any]:
        """Return the PyTorchJob; rank 0 is in the pod of the master, which counts as one of the nodes."""
        numbers = {"Master": 1, "Worker": self.nodes - 1}
        replicas = {
            # a pod of its own for each, or YAML would write the second as a reference
            role: {"replicas": number, "restartPolicy": "OnFailure", "template": {"spec": self._pod(submission)}}
            for role, number in numbers.items()
            if number
        }
        name = self.job_name or _name_of(submission)
        return {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "metadata": {"name": name} | ({"namespace": self.namespace} if self.namespace else {}),
            "spec": {
                "nprocPerNode": str(self.nproc_per_node),
                "runPolicy": {"backoffLimit": self.max_restarts},
                "pytorchReplicaSpecs": replicas,
            },
        }

    def _pod(self, submission: Submission) -> dict[str, Any]:
        # The operator sets PET_MASTER_ADDR, PET_MASTER_PORT and PET_NODE_RANK, which torchrun reads.
        command = ["python", "-m", "torch.distributed.run", f"--nnodes={self.nodes}"]
        command += [f"--nproc-per-node={self.nproc_per_node}", "-m", "automodel.run", *submission.argv]
        variables = {"AUTOMODEL_RUN_ID": submission.run_id} | self.environment
        mounts = [{"name": f"volume-{number}", "mountPath": path} for number, path in enumerate(self.volumes.values())]
        container = {
            "name": "pytorch",  # the operator looks for this name
            "image": self.image,
            "command": [_literally(word) for word in command],
            "env": [{"name": name, "value": _literally(str(value))} for name, value in variables.items()],
            # workers of a data loader and NCCL share memory, of which a pod has 64 MB
            "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}, *mounts],
        }
        if self.secrets:
            container["envFrom"] = [{"secretRef": {"name": name}} for name in self.secrets]
        if self.working_dir is not None:
            container["workingDir"] = self.working_dir
        amounts = {"nvidia.com/gpu": self.gpus_per_node, "cpu": self.cpus_per_node, "memory": self.mem}
        limits = {name: amount for name, amount in amounts.items() if amount is not None}
        if limits:
            container["resources"] = {"limits": limits}
        claims = [
            {"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}}
            for number, claim in enumerate(self.volumes)
        ]
        return {
            "containers": [container],
            "terminationGracePeriodSeconds": _SAVING_SECONDS,
            "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}, *claims],
        }


def _literally(text: str) -> str:
    """Keep Kubernetes from expanding ``$(NAME)`` in a command or variable."""
    return text.replace("$", "$$")


def _name_of(submission: Submission) -> str:
    text = f"automodel-{submission.recipe}-{submission.run_id}".lower()
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in text)[:63].strip("-")
