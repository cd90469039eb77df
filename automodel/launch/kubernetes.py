"""Print the manifest of a PyTorchJob (Kubeflow's training operator), with torchrun in every pod."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import yaml

from automodel.launch.submission import Submission
from automodel.types import UserError

_SAVING_SECONDS = 60
"""Between TERM and KILL of a pod: torchrun itself waits 30 s for its ranks."""


@dataclass(frozen=True)
class KubernetesLaunch:
    """What ``launch=kubernetes`` configures; the defaults stand in ``conf/launch/kubernetes.yaml``."""

    dry_run: bool
    image: str
    nodes: int
    nproc_per_node: int
    gpus_per_node: int | None
    cpus_per_node: int | None
    mem: str | None
    namespace: str | None
    job_name: str | None
    environment: dict[str, str | int | float]
    secrets: list[str]
    volumes: dict[str, str]
    working_dir: str | None
    max_restarts: int

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
