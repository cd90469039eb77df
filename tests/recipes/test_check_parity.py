"""The check that users run on their own configuration: it passes where layouts agree, and names what does not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from automodel.check_parity import main, read_command_line
from automodel.config import Config, load_config, resolved_yaml
from automodel.proofs.parity import both_configs, compare, compare_weights
from automodel.types import RunError
from tests.recipes.command import FAST, ROOT

LAYOUT = ["launch.nproc_per_node=2", "distributed=fsdp2"]
FAULTS = "loss_fn._target_=tests.recipes.parity_faults."


@pytest.fixture(autouse=True)
def outside_any_job(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def check(*argv: str, status: int, module: tuple[str, ...] = ("automodel.check_parity",), **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *module, *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == status, f"ended with {done.returncode} instead of {status}:\n{output}"
    return output


def refusal(capsys, *argv: str) -> list[str]:
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()


def figures(output: str) -> dict[str, float]:
    rows = re.findall(r"^(loss|gradient norm|updated weights) +(\S+) +\S", output, re.MULTILINE)
    return {name: float(figure) for name, figure in rows}


def test_a_right_layout_passes_and_leaves_nothing_behind(tmp_path):
    output = check(
        *FAST, *LAYOUT, "dataset.limit=64", "step_scheduler.num_epochs=1", "parity.num_steps=3",
        module=("automodel", "check-parity"), status=0,
        TMPDIR=str(tmp_path), AUTOMODEL_RUN_ID="of-another-run",
    )  # fmt: skip
    assert "2 processes with FSDP2 compared with 1 process with DDP, over 2 steps" in output
    assert "distributed.mixed_precision=float32, model.dtype=float32" in output
    assert "the rows give no more in step_scheduler.num_epochs=1" in output
    found = figures(output)
    assert set(found) == {"loss", "gradient norm", "updated weights"} and max(found.values()) < 1e-5, output
    assert "passed: every difference is within parity.tolerance=1e-05" in output
    assert not list(tmp_path.glob("automodel-*"))


def test_a_loss_that_is_wrong_on_one_rank_fails_by_the_step_at_which_it_begins():
    output = check(*FAST, LAYOUT[0], f"{FAULTS}ScaledOnRankOne", "parity.num_steps=2", status=1)
    assert re.search(r"^  loss: from step 2 on, where it differs by [1-3]\.\de-01$", output, re.MULTILINE), output
    assert re.search(r"^  gradient norm: from step 2 on", output, re.MULTILINE), output
    assert re.search(r"^  weights: model\S+ differs by \S+ after step 2$", output, re.MULTILINE), output
    assert "failed: above parity.tolerance=1e-05" in output and "dropout in the model" in output


def test_a_run_that_fails_is_told_with_its_last_lines():
    output = check(*FAST, *LAYOUT, f"{FAULTS}Raises", status=1)
    assert "failed: the reference run ended with status 1" in output
    assert "RuntimeError: this loss went wrong on purpose" in output
    assert "Traceback" not in output.partition("last lines:")[0]


def test_rows_that_only_the_run_reads_are_refused_once(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1", "completion": "2"}\nnot json\n')
    output = check("dataset=jsonl", f"dataset.path={rows}", *LAYOUT, status=2)
    assert output.count("error: ") == output.count("rows.jsonl:2") == 1


def test_everything_wrong_with_the_command_line_is_told_at_once(capsys):
    assert refusal(
        capsys, "parity.num_step=3", "parity.tolerance=nan", "parity.num_steps=0", "rng.seed=x", "max_steps=5"
    ) == [
        "error: parity.num_steps=0 must be at least 1",
        "error: parity.tolerance=nan must be a finite number",
        "error: parity.num_step is not a known key; did you mean parity.num_steps?",
        "error: max_steps is not a known key; did you mean step_scheduler.max_steps?",
        "error: rng.seed=x must be a whole number",
    ]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["parity.num_steps=2"], "there is nothing to compare"),
        (["distributed=ddp", "distributed.mixed_precision=bf16"], "add launch.nproc_per_node=2"),
        ([*LAYOUT, "-m", "rng.seed=1,2"], "takes one configuration: leave out -m"),
        ([*LAYOUT, "--cfg", "job"], "takes one configuration: leave out -m"),
    ],
)
def test_what_cannot_be_compared_is_refused(capsys, argv, words):
    (line,) = refusal(capsys, *argv)
    assert words in line


@pytest.mark.parametrize("job", [{"RANK": "0", "WORLD_SIZE": "2"}, {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}])
def test_a_rank_of_somebody_elses_job_is_refused(capsys, monkeypatch, job):
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    (line,) = refusal(capsys, *LAYOUT)
    assert "start it once, outside torchrun and srun" in line


def test_help_needs_no_torch():
    code = (
        "import sys; from automodel.check_parity import main; main(['-h'])\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "parity.tolerance=1e-5" in done.stdout and done.stdout.endswith("[]\n")


def configs_of(*argv: str) -> tuple[dict[str, dict], list[str]]:
    own, cfg, sets_precision = read_command_line(list(argv))
    return both_configs(cfg, num_steps=own.num_steps, sets_precision=sets_precision)


def test_the_reference_differs_from_the_layout_in_distributed_and_launch_alone(tmp_path):
    # A saved configuration chooses its layout outside the command line.
    saved = load_config([*FAST, *LAYOUT, "distributed.dp_replicate_size=2", "logger=[jsonl,wandb]"], env={})
    (tmp_path / "config.yaml").write_text(resolved_yaml(saved))
    configs, _ = configs_of("--config-path", str(tmp_path), "--config-name", "config", "parity.num_steps=7")
    reference, layout = (Config.model_validate(configs[name]) for name in ("reference", "layout"))
    other = {"distributed", "launch"}
    assert reference.model_dump(exclude=other) == layout.model_dump(exclude=other)
    assert layout.distributed == saved.distributed | {"mixed_precision": "float32"}
    assert layout.launch == saved.launch
    assert reference.distributed == load_config(["distributed.mixed_precision=float32"], env={}).distributed
    assert reference.launch["nproc_per_node"] == 1
    assert layout.step_scheduler.max_steps == 7 and layout.validation_dataset is None and layout.evaluation is None
    assert layout.lr_scheduler["_target_"].endswith(".constant") and layout.lr_scheduler["warmup_ratio"] == 0
    assert (
        layout.optimizer == saved.optimizer
        and not layout.checkpoint.enabled
        and layout.export.enabled
        and list(layout.logger) == ["jsonl"]
    )


@pytest.mark.parametrize(
    ("argv", "precision"), [([], "float32"), (["distributed.mixed_precision=bf16"], "bf16"),
                            (["distributed.mixed_precision=auto"], "auto")],
)  # fmt: skip
def test_the_precision_is_float32_unless_it_is_chosen(argv, precision):
    configs, notes = configs_of(*FAST, *LAYOUT, *argv)
    assert {tree["distributed"]["mixed_precision"] for tree in configs.values()} == {precision}
    assert f"distributed.mixed_precision={precision}" in notes[0]


def test_the_dropout_of_adapters_is_off_in_both_and_told(tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    model = ["model=hf", f"model.pretrained_model_name_or_path={tmp_path}"]
    configs, notes = configs_of(
        *FAST[3:], *model, "peft=lora", "peft.dropout=0.1", *LAYOUT, "step_scheduler.global_batch_size=32"
    )
    assert [tree["peft"]["dropout"] for tree in configs.values()] == [0, 0]
    assert "peft.dropout=0.1 is 0 here" in notes[1]


def write_run(folder: Path, *, losses: list[float | None], **weights: torch.Tensor) -> Path:
    (folder / "model").mkdir(parents=True)
    lines = [{"kind": "train", "step": n, "loss": loss, "grad_norm": 1.0} for n, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in [*lines, {"kind": "validation"}]))
    for name, tensor in weights.items():
        save_file({name: tensor}, folder / "model" / f"adapter_{name}.safetensors")
    return folder


def test_the_figures_are_relative_to_the_reference(tmp_path):
    one = write_run(tmp_path / "a", losses=[2.0, 4.0], up=torch.tensor([3.0, 4.0]), down=torch.ones(4))
    other = write_run(tmp_path / "b", losses=[2.0, 5.0], up=torch.tensor([3.0, 4.5]), down=torch.ones(4))
    steps, weights = compare(one, other)
    assert [(each.figure, each.where) for each in steps["loss"]] == [(0.0, "step 1"), (0.25, "step 2")]
    assert (weights.figure, weights.where) == (0.1, "up")


def test_what_is_not_a_number_differs_from_everything(tmp_path):
    one = write_run(tmp_path / "a", losses=[2.0], up=torch.ones(2), zero=torch.zeros(2))
    nan = write_run(tmp_path / "b", losses=[None], up=torch.tensor([1.0, float("nan")]), zero=torch.zeros(2))
    steps, weights = compare(one, nan)
    assert steps["loss"][0].figure == weights.figure == float("inf") and weights.where == "up"


def test_runs_that_wrote_other_weights_cannot_be_compared(tmp_path):
    one = write_run(tmp_path / "a", losses=[], up=torch.ones(2))
    more = write_run(tmp_path / "b", losses=[], up=torch.ones(2), down=torch.ones(2))
    wider = write_run(tmp_path / "c", losses=[], up=torch.ones(3))
    none = write_run(tmp_path / "d", losses=[])
    for first, second, words in ((one, more, "only one has: down"), (one, wider, "of shape"), (none, none, "any")):
        with pytest.raises(RunError, match=words):
            compare_weights(first / "model", second / "model")
