"""No secret is written down anywhere, and what only looks like one stays."""

from __future__ import annotations

import logging
import stat
import sys
import time
from pathlib import Path

import pytest
import yaml

from automodel import logs
from automodel.config import load_config, resolved_yaml, secret_keys
from automodel.launch.slurm import _submit_script
from automodel.launch.submission import submission_of
from automodel.loggers.fanout import open_loggers
from automodel.loggers.jsonl import JsonlLogger
from automodel.loggers.wandb import WandbLogger
from automodel.runner.process import report_problems
from automodel.runs.run_folder import RunDir, environment_record
from automodel.secrets import masked, masked_keys, masked_text
from automodel.types import UserError

HEX = "0123456789abcdef0123456789abcdef01234567"
PLAIN = "s3cretValue99"
SHAPES = [
    "hf_" + "a" * 34, "ghp_" + "A1" * 18, "gho_" + "A1" * 18, "ghs_" + "A1" * 18, "github_pat_" + "A1" * 20,
    "sk-" + "a1" * 20, "sk-ant-api03-" + "a1" * 20, "sk-proj-" + "a1" * 20, "AKIA" + "A1B2C3D4E5F6G7H8",
    "ASIA" + "A1B2C3D4E5F6G7H8", "xoxb-123456789012-abcdef", "xoxp-123456789012-abcdef", "glpat-" + "a1" * 10,
    "wandb_v1_" + "a1" * 20, "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abc123DEF",
]  # fmt: skip
BY_CONTEXT = [
    "a.api_key={}", "+x.hf_token='{}'", "x.password=\"{} and\"", "--api-key {}", "--token={}", "x={{token:{},b:2}}",
    '{{"password": "{}"}}', "{{'secret': '{}'}}", "Authorization: Bearer {}", "https://user:{}@host/x",
    "postgres://u:{}@h:5/db", "WANDB_API_KEY={} python", "x.credentials={}", "x.accessToken={}", "x.apiKey={}",
    "x.aws_secret_access_key={}", "x.client_secret={}", "x.private_key={}", "x.passwd={}", "x.auth={}",
    "https://h/x?token={}&b=1", "https://h/x?a=1&sig={}", "x.headers={{Authorization:'Bearer {}'}}",
]  # fmt: skip
NO_SECRETS = [
    f"revision={HEX}", f"/root/hub/models--a/snapshots/{HEX}/x", "max_new_tokens=64", "tokenizer_name_or_path=/a/b",
    "num_tokens=5 pad_token_id=0", "task-classification-model-2024", "eos_token=</s>", "https://host:8080/path",
    "git@github.com:a/b.git", "ssh://git@host/x", "author=me", "the end token: it is used", "hub_token_type=5",
    "a.api_key='${oc.env:KEY}'", "b.token=${oc.env:KEY}", "the price is sk-10", "TOKENIZERS_PARALLELISM=false",
]  # fmt: skip


@pytest.mark.parametrize("secret", SHAPES)
@pytest.mark.parametrize("words", ["{}", "x={}", "'{}'", "/a/{}/b", "a {}, b"])
def test_a_known_shape_is_masked_wherever_it_is(secret, words):
    assert secret not in masked_text(words.format(secret), env={})
    assert secret not in str(masked({"x": [{"y": words.format(secret)}]}, env={}))


@pytest.mark.parametrize("words", BY_CONTEXT)
@pytest.mark.parametrize("secret", [PLAIN, HEX])
def test_what_a_key_or_its_place_calls_a_secret_is_masked(words, secret):
    assert secret not in masked_text(words.format(secret), env={})


def test_a_private_key_is_masked_as_a_whole():
    text = masked_text("a -----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY----- b", env={})
    assert text == "a *** b"


@pytest.mark.parametrize("text", NO_SECRETS)
def test_what_only_looks_like_a_secret_stays(text):
    assert masked_text(text, env={}) == text


def test_keys_call_secrets_in_any_nesting():
    data = {
        "credentials": {"user": "me", "all": [PLAIN, {"a": PLAIN}]}, "headers": [{"authorization": PLAIN}], "pin": 1,
        "password": 1234, "deep": {"hfToken": PLAIN, "api-key": (PLAIN,)}, "url": f"https://u:{PLAIN}@h",
    }  # fmt: skip
    assert PLAIN not in str(masked(data, env={})) and "1234" not in str(masked(data, env={}))
    assert masked_keys(data) == ["credentials", "headers", "password", "deep.hfToken", "deep.api-key", "url"]
    kept = {
        "max_tokens": "5", "eos_token_id": "2", "pad_token": "<pad>", "tokenizer_name": "x", "revision": HEX,
        "launch": {"secrets": ["hub"]}, "token": None,
    }  # fmt: skip
    assert masked(kept, env={}) == kept and masked_keys(kept) == []


def test_a_secret_of_the_environment_becomes_a_reference_to_it():
    env = {"HF_TOKEN": "Z" * 12, "OTHER": "Q" * 12, "PWD": "/somewhere/else"}
    data = {"x": "a" + "Z" * 12, "api_key": "Q" * 12, "path": "/somewhere/else/x"}
    assert masked(data, env=env) == {
        "x": "a${oc.env:HF_TOKEN}", "api_key": "${oc.env:OTHER}", "path": "/somewhere/else/x",
    }  # fmt: skip


SECRETS = [SHAPES[0], SHAPES[1], SHAPES[5], SHAPES[7], SHAPES[13], PLAIN, HEX]
ARGV = [
    f"output_dir=out/{SHAPES[0]}", f"+model.config.api_key={PLAIN}", f"+model.config.note={SHAPES[1]} {SHAPES[5]}",
    f"+model.config.headers={{authorization:{HEX},key:{SHAPES[7]}}}", f"+model.config.url=https://u:{PLAIN}@host",
    f"+model.config.w={SHAPES[13]}", "model=scratch", "model.config.model_type=llama",
    "model.tokenizer_name_or_path=gpt2",
]  # fmt: skip


def leaks(folder: Path) -> list[tuple[str, str]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [(str(path), secret) for path in files for secret in SECRETS if secret.encode() in path.read_bytes()]


def test_no_writer_lets_a_secret_through(tmp_path, monkeypatch, capfd):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["automodel.run", *ARGV])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "automodel.run", *ARGV])
    cfg = load_config(ARGV, env={})
    run_dir = RunDir.open(tmp_path / "run")
    run_dir.write_config(resolved_yaml(cfg))
    run_dir.start_record(run_id="x", **environment_record(), resumed_from_step=None)
    run_dir.update_record(ended={"status": "failed", "error": f"ValueError: {ARGV}"})
    logs.setup_logging(0)
    logs.add_log_file(run_dir.log_path)
    logging.getLogger("automodel.x").warning("it failed: %s", ARGV)
    report_problems(UserError(*ARGV))
    loggers, config = {"wandb": WandbLogger(), "jsonl": JsonlLogger()}, masked(cfg.model_dump())
    sink = open_loggers(loggers, run_dir, run_id="x", config=config, is_main=True)
    sink.log({"kind": "validation", "name": ARGV[0], "step": 1, "loss": 1.0})
    sink.close()
    for _ in range(100):  # wandb's process writes its metadata when it likes
        if list(run_dir.path.glob("wandb/offline-run-*/files/wandb-metadata.json")):
            break
        time.sleep(0.05)
    assert list(run_dir.path.glob("wandb/offline-run-*/*.wandb"))
    assert leaks(tmp_path) == []
    told = capfd.readouterr()
    assert not [secret for secret in SECRETS if secret in told.out + told.err]


def test_a_configuration_without_its_secrets_says_how_to_give_them(tmp_path):
    cfg = load_config(ARGV[1:], env={})
    text = resolved_yaml(cfg)
    assert "#   model.config.api_key='${oc.env:NAME}'\n" in text and "model.config.api_key" in secret_keys(cfg)
    (tmp_path / "config.yaml").write_text(text)
    saved = ["--config-path", str(tmp_path), "--config-name", "config"]
    with pytest.raises(UserError) as caught:
        load_config(saved, env={})
    assert any(line.startswith("model.config.api_key held a secret, which was") for line in caught.value.problems)


def test_a_secret_of_the_environment_is_resolved_and_not_written_down(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", PLAIN)
    cfg = load_config([*ARGV[-3:], "+model.config.api_key=${oc.env:MY_KEY}"], env={})
    assert cfg.model["config"]["api_key"] == PLAIN
    text = resolved_yaml(cfg)
    assert PLAIN not in text and yaml.safe_load(text)["model"]["config"]["api_key"] == "${oc.env:MY_KEY}"
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(["--config-path", str(tmp_path), "--config-name", "config"], env={}) == cfg


@pytest.mark.parametrize("launch", [["launch=slurm"], ["launch=kubernetes", "launch.image=i", "launch.dry_run=true"]])
def test_a_cluster_is_handed_no_secret(launch, monkeypatch):
    argv = [*launch, *ARGV]
    with pytest.raises(UserError) as caught:
        submission_of(load_config(argv, env={}), argv, env={})
    told = "\n".join(caught.value.problems)
    assert "looks like a secret, and would be written" in told and not [each for each in SECRETS if each in told]
    monkeypatch.setenv("MY_KEY", PLAIN)
    argv = [*launch, *ARGV[-3:], "+model.config.api_key=${oc.env:MY_KEY}"]
    assert argv[-1] in submission_of(load_config(argv, env={}), argv, env={}).argv


def test_a_batch_script_is_its_owners_alone_from_the_beginning(tmp_path, monkeypatch):
    modes = []

    def run(command, cwd, **options):
        modes.append(stat.S_IMODE((cwd / "job.sh").stat().st_mode))
        raise InterruptedError

    monkeypatch.setattr("automodel.launch.slurm.subprocess.run", run)
    monkeypatch.setattr(Path, "chmod", lambda *args: pytest.fail("it was open to others until now"))
    with pytest.raises(InterruptedError):
        _submit_script("#!/bin/bash\n", tmp_path / "slurm")
    assert modes == [0o700]
