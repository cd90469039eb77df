"""Compare a layout with one process: two short runs of the same configuration, step by step and weight by weight."""

from __future__ import annotations

import json
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from automodel.config import Config
from automodel.config.command_line import compose_command_line
from automodel.proofs.child_run import ChildRun
from automodel.runs.records import read_records
from automodel.types import ExitStatus, RunError, UserError

_METRICS = {"loss": "loss", "grad_norm": "gradient norm"}
_REFERENCE, _LAYOUT = "reference", "layout"


@dataclass(frozen=True)
class Difference:
    """A relative difference between the runs, and where it was found."""

    figure: float
    where: str


def check_parity(cfg: Config, *, num_steps: int, tolerance: float, sets_precision: bool) -> ExitStatus:
    """Run ``cfg`` in one process and in its layout, print the differences, and return whether they are rounding.

    Args:
        tolerance: the largest relative difference that passes.
        sets_precision: keep the configured precision; otherwise both runs compute in float32.

    Raises:
        UserError: the layout is the reference itself, or its input is wrong.
        RunError: a run failed.
    """
    configs, notes = both_configs(cfg, num_steps=num_steps, sets_precision=sets_precision)
    with tempfile.TemporaryDirectory(prefix="automodel-parity-") as name:
        return _check(configs, notes, num_steps=num_steps, tolerance=tolerance, folder=Path(name))


def both_configs(cfg: Config, *, num_steps: int, sets_precision: bool) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the plain configuration of either run, by its name, and what to tell about them.

    Raises:
        UserError: the layout is the reference itself.
    """
    (ours,) = compose_command_line(["lr_scheduler=constant", "lr_scheduler.warmup_ratio=0"]).trees
    layout, notes = cfg.model_dump(by_alias=True), []
    layout["step_scheduler"] |= {
        "max_steps": num_steps, "log_every_steps": 1, "val_every_steps": None, "ckpt_every_steps": None,
    }  # fmt: skip
    layout["checkpoint"] |= {"enabled": False, "resume": "never"}
    layout["export"]["enabled"] = True
    layout |= {"validation_dataset": None, "evaluation": None, "logger": ours["logger"]}
    # Squeezed into so few steps, a schedule would begin or end near 0, and the weights would show nothing.
    layout["lr_scheduler"] = ours["lr_scheduler"]
    if layout["peft"] and layout["peft"].get("dropout"):
        notes.append(f"peft.dropout={layout['peft']['dropout']} is 0 here: ranks draw random numbers of their own")
        layout["peft"]["dropout"] = 0.0
    if not sets_precision:
        layout["distributed"]["mixed_precision"] = "float32"
        if "dtype" in layout["model"]:
            layout["model"]["dtype"] = "float32"
    precision = layout["distributed"].get("mixed_precision", "float32")
    reference = layout | {
        "distributed": ours["distributed"] | {"mixed_precision": precision},
        "launch": ours["launch"],
    }
    notes.insert(0, f"precision: distributed.mixed_precision={precision}, model.dtype={layout['model'].get('dtype')}")
    if not layout["launch"]["_target_"].endswith(".LocalLaunch"):
        raise UserError("check_parity starts its ranks on this machine: use launch=local")
    if reference["distributed"] == layout["distributed"] and layout["launch"].get("nproc_per_node", 1) == 1:
        raise UserError(
            "there is nothing to compare: this command line runs in one process with distributed=ddp, which is the "
            "reference itself; add launch.nproc_per_node=2 or so, and distributed=fsdp2 for example"
        )
    return {_REFERENCE: reference, _LAYOUT: layout}, notes


def _check(
    configs: dict[str, dict[str, Any]], notes: list[str], *, num_steps: int, tolerance: float, folder: Path
) -> ExitStatus:
    for name, tree in configs.items():
        _run(name, tree, folder)
    steps, weights = compare(folder / _REFERENCE, folder / _LAYOUT)
    num_taken = len(steps["loss"])
    print(f"\n{_shown(configs[_LAYOUT])} compared with {_shown(configs[_REFERENCE])}, over {num_taken} steps")
    if num_taken < num_steps:
        epochs = configs[_LAYOUT]["step_scheduler"]["num_epochs"]
        notes = [*notes, f"steps: the rows give no more in step_scheduler.num_epochs={epochs}"]
    print("\n".join(notes), end="\n\n")
    _print_table(steps, weights)
    found = []
    for key, differences in steps.items():
        above = [each for each in differences if each.figure > tolerance]
        if above:
            found.append(f"{_METRICS[key]}: from {above[0].where} on, where it differs by {above[0].figure:.1e}")
    if weights.figure > tolerance:
        found.append(f"weights: {weights.where} differs by {weights.figure:.1e} after step {num_taken}")
    if not found:
        print(f"\npassed: every difference is within parity.tolerance={tolerance:g}")
        return ExitStatus.DONE
    print(f"\nfailed: above parity.tolerance={tolerance:g}", *found, sep="\n  ")
    hints = _hints(configs[_LAYOUT], folder / _LAYOUT / "model", only_weights=found[0].startswith("weights"))
    print("what can make layouts differ without a fault", *hints, sep="\n  ", flush=True)
    return ExitStatus.FAILED


def _shown(tree: dict[str, Any]) -> str:
    num_processes = tree["launch"].get("nproc_per_node", 1)
    strategy = tree["distributed"]["_target_"].rpartition(".")[2]
    return f"{num_processes} process{'es' if num_processes > 1 else ''} with {strategy}"


def _run(name: str, tree: dict[str, Any], folder: Path) -> None:
    """Run ``tree`` to its end."""
    print(f"{name}: {_shown(tree)} ...", end="", flush=True)
    started, run = time.monotonic(), ChildRun(tree, folder, name)
    run.start()
    try:
        run.wait_until_done()
    except BaseException:
        print(flush=True)
        raise
    print(f" {time.monotonic() - started:.0f} s", flush=True)


def compare(reference: Path, layout: Path) -> tuple[dict[str, list[Difference]], Difference]:
    """Return, of two run directories, the differences of every step by metric, and the largest of the weights.

    Raises:
        RunError: the steps, or the names or shapes of the weights, are not the same.
    """
    records = [read_records(folder / "metrics.jsonl", "train") for folder in (reference, layout)]
    numbers = [[record["step"] for record in each] for each in records]
    if numbers[0] != numbers[1]:
        raise RunError(f"the reference run took the steps {numbers[0]}, and the layout {numbers[1]}")
    steps = {
        key: [
            Difference(relative_difference(one[key], other[key]), f"step {one['step']}")
            for one, other in zip(*records, strict=True)
        ]
        for key in _METRICS
    }
    return steps, compare_weights(reference / "model", layout / "model")


def relative_difference(expected: float | None, got: float | None) -> float:
    """Return |got - expected| / |expected|; infinite where one is not a number (null in the metrics file)."""
    if expected is None or got is None:
        return math.inf
    if got == expected:
        return 0.0
    return abs(got - expected) / abs(expected) if expected else math.inf


def compare_weights(reference: Path, layout: Path) -> Difference:
    """Return the largest difference of a tensor between two folders of safetensors, and the tensor's name.

    For each tensor: the L2 norm of the difference over the L2 norm of the reference, in float64.
    """
    import torch
    from safetensors import safe_open

    places = [_places(folder) for folder in (reference, layout)]
    if places[0].keys() != places[1].keys() or not places[0]:
        names = sorted(places[0].keys() ^ places[1].keys())
        raise RunError(f"the runs did not write the same weights; only one has: {', '.join(names[:5]) or 'any'}")
    largest = Difference(-1.0, "")
    for name in sorted(places[0]):
        tensors = []
        for place in places:
            with safe_open(place[name], framework="pt") as file:
                tensors.append(file.get_tensor(name).to(torch.float64))
        expected, got = tensors
        if expected.shape != got.shape:
            raise RunError(f"{name} is of shape {list(expected.shape)} in the reference, and {list(got.shape)}")
        difference, norm = (float(torch.linalg.vector_norm(each)) for each in (got - expected, expected))
        figure = difference / norm if norm else (math.inf if difference else 0.0)
        if math.isnan(figure):
            return Difference(math.inf, name)
        largest = max(largest, Difference(figure, name), key=lambda each: each.figure)
    return largest


def _places(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor in ``folder``."""
    from safetensors import safe_open

    places = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    return places


def _print_table(steps: dict[str, list[Difference]], weights: Difference) -> None:
    rows = {_METRICS[key]: max(found, key=lambda each: each.figure) for key, found in steps.items()}
    print(f"{'':<17}{'largest relative difference':<29}at")
    for name, difference in (rows | {"updated weights": weights}).items():
        print(f"{name:<17}{difference.figure:<29.1e}{difference.where if difference.figure else '-'}")


def _hints(tree: dict[str, Any], model_folder: Path, *, only_weights: bool) -> list[str]:
    """Return what to check, certain causes first."""
    hints = []
    if tree["distributed"].get("mixed_precision") != "float32" or tree["model"].get("dtype") == "bfloat16":
        hints.append("bf16 keeps three digits: compare with distributed.mixed_precision=float32 model.dtype=float32")
    if only_weights and tree["optimizer"]["_target_"].endswith(".adamw"):
        hints.append("AdamW moves a weight whose gradient is rounding noise as far as any: compare with optimizer=sgd")
    rates = _dropout_rates(model_folder / "config.json")
    found = f", here {', '.join(rates)}" if rates else ""
    hints.append(
        f"dropout in the model{found}: ranks draw numbers of their own; set it to 0 in the model's config.json"
    )
    hints.append("an attention kernel that sums in another order: compare with model.attn_implementation=eager")
    return hints


def _dropout_rates(config: Path) -> list[str]:
    if not config.is_file():  # of adapters, which have no configuration of the model beside them
        return []
    values = json.loads(config.read_text()).items()
    return [f"{key}={value}" for key, value in values if ("drop" in key) and isinstance(value, float) and value > 0]
