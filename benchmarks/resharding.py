"""Save in the middle of a run in every layout, go on from it in every other, and print how far that leads away.

    python -m benchmarks.resharding MODEL_DIR ROWS.jsonl [key=value ...]

Each cell is the largest relative difference of a later step's loss or gradient norm / of the final weights, from the
run that was never stopped, in the layout of the row; "same" is every figure and weight bit for bit.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import NoReturn

LAYOUTS = list(product((1, 2, 4), ("ddp", "fsdp2")))
SAVED, LAST = 5, 10
ARGV = (
    f"step_scheduler.max_steps={LAST}", f"step_scheduler.ckpt_every_steps={SAVED}", "checkpoint.keep_last=null",
    "step_scheduler.global_batch_size=16", "step_scheduler.local_batch_size=2", "step_scheduler.log_every_steps=1",
    "validation_dataset=none", "dataset.max_length=256", "optimizer.lr=1e-3", "export.verify=false",
)  # fmt: skip


def main() -> None:
    model, rows, *more = sys.argv[1:]
    argv = [*ARGV, "model=hf", f"model.pretrained_model_name_or_path={model}", "dataset=jsonl", f"dataset.path={rows}",
            *more]  # fmt: skip
    import torch
    import transformers  # noqa: F401 - so that the ranks need not import it

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for layout in LAYOUTS:
            run(argv, layout, folder / title(layout))
        print("saved by", *map(title, LAYOUTS), sep=" | ")
        for saved in LAYOUTS:
            cells = [resumed(argv, folder / title(saved), layout) for layout in LAYOUTS]
            print(f"{title(saved)} | {' | '.join(cells)}", flush=True)


def title(layout: tuple[int, str]) -> str:
    """Return ``2 fsdp2`` of (2, "fsdp2")."""
    return f"{layout[0]} {layout[1]}"


def resumed(argv: list[str], whole: Path, layout: tuple[int, str]) -> str:
    """Go on from the middle of ``whole`` in ``layout`` and return how far from it that ends."""
    from automodel.proofs.parity import compare

    again = whole.with_name("again")
    shutil.copytree(whole, again, symlinks=True)
    shutil.rmtree(again / "checkpoints" / f"step_{LAST:08d}")
    shutil.rmtree(again / "model")
    run(argv, layout, again)
    steps, weights = compare(whole, again)
    shutil.rmtree(again)
    figures = [each.figure for differences in steps.values() for each in differences[SAVED:]]
    return "same" if max(figures) == weights.figure == 0 else f"{max(figures):.0e} / {weights.figure:.0e}"


def run(argv: list[str], layout: tuple[int, str], folder: Path) -> None:
    """Run a command line as so many forked ranks."""
    num_ranks, strategy = layout
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log = folder.with_name("log")
    ranks = []
    for rank in range(num_ranks):
        pid = os.fork()
        if not pid:
            os.environ |= job | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            _be_a_rank([*argv, f"distributed={strategy}", f"output_dir={folder}"], log)
        ranks.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    if any(statuses):
        sys.exit(f"{num_ranks} {strategy} ended with {statuses}:\n{log.read_text()}")


def _be_a_rank(argv: list[str], log: Path) -> NoReturn:
    from automodel.run import main as run_main

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    run_main(argv)
    os._exit(1)


if __name__ == "__main__":
    main()
