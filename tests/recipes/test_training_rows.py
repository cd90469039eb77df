"""Packed, mixed and streamed rows from the command line: one curve in every layout, and after every resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.recipes.command import records, run

FSDP2 = ["launch.nproc_per_node=2", "distributed=fsdp2"]


@pytest.fixture(scope="module")
def base(shared_data: Path, stories: Path) -> list[str]:
    return [
        "model=hf", f"model.pretrained_model_name_or_path={stories}", "dataset=jsonl",
        f"dataset.path={shared_data}/sft/gsm8k_train.jsonl", "dataset.limit=120", "dataset.max_length=96",
        "dataset.truncation=left", "step_scheduler.num_epochs=2",
        "evaluation=loss", "lr_scheduler=constant", "export.enabled=false",
    ]  # fmt: skip


WAYS = {
    "packed": ["packing.enabled=true", "packing.max_length=256"],
    "streamed and packed": [
        "dataset.streaming=true",
        "dataset.buffer_rows=50",
        "packing.enabled=true",
        "packing.max_length=256",
    ],
    "grouped, by tokens": ["dataloader.length_grouped=true", "dataloader.max_tokens_per_batch=512"],
}


def curve(folder: Path) -> list[tuple]:
    return [(r["step"], r["epoch"], r["num_tokens"], r["num_label_tokens"], r["loss"], r["grad_norm"])
            for r in records(folder)]  # fmt: skip


def assert_close(got: list[tuple], expected: list[tuple]) -> None:
    assert [one[:4] for one in got] == [one[:4] for one in expected]
    for one, other in zip(got, expected, strict=True):
        assert one[4:] == pytest.approx(other[4:], rel=1e-5)


@pytest.mark.parametrize(
    "way", [way if way == "streamed and packed" else pytest.param(way, marks=pytest.mark.slow) for way in WAYS]
)
def test_one_curve_in_every_layout_and_after_a_resume_in_another(base, tmp_path, way):
    argv = [*base, *WAYS[way]]
    run(*argv, "step_scheduler.max_steps=6", f"output_dir={tmp_path}/whole")
    whole = curve(tmp_path / "whole")
    run(*argv, *FSDP2, "step_scheduler.max_steps=3", f"output_dir={tmp_path}/parts")
    assert_close(curve(tmp_path / "parts"), whole[:3])
    run(*argv, "step_scheduler.max_steps=6", f"output_dir={tmp_path}/parts")
    assert_close(curve(tmp_path / "parts"), whole)


@pytest.mark.parametrize("stream", [[], ["dataset.streaming=true", "dataset.buffer_rows=50"]], ids=["rows", "stream"])
def test_dealing_the_rows_of_a_step_by_length_changes_only_the_padding(base, tmp_path, stream):
    argv = [*base, *stream, "dataset.max_length=256", "step_scheduler.max_steps=4", "step_scheduler.local_batch_size=2"]
    run(*argv, f"output_dir={tmp_path}/dealt")
    run(*argv, "dataloader.sort_within_step=false", f"output_dir={tmp_path}/as_drawn")
    assert_close(curve(tmp_path / "dealt"), curve(tmp_path / "as_drawn"))
    dealt, as_drawn = (records(tmp_path / name) for name in ("dealt", "as_drawn"))
    assert sum(r["padding_share"] for r in dealt) < sum(r["padding_share"] for r in as_drawn)


def test_an_epoch_of_packs_has_the_tokens_of_the_rows(base, tmp_path):
    short = [*base, "dataset.limit=40", "step_scheduler.num_epochs=1"]
    run(*short, "packing.enabled=true", "packing.max_length=256", f"output_dir={tmp_path}/packed")
    run(*short, f"output_dir={tmp_path}/rows")
    packed, rows = (records(tmp_path / name) for name in ("packed", "rows"))
    assert len(packed) < len(rows)
    for key in ("num_tokens", "num_label_tokens"):
        assert sum(r[key] for r in packed) == sum(r[key] for r in rows)


def test_a_stream_that_ends_before_max_steps_ends_the_run(base, tmp_path):
    output = run(
        *base, "dataset.streaming=true", "step_scheduler.num_epochs=1", "step_scheduler.max_steps=1000", *FSDP2,
        f"output_dir={tmp_path}/run",
    )  # fmt: skip
    assert "the rows end before step_scheduler.max_steps=1000" in output
    assert records(tmp_path / "run")[-1]["step"] == 15
    assert (tmp_path / "run" / "checkpoints" / "step_00000015").is_dir()


def test_a_mixture_draws_by_weight(base, shared_data, tmp_path):
    a, b = f"{shared_data}/sft/gsm8k_train.jsonl", f"{shared_data}/sft/alpaca.jsonl"
    sources = [
        f"+dataset.sources.gsm8k={{path: {a}, limit: 100, weight: 3}}",
        f"+dataset.sources.alpaca={{path: {b}, limit: 100, weight: 1}}",
    ]
    rest = [arg for arg in base if not arg.startswith("dataset")]
    output = run(*rest, "dataset=mixture", *sources, "step_scheduler.max_steps=4", f"output_dir={tmp_path}/one")
    assert "│ gsm8k" in output and "│ 150" in output and "75.0%" in output
    run(*rest, "dataset=mixture", *sources, "step_scheduler.max_steps=4", *FSDP2, f"output_dir={tmp_path}/two")
    assert_close(curve(tmp_path / "two"), curve(tmp_path / "one"))


def test_a_share_to_validate_on_is_the_same_in_every_layout_and_after_a_resume(base, tmp_path):
    argv = [*base, "dataset.limit=40", "dataset.validation_share=0.2", "step_scheduler.num_epochs=1"]
    output = run(*argv, f"output_dir={tmp_path}/whole")
    assert "gsm8k_train.jsonl (validation share): 8 rows" in output and "gsm8k_train.jsonl: 32 rows" in output
    run(*argv, *FSDP2, "step_scheduler.max_steps=2", f"output_dir={tmp_path}/parts")
    run(*argv, f"output_dir={tmp_path}/parts")
    assert len(curve(tmp_path / "whole")) == 4
    assert_close(curve(tmp_path / "parts"), curve(tmp_path / "whole"))
    losses = [records(tmp_path / name, "validation")[-1]["loss"] for name in ("parts", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    told = run(*argv, "dataset.validation_share=0.1", f"output_dir={tmp_path}/parts", status=2)
    assert "dataset.validation_share is 0.1, but the checkpoint" in told


def test_rows_that_would_train_wrongly_stop_the_run_unless_told_otherwise(base, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{n}", "completion": f"a{n}"}) + "\n" for n in range(8)))
    argv = [
        *(arg for arg in base if "dataset" not in arg), "dataset=jsonl", f"dataset.path={path}",
        "validation_dataset=jsonl", f"validation_dataset.path={path}", f"output_dir={tmp_path}/run",
    ]  # fmt: skip
    output = run(*argv, *FSDP2, "data_checks=strict", status=2)
    assert "error: 8 of the 8 rows of" in output and "data_checks=warn trains all the same" in output
    assert not (tmp_path / "run").exists()
    assert "8 of the 8 rows of" in run(*argv)


def test_packs_are_refused_where_the_model_lets_documents_see_each_other(base, tmp_path):
    argv = [*base, "packing.enabled=true", "model._target_=tests.recipes.leaky_model.LeakyModel"]
    output = run(*argv, f"output_dir={tmp_path}/run", status=2)
    assert "does not keep packed documents apart" in output
