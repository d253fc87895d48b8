"""Whether a process has others, told from flags and environment as jax.distributed would."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from bailing_jax import distributed
from bailing_jax.distributed import Cluster, find
from bailing_jax.errors import EXIT_USAGE, UserError

SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "node[01-02]", "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
}  # fmt: skip
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The modules that are installed, of those `find` asks for; no TPU is plugged in."""
    found: set[str] = set()
    monkeypatch.setattr(
        distributed.importlib.util, "find_spec", lambda name: name if name in found else None
    )
    monkeypatch.setattr(distributed, "_has_tpu", lambda: False)
    return found


def found(environ: dict[str, str], said: list[str] | None = None) -> Cluster | None:
    return find(None, None, None, ([] if said is None else said).append, environ)


def test_a_process_alone_asks_nobody(
    modules: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a question to the network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    modules |= {"libtpu", "kubernetes"}
    assert found({}) is None
    assert found({"TPU_WORKER_HOSTNAMES": "a,b"}) is None  # a library, but no TPU


def test_the_three_flags() -> None:
    cluster = find("host0:8476", 4, 3, print, SLURM)
    assert cluster == Cluster("flags", "host0:8476", 4, 3)
    assert cluster.in_words() == "process 3 of 4 (flags), coordinator at host0:8476"
    assert find("[::1]:8476", 2, 0, print, {}) == Cluster("flags", "[::1]:8476", 2, 0)


def test_one_process_is_alone_whatever_the_environment_says() -> None:
    assert find(None, 1, None, print, SLURM) is None
    assert find(None, 1, 0, print, SLURM) is None
    assert find("host0:8476", 1, 0, print, SLURM) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host0:8476", None, None), "num_processes and process_id: missing"),
        ((None, 4, 1), "coordinator_address: missing"),
        ((None, 4, None), "coordinator_address and process_id: missing"),
        ((None, None, 0), "coordinator_address and num_processes: missing"),
        (("host0:8476", 4, 4), "process_id = 4; allowed: 0 to 3"),
        (("host0:8476", 4, -1), "process_id = -1; allowed: 0 to 3"),
        (("host0:8476", 0, 0), "num_processes = 0; allowed: an integer >= 1"),
        (("host0", 4, 1), "coordinator_address = 'host0'; allowed: host:port"),
        ((":8476", 4, 1), "coordinator_address = ':8476'; allowed: host:port"),
        (("host0:0", 4, 1), "coordinator_address = 'host0:0'; allowed: host:port"),
        (("host0:65536", 4, 1), "coordinator_address = 'host0:65536'; allowed: host:port"),
    ],
)
def test_flags_that_make_no_sense(flags: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        find(*flags, print, {})
    assert message in caught.value.message
    assert caught.value.exit_code == EXIT_USAGE


def test_slurm(modules: set[str]) -> None:
    assert found(SLURM) == Cluster("Slurm", None, 16, 9)
    assert found({**SLURM, "SLURM_NTASKS": "1"}) is None
    for name in SLURM:  # sbatch's own shell lacks some of them
        assert found({key: value for key, value in SLURM.items() if key != name}) is None


def test_a_tpu_slice_of_gke(modules: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pod = {**KUBERNETES, "TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}
    modules.add("libtpu")
    monkeypatch.setattr(distributed, "_has_tpu", lambda: True)
    assert found(pod) == Cluster("Cloud TPU", None, 4)
    assert found({**pod, "MEGASCALE_NUM_SLICES": "2"}) == Cluster("Cloud TPU", None, 8)
    assert found({**pod, "TPU_PROCESS_ADDRESSES": "a:1,b:1"}) == Cluster("Cloud TPU", None, 2)
    # One host, in an indexed job or not: not a cluster of TPUs and none of Kubernetes.
    modules.add("kubernetes")
    assert found({**pod, "TPU_WORKER_HOSTNAMES": "localhost"}) is None


def test_a_tpu_vm_asks_its_metadata_server(
    modules: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3")

        def log_message(self, *_args: object) -> None:
            pass

    modules.add("libtpu")
    monkeypatch.setattr(distributed, "_has_tpu", lambda: True)
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        where = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        assert found(where) == Cluster("Cloud TPU", None, 2)
        assert found({**where, "TPU_SKIP_MDS_QUERY": "1"}) is None
        server.shutdown()
        thread.join()
    path = "/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    assert asked == [(path, "Google")]
    assert found(where) is None  # nobody answers


def test_a_pod_of_an_indexed_job(modules: set[str]) -> None:
    said: list[str] = []
    assert found(KUBERNETES, said) is None
    (line,) = said
    assert "pod 3 of an indexed Kubernetes job" in line
    assert "runs alone" in line
    assert "pip install 'jax[k8s]'" in line
    modules.add("kubernetes")
    assert found(KUBERNETES, said) == Cluster("Kubernetes", None, None, 3)
    assert found({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, said) is None
    assert len(said) == 1


ALONE = """
import json, sys
from bailing_jax import generate
code = generate.main(sys.argv[1:])
from jax._src import distributed
print(json.dumps([code, distributed.global_state.client is None,
                  "bailing_jax.group" in sys.modules]))
"""


def test_a_job_of_one_process_starts_no_runtime(tmp_path: Path) -> None:
    """Nothing waits, nothing listens: jax.distributed is not called."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt_ids": [5, 6], "max_tokens": 1}\n')
    done = subprocess.run(
        [sys.executable, "-c", ALONE, "--input", str(source), "--output", str(output),
         "--max-num-seqs", "1", "--max-model-len", "64", "--prefill-chunk", "16"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1])[:2] == [0, True]
    assert "waiting" not in done.stderr
    assert output.read_text().count("\n") == 1
