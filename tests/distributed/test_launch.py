"""The launch files: manifests against the schema's facts, scripts with stand-ins on PATH."""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from bailing_jax.cli import flags

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "scripts" / "launch"
MANIFESTS = sorted(LAUNCH.glob("*.yaml"))
TPU_VM, SLURM = LAUNCH / "tpu_vm.sh", LAUNCH / "slurm_gpus.sh"

# What a field may hold: a type, [of list items], {of a mapping's fields, ! means required}.
TEXTS = {str: str}
POD = {
    "restartPolicy!": str,
    "serviceAccountName": str,
    "terminationGracePeriodSeconds": int,
    "nodeSelector!": TEXTS,
    "containers!": [
        {
            "name!": str,
            "image!": str,
            "command": [str],
            "args": [str],
            "resources!": {"requests": TEXTS, "limits!": TEXTS},
            "volumeMounts": [{"name!": str, "mountPath!": str}],
        }
    ],
    "volumes": [
        {
            "name!": str,
            "csi": {"driver!": str, "volumeAttributes": TEXTS},
            "persistentVolumeClaim": {"claimName!": str},
        }
    ],
}
JOBSET = {
    "apiVersion!": str,
    "kind!": str,
    "metadata!": {"name!": str, "annotations": TEXTS, "labels": TEXTS},
    "spec!": {
        "failurePolicy": {"maxRestarts": int, "restartStrategy": str},
        "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool, "subdomain": str},
        "ttlSecondsAfterFinished": int,
        "replicatedJobs!": [
            {
                "name!": str,
                "replicas": int,
                "template!": {
                    "metadata": {"annotations": TEXTS, "labels": TEXTS},
                    "spec!": {
                        "parallelism!": int,
                        "completions!": int,
                        "completionMode": str,
                        "backoffLimit": int,
                        "template!": {
                            "metadata": {"annotations": TEXTS, "labels": TEXTS},
                            "spec!": POD,
                        },
                    },
                },
            }
        ],
    },
}
# Of a GKE accelerator: chips a host, and the dimensions of its topologies.
HOSTS = {"tpu-v6e-slice": (4, 2), "tpu7x": (4, 3)}
DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")


def faults(value: Any, schema: Any, where: str = "") -> list[str]:
    """What does not fit: unknown and missing fields, and values of another type."""
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{where}: {value!r} is no {schema.__name__}"]
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{where}: no list, or an empty one"]
        return [f for i, item in enumerate(value) for f in faults(item, schema[0], f"{where}[{i}]")]
    if not isinstance(value, dict):
        return [f"{where}: no mapping"]
    if schema == TEXTS:
        return [f for name, item in value.items() for f in faults(item, str, f"{where}.{name}")]
    known = {name.rstrip("!"): inner for name, inner in schema.items()}
    found = [f"{where}.{name}: unknown" for name in value.keys() - known.keys()]
    needed = {name[:-1] for name in schema if name.endswith("!")}
    found += [f"{where}.{name}: missing" for name in needed - value.keys()]
    both = value.keys() & known.keys()
    return found + [f for n in both for f in faults(value[n], known[n], f"{where}.{n}")]


def faults_of_manifest(manifest: Any) -> list[str]:
    """The schema's, then what the fields must be to each other."""
    if found := faults(manifest, JOBSET):
        return found
    kind = (manifest["apiVersion"], manifest["kind"])
    if kind != ("jobset.x-k8s.io/v1alpha2", "JobSet"):
        return [f"{kind}"]
    if not DNS_NAME.fullmatch(manifest["metadata"]["name"]):
        found.append("the name is no DNS name")
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    accelerator = pod["nodeSelector"].get("cloud.google.com/gke-tpu-accelerator")
    topology = pod["nodeSelector"].get("cloud.google.com/gke-tpu-topology", "")
    if accelerator not in HOSTS:
        return [*found, f"accelerator {accelerator}"]
    chips_a_host, dimensions = HOSTS[accelerator]
    sides = [int(side) for side in topology.split("x")]
    if len(sides) != dimensions:
        found.append(f"topology {topology} of {accelerator}")
    if spec["parallelism"] * chips_a_host != math.prod(sides):
        found.append(f"{spec['parallelism']} hosts for topology {topology}")
    if spec["completions"] != spec["parallelism"]:
        found.append("completions differ from parallelism")
    resources = container["resources"]
    if {r.get("google.com/tpu") for r in resources.values()} != {str(chips_a_host)}:
        found.append(f"google.com/tpu of {resources}")
    if (spec.get("completionMode"), spec.get("backoffLimit")) != ("Indexed", 0):
        found.append("a pod would come back by itself")
    if pod["restartPolicy"] != "Never":
        found.append(f"restartPolicy {pod['restartPolicy']}")
    volumes = {volume["name"] for volume in pod["volumes"]}
    if {mount["name"] for mount in container["volumeMounts"]} != volumes:
        found.append("volumes and mounts differ")
    return found


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_fits_the_schema_and_the_slice(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    assert faults_of_manifest(manifest) == []
    (container,) = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ]
    args = flags.parser().parse_args(container["args"])
    flags.check(args)
    assert container["command"] == ["python", "-m", "bailing_jax.generate"]
    # Nobody says who is who: the processes find out.
    assert args.coordinator_address is args.num_processes is args.process_id is None
    for part in (args.input, args.output, args.model):
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert any(part.startswith(f"{mount}/") for mount in mounts)


def test_the_two_slices_are_there() -> None:
    found = {}
    for path in MANIFESTS:
        spec = yaml.safe_load(path.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
        selector = spec["template"]["spec"]["nodeSelector"]
        found[path.stem] = (*selector.values(), spec["parallelism"])
    assert found == {
        "jobset-v6e-64": ("tpu-v6e-slice", "8x8", 16),
        "jobset-v7x-16": ("tpu7x", "2x2x4", 4),
    }


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("v1alpha2", "v1alpha1", "('jobset.x-k8s.io/v1alpha1', 'JobSet')"),
        ("parallelism: 16", "parallelism: 8", "8 hosts for topology 8x8"),
        ("completions: 16", "completions: 1", "completions differ"),
        ("8x8", "4x4x4", "topology 4x4x4 of tpu-v6e-slice"),
        ("tpu-v6e-slice", "tpu-v6e", "accelerator tpu-v6e"),
        ('limits:\n                      google.com/tpu: "4"', "limits: {}", "google.com/tpu of"),
        ('"4"', "4", "4 is no str"),
        ("parallelism:", "paralelism:", ".paralelism: unknown"),
        ("completionMode: Indexed\n", "", "come back by itself"),
        ("restartPolicy: Never", "restartPolicy: OnFailure", "restartPolicy OnFailure"),
        ("image: IMAGE", "imagePullPolicy: Always", ".image: missing"),
        ("mountPath: /data", "path: /data", ".mountPath: missing"),
    ],
)
def test_a_manifest_with_a_fault_is_noticed(old: str, new: str, fault: str) -> None:
    text = (LAUNCH / "jobset-v6e-64.yaml").read_text()
    assert old in text
    found = faults_of_manifest(yaml.safe_load(text.replace(old, new)))
    assert any(fault in line for line in found), found


# The scripts.


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """An environment in which gcloud and srun write down what they were given."""
    for name in ("gcloud", "srun"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\0" {name} "$@" > "$SAW"\nexit 7\n')
        program.chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM") and k != "PYTHON"}
    return {**clean, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SAW": str(tmp_path / "saw")}


def run(
    script: Path, *arguments: str, env: dict[str, str]
) -> tuple[subprocess.CompletedProcess[str], list[str] | None]:
    """What the script did, and what the stand-in saw."""
    saw = Path(env["SAW"])
    saw.unlink(missing_ok=True)
    done = subprocess.run([script, *arguments], env=env, capture_output=True, text=True)
    return done, saw.read_text().split("\0")[:-1] if saw.exists() else None


JOB = ("--model", "my model", "--input", "in.jsonl", "--output", "out.jsonl", "--stop", "it's")


@pytest.mark.parametrize("script", [TPU_VM, SLURM], ids=lambda path: path.stem)
def test_a_script_is_well_formed(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    assert "set -euo pipefail" in script.read_text()


def test_the_tpu_vm_script_runs_one_command_on_all_workers(
    stand_ins: dict[str, str], tmp_path: Path
) -> None:
    done, saw = run(TPU_VM, "slice", "us-east5-b", "--", *JOB, env=stand_ins)
    assert done.returncode == 7
    assert saw is not None
    assert saw[:-1] == [
        "gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice", "--zone=us-east5-b", "--worker=all",
    ]  # fmt: skip
    remote = saw[-1].removeprefix("--command=")
    # What a VM's shell makes of it: the arguments arrive as they were given.
    home = tmp_path / "home"
    (home / "bailing" / "bin").mkdir(parents=True)
    python = home / "bailing" / "bin" / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\0" "$@" > "$HOME/saw"\necho said; exit 5\n')
    python.chmod(0o755)
    there = subprocess.run(
        ["bash", "-c", remote], env={**stand_ins, "HOME": str(home)}, capture_output=True, text=True
    )
    assert there.returncode == 5
    assert there.stdout == "said\n"
    assert (home / "bailing-job.log").read_text() == "said\n"
    assert (home / "saw").read_text().split("\0")[:-1] == ["-m", "bailing_jax.generate", *JOB]


def test_the_tpu_vm_script_stops_a_job(stand_ins: dict[str, str], tmp_path: Path) -> None:
    _, saw = run(TPU_VM, "--stop", "slice", "us-east5-b", env=stand_ins)
    assert saw is not None
    remote = saw[-1].removeprefix("--command=")
    assert remote.startswith("pkill -TERM -f ")
    (pattern,) = shlex.split(remote)[3:]
    assert re.search(pattern, "/x/python -m bailing_jax.generate --model m")
    assert not re.search(pattern, remote)


@pytest.mark.parametrize(
    "arguments", [(), ("slice",), ("slice", "zone", "--model", "m"), ("--stop", "s"), ("--what",)]
)
def test_the_tpu_vm_script_says_how_it_is_used(
    stand_ins: dict[str, str], arguments: tuple[str, ...]
) -> None:
    done, saw = run(TPU_VM, *arguments, env=stand_ins)
    assert (done.returncode, saw) == (2, None)
    assert "tpu_vm.sh [--dry-run] NAME ZONE -- ARGUMENT..." in done.stderr


def test_a_dry_run_starts_nothing(stand_ins: dict[str, str]) -> None:
    done, saw = run(TPU_VM, "--dry-run", "slice", "zone", "--", *JOB, env=stand_ins)
    assert (done.returncode, saw) == (0, None)
    assert shlex.split(done.stdout)[:4] == ["gcloud", "compute", "tpus", "tpu-vm"]
    done, saw = run(SLURM, *JOB, env={**stand_ins, "DRY_RUN": "1"})
    assert (done.returncode, saw) == (0, None)
    assert shlex.split(done.stdout)[-len(JOB) :] == [*JOB]


def test_the_slurm_script_runs_one_process_a_gpu(stand_ins: dict[str, str]) -> None:
    tasks = {"SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_PER_NODE": "h200:8"}
    done, saw = run(SLURM, *JOB, env={**stand_ins, **tasks, "PYTHON": "python3.12"})
    assert done.returncode == 7
    assert saw == [
        "srun", "--kill-on-bad-exit=1", "python3.12", "-m", "bailing_jax.generate", *JOB,
    ]  # fmt: skip
    assert "#SBATCH --signal=TERM@" in SLURM.read_text()


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"SLURM_GPUS_PER_TASK": "1"}, "--gpus-per-task hides"),
        ({"SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_PER_NODE": "8"}, "one process a GPU"),
    ],
)
def test_the_slurm_script_refuses_what_would_go_wrong(
    stand_ins: dict[str, str], environ: dict[str, str], message: str
) -> None:
    done, saw = run(SLURM, *JOB, env={**stand_ins, **environ})
    assert (done.returncode, saw) == (2, None)
    assert message in done.stderr
    done, saw = run(SLURM, env=stand_ins)
    assert (done.returncode, saw) == (2, None)
    assert done.stderr.startswith("usage: sbatch")
