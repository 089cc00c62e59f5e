"""The files of examples/cluster: their fields are those that the tools document, their flags are those of the command,
and their processes find each other when as many are started here."""

from __future__ import annotations

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
from typing import Any

import pytest
import yaml

from jaxmoe.train.__main__ import build_parser
from tests.conftest import ROOT

CLUSTER = ROOT / "examples" / "cluster"
PROCESSES = 2

# Options of sbatch (slurm.schedmd.com/sbatch.html).
SBATCH = {"job-name", "nodes", "ntasks-per-node", "gres", "cpus-per-task", "time", "signal", "requeue"}
# Fields by their place; "*" is an element of a list. JobSet v1alpha2 (jobset.sigs.k8s.io), Job batch/v1, PodSpec v1
# (kubernetes.io/docs/reference/kubernetes-api).
JOBSET: dict[str, set[str]] = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "metadata": {"name", "namespace", "labels", "annotations"},
    "spec": {"replicatedJobs", "network", "successPolicy", "failurePolicy", "startupPolicy", "suspend", "managedBy"},
    "spec.failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "spec.replicatedJobs.*": {"name", "replicas", "template", "groupName", "dependsOn"},
    "spec.replicatedJobs.*.template": {"metadata", "spec"},
    "spec.replicatedJobs.*.template.spec": {
        *("completions", "parallelism", "completionMode", "backoffLimit", "activeDeadlineSeconds", "template"),
        *("podFailurePolicy", "ttlSecondsAfterFinished", "suspend", "selector", "manualSelector"),
    },
    "spec.replicatedJobs.*.template.spec.template": {"metadata", "spec"},
    "spec.replicatedJobs.*.template.spec.template.spec": {
        *("containers", "volumes", "restartPolicy", "terminationGracePeriodSeconds", "nodeSelector", "tolerations"),
        *("serviceAccountName", "affinity", "initContainers", "securityContext", "schedulerName", "subdomain"),
    },
}
_POD = "spec.replicatedJobs.*.template.spec.template.spec"
JOBSET |= {
    f"{_POD}.containers.*": {
        *("name", "image", "command", "args", "env", "ports", "resources", "volumeMounts", "workingDir", "envFrom"),
        *("imagePullPolicy", "securityContext"),
    },
    f"{_POD}.containers.*.env.*": {"name", "value", "valueFrom"},
    f"{_POD}.containers.*.ports.*": {"containerPort", "name", "protocol", "hostPort"},
    f"{_POD}.containers.*.resources": {"limits", "requests", "claims"},
    f"{_POD}.containers.*.resources.limits": {"nvidia.com/gpu", "cpu", "memory"},
    f"{_POD}.containers.*.volumeMounts.*": {"name", "mountPath", "subPath", "readOnly"},
    f"{_POD}.volumes.*": {"name", "persistentVolumeClaim", "emptyDir", "hostPath", "nfs"},
    f"{_POD}.volumes.*.persistentVolumeClaim": {"claimName", "readOnly"},
    f"{_POD}.volumes.*.emptyDir": {"medium", "sizeLimit"},
}
# docs.skypilot.co/en/latest/reference/yaml-spec.html
SKYPILOT: dict[str, set[str]] = {
    "": {
        *("name", "workdir", "num_nodes", "resources", "envs", "secrets", "volumes", "file_mounts", "setup", "run"),
        *("config", "service"),
    },
    "resources": {
        *("infra", "accelerators", "accelerator_args", "cpus", "memory", "instance_type", "use_spot", "disk_size"),
        *("disk_tier", "network_tier", "max_hourly_cost", "image_id", "ports", "labels", "autostop", "any_of"),
        *("ordered", "job_recovery"),
    },
}


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def check_fields(value: Any, known: dict[str, set[str]], place: str = "") -> None:
    if isinstance(value, list):
        for each in value:
            check_fields(each, known, f"{place}.*")
    if isinstance(value, dict):
        if place in known:
            assert set(value) <= known[place], place
        for name, each in value.items():
            check_fields(each, known, f"{place}.{name}".lstrip("."))


@pytest.mark.parametrize(("name", "known"), [("jobset.yaml", JOBSET), ("skypilot.yaml", SKYPILOT)])
def test_fields_are_documented(name: str, known: dict[str, set[str]]) -> None:
    check_fields(read(name), known)
    with pytest.raises(AssertionError):
        check_fields(read(name) | {"replicas": 2}, known)


def container() -> dict[str, Any]:
    job = read("jobset.yaml")["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == job["parallelism"] == PROCESSES and job["completionMode"] == "Indexed"
    return job["template"]["spec"]["containers"][0]


def test_the_jobset_names_its_first_pod() -> None:
    """JobSet's pods are called <jobset>-<job>-<its index>-<the pod's index>, in a service called as the JobSet."""
    raw, env = read("jobset.yaml"), {each["name"]: each["value"] for each in container()["env"]}
    name, (workers,) = raw["metadata"]["name"], raw["spec"]["replicatedJobs"]
    port = container()["ports"][0]["containerPort"]
    assert env["COORDINATOR"] == f"{name}-{workers['name']}-0-0.{name}:{port}"


def test_the_script_for_slurm_asks_for_what_exists() -> None:
    options = re.findall(r"^#SBATCH --([a-z-]+)", (CLUSTER / "slurm.sbatch").read_text(), re.MULTILINE)
    assert set(options) <= SBATCH and len(options) == len(set(options))


SRUN = """#!/bin/bash
for i in $(seq 0 $((SLURM_NTASKS - 1))); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & done
wait
"""
# In place of `python -m jaxmoe.train`: joins the others as the command does, and writes what it was told.
JOIN = """#!{python}
import argparse, json, os, pathlib, sys, time
from jaxmoe.distributed import launch
from jaxmoe.distributed.agreement import exchange_values
parser = argparse.ArgumentParser()
launch.add_arguments(parser)
process = launch.start(parser.parse_known_args()[0])
everyone = exchange_values(process.index)
pathlib.Path({folder!r}, f"process-{{process.index}}.json").write_text(json.dumps([sys.argv, everyone]))
# Process 0 has the coordinator, without which the others abort: it ends last.
while process.index == 0 and len([*pathlib.Path({folder!r}).glob("process-*.json")]) < process.count:
    time.sleep(0.05)
time.sleep(0.5 * (process.index == 0))
os._exit(0)
"""


def scripts(port: int) -> dict[str, tuple[str, list[dict[str, str]]]]:
    """File -> (what runs, the environment of each start of it)."""
    sky, everywhere = read("skypilot.yaml"), {"COORDINATOR": f"localhost:{port}"}
    env = {each["name"]: each["value"] for each in container()["env"]} | everywhere
    slurm = {"SLURM_JOB_ID": str(port), "SLURM_NTASKS": str(PROCESSES), "SLURM_TASKS_PER_NODE": str(PROCESSES)}
    addresses = {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2", "SKYPILOT_NUM_NODES": str(sky["num_nodes"])}
    sky_env = {name: value or "" for name, value in sky["envs"].items()} | addresses | {"PORT": str(port)}
    return {
        "slurm.sbatch": ((CLUSTER / "slurm.sbatch").read_text(), [slurm | {"SLURM_STEP_NODELIST": "localhost"}]),
        "jobset.yaml": (container()["args"][0], [env | {"JOB_COMPLETION_INDEX": str(i)} for i in range(PROCESSES)]),
        "skypilot.yaml": (sky["run"], [sky_env | {"SKYPILOT_NODE_RANK": str(i)} for i in range(PROCESSES)]),
    }


@pytest.mark.parametrize("name", ["slurm.sbatch", "jobset.yaml", "skypilot.yaml"])
def test_processes_find_each_other(name: str, tmp_path: pathlib.Path) -> None:
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    script, environments = scripts(port)[name]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    for command, text in {"srun": SRUN, "python": JOIN.format(python=sys.executable, folder=str(tmp_path))}.items():
        (tmp_path / command).write_text(text)
        (tmp_path / command).chmod(0o755)
    base = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    begun = [subprocess.Popen(["bash", "-c", script], env=base | each, cwd=tmp_path) for each in environments]
    assert [each.wait(timeout=120) for each in begun] == [0] * len(begun)
    for index in range(PROCESSES):
        argv, everyone = json.loads((tmp_path / f"process-{index}.json").read_text())
        assert everyone == list(range(PROCESSES))
        assert argv[1:3] == ["-m", "jaxmoe.train"]
        arguments = build_parser().parse_args(argv[3:])
        assert arguments.mesh == "auto" and arguments.resume and arguments.batch_size % (8 * PROCESSES) == 0
