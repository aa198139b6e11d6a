"""Multi-host start: which processes make up this run, read from the environment, and `jax.distributed` over them.

Known places: TPU pod slices on TPU VMs and on GKE, one slice or several (multi-slice, "megascale"), Slurm steps, and
plain processes that are told by variables:

    JAX_COORDINATOR_ADDRESS=host:port   where process 0 listens
    JAX_NUM_PROCESSES=N  JAX_PROCESS_ID=0..N-1
    JAX_LOCAL_DEVICE_IDS=0,1            the GPUs of this process (default: all that it sees)

jax.distributed finds a part of this by itself, but ends with an abort of the C++ runtime where a process does not come,
and gives a Slurm task one GPU however many it owns. So the place is found here, the processes meet here (`_meet`, which
names the missing ones), and jax is told all of it.

Multi-slice: the runtime's own variables MEGASCALE_NUM_SLICES, MEGASCALE_SLICE_ID and MEGASCALE_COORDINATOR_ADDRESS (set
by queued resources with several nodes, and by GKE for a JobSet) give the number of slices, this one's index, and the
host of process 0. Processes are numbered slice by slice, so that an outer mesh axis over slices is the leading one.
"""

import json
import os
import re
import selectors
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from refine_jax.errors import RefineError

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
TIMEOUT = "REFINE_JAX_START_TIMEOUT"
START_FAILED = 69  # EX_UNAVAILABLE: not the user's input; may pass by itself, so launchers try again
_TPU_PORT = 8482
_LONG = 30 * 24 * 3600
# What a collective says that another process left: of CPUs (Gloo), of GPUs (NCCL).
_COLLECTIVE = re.compile(r"Gloo .*(failed|error)|NCCL .*(remote|abort|error)|[Cc]onnection (reset|closed) by peer")


class StartError(RefineError):
    """The processes of a run did not find each other."""


@dataclass(frozen=True)
class Job:
    """The processes of one run: where process 0 listens ("host:port"), how many there are, which one this is, and the
    indices of this one's GPUs (None: all that it sees)."""

    place: str
    coordinator: str
    processes: int
    process: int
    devices: tuple[int, ...] | None = None


def start(env: Mapping[str, str] | None = None) -> Job | None:
    """Join the other processes of this run; returns what was found, or None for a single process (nothing is done).

    Must come before anything touches a device. A second call does nothing. Waits for the others for
    REFINE_JAX_START_TIMEOUT seconds (default 300). Raises `RefineError` for variables that are half set or contradict
    each other, `StartError` when the others do not come.
    """
    env = os.environ if env is None else env
    job = detect(env)
    if job is None:
        return None
    timeout = _number(env.get(TIMEOUT, "300"), TIMEOUT, 1)

    import jax

    if jax.distributed.is_initialized():
        return job
    _meet(job, timeout, jax.__version__)
    if any(name.lower().endswith("_proxy") for name in env):
        # gRPC would ask the proxy for the coordinator until its time is over; jax only warns of it.
        os.environ.setdefault("no_grpc_proxy", job.coordinator.rpartition(":")[0].strip("[]"))
        jax.config.update("jax_check_proxy_envs", False)
    try:
        jax.distributed.initialize(
            job.coordinator,
            job.processes,
            job.process,
            local_device_ids=job.devices and list(job.devices),
            cluster_detection_method="deactivate",
            initialization_timeout=timeout,
            # Who is done waits for the others as long as they live; that they do is told by their heartbeats.
            shutdown_timeout_seconds=_LONG,
        )
    except jax.errors.JaxRuntimeError as error:
        reason = next(iter(str(error).strip().splitlines()), "")[:200]
        raise StartError(
            f"{_who(job)}: jax.distributed cannot start at {job.coordinator} ({reason}); run again"
        ) from None
    return job


def alone() -> bool:
    """Whether `start` joined no other process."""
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized()


def lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process is gone, or was waited for in vain, which is no fault of this one."""
    if isinstance(error, TimeoutError):
        return not alone()
    if not alone() and _COLLECTIVE.search(str(error)):
        return True
    return type(error).__name__ == "JaxRuntimeError" and str(error).startswith(("UNAVAILABLE", "DEADLINE_EXCEEDED"))


def leave(code: int) -> int:
    """Give back the exit code `code`; of several processes, one that failed ends here, at once.

    Otherwise it would wait at exit, in jax's shutdown barrier, for processes that wait for it in a collective. One that
    is finished (0) or preempted (75, as all of them are) does wait.
    """
    if code not in (0, 75) and not alone():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


# ------------------------------------------------------------------------------------------------ where is this?


def detect(env: Mapping[str, str]) -> Job | None:
    """The run that this process is a part of, or None where it is alone. Raises `RefineError` for what is half set."""
    job = _plain(env)
    if job is None and "JAX_NUM_PROCESSES" not in env:
        job = _slurm(env) or _gke(env) or _tpu_vm(env)
        if job is None and _number(env.get("OMPI_COMM_WORLD_SIZE", "1"), "OMPI_COMM_WORLD_SIZE", 1) > 1:
            raise RefineError(
                f"OMPI_COMM_WORLD_SIZE is set, mpirun is not read; use srun, or set {', '.join(EXPLICIT)}"
            )
        if job is None and "JAX_COORDINATOR_ADDRESS" in env:
            raise RefineError(
                "JAX_COORDINATOR_ADDRESS is set, JAX_NUM_PROCESSES and JAX_PROCESS_ID are not; set all three or none"
            )
    return job if job is not None and job.processes > 1 else None


def _plain(env: Mapping[str, str]) -> Job | None:
    if "JAX_NUM_PROCESSES" not in env and "JAX_PROCESS_ID" not in env:
        return None
    if env.get("JAX_NUM_PROCESSES") == "1" and env.get("JAX_PROCESS_ID", "0") == "0":
        return None
    missing = [name for name in EXPLICIT if name not in env]
    if missing:
        given = [name for name in EXPLICIT if name in env]
        raise RefineError(f"{' and '.join(given)} set, {' and '.join(missing)} not; set all three or none")
    count = _number(env["JAX_NUM_PROCESSES"], "JAX_NUM_PROCESSES", 1)
    process = _number(env["JAX_PROCESS_ID"], "JAX_PROCESS_ID", 0)
    return _job("JAX_PROCESS_ID", env, "", 0, count, process, "JAX_PROCESS_ID")


def _slurm(env: Mapping[str, str]) -> Job | None:
    count = _number(env.get("SLURM_NTASKS", "1"), "SLURM_NTASKS", 1)
    if "SLURM_JOB_ID" not in env or count < 2:
        return None
    needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")
    missing = [name for name in needed if name not in env]
    if missing:
        raise RefineError(
            f"SLURM_NTASKS={env['SLURM_NTASKS']}, but {missing[0]} is not set: this is no task of a step; "
            "start it with srun, or set JAX_NUM_PROCESSES=1"
        )
    # `gpu[003-007],login1` -> `gpu003`
    first = re.split(r",(?![^\[]*\])", env["SLURM_STEP_NODELIST"])[0]
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)
    port = 61440 + _number(env["SLURM_JOB_ID"], "SLURM_JOB_ID", 0) % 4096
    process = _number(env["SLURM_PROCID"], "SLURM_PROCID", 0)
    return _job("Slurm", env, host, port, count, process, "SLURM_PROCID", _slurm_devices(env))


def _slurm_devices(env: Mapping[str, str]) -> tuple[int, ...] | None:
    """A task's share of the GPUs that it sees; None is all: it is alone on its node, or Slurm gave it its own."""
    if "JAX_LOCAL_DEVICE_IDS" in env:
        return None
    local = _number(env["SLURM_LOCALID"], "SLURM_LOCALID", 0)
    tasks = []  # `4(x2),3` -> [4, 4, 3]
    for part in filter(None, env.get("SLURM_STEP_TASKS_PER_NODE", "").split(",")):
        size, _, times = part.rstrip(")").partition("(x")
        tasks += [int(size)] * int(times or 1)
    node = int(env.get("SLURM_NODEID", "0"))
    here = tasks[node] if node < len(tasks) else local + 1
    seen = env.get("CUDA_VISIBLE_DEVICES", "")
    gpus = len(seen.split(",")) if seen else int(env.get("SLURM_GPUS_ON_NODE") or 0)
    if here == 1 or gpus <= 1:
        return None
    if gpus % here:
        raise RefineError(
            f"Slurm: {here} tasks on this node share {gpus} GPUs, which does not come out even; "
            "use one task a GPU or a node (--ntasks-per-node), or set JAX_LOCAL_DEVICE_IDS"
        )
    share = gpus // here
    return tuple(range(local * share, (local + 1) * share))


def _gke(env: Mapping[str, str]) -> Job | None:
    name = "TPU_PROCESS_ADDRESSES" if "TPU_PROCESS_ADDRESSES" in env else "TPU_WORKER_HOSTNAMES"
    hosts = [host.split(":")[0] for host in env.get(name, "").split(",") if host]
    if not hosts:
        return None
    if "TPU_WORKER_ID" not in env and len(hosts) > 1:
        raise RefineError(f"{name} names {len(hosts)} hosts, TPU_WORKER_ID is not set; set both or neither")
    worker = _number(env.get("TPU_WORKER_ID", "0"), "TPU_WORKER_ID", 0)
    return _slices("TPU slice of GKE", env, env, hosts, worker, "TPU_WORKER_ID")


def _tpu_vm(env: Mapping[str, str]) -> Job | None:
    if "TPU_SKIP_MDS_QUERY" in env or "tpu" not in env.get("JAX_PLATFORMS", "tpu"):
        return None
    # The driver of v4 and before makes /dev/accel0, that of later chips /dev/vfio/0.
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    if not chips or not (find_spec("libtpu") or "TPU_LIBRARY_PATH" in env):
        return None
    return _tpu_metadata(env)


def _tpu_metadata(env: Mapping[str, str]) -> Job | None:
    """What the metadata server of a TPU VM says; None where there is none, or it knows no TPU."""
    worker = _metadata(env, "agent-worker-number")
    endpoints = _metadata(env, "worker-network-endpoints") if worker is not None else None
    if worker is None or not endpoints:
        return None
    # Each is a host name, or `name:id:address`.
    hosts = [(endpoint.split(":") + ["", ""])[2] or endpoint for endpoint in endpoints.split(",")]
    lines = [line.partition(":") for line in (_metadata(env, "tpu-env") or "").splitlines()]
    told = {key.strip(): value.strip().strip("'") for key, _, value in lines if key.strip().startswith("MEGASCALE_")}
    number = _number(worker, "agent-worker-number", 0)
    return _slices("TPU VM", env, {**told, **env}, hosts, number, "agent-worker-number")


def _metadata(env: Mapping[str, str], key: str) -> str | None:
    import urllib.error
    import urllib.request

    host = env.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/attributes/{key}", headers={"Metadata-Flavor": "Google"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for attempt in range(3):
        time.sleep(attempt)
        try:
            with opener.open(request, timeout=5) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
        except OSError:
            pass
    return None


def _slices(
    place: str, env: Mapping[str, str], told: Mapping[str, str], hosts: list[str], worker: int, field: str
) -> Job:
    """All processes of all slices; `told` holds the MEGASCALE_ variables, where there are several."""
    slices = _number(told.get("MEGASCALE_NUM_SLICES") or "1", "MEGASCALE_NUM_SLICES", 1)
    host, process = hosts[0], worker
    if worker >= len(hosts):
        raise RefineError(
            f"{place}: {field}={worker}, but the slice has {len(hosts)} hosts; give 0 to {len(hosts) - 1}"
        )
    if slices > 1:
        for name in ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_SLICE_ID"):
            if not told.get(name):
                raise RefineError(f"{place}: MEGASCALE_NUM_SLICES={slices}, {name} is not set; set both or neither")
        host = told["MEGASCALE_COORDINATOR_ADDRESS"].split(":")[0]
        number = _number(told["MEGASCALE_SLICE_ID"], "MEGASCALE_SLICE_ID", 0)
        process, field = number * len(hosts) + worker, "MEGASCALE_SLICE_ID"
    return _job(place, env, host, _TPU_PORT, slices * len(hosts), process, field)


def _job(
    place: str,
    env: Mapping[str, str],
    host: str,
    port: int,
    count: int,
    process: int,
    field: str,
    devices: tuple[int, ...] | None = None,
) -> Job:
    if process >= count:
        raise RefineError(f"{field}={env.get(field, process)}: there are {count} processes; they count from 0")
    given = env.get("JAX_COORDINATOR_ADDRESS")
    address = given or f"{host}:{env.get('JAX_COORDINATOR_PORT', port)}"
    name = "JAX_COORDINATOR_ADDRESS" if given else "JAX_COORDINATOR_PORT"
    front, _, back = address.rpartition(":")
    if not front or not back.isdecimal() or not 0 < int(back) < 65536:
        raise RefineError(f"{name}={given or back}: give {'host:port' if given else 'a port'}, such as 10.0.0.2:12321")
    return Job(place, address, count, process, devices)


def _number(text: str, name: str, least: int) -> int:
    if not text.strip().isdecimal() or int(text) < least:
        raise RefineError(f"{name}={text}: give a whole number of at least {least}")
    return int(text)


# ------------------------------------------------------------------------------------------------ meeting the others


def _who(job: Job) -> str:
    return f"process {job.process} of {job.processes} ({job.place})"


def _meet(job: Job, timeout: float, version: str) -> None:
    """Wait until every process has come to the coordinator's port, before jax takes that port over.

    The runtime aborts the process when another one is missing at its own deadline; here the missing ones are named.
    """
    host, _, port = job.coordinator.rpartition(":")
    hello = {"refine_jax": 1, "process": job.process, "processes": job.processes, "jax": version}
    deadline = time.monotonic() + timeout
    if job.process == 0:
        with _listen(job, int(port), deadline) as listener:
            _gather(job, listener, hello, deadline)
    else:
        _report(job, host.strip("[]"), int(port), hello, deadline)


def _listen(job: Job, port: int, deadline: float) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    while True:
        try:
            return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=4096)
        except OSError as error:  # the run before may still be letting it go
            if time.monotonic() + 1 > deadline:
                raise StartError(
                    f"{_who(job)}: port {port} cannot be opened ({error.strerror}); end the run that holds it, or set "
                    "JAX_COORDINATOR_PORT (JAX_COORDINATOR_ADDRESS for plain processes) to another, everywhere"
                ) from None
            time.sleep(1)


def _gather(job: Job, listener: socket.socket, hello: dict, deadline: float) -> None:
    """Process 0: one connection from each of the others, which say hello and wait for the word."""
    came: dict[int, socket.socket] = {}
    received: dict[socket.socket, bytes] = {}
    told = time.monotonic() + 30
    with selectors.DefaultSelector() as watch:
        watch.register(listener, selectors.EVENT_READ)

        def drop(link: socket.socket) -> None:
            watch.unregister(link)
            del received[link]
            for process in [process for process, other in came.items() if other is link]:
                del came[process]
            link.close()

        try:
            while len(came) < job.processes - 1:
                now = time.monotonic()
                absent = [i for i in range(1, job.processes) if i not in came]
                names = ", ".join(map(str, absent[:20])) + (f" and {len(absent) - 20} more" * (len(absent) > 20))
                if now > deadline:
                    raise StartError(
                        f"{_who(job)}: process {names} did not come to {job.coordinator} in time; look at what they "
                        f"said, start all within {TIMEOUT} seconds, and let them reach that port"
                    )
                if now > told:
                    print(f"refine-jax: waiting for process {names} of {job.processes}", file=sys.stderr, flush=True)
                    told = now + 30
                for key, _ in watch.select(max(0.0, min(deadline, told) - now) + 0.01):
                    if key.fileobj is listener:
                        link = listener.accept()[0]
                        link.setblocking(False)
                        watch.register(link, selectors.EVENT_READ)
                        received[link] = b""
                        continue
                    link = key.fileobj
                    try:
                        part = link.recv(4096)
                    except OSError:
                        part = b""
                    received[link] += part
                    theirs = _parse(received[link])
                    if not part or theirs is None and len(received[link]) > 200:  # gone, or no process of ours
                        drop(link)
                    elif theirs is not None:
                        _agree(job, hello, theirs, came)
                        came[theirs["process"]] = link
            for link in came.values():
                _say(link, "go")
        except RefineError as error:
            for link in received:
                _say(link, f"{'late' if isinstance(error, StartError) else 'bad'} {error}")
            raise
        finally:
            for link in received:
                link.close()


def _agree(job: Job, hello: dict, theirs: dict, came: Mapping[int, socket.socket]) -> None:
    for name, noun in (("processes", "processes"), ("jax", "jax")):
        if theirs.get(name) != hello[name]:
            raise RefineError(
                f"{_who(job)}: process {theirs['process']} was told {noun} {theirs.get(name)}, this one "
                f"{hello[name]}; give all the same"
            )
    if theirs["process"] in came or not 0 < theirs["process"] < job.processes:
        raise RefineError(
            f"{_who(job)}: two processes say that they are number {theirs['process']}; give each its own, from 0 on"
        )


def _say(link: socket.socket, text: str) -> None:
    try:
        link.settimeout(5)
        link.sendall(text.encode() + b"\n")
    except OSError:
        pass


def _parse(line: bytes) -> dict | None:
    try:
        theirs = json.loads(line) if line.endswith(b"\n") else {}
        return theirs if theirs.get("refine_jax") == 1 and isinstance(theirs["process"], int) else None
    except (ValueError, AttributeError, KeyError):
        return None


def _report(job: Job, host: str, port: int, hello: dict, deadline: float) -> None:
    """The other processes: say hello to process 0, wait for its word."""
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(left, 10)) as link:
                link.sendall(json.dumps(hello).encode() + b"\n")
                link.settimeout(left + 5)  # at the deadline process 0, which knows more, speaks first
                with link.makefile("rb") as stream:
                    answer = stream.readline(4096).decode(errors="replace").strip()
            word, _, message = answer.partition(" ")
            if word == "go":
                return
            if word in ("late", "bad"):
                raise (StartError if word == "late" else RefineError)(message)
            reason = "something else listens there" if answer else "it hung up"
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(max(0.0, min(0.5, deadline - time.monotonic())))
    raise StartError(
        f"{_who(job)}: process 0 did not answer at {job.coordinator} in time ({reason}); look at what it said, start "
        f"all within {TIMEOUT} seconds, and let them reach that port"
    )
