"""The launchers, run for real against stand-ins for the clouds' tools, and the multi-host start with real processes.

The stand-ins record their calls. That of gcloud carries out what is sent to the workers, each in a home of its own, so
that quoting is tested to the end; that of srun runs the command, and kills it where srun does.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from refine_jax import cli, distributed
from refine_jax.errors import RefineError

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
HOSTILE = "a b'c\"d$(touch pwned)`touch pwned`\\e;f&g|h>i*?~{x,y}#!"

RECORD = r"""
call=${0##*/}
for word in "$@"; do call+=$'\037'$word; done
printf '%s\036' "$call" >>"$CLOUD/calls"  # at once: several run at the same time
pop() { # the first line of a file; the last one stays
  [[ -e $1 ]] || return 0
  head -n 1 "$1"
  (($(wc -l <"$1") < 2)) || { tail -n +2 "$1" >"$1.new" && mv "$1.new" "$1"; }
}
option() { local word; for word in "${args[@]}"; do [[ $word != "$1="* ]] || printf '%s' "${word#*=}"; done; }
args=("$@")
"""

TOOLS = {
    "gcloud": r"""
case "$*" in
  *"node-pools list"*) [[ ! -e $CLOUD/pools ]] || grep -x "$(option --filter | sed s/name=//)" "$CLOUD/pools" || true ;;
  *"node-pools create"*) echo "$4" >>"$CLOUD/pools" ;;
  *"node-pools delete"*) sed -i "/^$4\$/d" "$CLOUD/pools" ;;
  *" describe "*)
    state=$(pop "$CLOUD/states")
    if [[ $state == ERROR* ]]; then echo "$state" >&2; exit 1; fi
    if [[ -z $state || $state == GONE ]]; then
      echo "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found" >&2; exit 1
    fi
    echo "$state" ;;
  *" create "*) cp "$CLOUD/after_create" "$CLOUD/states" ;;
  *" delete "*) echo GONE >"$CLOUD/states"; rm -rf "$CLOUD"/worker-* ;;
  *" scp "*)
    [[ $(head -n 1 "$CLOUD/states") == ACTIVE ]] || exit 255
    for i in 0 1; do mkdir -p "$CLOUD/worker-$i"; cp "$5" "$6" "$CLOUD/worker-$i/"; done ;;
  *" ssh "*)
    [[ $(head -n 1 "$CLOUD/states") == @(ACTIVE|SUSPENDING) ]] || exit 255
    code=0
    for i in 0 1; do
      [[ $(option --worker) == all || $(option --worker) == "$i" ]] || continue
      (cd "$CLOUD/worker-$i" && HOME=$PWD WORKER=$i bash -c "$(option --command)") || code=$?
    done
    exit "$code" ;;
esac
""",
    "kubectl": r"""
case "$*" in
  *"get jobset"*) pop "$CLOUD/jobset" ;;
  *"get pods"*jsonpath*) cat "$CLOUD/codes" ;;
  *apply*) cat >"$CLOUD/manifest.yaml"; cp "$CLOUD/after_apply" "$CLOUD/jobset" ;;
  *delete*) rm -f "$CLOUD/jobset" ;;
  *patch*) echo "/true/" >"$CLOUD/jobset"; [[ $* != *:false* ]] || cp "$CLOUD/after_apply" "$CLOUD/jobset" ;;
esac
""",
    "docker": "",
    "refine-jax": "",
    "sbatch": 'echo 7 >"$CLOUD/job"; echo "Submitted batch job 7"; env >"$CLOUD/sbatch_env"',
    "squeue": 'if [[ -e $CLOUD/job ]]; then cat "$CLOUD/job"; fi',
    "scancel": r"""
case "$*" in
  *--batch*) ;;
  *--signal=TERM*) [[ ! -e $CLOUD/step ]] || kill -TERM "$(cat "$CLOUD/step")" ;;
  *) rm -f "$CLOUD/job" ;;
esac
""",
    "scontrol": "[[ ! -e $CLOUD/no_requeue ]]",
    # As srun, which answers SIGTERM with "forcing job termination".
    "srun": r"""
while [[ $1 == --* ]]; do shift; done
(echo "$BASHPID" >"$CLOUD/step"; exec "$@") &  # before anything of it is seen
child=$!
trap 'kill -KILL "$child"' TERM
while true; do
  code=0
  wait "$child" || code=$?
  kill -0 "$child" 2>/dev/null || exit "$code"
done
""",
    "hostname": 'echo "host-${WORKER:-}"',
    # A worker's Python, for its environment: the real one would install for minutes.
    "python3.13": r"""
if [[ $2 == pip && -e $CLOUD/pip_fails ]]; then echo "no such package" >&2; exit 1; fi
[[ $2 != venv ]] || { mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/tool-of-venv"; }
""",
}


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """The stand-ins, and a small checkout that holds launch/; no test changes them."""
    folder = tmp_path_factory.mktemp("place")
    tools, checkout = folder / "tools", folder / "checkout"
    tools.mkdir()
    checkout.mkdir()
    for name, body in TOOLS.items():
        (tools / name).write_text("#!/usr/bin/env bash\n" + RECORD + body)
        (tools / name).chmod(0o755)
    shutil.copytree(LAUNCH, checkout / "launch")
    (checkout / HOSTILE).touch()
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(checkout)]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run(git + command, check=True)
    return folder


@pytest.fixture
def cloud(place, tmp_path, monkeypatch):
    """A folder for the stand-ins' memory, with the stand-ins on PATH; the working folder has the checkout."""
    folder = tmp_path / "cloud"
    folder.mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "checkout").symlink_to(place / "checkout")
    (folder / "after_create").write_text("ACTIVE\n")
    (folder / "after_apply").write_text("/false/\n/false/Completed\n")
    monkeypatch.setenv("CLOUD", str(folder))
    monkeypatch.setenv("PATH", f"{place / 'tools'}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in [*os.environ]:
        if name.startswith(("LAUNCH_", "SLURM_", "SRUN_", "JAX_COORD", "JAX_NUM", "JAX_PROC", "XDG_CACHE")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return folder


def launch(script, *args, code=0):
    done = subprocess.run(
        ["bash", f"checkout/launch/{script}", *args],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


def calls(cloud, *tools):
    path = cloud / "calls"
    text = path.read_text() if path.exists() else ""
    found = [call.split("\037") for call in text.split("\036") if call]
    return [call for call in found if not tools or call[0] in tools]


def printed(done, *tools):
    """The commands of a dry run, as words."""
    found = []
    for line in done.stdout.splitlines():
        words = shlex.split(line.removesuffix(" <<'YAML'")) if line.startswith((*tools, "env ")) else []
        start = next((i for i, word in enumerate(words) if word in tools), None)
        found += [] if start is None else [words[start:]]
    return found


def asked(cloud):
    """What was asked of gcloud, a word each: describe, create, delete, scp, or what the workers were told."""
    found = []
    for call in calls(cloud, "gcloud"):
        told = [word for word in call if word.startswith("--command=")]
        found.append(told[0].split()[2] if told else call[4])
    return found


def wait_for(check, seconds=20):
    end = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)
    return value


# ------------------------------------------------------------------------------------------------ all of them

SCRIPTS = ["tpu_vm.sh", "gke.sh", "slurm.sh", "local.sh"]


def test_shellcheck():
    tool = Path(sys.executable).parent / "shellcheck"
    files = sorted(map(str, [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]))
    assert len(files) >= 7
    done = subprocess.run([tool if tool.exists() else "shellcheck", "-x", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag_and_variable(script):
    done = subprocess.run(["bash", LAUNCH / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    source = (LAUNCH / script).read_text() + (LAUNCH / "common.sh").read_text()
    flags = {flag for line in re.findall(r"^ +((?:--[a-z-]+(?: \| )?)+)\)", source, re.M) for flag in line.split(" | ")}
    assert len(flags) > 5
    read = set(re.findall(r"\$\{(LAUNCH_[A-Z_]+)", source))
    assert {"LAUNCH_CONFIG", "LAUNCH_WORKDIR"} < read
    assert [flag for flag in (flags | read) - {"--"} if flag not in done.stdout] == []


def test_what_the_caller_exports_reaches_the_training(cloud):
    """No variable of the scripts takes the place of one that the caller has exported under the same name."""
    scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]
    text = "\n".join(path.read_text() for path in scripts)
    names = set(re.findall(r"(?<![\w$-])([A-Za-z]\w*)(?:\+?=|\[)", text)) | set(re.findall(r"\$\{?([A-Za-z]\w*)", text))
    names |= {"PORT", "NAME", "CONFIG", "GPUS", "PROCESSES", "PROJECT", "TIME", "STATE", "code", "step", "FAILED"}
    bash = {"IFS", "SECONDS"}  # which takes neither from outside
    ours = ("LAUNCH_", "JAX_", "REFINE_JAX_", "SLURM_", "BASH_", "PYTHON", "XDG_")
    names = sorted(name for name in names if not name.startswith(ours) and name not in {*os.environ, *bash})
    env = {**os.environ, **dict.fromkeys(names, "caller"), "SLURM_JOB_ID": "7"}
    show = ["bash", "-c", 'env >>"$CLOUD/seen"']
    home = Path("home", "refine-jax", "n")
    (home / "source").mkdir(parents=True)
    (home / "installed").write_text("v\n")
    for script, *args in [
        ("local.sh", "--processes", "2", "--", *show),
        ("local.sh", "--", *show),
        ("slurm.sbatch", *show),
        ("slurm.sh", "submit", "--name", "n", "--", *show),
        ("tpu_worker.sh", "install", "n", "v", show[2]),
        ("tpu_worker.sh", "_run", "n", *show),
    ]:
        subprocess.run(["bash", f"checkout/launch/{script}", *args], env=env, check=True, stdout=subprocess.DEVNULL)
    seen = [*(cloud / "seen").read_text().splitlines(), *(cloud / "sbatch_env").read_text().splitlines()]
    assert {name: seen.count(f"{name}=caller") for name in names} == dict.fromkeys(names, 7)


TPU = ["--name", "n", "--zone", "z", "--accelerator", "v6e-16", "--config", "c", "--workdir", "w"]
GKE = ["--name", "n", "--image", "i", "--tpu", "v6e", "--topology", "4x4", "--config", "c", "--workdir", "w"]
SLURM = ["--name", "n", "--config", "c", "--workdir", "w"]


@pytest.mark.parametrize(
    "script, args, words",
    [
        ("tpu_vm.sh", [], "say what to do"),
        ("tpu_vm.sh", ["fly"], "fly"),
        ("tpu_vm.sh", ["resume", *TPU, "--name", "Bad Name"], "--name Bad Name"),
        ("tpu_vm.sh", ["resume", *TPU, "--name", "-x"], "--name -x"),
        ("tpu_vm.sh", ["resume", *TPU, "--zone", "a;b"], "--zone a;b"),
        ("tpu_vm.sh", ["resume", *TPU, "--accelerator", "v9-8"], "give --runtime"),
        ("tpu_vm.sh", ["resume", *TPU, "--slices", "0"], "--slices 0"),
        ("tpu_vm.sh", ["resume", *TPU, "--wings"], "--wings"),
        ("tpu_vm.sh", ["resume", *TPU, "--config"], "--config wants a value"),
        ("tpu_vm.sh", ["resume", *TPU, "--config.steps", "3"], "with an equals sign"),
        ("tpu_vm.sh", ["resume", *TPU, "--", "ls"], "after --"),
        ("tpu_vm.sh", ["resume", "--zone", "z"], "--name is missing"),
        ("tpu_vm.sh", ["run", "--name", "n", "--zone", "z"], "--config is missing"),
        ("gke.sh", ["run", *GKE, "--tpu", "v2"], "--tpu v2"),
        ("gke.sh", ["run", *GKE, "--topology", "4x"], "--topology 4x"),
        ("gke.sh", ["run", *GKE, "--topology", "1x1"], "whole hosts"),
        ("gke.sh", ["run", *GKE, "--bucket", 'a"b'], "--bucket"),
        ("gke.sh", ["run", *GKE, "--config", "a\x01b"], "control character"),
        ("gke.sh", ["create", *GKE], "--cluster is missing"),
        ("slurm.sh", ["submit", *SLURM, "--task", "core"], "--task core"),
        ("slurm.sh", ["submit", *SLURM, "--time", "1h"], "--time 1h"),
        ("slurm.sh", ["submit", *SLURM, "--gpus", "1.5"], "--gpus 1.5"),
        ("slurm.sh", ["submit", *SLURM, "--cpus", "0"], "--cpus 0"),
        ("local.sh", ["--processes", "two", "--", "true"], "--processes two"),
        ("local.sh", [], "--config is missing"),
    ],
)
def test_bad_flags_give_one_line_and_run_nothing(cloud, script, args, words):
    done = launch(script, *args, code=2)
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1 and words in done.stderr
    assert calls(cloud) == []


@pytest.mark.parametrize("script", ["tpu_worker.sh", "Dockerfile"])
def test_what_is_installed_reads_what_the_shipped_configurations_name(script):
    """TensorBoard's files, Parquet tables, procedural data: --setup runs too early to add them."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (found,) = re.findall(r"pip install .*\[([a-z,]+)\]", (LAUNCH / script).read_text())
    assert {"tpu", "watch", "parquet", "data"} <= set(found.split(",")) <= set(extras)


# ------------------------------------------------------------------------------------------------ TPU VMs

PLAN = """
# One line of the plan for each run of a worker: `code SECONDS CODE`, or `lose` the machines.
runs=$HOME/runs; echo x >>"$CLOUD/started-$WORKER"; n=$(wc -l <"$CLOUD/started-$WORKER")
read -r what seconds code <<<"$(sed -n "${n}p" "$CLOUD/plan-$WORKER")"
trap 'exit 75' TERM
echo "run $n of worker $WORKER in $PWD with $(command -v tool-of-venv)"
for ((i = 0; i < seconds * 10; i++)); do sleep 0.1; done
if [[ $what == lose ]]; then echo SUSPENDED >"$CLOUD/states"; rm -rf "$CLOUD"/worker-*; fi
exit "$code"
"""
TPU_HERE = ["--name", "run-1", "--zone", "z1", "--accelerator", "v6e-16", "--poll", "0"]


def plan(cloud, *workers):
    (cloud / "train.bash").write_text(PLAN)
    for i, lines in enumerate(workers):
        (cloud / f"plan-{i}").write_text("\n".join(lines) + "\n")
    return ["--", "bash", str(cloud / "train.bash")]


def test_tpu_life(cloud):
    """create, install, run, status, logs, stop, run again, delete; each of them twice."""
    (cloud / "states").write_text("GONE\n")
    (cloud / "after_create").write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    for _ in range(2):
        launch("tpu_vm.sh", "create", *TPU_HERE, "--spot", "--slices", "2", "--project", "p")
    assert asked(cloud) == ["describe", "create", *["describe"] * 3, "describe"]
    create = calls(cloud, "gcloud")[1]
    assert create[1:] == [
        *("compute", "tpus", "queued-resources", "create", "run-1", "--zone=z1", "--project=p"),
        *("--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--node-count=2", "--node-prefix=run-1"),
        *("--spot", "--quiet"),
    ]

    where = ["--name", "run-1", "--zone", "z1"]
    launch("tpu_vm.sh", "install", *where, "--setup", "echo ready >>$HOME/mounted; false || true")
    assert launch("tpu_vm.sh", "install", *where).stdout.count("is installed") == 2
    worker = cloud / "worker-1" / "refine-jax" / "run-1"
    assert (worker / "source" / "launch" / "tpu_vm.sh").exists()
    assert (cloud / "worker-1" / "mounted").read_text() == "ready\n"
    assert [call[1:4] for call in calls(cloud, "python")][:1] == [["-m", "pip", "install"]]

    command = plan(cloud, ["code 60 0", "code 0 0"], ["code 60 0", "code 0 0"])
    assert launch("tpu_vm.sh", "run", *where, *command).stdout.count("started") == 2
    assert launch("tpu_vm.sh", "run", *where, *command).stdout.count("already running") == 2
    lines = launch("tpu_vm.sh", "status", *where).stdout.splitlines()
    assert lines == ["run-1 ACTIVE", "worker host-0 running", "worker host-1 running"]

    follower = subprocess.Popen(
        ["bash", "checkout/launch/tpu_vm.sh", "logs", *where], stdout=subprocess.PIPE, text=True
    )
    assert follower.stdout.readline() == f"run 1 of worker 0 in {cloud}/worker-0/refine-jax/run-1/source with " + (
        f"{cloud}/worker-0/refine-jax/run-1/venv/bin/tool-of-venv\n"
    )
    wait_for(lambda: (worker / "log").read_text())
    launch("tpu_vm.sh", "stop", *where)
    assert follower.wait(20) == 0  # it ends with the run
    status = lambda: launch("tpu_vm.sh", "status", *where).stdout
    wait_for(lambda: "running" not in status())
    assert status().splitlines()[1:] == [f"worker host-{i} ended 75, told to stop" for i in (0, 1)]
    launch("tpu_vm.sh", "stop", *where)  # nothing runs: fine
    launch("tpu_vm.sh", "run", *where, *command)
    wait_for(lambda: "running" not in status())
    assert status().splitlines()[1:] == ["worker host-0 ended 0", "worker host-1 ended 0"]

    for _ in range(2):
        launch("tpu_vm.sh", "delete", *where)
    deletes = [call for call in calls(cloud, "gcloud") if call[4] == "delete"]
    assert [call[5:] for call in deletes] == [["run-1", "--zone=z1", "--force", "--quiet"]]


def test_tpu_resume_from_preemption_to_the_end(cloud):
    """Suspended before it begins, saved and ended, machines lost in the middle, a crash, the end."""
    (cloud / "states").write_text("SUSPENDING\nSUSPENDED\n")
    command = plan(
        cloud, ["code 0 75", "code 30 0", "code 0 139", "code 0 0"], ["code 0 75", "lose 0 0", "code 0 134", "code 0 0"]
    )
    done = launch("tpu_vm.sh", "resume", *TPU_HERE, *command)
    said = [line.split(": ", 1)[1] for line in done.stderr.splitlines()]
    assert said[:3] == [
        "run-1 is SUSPENDING; waiting",
        "run-1 is SUSPENDED; giving it back and asking again",
        "the training was preempted and saved; running it again",
    ]
    assert "run-1 was preempted; asking for it again" in said
    assert any("running it again (1 of 5)" in line for line in said) and said[-1].startswith("finished")
    steps = [word for word in asked(cloud) if word not in ("describe", "status")]
    once, again = ["scp", "install", "start"], ["scp", "install", "again"]
    assert steps == ["delete", "create", *once, *again, "delete", "create", *again, *again]


@pytest.mark.parametrize("codes, end", [((2, 134), 2), ((134, 1), 1), ((0, 0), 0)])
def test_tpu_resume_stops(cloud, codes, end):
    (cloud / "states").write_text("ACTIVE\n")
    command = plan(cloud, [f"code 0 {codes[0]}"] * 9, [f"code 0 {codes[1]}"] * 9)
    done = launch("tpu_vm.sh", "resume", *TPU_HERE, *command, code=end)
    assert [word for word in asked(cloud) if word == "start"] == ["start"]
    assert end == 0 or f"ended with {end}" in done.stderr


def test_tpu_failure_while_the_machines_go_is_no_failure(cloud):
    """A worker that ends with 1 because its neighbour is being taken away."""
    (cloud / "states").write_text("ACTIVE\n")
    (cloud / "fade.bash").write_text(
        'if ((WORKER == 0)) && [[ ! -e $CLOUD/faded ]]; then touch "$CLOUD/faded"\n'
        'printf "SUSPENDING\\nSUSPENDED\\n" >"$CLOUD/states"; exit 1; fi\n'
    )
    done = launch("tpu_vm.sh", "resume", *TPU_HERE, "--", "bash", str(cloud / "fade.bash"))
    assert "was preempted; asking for it again" in done.stderr and asked(cloud).count("again") == 1


def test_verdict():
    """Of several processes: bad input stops, a preemption explains any other end, a failure stops."""
    cases = {
        "0 0": "done",
        "75 0": "again",
        "1 75": "again",
        "75 1": "again",
        "134 75 139": "again",
        "75 2": "stop 2",
        "134 1": "stop 1",
        "1 134": "stop 1",
        "0 134": "crash 134",
        "69": "crash 69",
        "3": "stop 3",
        "3 1": "stop 1",
        "137 3": "crash 137",
    }
    script = f'. "{LAUNCH}/common.sh"; for codes; do verdict $codes; echo; done'
    done = subprocess.run(["bash", "-c", script, "-", *cases], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == list(cases.values())


def test_tpu_resume_gives_up_on_crashes_and_on_a_failed_request(cloud):
    (cloud / "states").write_text("ACTIVE\n")
    done = launch(
        "tpu_vm.sh",
        "resume",
        *TPU_HERE,
        "--max-restarts",
        "2",
        *plan(cloud, ["code 0 134"] * 9, ["code 0 134"] * 9),
        code=1,
    )
    assert (asked(cloud).count("start"), asked(cloud).count("again")) == (1, 2)
    assert "the training ended with 134, 3 times" in done.stderr
    shutil.rmtree(cloud / "worker-0")
    (cloud / "worker-0").touch()  # no place to log in to
    done = launch("tpu_vm.sh", "resume", *TPU_HERE, "--max-restarts", "1", "--", "true", code=1)
    assert "the workers of run-1 cannot be reached, 2 times" in done.stderr and "the training" not in done.stderr
    (cloud / "calls").unlink()
    (cloud / "states").write_text("FAILED\n")  # an old one: asked for again; the new one: told
    (cloud / "after_create").write_text("FAILED\n")
    done = launch("tpu_vm.sh", "create", *TPU_HERE, code=1)
    assert asked(cloud) == ["describe", "delete", "describe", "create", "describe"]
    assert "the request for run-1 failed" in done.stderr
    (cloud / "states").write_text("ERROR: PERMISSION_DENIED: no\n")
    assert "PERMISSION_DENIED" in launch("tpu_vm.sh", "create", *TPU_HERE, code=1).stderr


def test_tpu_configuration_that_is_not_sent(cloud):
    """What is not in the commit would be missed on the workers, after the TPUs were waited for."""
    Path("new.py").touch()
    for config in ("new.py", "checkout/new.py", "../new.py", "launch"):
        done = launch("tpu_vm.sh", "resume", *TPU_HERE, "--config", config, "--workdir", "w", code=2)
        assert f"--config {config} is not in the commit" in done.stderr and len(done.stderr.splitlines()) == 1
    assert calls(cloud) == []
    for config in ("launch/tpu_vm.sh", "./launch/../launch/tpu_vm.sh", "/mnt/new.py"):
        launch("tpu_vm.sh", "resume", *TPU_HERE, "--config", config, "--workdir", "w", "--dry-run")


def test_tpu_stop_ends_a_resume_elsewhere(cloud):
    """Whether the training saves (75) or had not begun (143), whether it runs or is about to be started again."""
    (cloud / "states").write_text("ACTIVE\n")
    where = ["--name", "run-1", "--zone", "z1"]
    command = plan(cloud, ["code 60 0", "code 0 139", "code 0 0"], ["code 60 0", "code 0 143", "code 0 0"])
    args = ["bash", "checkout/launch/tpu_vm.sh", "resume", *TPU_HERE]
    with subprocess.Popen([*args, *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as elsewhere:
        wait_for(lambda: (cloud / "started-1").exists())
        launch("tpu_vm.sh", "stop", *where)
        assert elsewhere.wait(20) == 75
        assert "tpu_vm.sh: run-1 was told to stop; resume it, or run it, to continue\n" == elsewhere.stderr.read()
    assert asked(cloud).count("again") == 0

    # The first setup marks what the start by hand takes away, the second one what a stop meanwhile would.
    mark = ["--setup", "touch $HOME/refine-jax/run-1/stop"]
    done = launch("tpu_vm.sh", "resume", *TPU_HERE, *mark, *command, code=75)
    assert "(1 of 5)" in done.stderr and "was told to stop" in done.stderr
    assert (cloud / "started-1").read_text().count("x") == 2
    launch("tpu_vm.sh", "run", *where, *command)
    wait_for(lambda: "running" not in launch("tpu_vm.sh", "status", *where).stdout)
    assert "told" not in launch("tpu_vm.sh", "status", *where).stdout


def test_tpu_setup_or_installation_that_fails(cloud):
    """It is no crash: what failed where, why, and the end. One that fails as its machine goes is a preemption."""
    (cloud / "states").write_text("ACTIVE\n")
    for action in ("resume", "install"):
        fails = ["--setup", "((WORKER == 0)) || { echo no such disk >&2; exit 32; }"]
        done = launch("tpu_vm.sh", action, *TPU_HERE, *fails, *plan(cloud, [], []), code=2)
        *_, why, end = done.stderr.splitlines()
        assert why == "host-1: no such disk" and "setup failed on host-1: see" in end and "training" not in end
    assert asked(cloud).count("install") == 2 and "start" not in asked(cloud)
    (cloud / "pip_fails").touch()
    shutil.rmtree(cloud / "worker-0" / "refine-jax")
    done = launch("tpu_vm.sh", "resume", *TPU_HERE, *plan(cloud, [], []), code=2)
    assert "installation failed on host-0 host-1: see" in done.stderr and "host-1: no such package" in done.stderr
    (cloud / "pip_fails").unlink()

    goes = "[[ -e $CLOUD/went ]] || { ((WORKER == 0)) || touch $CLOUD/went; echo SUSPENDED >$CLOUD/states; exit 1; }"
    (cloud / "calls").unlink()
    done = launch("tpu_vm.sh", "resume", *TPU_HERE, "--setup", goes, "--", "true")
    assert "was preempted; asking for it again" in done.stderr and asked(cloud).count("install") == 2


def test_tpu_lost_worker_is_waited_for_no_longer(cloud):
    """One worker failed, the other hangs and does not listen: it is ended, and the failure is told."""
    (cloud / "states").write_text("ACTIVE\n")
    script = cloud / "hang.bash"
    script.write_text('((WORKER)) || exit 2\ntrap "" TERM\nwhile true; do sleep 0.2; done\n')
    launch("tpu_vm.sh", "resume", *TPU_HERE, "--", "bash", str(script), code=2)
    assert asked(cloud).count("kill") == 1


def test_tpu_dry_run_is_what_a_run_does(cloud):
    (cloud / "states").write_text("GONE\n")
    args = ["resume", *TPU_HERE, "--setup", "true", "--create-flag", "--labels=a=b", "--ssh-flag", "--internal-ip"]
    args += ["--config", HOSTILE, "--workdir", "gs://b/" + HOSTILE, f"--config.x={HOSTILE}"]
    dry = launch("tpu_vm.sh", *args, "--dry-run")
    assert calls(cloud) == [] and not (Path("home") / ".cache").exists()
    launch("tpu_vm.sh", *args)
    told, done = printed(dry, "gcloud"), calls(cloud, "gcloud")
    assert told == done[: len(told)]
    assert {call[4] for call in done[len(told) :]} <= {"ssh", "describe"}  # looks, as often as it takes
    for call in calls(cloud, "refine-jax"):
        assert call[1:] == ["train", "--config", HOSTILE, "--workdir", "gs://b/" + HOSTILE, f"--config.x={HOSTILE}"]
    assert len(calls(cloud, "refine-jax")) == 2 and not list(Path().rglob("pwned"))


# ------------------------------------------------------------------------------------------------ GKE

GKE_HERE = ["--name", "run-1", "--image", "repo/image:1", "--tpu", "v6e", "--topology", "4x4", "--poll", "0"]
TRAIN = ["--config", "configs/x.py", "--workdir", "/bucket/run"]


def test_gke_life(cloud):
    pools = ["--cluster", "c", "--location", "l"]
    for _ in range(2):
        launch("gke.sh", "create", *GKE_HERE, *pools, "--slices", "2", "--spot")
    assert (cloud / "pools").read_text() == "run-1-0\nrun-1-1\n"
    made = [call for call in calls(cloud, "gcloud") if call[3] == "create"]
    assert made[0][4:] == [
        *("run-1-0", "--cluster=c", "--location=l", "--machine-type=ct6e-standard-4t", "--num-nodes=4"),
        *("--tpu-topology=4x4", "--spot", "--quiet"),
    ]
    launch("gke.sh", "image", *GKE_HERE)
    assert [call[1] for call in calls(cloud, "docker")] == ["build", "push"]

    (cloud / "after_apply").write_text("/false/\n")
    run = ["run", *GKE_HERE, *TRAIN, "--slices", "2", "--bucket", "b", "--service-account", "s", "--spot"]
    for _ in range(2):
        launch("gke.sh", *run)
    assert len([call for call in calls(cloud, "kubectl") if "apply" in call]) == 1
    jobset = yaml.safe_load((cloud / "manifest.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert job["replicas"] == 2 and job["template"]["spec"]["parallelism"] == 4
    assert pod["containers"][0]["command"] == ["refine-jax", "train", *TRAIN]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    # Batches pass through /dev/shm; a checkpoint's folder is renamed.
    assert pod["containers"][0]["volumeMounts"] == [
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "bucket", "mountPath": "/bucket"},
    ]
    shared, bucket = pod["volumes"]
    assert shared == {"name": "shm", "emptyDir": {"medium": "Memory"}} and bucket["name"] == "bucket"
    options = bucket["csi"]["volumeAttributes"]
    assert options == {"bucketName": "b", "mountOptions": "implicit-dirs,rename-dir-limit=200000"}
    stops = job["template"]["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"]
    assert stops == [1, 2, 3] and jobset["spec"]["failurePolicy"]["rules"][0]["action"] == "FailJobSet"

    launch("gke.sh", "stop", *GKE_HERE)
    launch("gke.sh", "stop", *GKE_HERE)
    launch("gke.sh", *run)
    patches = [call[-1] for call in calls(cloud, "kubectl") if "patch" in call]
    assert patches == ['--patch={"spec":{"suspend":true}}', '--patch={"spec":{"suspend":false}}']
    launch("gke.sh", "logs", *GKE_HERE)
    launch("gke.sh", "status", *GKE_HERE)
    for _ in range(2):
        launch("gke.sh", "delete", *GKE_HERE, *pools, "--slices", "2")
    assert (cloud / "pools").read_text() == ""
    assert [call[4] for call in calls(cloud, "gcloud") if call[3] == "delete"] == ["run-1-0", "run-1-1"]


@pytest.mark.parametrize("codes, end", [("75 134", 0), ("2 134", 2), ("1 ", 1), ("137 ", 137), ("", 255)])
def test_gke_resume(cloud, codes, end):
    """A JobSet that failed: again after a preemption, else its code."""
    (cloud / "jobset").write_text("/false/\n/false/Failed\n")
    (cloud / "codes").write_text(codes)
    launch("gke.sh", "resume", *GKE_HERE, *TRAIN, code=end)
    done = [word for call in calls(cloud, "kubectl") for word in call if word in ("apply", "delete")]
    assert done == (["delete", "apply"] if end == 0 else [])


def test_gke_dry_run_is_what_a_run_does(cloud):
    args = ["resume", *GKE_HERE, "--namespace", "ns", "--context", "ctx", "--claim", "c"]
    args += ["--config", HOSTILE + "\n\t", "--workdir", "/data/" + HOSTILE, f"--config.x={HOSTILE}"]
    dry = launch("gke.sh", *args, "--dry-run")
    assert calls(cloud) == []
    (cloud / "after_apply").write_text("/false/Completed\n")
    launch("gke.sh", *args)
    assert printed(dry, "kubectl") == calls(cloud, "kubectl")
    written = (cloud / "manifest.yaml").read_text()
    assert written in dry.stdout
    job = yaml.safe_load(written)["spec"]["replicatedJobs"][0]
    pod = job["template"]["spec"]["template"]["spec"]
    assert [mount["name"] for mount in pod["containers"][0]["volumeMounts"]] == ["shm", "data"]
    assert [volume["name"] for volume in pod["volumes"]] == ["shm", "data"]
    command = pod["containers"][0]["command"]
    given = [word.replace("$$", "$") for word in command]  # as Kubernetes reads it
    assert given[3:] == [HOSTILE + "\n\t", "--workdir", "/data/" + HOSTILE, f"--config.x={HOSTILE}"]
    assert "$(" not in "".join(command).replace("$$", "")


# ------------------------------------------------------------------------------------------------ Slurm


def test_slurm_life(cloud):
    args = ["--name", "run-1", "--nodes", "2", "--cpus", "12", "--time", "4:00:00", "--save", "120", "--log", "50%.log"]
    args += ["--sbatch-flag", "--constraint=h100", "--config", HOSTILE, "--workdir", "w", f"--config.x={HOSTILE}"]
    dry = launch("slurm.sh", "submit", *args, "--task", "node", "--dry-run")
    assert calls(cloud) == []
    launch("slurm.sh", "submit", *args, "--task", "node")
    assert printed(dry, "squeue", "sbatch") == calls(cloud)
    (sbatch,) = calls(cloud, "sbatch")
    assert {"--ntasks-per-node=1", "--gpus-per-node=8", "--signal=B:TERM@120", "--requeue"} < set(sbatch)
    assert "--cpus-per-task=12" in sbatch
    assert f"--output={Path().absolute()}/50%%.log" in sbatch and not list(Path().rglob("pwned"))
    assert sbatch[-6:] == ["train", "--config", HOSTILE, "--workdir", "w", f"--config.x={HOSTILE}"]
    assert "REFINE_JAX_GRACE=120" in (cloud / "sbatch_env").read_text()
    assert "job 7 already" in launch("slurm.sh", "submit", *args).stderr
    assert len(calls(cloud, "sbatch")) == 1
    launch("slurm.sh", "status", "--name", "run-1")
    launch("slurm.sh", "stop", "--name", "run-1")
    assert calls(cloud, "scontrol", "scancel")[-2:] == [
        ["scontrol", "update", "JobId=7", "Requeue=0"],
        ["scancel", "--batch", "--signal=TERM", "7"],
    ]
    for _ in range(2):
        launch("slurm.sh", "delete", "--name", "run-1")
    assert calls(cloud, "scancel")[1:] == [["scancel", "7"]]


def batch(*command, **env):
    return subprocess.Popen(
        ["bash", "checkout/launch/slurm.sbatch", *command],
        env={**os.environ, "SLURM_JOB_ID": "7", "REFINE_JAX_PAUSE": "0", **env},
        stdout=subprocess.PIPE,
        text=True,
    )


SAVES = "trap 'sleep 0.3; echo saved; exit 75' TERM; echo up; for i in {1..300}; do sleep 0.1; done; exit 9"


@pytest.mark.parametrize("requeues", [True, False])
def test_slurm_sigterm_saves_and_requeues(cloud, requeues):
    if not requeues:
        (cloud / "no_requeue").touch()
    with batch("bash", "-c", SAVES) as job:
        assert job.stdout.readline() == "up\n"
        job.send_signal(signal.SIGTERM)
        assert "saved" in job.stdout.read()
    assert job.returncode == (0 if requeues else 75)
    assert calls(cloud, "scontrol") == [["scontrol", "requeue", "7"]]
    assert calls(cloud, "scancel") == [["scancel", "--signal=TERM", "7"]]


def test_slurm_sigterm_before_the_step_is_known(cloud):
    (cloud / "slow").write_text("""trap '[[ $BASH_COMMAND != "_step=\\$!" ]] || sleep 0.5' DEBUG""")
    with batch("bash", "-c", SAVES, BASH_ENV=str(cloud / "slow")) as job:
        assert job.stdout.readline() == "up\n"
        job.send_signal(signal.SIGTERM)
        assert "saved" in job.stdout.read()
    assert job.returncode == 0
    assert calls(cloud, "scontrol") == [["scontrol", "requeue", "7"]]
    assert calls(cloud, "scancel") == [["scancel", "--signal=TERM", "7"]]


def test_slurm_sigterm_before_slurm_knows_the_step(cloud, place):
    late = (place / "tools" / "srun").read_text().replace("(echo", "(sleep 1; echo")
    (cloud / "srun").write_text(late)
    (cloud / "srun").chmod(0o755)
    path = f"{cloud}:{os.environ['PATH']}"
    with batch("bash", "-c", SAVES, PATH=path, REFINE_JAX_AGAIN="0.7") as job:
        while not calls(cloud, "srun"):
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        job.stdout.read()
    assert job.returncode == 0 and calls(cloud, "scontrol") == [["scontrol", "requeue", "7"]]
    assert len(calls(cloud, "scancel")) > 1


def test_slurm_step_has_the_cpus_of_the_job(cloud):
    """From --cpus or --sbatch-flag: srun by itself gives its tasks one each."""
    (cloud / "srun").write_text("#!/bin/sh\nprintenv SRUN_CPUS_PER_TASK || echo none\n")
    (cloud / "srun").chmod(0o755)
    for env, said in [({"SLURM_CPUS_PER_TASK": "16"}, "16\n"), ({}, "none\n")]:
        with batch("true", PATH=f"{cloud}:{os.environ['PATH']}", **env) as job:
            assert job.stdout.read() == said


@pytest.mark.parametrize("code, runs, end", [(0, 1, 0), (2, 1, 2), (1, 1, 1), (75, 1, 0), (134, 3, 134)])
def test_slurm_exit_codes(cloud, code, runs, end):
    with batch("bash", "-c", f"echo run; exit {code}", REFINE_JAX_MAX_RESTARTS="2") as job:
        assert job.stdout.read().count("run\n") == runs
    assert job.returncode == end
    assert len(calls(cloud, "srun")) == runs and "--kill-on-bad-exit=0" in calls(cloud, "srun")[0]
    assert len(calls(cloud, "scontrol")) == (code == 75)


# ------------------------------------------------------------------------------------------------ local processes


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def local(*args, **kwargs):
    # A suite that a script runs in the background ignores SIGINT, and a shell cannot trap what was ignored before it.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    command = ["bash", LAUNCH / "local.sh", *args]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heed, **kwargs)
    try:
        yield job
        job.wait(60)
    finally:
        for _ in range(2):  # the second one kills
            if job.poll() is None:
                job.send_signal(signal.SIGTERM)
                time.sleep(0.5)
        job.stdout.close()


def gone(pid):
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_local_dry_run_quotes(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    args = ["--processes", "2", "--gpus", "2", "--port", "5000", "--config", HOSTILE, "--workdir", "w"]
    with local(*args, f"--config.x={HOSTILE}", "--dry-run") as job:
        lines = [shlex.split(line) for line in job.stdout]
    train = ["refine-jax", "train", "--config", HOSTILE, "--workdir", "w", f"--config.x={HOSTILE}"]
    common = ["env", "JAX_COORDINATOR_ADDRESS=127.0.0.1:5000", "JAX_NUM_PROCESSES=2"]
    assert lines == [
        [*common, "JAX_PROCESS_ID=0", "JAX_LOCAL_DEVICE_IDS=0,1", *train],
        [*common, "JAX_PROCESS_ID=1", "JAX_LOCAL_DEVICE_IDS=2,3", *train],
    ]


@pytest.mark.parametrize(
    "processes, gpus, visible, told",
    [
        (1, 2, None, ["CUDA_VISIBLE_DEVICES=0,1"]),
        (1, 2, "3,5,7", ["CUDA_VISIBLE_DEVICES=3,5"]),
        (1, 1, "GPU-8932f937,GPU-f123d1eb", ["CUDA_VISIBLE_DEVICES=GPU-8932f937"]),
        (2, 1, "3,5", ["JAX_LOCAL_DEVICE_IDS=0", "JAX_LOCAL_DEVICE_IDS=1"]),
        (1, 0, "3,5", [None]),
        (1, 3, "3,5", "names 2"),
        (2, 1, "3", "names 1"),
        (1, 1, "", "names 0"),
    ],
)
def test_local_gpus(processes, gpus, visible, told):
    """jax reads JAX_LOCAL_DEVICE_IDS of several processes; of one CUDA itself must hide the rest."""
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    env |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    args = ["--processes", str(processes), "--gpus", str(gpus), "--port", "5000", "--dry-run", "--", "true"]
    done = subprocess.run(["bash", LAUNCH / "local.sh", *args], env=env, capture_output=True, text=True)
    if isinstance(told, str):
        assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1
    else:
        found = [re.findall(r"(?:CUDA_|JAX_LOCAL_)\S+", line) for line in done.stdout.splitlines()]
        assert found == [[word] if word else [] for word in told]


def test_local_passes_sigterm_on_and_ends_with_75(tmp_path):
    with local("--processes", "2", "--", "bash", "-c", SAVES) as job:
        assert sorted([job.stdout.readline(), job.stdout.readline()]) == ["[0] up\n", "[1] up\n"]
        job.send_signal(signal.SIGTERM)
        assert job.stdout.read().count("saved") == 2
    assert job.returncode == 75


def test_local_second_signal_kills():
    with local("--processes", "2", "--", "bash", "-c", "trap '' TERM; echo up; while true; do sleep 0.1; done") as job:
        assert sorted([job.stdout.readline(), job.stdout.readline()]) == ["[0] up\n", "[1] up\n"]
        job.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert job.poll() is None
        job.send_signal(signal.SIGINT)
        assert job.wait(20) == 137


def test_local_runs_again_after_75_and_stops_on_failure(tmp_path):
    script = 'n=$(cat n 2>/dev/null || echo 0); echo $((n + 1)) >n; ((n > 1)) || exit 75; exit "$CODE"'
    for code in (0, 2):
        (tmp_path / "n").unlink(missing_ok=True)
        with local("--", "bash", "-c", script, cwd=tmp_path, env={**os.environ, "CODE": str(code)}) as job:
            pass
        assert job.returncode == code and (tmp_path / "n").read_text() == "3\n"


@pytest.mark.parametrize("listens", [True, False])
def test_local_failure_of_one_ends_the_others(tmp_path, listens):
    trap = "" if listens else "trap '' TERM;"
    script = f"{trap} echo $$ >pid-$JAX_PROCESS_ID; ((JAX_PROCESS_ID)) || sleep 0.5; ((JAX_PROCESS_ID)) || exit 3; "
    script += "while true; do sleep 0.1; done"
    with local("--processes", "3", "--grace", "1", "--logs", "logs", "--", "bash", "-c", script, cwd=tmp_path) as job:
        assert job.wait(30) == 3
    assert all(gone((tmp_path / f"pid-{i}").read_text()) for i in range(3))
    assert len(list((tmp_path / "logs").iterdir())) == 3


REAL = """
import os, sys, time
from pathlib import Path
from refine_jax import checkpoint, distributed
from refine_jax.errors import RefineError
job = distributed.start()
import jax
from jax.experimental import multihost_utils
assert distributed.start() == job  # a second time: nothing
ids = multihost_utils.process_allgather(jax.numpy.array([jax.process_index()])).ravel().tolist()
print("together", jax.process_index(), jax.process_count(), ids, flush=True)
if os.environ["HOW"] == "fail" and jax.process_index() == 1:
    sys.exit(distributed.leave(1))
checkpoint._SHARED = 0.5
checkpoint.claim(Path(os.environ["SHARED"]))
try:
    checkpoint.claim(Path(os.environ["SHARED"], str(jax.process_index())))
except RefineError as error:
    print("apart", error, flush=True)
first = 300
with checkpoint.Preemption() as preemption:
    print("listens", flush=True)
    if os.environ["HOW"] == "early":
        time.sleep(4)
    preemption.go_on_from(first)
    for step in range(first + 1, 10**6):
        time.sleep(0.05)
        if preemption.reached(step):
            print("saved", step, flush=True)
            sys.exit(distributed.leave(75))
        multihost_utils.process_allgather(jax.numpy.array([step]))
"""


@pytest.mark.parametrize("how", ["early", "fail"])
def test_local_real_processes(how, tmp_path):
    """Two processes of jax.distributed: they meet; SIGTERM before the first step of a run that goes on ends both with
    75 after it; the failure of one ends both at once. Work folders of each process are refused."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "HOW": how, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    env["SHARED"] = str(tmp_path / "work")
    with local("--processes", "2", "--grace", "1", "--", sys.executable, "-c", REAL, env=env) as job:
        said = []
        while len(said) < 2:
            line = job.stdout.readline()
            assert line, "they did not meet"
            said += [line] if "together" in line else []
        assert sorted(said) == ["[0] together 0 2 [0, 1]\n", "[1] together 1 2 [0, 1]\n"]
        met, rest = time.monotonic(), ""
        if how == "early":
            while rest.count("listens") < 2:
                rest += job.stdout.readline()
            job.send_signal(signal.SIGTERM)
        rest += job.stdout.read()
        assert job.wait(60) == (1 if how == "fail" else 75)
        assert time.monotonic() - met < 30
    if how == "early":
        assert rest.count("apart --workdir") == 2 and "process 1 does not see what process 0 wrote" in rest
        assert sorted(path.name for path in (tmp_path / "work").rglob("*")) == ["0", "1"]
        steps = re.findall(r"saved (\d+)", rest)
        assert steps == ["301", "301"]


@pytest.mark.parametrize(
    "error, lost",
    [
        (ValueError("UNKNOWN: Gloo all-reduce failed: Read error [127.0.0.1]:5: Connection reset by peer"), True),
        (RuntimeError("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited"), True),
        (TimeoutError(), True),
        (ValueError("shapes do not fit"), False),
        (RefineError("data.path 'x': Connection is no folder"), False),
    ],
)
def test_what_says_that_another_process_is_gone(monkeypatch, error, lost):
    assert not distributed.lost_peer(error)  # alone, nobody can be
    monkeypatch.setattr(distributed, "alone", lambda: False)
    assert distributed.lost_peer(error) == lost


# ------------------------------------------------------------------------------------------------ who is there?

SLURM_ENV = {
    "SLURM_JOB_ID": "5000",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu-[003-004,7]-a,login1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_NODEID": "1",
}
PLAIN = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
SLICES = {
    "TPU_WORKER_HOSTNAMES": "a,b",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_NUM_SLICES": "3",
    "MEGASCALE_SLICE_ID": "2",
    "MEGASCALE_COORDINATOR_ADDRESS": "s-0:8080",
}


@pytest.mark.parametrize(
    "env, found",
    [
        ({}, None),
        ({"JAX_NUM_PROCESSES": "1"}, None),
        ({"SLURM_JOB_ID": "1"}, None),
        ({**SLURM_ENV, "SLURM_NTASKS": "1"}, None),
        ({**SLURM_ENV, "JAX_NUM_PROCESSES": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        (PLAIN, ("h:1", 2, 1, None)),
        ({**SLURM_ENV, **PLAIN}, ("h:1", 2, 1, None)),
        (SLURM_ENV, ("gpu-003-a:62344", 8, 5, None)),
        ({**SLURM_ENV, "JAX_COORDINATOR_PORT": "99"}, ("gpu-003-a:99", 8, 5, None)),
        ({**SLURM_ENV, "JAX_COORDINATOR_ADDRESS": "ib0:7"}, ("ib0:7", 8, 5, None)),
        ({**SLURM_ENV, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, ("gpu-003-a:62344", 8, 5, (1,))),
        ({**SLURM_ENV, "SLURM_GPUS_ON_NODE": "8"}, ("gpu-003-a:62344", 8, 5, (2, 3))),
        ({**SLURM_ENV, "CUDA_VISIBLE_DEVICES": "6"}, ("gpu-003-a:62344", 8, 5, None)),
        (
            {**SLURM_ENV, "SLURM_STEP_TASKS_PER_NODE": "1(x8)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"},
            ("gpu-003-a:62344", 8, 5, None),
        ),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, ("a:8482", 2, 1, None)),
        (
            {"TPU_PROCESS_ADDRESSES": "a:8471,b:8471", "TPU_WORKER_HOSTNAMES": "x", "TPU_WORKER_ID": "0"},
            ("a:8482", 2, 0, None),
        ),
        (SLICES, ("s-0:8482", 6, 5, None)),
    ],
)
def test_detect(env, found):
    job = distributed.detect({"TPU_SKIP_MDS_QUERY": "1", **env})
    assert (job and (job.coordinator, job.processes, job.process, job.devices)) == found


@pytest.mark.parametrize(
    "env, words",
    [
        ({"JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES not"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS not"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "set all three or none"),
        ({**PLAIN, "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2"),
        ({**PLAIN, "JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1"),
        ({**PLAIN, "JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two"),
        ({**PLAIN, "JAX_COORDINATOR_ADDRESS": "h"}, "host:port"),
        ({**PLAIN, "JAX_COORDINATOR_ADDRESS": "h:99999"}, "host:port"),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "start it with srun"),
        ({**SLURM_ENV, "SLURM_GPUS_ON_NODE": "6"}, "does not come out even"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_ID is not set"),
        ({**SLICES, "TPU_WORKER_ID": "2"}, "TPU_WORKER_ID=2"),
        ({**SLICES, "MEGASCALE_SLICE_ID": ""}, "MEGASCALE_SLICE_ID is not set"),
        ({**SLICES, "MEGASCALE_SLICE_ID": "3"}, "MEGASCALE_SLICE_ID=3"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun"),
        ({**PLAIN, "REFINE_JAX_START_TIMEOUT": "0"}, "REFINE_JAX_START_TIMEOUT=0"),
    ],
)
def test_half_set_variables_are_named(env, words):
    with pytest.raises(RefineError, match=re.escape(words)) as caught:
        distributed.start({"TPU_SKIP_MDS_QUERY": "1", **env})
    assert "\n" not in str(caught.value)


def test_train_starts_with_the_others(monkeypatch, capsys):
    """What is half set is bad input (2); that nobody comes may pass (69). Both before a device is touched."""
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    command = ["train", "--config", str(ROOT / "configs" / "tiny_vae.py"), "--workdir", "none"]
    assert cli.main(command) == 2 and "set all three or none" in capsys.readouterr().err
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"127.0.0.1:{free_port()}")
    monkeypatch.setenv("REFINE_JAX_START_TIMEOUT", "1")
    assert cli.main(command) == 69 and "process 0 did not answer" in capsys.readouterr().err
    assert distributed.alone()


def test_tpu_vm_metadata():
    """A TPU VM knows its slice from the metadata server, several slices too; in both ways that it writes addresses."""
    told = {"agent-worker-number": "1", "worker-network-endpoints": "n:0:10.0.0.2,n:1:10.0.0.3"}

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            text = told.get(self.path.rsplit("/", 1)[1]) if self.headers["Metadata-Flavor"] == "Google" else None
            self.send_response(200 if text is not None else 404)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}", "http_proxy": "http://127.0.0.1:9"}
        job = distributed._tpu_metadata(env)
        assert (job.coordinator, job.processes, job.process) == ("10.0.0.2:8482", 2, 1)
        told["worker-network-endpoints"] = "host-a,host-b"
        told["tpu-env"] = (
            "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
            "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9:8080'"
        )
        job = distributed._tpu_metadata(env)
        assert (job.coordinator, job.processes, job.process) == ("10.0.0.9:8482", 4, 3)
        del told["agent-worker-number"]
        assert distributed._tpu_metadata(env) is None
        server.shutdown()


def meet(*jobs, timeout=5.0, versions=None, address=None):
    """Processes as threads; returns what each ended with."""
    address = address or f"127.0.0.1:{free_port()}"
    ends = [None] * len(jobs)

    def one(i, processes, process):
        try:
            distributed._meet(
                distributed.Job("test", address, processes, process), timeout, (versions or {}).get(i, "1")
            )
        except RefineError as error:
            ends[i] = error

    threads = [threading.Thread(target=one, args=(i, *job)) for i, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def test_processes_meet():
    assert meet((3, 2), (3, 1), (3, 0)) == [None] * 3


def test_missing_processes_are_named():
    for error in meet((4, 0), (4, 2), timeout=0.6):
        assert isinstance(error, distributed.StartError) and "process 1, 3 did not come" in str(error)
    (error,) = meet((2, 1), timeout=0.3)
    assert isinstance(error, distributed.StartError) and "process 0 did not answer" in str(error)
    with socket.create_server(("", 0)) as taken:
        (error,) = meet((2, 0), timeout=0.3, address=f"127.0.0.1:{taken.getsockname()[1]}")
        assert isinstance(error, distributed.StartError) and "cannot be opened" in str(error)


def test_contradictions_are_named_on_every_side():
    cases = [
        (meet((3, 0), (3, 1), (3, 1)), "two processes say that they are number 1"),
        (meet((2, 0), (3, 1)), "told processes 3"),
        (meet((2, 0), (2, 1), versions={1: "2"}), "told jax 2"),
    ]
    for ends, words in cases:
        assert all(type(error) is RefineError and words in str(error) for error in ends), ends


def test_strangers_and_restarts_do_not_disturb():
    port = free_port()
    ends = []
    thread = threading.Thread(target=lambda: ends.extend(meet((4, 0), (4, 2), address=f"127.0.0.1:{port}", timeout=20)))
    thread.start()

    def hello(process):
        return json.dumps({"refine_jax": 1, "process": process, "processes": 4, "jax": "1"}).encode() + b"\n"

    def connect(data):
        link = wait_for(lambda: _try(port))
        link.sendall(data)
        return link

    def _try(port):
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1)
        except OSError:
            return None

    stranger = connect(b"GET / HTTP/1.1\r\nHost: " + b"x" * 500 + b"\r\n\r\n")
    early = connect(hello(1))
    time.sleep(0.2)
    early.close()  # it was restarted: the second one counts
    time.sleep(0.2)
    again = connect(hello(1))
    last = connect(hello(3))
    assert again.makefile().readline() == last.makefile().readline() == "go\n"
    thread.join(20)
    assert ends == [None, None]
    for link in (stranger, again, last):
        link.close()
