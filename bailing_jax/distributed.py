"""Which processes a job has, and how this one comes together with the others.

`find` reads off flags and environment whether there are others at all, as jax.distributed would;
a process that is alone never gets further. `join` waits for the others: it starts JAX's runtime
and opens a connection of our own from each process to process 0 (`group.Group`), which carries
what the job's processes have to tell each other and notices when one is gone. Nothing here starts
a device; jax is imported by `join` only. The network is trusted, as JAX's own runtime trusts it.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib.util
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bailing_jax import group
from bailing_jax.errors import EXIT_FAILURE, EXIT_USAGE, UserError, bad_value, tell_error
from bailing_jax.terminal import tell

WAIT_S = 300
# A process that is not the one that talks says that it waits only once this may mean trouble.
PATIENCE_S = 15.0
# At its end JAX's runtime waits for everybody; who has not come by then is not coming.
LEAVE_S = 10

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_GOOGLE = "0x1ae0"
_METADATA = "http://{host}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
_KEY = "bailing_jax/control"
_TOLD_KEY = "bailing_jax/told"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Cluster:
    """How this process finds the others.

    Attributes:
        where: what told us, in words.
        address: host:port of the coordinator, which is process 0; None: jax knows.
        num_processes: None: jax finds out.
        process_id: None: jax finds out.
    """

    where: str
    address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def in_words(self) -> str:
        """As in "process 1 of 4 (flags), coordinator at host:port"."""
        name = "this process" if self.process_id is None else f"process {self.process_id}"
        count = "" if self.num_processes is None else f" of {self.num_processes}"
        at = "" if self.address is None else f", coordinator at {self.address}"
        return f"{name}{count} ({self.where}){at}"


def find(
    address: str | None,
    num_processes: int | None,
    process_id: int | None,
    say: Say,
    environ: Mapping[str, str] = os.environ,
) -> Cluster | None:
    """The cluster that flags or environment name; None: this process is alone.

    Args:
        address: --coordinator-address.
        num_processes: --num-processes; 1 by itself: alone, whatever the environment says.
        process_id: --process-id.
        say: called with a remark where an environment looks like a cluster's but is not used.
        environ: the environment.

    Raises:
        UserError: the flags are not complete or make no sense.
    """
    flags = (address, num_processes, process_id)
    if any(flag is not None for flag in flags):
        return _from_flags(address, num_processes, process_id)
    if all(environ.get(name) for name in _SLURM):
        count, number = int(environ["SLURM_NTASKS"]), int(environ["SLURM_PROCID"])
        return Cluster("Slurm", None, count, number) if count > 1 else None
    hosts = _tpu_hosts(environ)
    if hosts > 1:
        return Cluster("Cloud TPU", None, hosts)
    if hosts == 0 and "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        number = environ["JOB_COMPLETION_INDEX"]
        if importlib.util.find_spec("kubernetes") is not None:
            return Cluster("Kubernetes", None, None, int(number))
        say(
            f"this is pod {number} of an indexed Kubernetes job; it runs alone, because the "
            "package kubernetes, with which jax finds the others, is not installed "
            "(pip install 'jax[k8s]')"
        )
    return None


def _from_flags(
    address: str | None, num_processes: int | None, process_id: int | None
) -> Cluster | None:
    options = ("coordinator_address", "num_processes", "process_id")
    if num_processes is not None and num_processes < 1:
        raise bad_value("num_processes", num_processes, "an integer >= 1")
    if num_processes == 1 and address is None and process_id in (None, 0):
        return None
    given = dict(zip(options, (address, num_processes, process_id), strict=True))
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)}: missing; several processes need all three of "
            "coordinator_address, num_processes and process_id",
            "The address is process 0's, the same for all; ids count from 0.",
            EXIT_USAGE,
            options=options,
        )
    assert address is not None
    assert num_processes is not None
    assert process_id is not None
    if not 0 <= process_id < num_processes:
        raise bad_value(
            "process_id", process_id, f"0 to {num_processes - 1} (num_processes = {num_processes})",
            options=("num_processes",),
        )  # fmt: skip
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise bad_value("coordinator_address", address, "host:port of process 0, as in host0:8476")
    return None if num_processes == 1 else Cluster("flags", address, num_processes, process_id)


def _tpu_hosts(environ: Mapping[str, str]) -> int:
    """Hosts of the Cloud TPU slices this one belongs to; 0: it has no TPU that jax would use."""
    has_library = "TPU_LIBRARY_PATH" in environ or importlib.util.find_spec("libtpu") is not None
    if not has_library or not (_has_tpu() or "JAX_FORCE_TPU_INIT" in environ):
        return 0
    names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if names is None and "TPU_SKIP_MDS_QUERY" not in environ:
        names = _metadata(environ)
    slices = environ.get("MEGASCALE_NUM_SLICES", "1")
    return (len(names.split(",")) if names else 1) * (int(slices) if slices.isdecimal() else 1)


def _has_tpu() -> bool:
    """Whether a TPU is plugged in: Google's name on the PCI bus."""
    for path in glob.glob("/sys/bus/pci/devices/*/vendor"):
        with contextlib.suppress(OSError), open(path) as file:
            if file.read().strip() == _GOOGLE:
                return True
    return False


def _metadata(environ: Mapping[str, str]) -> str | None:
    """The list of the slice's hosts as a TPU VM is told it."""
    import urllib.request

    host = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        _METADATA.format(host=host), headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode("utf-8", "replace")
    except OSError:  # urllib's own errors are of this kind
        return None


def join(cluster: Cluster, say: Say, *, wait_s: float = WAIT_S) -> group.Group | None:
    """Come together with the other processes; None: there turned out to be no others.

    Args:
        cluster: from `find`.
        say: called with remarks, by process 0 only.
        wait_s: how long the others have.

    Raises:
        UserError: jax can't tell who the others are. When they don't come or can't be reached, the
            process ends with a message and code 1: nothing can be raised from inside jax's wait,
            and once its runtime has started, a regular exit would wait for the others again.
    """
    import jax

    talks = cluster.process_id in (None, 0)
    if talks:
        say(f"waiting up to {wait_s:g} s for the other processes; {cluster.in_words()}")
    # It would handle SIGTERM in jax's way; a job has its own.
    jax.config.update("jax_enable_preemption_service", False)
    with _deadline(cluster, wait_s):
        try:
            jax.distributed.initialize(
                cluster.address,
                cluster.num_processes,
                cluster.process_id,
                # Ours comes first: jax's ends the process in a way that can't be caught.
                initialization_timeout=int(wait_s) + 60,
                shutdown_timeout_seconds=LEAVE_S,
            )
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"{cluster.in_words()}: jax.distributed could not start: {error}",
                "Name the processes by --coordinator-address, --num-processes and --process-id.",
            ) from error
        try:
            return _connect(wait_s)
        except UserError as error:
            tell_error(error, {})
            os._exit(error.exit_code)


def leave() -> None:
    """Leave JAX's runtime, together with all others, at the regular end of a job."""
    import jax

    jax.distributed.shutdown()


@functools.cache
def processes_here() -> int:
    """How many processes of this job run on this host; waits until each has asked.

    Once jax.distributed has started; a process without it is alone.
    """
    here = socket.gethostname()
    return told_by_all("host", here).count(here)


def told_by_all(about: str, value: str) -> list[str]:
    """What each process says, by number, this one being `value`; waits until each has.

    Args:
        about: names the question; each has another name.
        value: this process' answer.

    Raises:
        UserError: a process has not answered within five minutes.
    """
    store = _store()
    if store.client is None:
        return [value]
    keys = [f"{_TOLD_KEY}/{about}/{index}" for index in range(store.num_processes)]
    store.client.key_value_set(keys[store.process_id], value)
    answers: list[str] = []
    for index, key in enumerate(keys):
        try:
            answers.append(store.client.blocking_key_value_get(key, WAIT_S * 1000))
        except RuntimeError as error:
            raise UserError(
                f"process {index} of {len(keys)} did not come as far as this one ({about}): "
                + str(error).partition("\n")[0],
                "It has ended, or waits for something else: its own output says which.",
            ) from error
    return answers


def _store() -> Any:
    """JAX's state of the job; `client` is its key-value store, None without jax.distributed."""
    # It has no public name; Orbax reaches it in the same way.
    from jax._src.distributed import global_state

    return global_state


def _connect(wait_s: float) -> group.Group | None:
    """Our own connections, arranged over JAX's key-value store."""
    global_state = _store()
    client = global_state.client
    index, size = global_state.process_id, global_state.num_processes
    address = global_state.coordinator_address
    if size == 1:
        return None
    assert address is not None
    host, _, port = address.rpartition(":")
    if index == 0:
        token = secrets.token_hex(16)
        with group.listen(int(port) + 1) as listener:
            client.key_value_set(_KEY, f"{listener.getsockname()[1]} {token}")
            return group.accept(listener, size, token, wait_s)
    published = client.blocking_key_value_get(_KEY, int(wait_s * 1000))
    control, token = published.split()
    return group.connect((host.strip("[]"), int(control)), index, size, token, wait_s)


@contextlib.contextmanager
def _deadline(cluster: Cluster, wait_s: float) -> Iterator[None]:
    """End this process, in words, if the body takes longer; a hint halfway for those not heard."""
    came = threading.Event()

    def watch() -> None:
        first = min(PATIENCE_S, wait_s / 2)
        if came.wait(first):
            return
        tell(f"{cluster.in_words()}: still waiting for the others. {_causes(cluster)}")
        if not came.wait(wait_s - first):
            tell(f"error: {cluster.in_words()}: the others did not come within {wait_s:g} s")
            tell(f"  {_causes(cluster)}")
            os._exit(EXIT_FAILURE)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        came.set()
        thread.join()


def _causes(cluster: Cluster) -> str:
    """Why processes usually do not find each other."""
    where = f"{cluster.address} and the port above it" if cluster.address else "process 0's port"
    return (
        "Two likely causes: another process was not started, or has ended (its stderr says why); "
        f"or {where} can't be reached from every host (another address, a firewall)."
    )
