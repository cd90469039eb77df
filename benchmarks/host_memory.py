"""Print the host memory that two ranks take while they load a model and save it, and that an export of it takes.

    python -m benchmarks.host_memory [float32 | bfloat16]

The model, a Llama of 100 M parameters in bf16 files of 25 MB, is held in the type named. The figures are MiB of
anonymous memory (pages of mapped files are the kernel's to drop) above what the imports take: before, and at most, of
each rank and of both at the same time, looked at every millisecond from outside. What is saved are weights and AdamW's
state after a step; a stall is what training waits for a save.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft  # noqa: F401 - so that it counts among the imports
import torch
import transformers
import yaml

from automodel.checkpoint.retention import Retention
from automodel.checkpoint.training import Checkpointer, TrainState
from automodel.distributed.parallel.ddp import DDP
from automodel.distributed.parallel.fsdp2 import FSDP2
from automodel.export import read_command_line
from automodel.models.char_tokenizer import build_char_tokenizer
from automodel.models.hf import HFModel
from automodel.models.sharded_loading import unfilled_model
from automodel.runner import export_checkpoint
from automodel.tasks.causal_lm import CausalLM
from tests.dist.pool import RankPool
from tests.dist.tiny import cpu_info

SIZES = {
    "vocab_size": 16000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14,
    "num_attention_heads": 12, "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip
SMALL = SIZES | {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 48}

kept: dict[str, Any] = {}
"""What a rank holds from one measurement to the next."""


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    dtype = sys.argv[1] if len(sys.argv) > 1 else "float32"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = RankPool(1)  # what this process itself had held and freed would hide what its ranks take
        (num_parameters,) = writer.run(write_models, folder, dtype)
        writer.close()
        mib = num_parameters * getattr(torch, dtype).itemsize / 2**20
        print(f"{num_parameters / 1e6:.0f} M parameters, {mib:.0f} MiB in {dtype}")
        print(f"{'MiB':48}{'before':>8}{'rank 0':>8}{'rank 1':>8}{'both':>8}{'stall':>9}")
        for how in ("ddp", "fsdp2, whole on every rank first", "fsdp2"):
            pool = RankPool(2)
            pool.run(load, how, folder / "small", dtype)  # what the first use imports
            imports = _measured(pool, f"load, {how}", [0, 0], load, how, folder / "model", dtype)
            for is_async in (False, True) if how in ("ddp", "fsdp2") else ():
                way = "in the background" if is_async else "waited for"
                pool.run(begin_to_train, folder / "run", is_async)
                for step in (1, 2):
                    which = "the first" if step == 1 else "the next"
                    _measured(pool, f"save {way}, {how}, {which}", imports, save, step)
            pool.close()
        for verify in ("false", "true"):
            pool = RankPool(1)
            pool.run(load, "ddp", folder / "small", dtype)
            _measured(pool, f"export, export.verify={verify}", [0], export, folder, verify)
            pool.close()


def write_models(folder: Path, dtype: str) -> int:
    """Write the model, a small one to warm up with, and what a run leaves; return the number of parameters."""
    for name, sizes in (("small", SMALL), ("model", SIZES)):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).to(torch.bfloat16)
        model.save_pretrained(folder / name, max_shard_size="25MB")
    build_char_tokenizer().save_pretrained(folder / "run" / "tokenizer")
    section = {
        "_target_": "automodel.models.hf.HFModel",
        "pretrained_model_name_or_path": str(folder / "model"),
        "dtype": dtype,
    }
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump({"model": section, "peft": None}))
    return sum(parameter.numel() for parameter in model.parameters())


def _measured(
    pool: RankPool, what: str, imports: list[float], function: Callable[..., float | None], *args: Any
) -> list[float]:
    """Run ``function`` on the ranks, print what it took, and return what they held before, which 0 stands for."""
    pids = pool.run(os.getpid)
    before = [_anonymous_mib(pid) for pid in pids]
    imports = imports if any(imports) else before
    peaks, both, is_done = list(before), sum(before), threading.Event()

    def watch() -> None:
        nonlocal both
        while not is_done.wait(0.001):
            now = [_anonymous_mib(pid) for pid in pids]
            peaks[:], both = map(max, peaks, now), max(both, sum(now))

    watcher = threading.Thread(target=watch)
    watcher.start()
    stalls = pool.run(function, *args)
    is_done.set()
    watcher.join()
    shown = [max(before) - max(imports), *(peak - own for peak, own in zip(peaks, imports, strict=True))]
    shown += [both - sum(imports)] if len(pids) > 1 else []
    stall = "" if stalls[0] is None else f"{max(stalls):8.2f}s".rjust(9 + 8 * (4 - len(shown)))
    print(f"{what:48}{''.join(f'{figure:8.0f}' for figure in shown)}{stall}", flush=True)
    return imports


def _anonymous_mib(pid: int) -> float:
    resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE") / 2**20


def load(how: str, folder: Path, dtype: str) -> None:
    """Load the model as a run does, or as one does whose weights are not read in shards."""
    kept.clear()
    source, info, tokenizer = HFModel(str(folder), dtype=dtype), cpu_info(), build_char_tokenizer()
    strategy: Any = DDP() if how == "ddp" else FSDP2()
    mesh = strategy.build_mesh(info)
    unfilled = unfilled_model(source, tokenizer, task=CausalLM(), adapters=None) if how == "fsdp2" else None
    model = source.build(tokenizer, task=CausalLM()) if unfilled is None else unfilled.adapted(None, task=CausalLM())
    model = strategy.parallelize(model, dist_info=info, mesh=mesh)
    if unfilled is not None:
        unfilled.fill(model, info.device)
    kept["model"] = model


def begin_to_train(run: Path, is_async: bool) -> None:
    """Take one step, so that there is an optimizer state, and make the Checkpointer."""
    model = kept["model"]
    for name in ("checkpointer", "state"):
        kept.pop(name, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model(input_ids=torch.arange(8).reshape(1, 8), use_cache=False).logits.float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    kept["state"] = TrainState(model, optimizer)
    kept["checkpointer"] = Checkpointer(run / "checkpoints", retention=Retention(1, None, None), is_async=is_async)
    gc.collect()


def save(step: int) -> float:
    """Save, and return the seconds until training may go on; the write is waited for all the same."""
    start = time.monotonic()
    kept["checkpointer"].save(kept["state"], progress={"step": step}, rng={})
    stall = time.monotonic() - start
    kept["checkpointer"].finish()
    return stall


def export(folder: Path, verify: str) -> None:
    """Export the newest checkpoint as the verb does."""
    argv = [str(folder / "run" / "checkpoints" / "latest"), str(folder / verify), f"export.verify={verify}"]
    argv.append("export.max_shard_size=25MB")
    options = read_command_line(argv)
    export_checkpoint.export(options, export_checkpoint.read_run(options))


if __name__ == "__main__":
    main()
