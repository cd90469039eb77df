"""What the preview makes of small inputs of the kinds that users of fine-tuning tools stumble over.

``python -m tests.unit.test_field_cases`` prints the table of all cases and their outcomes.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from automodel.preview import main
from tests.conftest import SHARED_DATA

CASES = SHARED_DATA / "cases"
TEMPLATES = SHARED_DATA / "templates"
MODELS = ("falcon", "llama", "llama_addtok", "llama_nli", "qwen2", "qwen2_moe", "qwen_base_eos")
LONG = "falcon"  # takes 2,048 tokens, the others 256
QWEN3 = f"dataset.chat_template={TEMPLATES}/trl_qwen3.jinja"
CLASSIFY = "recipe=llm_seq_cls"


class Case(NamedTuple):
    """An input, what is right, and how that shows.

    Attributes:
        shows: patterns found in what the preview prints; ``hides``: one that is not.
    """

    name: str
    right: str
    status: int
    shows: Sequence[str]
    argv: Sequence[str] = ()
    rows: str = "rows.jsonl"
    model: str = "llama"
    hides: str | None = None


def own(name: str, template: str = "own.jinja") -> str:
    return f"dataset.chat_template={CASES}/{name}/{template}"


TABLE = [
    Case("added-tokens", "ids without a row of the embedding told", 2,
         [r"6,?400", r"model\.resize_embeddings=true"], model="llama_addtok"),
    Case("added-tokens", "embedding resized", 0, [r"«house.*<\|newa\|>"],
         ["model.resize_embeddings=true"], model="llama_addtok"),
    Case("alpaca-history", "told", 2, [r'rows\.jsonl:1: the field "history" is not supported']),
    Case("argument-text-kept", "values as given", 0, [r'"price": (1e3|1000\.0)'], [QWEN3], model=LONG),
    Case("config-exp", "told by name", 2, [r"ROWS_DIR"],
         [f"--config-dir={CASES}/config-exp", "experiment=sci", "dataset=jsonl"], rows=""),
    Case("config-exp", "quoted numbers and yes/no told or read", 2, [r"num_epochs=1\.0|max_steps|optimizer\.lr"],
         [f"--config-dir={CASES}/config-exp", "experiment=strings"], rows=""),
    Case("config-paths", "usable when quoted", 0, [r"«bird wind"], rows="my data=v1, final [x]/rows.jsonl"),
    Case("eos-of-template", "end of turn supervised", 0, [r"«red<\|im_end\|>»"], model="qwen_base_eos"),
    Case("first-row-lacks", "later fields read", 0, [r"You shout\.", r"loud"]),
    Case("functions-column", "read as tools", 0, [r'"name": "get_weather", "parameters"'], [QWEN3],
         hides="fields not used"),
    Case("generation-block-of-eos", "eos with the last answer", 0, [r"«bird.*<\|im_end\|>»\s*«<\|endoftext\|>»"],
         [own("generation-block-of-eos")]),
    Case("image-column", "told", 2, [r"fields not used: images \(12 of 12", r"rows hold images \(12 of 12 rows\)"]),
    Case("input-output", "told how to map", 2, [r"dataset\.columns\.prompt=input dataset\.columns\.completion=output"]),
    Case("input-output", "mapped", 0, [r"q 0\n?«?\n?a 0"],
         ["dataset.columns.prompt=input", "dataset.columns.completion=output"], hides="fields not used"),
    Case("list-of-list", "told by row", 2, [r"rows\.jsonl:1: message 1 must be an object"]),
    Case("long-thought", "prepared in time (none asserted)", 2, [r"the model's limit cuts every row"]),
    Case("moe-lora", "rows are read (the adapters are told by a run)", 0, [r"«house bird"], ["peft=lora"],
         model="qwen2_moe"),
    Case("name-field", "read; the unused name told", 0, [r"«yes<", r"fields not used: messages\.name \(12 of 12"]),
    Case("nested-folder", "told where the rows are", 2, [r"folders below it have \(train, val\)", r"\*\*/\*\.jsonl"],
         rows="data"),
    Case("nested-folder", "read by a glob", 0, [r"rows\s+│ 12 "], rows="data/**/*.jsonl"),
    Case("number-content", "told by row", 2, [r'rows\.jsonl:1: .*message 2: content" must be text, not a number']),
    *(Case("odd-turns", "answers trained or refused", 0, [r"«a 0<\|im_end\|>»"], rows=f"{name}.jsonl")
      for name in ("assistant_first", "empty_system", "only_spaces_user", "same_role", "user_last")),
    Case("old-function-call", "trained as a call", 0,
         [r'«I look it up\.\s*<tool_call>\s*\{"name": "get_weather", "arguments": \{"city": "town 0"\}\}'], [QWEN3],
         model=LONG, hides="fields not used"),
    Case("parquet-filled-nulls", "same tokens as Parquet", 0, [r'"stock": "S0", "days": 0'], [QWEN3],
         model=LONG),
    Case("parquet-filled-nulls", "same tokens as JSON Lines", 0, [r'"stock": "S0", "days": 0'], [QWEN3],
         rows="rows.parquet", model=LONG, hides=": null"),
    Case("query-response", "told how to map", 2,
         [r"dataset\.columns\.prompt=query dataset\.columns\.completion=response"]),
    Case("query-response", "mapped; history told", 0, [r"a 0", r"fields not used: history \(12 of 12 rows\)"],
         ["dataset.columns.prompt=query", "dataset.columns.completion=response"]),
    Case("saved-to-disk", "told what to do", 2, [r"Dataset\.save_to_disk", r"to_parquet"], rows="data"),
    Case("sentencepiece-border", "ids of the whole text", 0, [r"compared with their text", r"«Once upon a time\."],
         model=str(SHARED_DATA / "models" / "stories260k")),
    Case("seqcls-bool", "two classes", 0, [r"label false", r"label true"], [CLASSIFY]),
    Case("seqcls-float-int", "classes 0, 1, 2", 0, [r"label 0 ", r"label 1 ", r"label 2 "], [CLASSIFY]),
    Case("seqcls-label-order", "the head's order", 0, [r"(?s)label entailment.*label neutral.*label contradiction"],
         [CLASSIFY], model="llama_nli"),
    Case("seqcls-multilabel", "refused", 2, [r'rows\.jsonl:1: the field "label" is a list.*multi-label'], [CLASSIFY]),
    Case("sharegpt-system-tools", "read", 0, [r"Be brief\.", r"«ok<"], hides="fields not used"),
    Case("string-arguments-template", "text as given", 0, [r'\{"city": "town 0"\}'],
         [own("string-arguments-template", "deepseek_like.jinja")]),
    Case("string-json-messages", "read", 0, [r"«a 0<\|im_end\|>»"]),
    Case("system-beside-prompt", "system in the prompt", 0, [r"Answer in French\.\s+Say 0", r"«dit 0"],
         hides="fields not used"),
    Case("think-in-content", "refused by name of the thought", 2, [r"thought|reasoning|</think>"],
         [own("think-in-content", "r1_distill_special.jinja")]),
    Case("think-in-content", "refused by name of the thought", 2, [r"thought|reasoning|</think>"],
         [own("think-in-content", "r1_distill_like.jinja")]),
    Case("thought-other-key", "rendered", 0, [r"«.*\s*Adding 1 twice gives 2\."], [QWEN3]),
    Case("thought-other-key", "refused by name", 2, [r"thought|reasoning|thinking"]),
    Case("tied-lm-head-lora", "rows are read (the adapter is refused by a run)", 0, [r"«house bird"], model="qwen2"),
    Case("tool-name-repeated", "trained", 0, [r"«call get_weather", r"«It is 21 degrees\."],
         [own("tool-name-repeated")]),
    Case("tool-role-list", "read", 0, [r"(?s)«<tool_call>.*\n21<\|im_end\|>»"], [QWEN3]),
    Case("tools-forms", "all read", 0, [r"damaged, skipped\s+│ 0 ", r"get_weather"], [QWEN3]),
    Case("train-false", "obeyed", 0, [r"\nno<\|im_end\|>", r"«yes<\|im_end\|>»"]),
]  # fmt: skip


def outcome(case: Case, models: Path) -> tuple[int, str]:
    """Return the status of the preview of a case and all that it printed."""
    argv = ["model=hf", f"model.pretrained_model_name_or_path={models / case.model}"]
    if case.rows:
        argv += ["dataset=jsonl", f"dataset.path='{CASES / case.name / case.rows}'"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main([*argv, *case.argv, "preview.num_rows=3"])
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
    return status, printed.getvalue()


def make_models(folder: Path) -> Path:
    subprocess.run([sys.executable, CASES / "make_models.py", folder, *MODELS], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def models(shared_data: Path, tmp_path_factory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("case", TABLE, ids=[f"{case.name}: {case.right}" for case in TABLE])
def test_the_preview_reads_or_refuses_each_kind_of_row(case, models):
    status, printed = outcome(case, models)
    assert status == case.status, printed
    for pattern in case.shows:
        assert re.search(pattern, printed), printed
    if case.hides is not None:
        assert not re.search(case.hides, printed), printed


def test_every_case_is_in_the_table(shared_data: Path):
    folders = {folder.name for folder in CASES.iterdir() if folder.is_dir()}
    assert folders - {case.name for case in TABLE} == {"resume-changed-lr"}  # which is about a run


if __name__ == "__main__":
    os.environ["AUTOMODEL_CACHE"] = tempfile.mkdtemp()
    made = make_models(Path(tempfile.mkdtemp()))
    print("case | what is right | status | what it says\n---|---|---|---")
    for each in TABLE:
        ended, text = outcome(each, made)
        hits = [re.search(pattern, text) for pattern in each.shows]
        lines = {text[text.rfind("\n", 0, hit.start()) + 1 :].partition("\n")[0].strip() for hit in hits if hit}
        said = " … ".join(sorted(lines)).replace(str(SHARED_DATA), "")[:230].replace("|", "\\|").replace("\n", " ")
        is_right = ended == each.status and all(hits) and not (each.hides and re.search(each.hides, text))
        print(f"{each.name} | {each.right} | {ended}{'' if is_right else ' WRONG'} | {said}")
