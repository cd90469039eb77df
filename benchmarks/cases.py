"""What the comparison trains: its cases, and the files that all contenders read.

A ``Job`` is what a contender is to do. Its rows are stored twice: as the project reads them, and in the order in which
the project trains on them, for those that read rows one after the other.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

SMALL = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
"""3.3 M parameters with a vocabulary of 512."""
LARGE_VOCABULARY = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 7, "num_attention_heads": 6,
    "num_key_value_heads": 2,
}  # fmt: skip
"""30 M parameters with GPT-2's vocabulary of 50,257, two thirds of them in the embedding."""


@dataclass(frozen=True)
class Case:
    """A model and a layout.

    Attributes:
        model: of a Llama; its vocabulary comes from the tokenizer.
        tokenizer: folder under the data folder: a saved tokenizer, or GPT-2's ``vocab.json`` and ``merges.txt``.
        num_threads: of OpenMP, in each rank.
    """

    title: str
    model: dict[str, int]
    tokenizer: str
    num_ranks: int
    num_threads: int


CASES = {
    "small": Case("3.3M Llama, vocabulary 512", SMALL, "models/stories260k", num_ranks=1, num_threads=2),
    "vocab": Case("30M Llama, vocabulary 50k", LARGE_VOCABULARY, "templates/tok_gpt2", num_ranks=1, num_threads=2),
    "ddp": Case("30M Llama, 2 ranks", LARGE_VOCABULARY, "templates/tok_gpt2", num_ranks=2, num_threads=1),
}
ROWS = "sft/gsm8k_train.jsonl"


@dataclass(frozen=True)
class Job:
    """One training, the same for every contender: float32, AdamW at a constant rate, no weight decay.

    Attributes:
        model: arguments of ``AutoConfig.for_model``, with the vocabulary's size and the special tokens.
        tokenizer: folder of a saved tokenizer that has a padding token.
        rows: JSON Lines with ``prompt`` and ``completion``, none longer than ``max_length`` tokens.
        ordered_rows: the same rows in the order of the project's first epoch.
        local_batch_size: rows of a micro-batch on each rank.
        num_micro_batches: of an optimizer step, on each rank.
        seed: the project's, which decides the order of the rows.
        torch_seed: what the project seeds torch with before it draws the weights.
    """

    model: dict[str, Any]
    tokenizer: str
    rows: str
    ordered_rows: str
    num_ranks: int
    num_steps: int
    max_length: int = 512
    local_batch_size: int = 4
    num_micro_batches: int = 2
    lr: float = 3e-4
    max_grad_norm: float = 1.0
    seed: int = 42
    torch_seed: int = 0

    @property
    def global_batch_size(self) -> int:
        return self.local_batch_size * self.num_micro_batches * self.num_ranks

    def save(self, path: Path) -> Path:
        """Write the job where ``load`` reads it, and return ``path``."""
        path.write_text(json.dumps(asdict(self)))
        return path

    @classmethod
    def load(cls, path: str | Path) -> Job:
        return cls(**json.loads(Path(path).read_text()))


def encode(tokenizer: Any, row: dict[str, str]) -> dict[str, list[int]]:
    """Return a row as ``input_ids`` and, at the same positions, ``labels``: the completion and the end token."""
    whole = tokenizer(row["prompt"] + row["completion"], verbose=False)["input_ids"]
    ids = [*whole, tokenizer.eos_token_id]
    num_prompt = len(tokenizer(row["prompt"], verbose=False)["input_ids"])
    return {"input_ids": ids, "labels": [-100] * num_prompt + ids[num_prompt:]}


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """Read JSON Lines."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def prepare(case: Case, data: Path, folder: Path, *, num_steps: int) -> Job:
    """Write the tokenizer and the rows of ``case`` into ``folder``, and return the job.

    Args:
        data: holds the tokenizers and ``ROWS``, which are those of GSM8K, with ``question`` and ``answer``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(data / case.tokenizer)
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in read_rows(data / ROWS)]
    return prepare_rows(tokenizer, rows, folder, model=case.model, num_ranks=case.num_ranks, num_steps=num_steps)


def prepare_rows(
    tokenizer: Any, rows: list[dict[str, str]], folder: Path, *, model: dict[str, Any], num_ranks: int, num_steps: int
) -> Job:
    """Write ``rows`` and the same rows in the order of training, and return the job.

    Args:
        tokenizer: saved in ``folder / "tokenizer"``.

    Raises:
        SystemExit: the rows do not suffice for ``num_steps``.
    """
    whole_model = {
        "model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": 512,
        "tie_word_embeddings": True, **model, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    paths = {"rows": str(folder / "rows.jsonl"), "ordered_rows": str(folder / "ordered_rows.jsonl")}
    job = Job(whole_model, str(folder / "tokenizer"), **paths, num_ranks=num_ranks, num_steps=num_steps)
    job = replace(job, torch_seed=_torch_seed(job.seed))
    lengths = [len(encode(tokenizer, row)["input_ids"]) for row in rows]
    whole = [row for row, length in zip(rows, lengths, strict=True) if length <= job.max_length]
    lengths = [length for length in lengths if length <= job.max_length]
    if len(whole) < num_steps * job.global_batch_size:
        raise SystemExit(f"{len(whole)} rows are enough for {len(whole) // job.global_batch_size} steps; lower --steps")
    _write(job.rows, whole)
    _write(job.ordered_rows, [whole[index] for index in _order(job, lengths)])
    return job


def _torch_seed(seed: int) -> int:
    import torch

    from automodel.train.rng import seed_everything

    with torch.random.fork_rng(devices=[]):
        seed_everything(seed)
        return torch.initial_seed()


def _order(job: Job, lengths: list[int]) -> list[int]:
    """Return the row numbers in the order of the project's first epoch."""
    import numpy as np

    from automodel.data.batches.loader import TrainLoader

    loader = TrainLoader(
        lengths,
        collate=list,
        global_batch_size=job.global_batch_size,
        local_batch_size=job.local_batch_size,
        dp_rank=0,
        dp_size=1,
        seed=job.seed,
        lengths=np.array(lengths),
    )
    return [index for rows in loader.global_batches(epoch=0) for index in rows]


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer, GPT2Tokenizer

    if (folder / "vocab.json").exists():
        tokenizer = GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _write(path: str, rows: list[dict[str, str]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
