"""The scripts for Cloud TPU print commands that mean what they should; nothing of them runs here."""

import os
import shlex
import shutil
import string
import subprocess
from pathlib import Path

import pytest
import yaml
from absl import flags

import longrope_jax.main  # noqa: F401  # defines the flags

FOLDER = Path(__file__).parent.parent / "experiments" / "cloud_tpu"
SCRIPT = FOLDER / "queued_resource.sh"
SET = dict(NAME="rope", PROJECT="mine", ZONE="us-east5-a", ACCELERATOR="v5p-64", WORKDIR="gs://bucket/run")


def dry(*arguments, **environment):
    """What the script does in these circumstances."""
    environment = {"PATH": os.environ["PATH"], **{key: value for key, value in environment.items() if value}}
    return subprocess.run([SCRIPT, "--dry-run", *arguments], env=environment, capture_output=True, text=True)


def commands(*arguments, **environment):
    done = dry(*arguments, **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def options(command):
    """--name=value of a command."""
    return dict(word.split("=", 1) for word in command if word.startswith("--") and "=" in word)


def known_flags(words):
    """Names of flags of longrope_jax.main among the words; fields of the config count as its flag."""
    names = {word.removeprefix("--").split("=")[0] for word in words if word.startswith("--")}
    unknown = {name for name in names if name not in flags.FLAGS and not name.startswith("config.")}
    assert not unknown, f"longrope_jax.main has no {unknown}"
    return names


@pytest.mark.parametrize(
    "accelerator, runtime",
    [
        ("v6e-16", "v2-alpha-tpuv6e"),
        ("v5p-64", "v2-alpha-tpuv5"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v4-32", "tpu-ubuntu2204-base"),
    ],
)
def test_a_queued_resource_is_asked_for(accelerator, runtime):
    (command,) = commands("create", **{**SET, "ACCELERATOR": accelerator})
    assert command[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "rope"]
    given = options(command)
    assert given["--accelerator-type"] == accelerator and given["--runtime-version"] == runtime
    assert given["--node-id"] == "rope" and given["--zone"] == "us-east5-a" and given["--project"] == "mine"
    assert "--spot" not in command and "--reserved" not in command


def test_spot_reserved_and_another_runtime():
    assert "--spot" in commands("create", **SET, SPOT="1")[0]
    assert "--reserved" in commands("create", **SET, RESERVED="1")[0]
    other = commands("create", **{**SET, "ACCELERATOR": "v9-8"}, RUNTIME="some-runtime")[0]
    assert options(other)["--runtime-version"] == "some-runtime"


def test_all_workers_run_this_commit_with_the_arguments_given():
    arguments = ["--config=experiments/quickstart.py", "--config.mesh.axes=seq:4,tensor:2", "--compilation_cache=a b"]
    state, archive, copy, install, start = commands("run", *arguments, **SET)
    assert "describe" in state and "archive" in archive and archive[-1] == "HEAD"
    archived = options(archive)["--output"]
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"] and copy[5:7] == [archived, "rope:"]
    for command in (copy, install, start):
        assert options(command)["--worker"] == "all"
    installing = options(install)["--command"]
    assert installing.endswith("-r requirements-tpu.txt") and "--python 3.12" in installing
    assert Path(archived).name in installing
    words = shlex.split(options(start)["--command"], comments=False)
    assert {*arguments, "--workdir=gs://bucket/run", "--coordinator=auto"} <= set(words)
    known_flags(words)


def test_the_command_that_workers_get_runs_and_keeps_the_exit_status(tmp_path):
    """With a Python that tells its arguments and is preempted."""
    python = tmp_path / "longrope_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "<%s>" "$@"\nexit 75\n')
    python.chmod(0o755)
    *_, start = commands("run", "--config=c.py", "--config.data.folder=my texts", **SET)
    remote = options(start)["--command"].removesuffix("&)") + ")"  # in the foreground
    subprocess.run(["bash", "-c", remote], cwd=tmp_path, check=True)
    assert (tmp_path / "longrope_jax" / "exit_status").read_text() == f"{os.EX_TEMPFAIL}\n"
    assert (tmp_path / "longrope_jax" / "run.log").read_text() == (
        "<-m><longrope_jax.main><--config=c.py><--config.data.folder=my texts><--workdir=gs://bucket/run>"
        "<--coordinator=auto>"
    )


def test_logs_status_and_delete():
    (logs,) = commands("logs", **SET)
    assert options(logs)["--worker"] == "0" and "tail" in options(logs)["--command"]
    state, exits = commands("status", **SET)
    assert "describe" in state and "exit_status" in options(exits)["--command"]
    (delete,) = commands("delete", **SET)
    assert delete[3:6] == ["queued-resources", "delete", "rope"] and "--force" in delete


@pytest.mark.parametrize(
    "arguments, changes, message",
    [
        (["create"], {"ZONE": ""}, "ZONE is not set; create needs it"),
        (["create"], {"ACCELERATOR": "h100"}, "ACCELERATOR = h100 is none of"),
        (["create"], {"SPOT": "1", "RESERVED": "1"}, "exclude each other"),
        (["run"], {}, "run needs --config=FILE"),
        (["run", "--config=c.py"], {"WORKDIR": ""}, "WORKDIR is not set; run needs it"),
        (["run", "--config=c.py"], {"WORKDIR": "/tmp/run"}, "WORKDIR = /tmp/run must begin with gs://"),
        (["stop"], {}, "'stop' is none of create, run, logs, status, delete"),
        ([], {}, "'' is none of"),
    ],
)
def test_what_can_not_work_is_one_line_and_does_nothing(arguments, changes, message):
    done = dry(*arguments, **{**SET, **changes})
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def jobset():
    values = dict(
        NAME="rope", IMAGE="image:1", WORKDIR="gs://bucket/run", CONFIG="experiments/quickstart.py",
        SERVICE_ACCOUNT="default", TPU="tpu-v5p-slice", TOPOLOGY="2x4x4", HOSTS="8", CHIPS="4",
    )  # fmt: skip
    return yaml.safe_load(string.Template((FOLDER / "jobset.yaml").read_text()).substitute(values))


def test_the_jobset_starts_one_process_a_host_of_the_slice(jobset):
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 8 and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x4x4",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": 4}
    assert known_flags(container["args"]) == {"config", "workdir", "coordinator"}


def test_the_jobset_restarts_what_was_preempted_without_counting(jobset):
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    by_status, by_node = job["podFailurePolicy"]["rules"]
    assert by_status["action"] == by_node["action"] == "FailJob"  # for the reason that the rule below waits for
    assert by_status["onExitCodes"]["values"] == [os.EX_TEMPFAIL]
    assert by_status["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # or the policy is not allowed
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert policy["rules"] == [
        {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]


def test_the_image_has_what_the_commands_need():
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    root = FOLDER.parent.parent
    assert {"requirements-tpu.txt", "requirements.txt", "longrope_jax", "experiments"} <= copied
    assert all((root / name).exists() for name in copied)
    assert lines[-1] == 'ENTRYPOINT ["python", "-m", "longrope_jax.main"]'


def test_commands_in_the_readme_have_flags_that_exist():
    text = (FOLDER / "README.md").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if "longrope_jax.main" in line and "--config" in line:
            known_flags(shlex.split(shlex.split(line.strip())[-1].removeprefix("--command=")))
        if "queued_resource.sh run" in line and line.startswith("    "):
            known_flags(line.split()[2:])
    assert "--config.profile.steps" in text


def test_the_pins_of_jax_agree():
    root = FOLDER.parent.parent
    (pinned,) = [line for line in (root / "requirements.txt").read_text().splitlines() if line.startswith("jax==")]
    assert pinned.replace("jax==", "jax[tpu]==") in (root / "requirements-tpu.txt").read_text().splitlines()
