"""What the preview shows, and what it stops at."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from automodel.config import load_config
from automodel.data.prepare.checks import data_problems, num_duplicates, shared_rows
from automodel.data.sources import FileDataset
from automodel.models.char_tokenizer import build_char_tokenizer
from automodel.preview import main, preview, render
from tests.unit.rows import load_sft

ROWS = [{"prompt": f"question {number}\n", "completion": f"answer {number}"} for number in range(20)]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: str, **options):
    return load_sft(FileDataset(path=path, **options), build_char_tokenizer(), model_max_length=None)


def shown(*argv: str, num_rows: int = 1) -> tuple[str, list[str]]:
    out = io.StringIO()
    problems = preview(load_config(list(argv)), num_rows=num_rows, console=Console(file=out, width=200))
    return out.getvalue(), problems


def cell(text: str, line: str, column: int = 0) -> str:
    row = next(each for each in text.splitlines() if each.startswith("│") and each.split("│")[1].strip() == line)
    return row.split("│")[2 + column].strip()


def test_the_supervised_tokens_of_a_row_are_bracketed_or_green(tmp_path):
    rows = load(write(tmp_path / "rows.jsonl", ROWS[:1]))
    text = render(rows.examples[0], build_char_tokenizer(), is_colored=False)
    assert text.plain == "<s>question 0\n«answer 0</s>»"
    colored = render(rows.examples[0], build_char_tokenizer(), is_colored=True)
    assert colored.plain == "<s>question 0\nanswer 0</s>"
    assert [colored.plain[span.start : span.end] for span in colored.spans if span.style == "green"] == ["answer 0</s>"]


def test_the_table_counts_what_becomes_of_the_rows(tmp_path):
    rows = [
        *ROWS,
        ROWS[0],
        {"prompt": "q" * 40, "completion": "cut away"},
        {"prompt": "q" * 30, "completion": "x" * 30},
    ]
    train = write(tmp_path / "train.jsonl", rows)
    Path(train).write_text(Path(train).read_text() + "{damaged\n")
    val = write(tmp_path / "val.jsonl", [{"prompt": "other", "completion": "row"}])
    text, problems = shown(
        "dataset=jsonl", f"dataset.path={train}", "dataset.on_bad_row=skip", "dataset.max_length=40",
        "validation_dataset=jsonl", f"validation_dataset.path={val}", "packing.enabled=true",
    )  # fmt: skip
    assert problems == []
    assert cell(text, "format") == "prompt_completion"
    assert cell(text, "rows") == "24" and cell(text, "rows", 1) == "1"
    assert cell(text, "damaged, skipped") == "1"
    assert cell(text, "dropped, unsupervised") == "1 (4.2%)"
    assert cell(text, "truncated") == "1 (4.2%)"
    assert cell(text, "duplicates") == "1"
    assert cell(text, "tokens a row, max") == "40"
    assert cell(text, "teach to end an answer") == "21 (95.5%)"
    assert cell(text, "validated on as well") == "0"
    packed = float(cell(text, "filled of 40 slots").rstrip("%"))
    lengths = load(train, on_bad_row="skip", max_length=40).stats.lengths
    assert packed == pytest.approx(100 * lengths.sum() / (40 * -(-len(lengths) // 1)), abs=0.05)  # two never fit
    assert re.search(r"\d+ -\s+40 █+ 1\n", text)


def test_rows_that_teach_nothing_are_a_problem_above_a_small_share(tmp_path):
    lost = {"prompt": "q" * 100, "completion": "cut away"}
    fine = load(write(tmp_path / "few.jsonl", [*ROWS, lost]), max_length=40)
    many = load(write(tmp_path / "many.jsonl", [*ROWS, lost, lost]), max_length=40)
    assert data_problems(fine) == []
    ((problem, is_sure),) = data_problems(many)
    assert "2 of 22 rows (9%) are not trained on: 2 have no supervised token left within" in problem and not is_sure
    assert data_problems(load(write(tmp_path / "all.jsonl", [ROWS[0], *[lost] * 9]), max_length=40))[0].is_sure
    assert data_problems(load(str(tmp_path / "many.jsonl"), max_length=40, truncation="drop")) == []


def test_rows_that_are_lost_are_a_problem_whatever_the_reason(tmp_path):
    lost = [{"prompt": "q", "completion": "x" * 60}] * 12 + [{"prompt": "no answer"}] * 8
    rows = load(write(tmp_path / "rows.jsonl", ROWS + lost), max_length=40, truncation="drop", on_bad_row="skip")
    ((problem, is_sure),) = data_problems(rows)
    assert "20 of 40 rows (50%) are not trained on: 12 are longer than dataset.max_length; raise it" in problem
    assert "8 are damaged and skipped; dataset.on_bad_row=stop names them" in problem and not is_sure
    most = load(write(tmp_path / "most.jsonl", ROWS[:2] + lost), max_length=40, truncation="drop", on_bad_row="skip")
    assert data_problems(most)[0].is_sure


def test_images_that_nobody_sees_are_a_problem(tmp_path):
    rows = [*ROWS, ROWS[0] | {"images": ["a.png"], "image_id": 3}]
    ((problem, is_sure),) = data_problems(load(write(tmp_path / "rows.jsonl", rows)))
    assert "rows hold images (1 of 21 rows), which no recipe reads" in problem and not is_sure


def test_fields_that_nothing_reads_are_told_with_their_counts(tmp_path, caplog):
    path = write(tmp_path / "rows.jsonl", [*ROWS, ROWS[0] | {"note": "n", "id": 1}, ROWS[1] | {"id": 2}])
    for num_proc in (2, 1):  # prepared by several processes, and then taken from the cache
        caplog.clear()
        with caplog.at_level("INFO"):
            load(path, num_proc=num_proc)
        (told,) = (record for record in caplog.records if "fields not used" in record.message)
        assert "fields not used: id (2 of 22 rows), note (1); dataset.columns" in told.message
        assert told.levelname == "WARNING"
    with caplog.at_level("INFO"):
        load(write(tmp_path / "calm.jsonl", [ROWS[0] | {"id": 1, "source": "s"}]))
    assert caplog.records[-1].levelname == "INFO"
    assert "fields not used: id (1 of 1 rows), source (1)" in caplog.text


def test_keys_of_messages_that_the_template_does_not_read_are_told(tmp_path, caplog):
    turns = [{"role": "user", "name": "bob", "content": "u"}, {"role": "assistant", "content": "a", "mood": "good"}]
    path = write(tmp_path / "rows.jsonl", [{"messages": turns}])
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}:{{ m['name'] }}:{{ m.content }}<|im_end|>\n{% endfor %}")
    load(path)
    assert "fields not used: messages.mood (1 of 1 rows), messages.name (1)" in caplog.text
    caplog.clear()
    load(path, chat_template=str(template))
    assert "fields not used: messages.mood (1 of 1 rows);" in caplog.text


def test_checks_may_warn_instead_of_failing(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [ROWS[0] | {"images": ["a.png"]}])
    rows = ["dataset=jsonl", f"dataset.path={path}"]
    assert ended(rows, capsys)[0] == 2
    status, told = ended([*rows, "data_checks=warn"], capsys)
    assert status == 0 and "rows hold images (1 of 1 rows)" in told


def test_rows_that_never_end_are_a_problem(tmp_path):
    rows = load(write(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "x" * 50}] * 3), max_length=20)
    ((problem, is_sure),) = data_problems(rows)
    assert "no row supervises a token that ends an answer" in problem and "raise dataset.max_length" in problem
    assert not is_sure


def test_rows_that_are_whole_and_never_end_are_surely_wrong(tmp_path):
    rows = load(write(tmp_path / "rows.jsonl", ROWS))
    rows.stats.has_end[:] = False  # as by a template without an end of turn
    ((problem, is_sure),) = data_problems(rows)
    assert "check the chat template's end of turn" in problem and is_sure


def test_rows_that_are_validated_on_are_a_problem(tmp_path):
    train, val = load(write(tmp_path / "a.jsonl", ROWS)), load(write(tmp_path / "b.jsonl", ROWS[5:8]))
    assert shared_rows(train, val).tolist() == [0, 1, 2]
    ((problem, is_sure),) = data_problems(train, val)
    assert "3 of the 3 rows of" in problem and "are trained on as well" in problem and not is_sure
    assert num_duplicates(load(write(tmp_path / "c.jsonl", ROWS + ROWS[:4]))) == 4


def test_the_demo_has_no_problem():
    text, problems = shown(num_rows=2)
    assert problems == [] and cell(text, "validated on as well") == "0"


def test_a_mixture_shows_a_column_for_each_source(tmp_path):
    a, b = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", ROWS[:5])
    text, _ = shown(
        "dataset=mixture", f"+dataset.sources.first={{path: {a}, epochs: 1}}",
        f"+dataset.sources.second={{path: {b}, epochs: 4}}",
    )  # fmt: skip
    assert cell(text, "drawn an epoch") == "20 (50.0%)" and cell(text, "drawn an epoch", 1) == "20 (50.0%)"


def test_a_classifiers_rows_show_the_share_of_each_label(tmp_path):
    rows = [{"text": f"text {number}", "label": "yes" if number % 4 else "no"} for number in range(8)]
    path = write(tmp_path / "rows.jsonl", rows)
    text, problems = shown("recipe=llm_seq_cls", "dataset=jsonl", f"dataset.path={path}", "model=demo")
    assert problems == [] and cell(text, "label no") == "2 (25.0%)" and cell(text, "label yes") == "6 (75.0%)"


def test_a_classifier_learns_the_labels_of_all_sources_and_of_the_rows_set_aside(tmp_path):
    rows = [{"text": f"text {number}", "label": "ab"[number % 2]} for number in range(8)]
    a = write(tmp_path / "a.jsonl", rows)
    b = write(tmp_path / "b.jsonl", [{"text": "other", "label": "c"}, *rows[:1]])
    mixture = ["dataset=mixture", f"dataset.sources.a.path={a}", f"dataset.sources.b.path={b}"]
    text, problems = shown("recipe=llm_seq_cls", "model=demo", *mixture)
    assert problems == [] and [cell(text, f"label {name}", 1) for name in "abc"] == [
        "1 (50.0%)", "0 (0.0%)", "1 (50.0%)",
    ]  # fmt: skip
    single = write(tmp_path / "c.jsonl", [*rows, {"text": "rare", "label": "z"}])
    held_out = []
    for seed in range(6):
        keys = ["dataset=jsonl", f"dataset.path={single}", "dataset.validation_share=0.3", f"rng.seed={seed}"]
        text, _ = shown("recipe=llm_seq_cls", "model=demo", *keys)
        held_out.append(int(cell(text, "label z", 1)[0]))
        assert held_out[-1] + int(cell(text, "label z")[0]) == 1
    assert set(held_out) == {0, 1}


def test_rows_of_a_classifier_are_checked_like_others(tmp_path):
    rows = [{"text": f"text {number}", "label": number % 2} for number in range(8)]
    path = write(tmp_path / "rows.jsonl", rows)
    same = ["validation_dataset=jsonl", f"validation_dataset.path={path}"]
    _, problems = shown("recipe=llm_seq_cls", "model=demo", "dataset=jsonl", f"dataset.path={path}", *same)
    (problem,) = problems
    assert "8 of the 8 rows of" in problem and "are trained on as well" in problem


def ended(argv: list[str], capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as error:
        main(argv)
    return error.value.code, capsys.readouterr().err


def test_how_the_preview_ends(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", ROWS)
    rows = ["dataset=jsonl", f"dataset.path={path}"]
    assert ended([*rows, "preview.num_rows=0"], capsys)[0] == 0
    same = ["validation_dataset=jsonl", f"validation_dataset.path={path}"]
    status, told = ended([*rows, *same], capsys)
    assert status == 2 and "error: 20 of the 20 rows of" in told
    status, told = ended(["dataset=jsonl", "dataset.path=no/such.jsonl", "preview.num_row=1"], capsys)
    assert status == 2 and "preview.num_row is not a known key; did you mean preview.num_rows?" in told
    assert "dataset.path=no/such.jsonl: there is no such file" in told
    assert ended(["preview.num_rows=x"], capsys) == (
        2,
        "error: preview.num_rows=x must be a whole number\n",
    )


def test_sources_keep_templates_of_their_own_and_are_named_without_a_plus(tmp_path, caplog):
    turns = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}
    a, b, c = (write(tmp_path / f"{name}.jsonl", [turns] * 3) for name in "abc")
    text, _ = shown(
        "dataset=mixture", f"dataset.sources.first.path={a}", f"dataset.sources.second.path={b}",
        "dataset.sources.second.chat_template=alpaca", f"dataset.sources.third.path={c}",
    )  # fmt: skip
    assert text.count("### ") == 2  # the headings of alpaca, in the one row shown of the second source
    assert "rendered by different chat templates; the export gets that of first" in caplog.text
