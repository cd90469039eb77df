"""What launchers leave in the environment: read right, and told in words where it cannot be."""

from __future__ import annotations

import pytest

from automodel.environment import environment_problems, first_node, slurm_exports

JOB = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
NODES = {"SLURM_STEP_NODELIST": "gpu[1-2]", "SLURM_STEP_NUM_NODES": "2"}

WRONG = [
    ({"RANK": "0"}, "RANK without WORLD_SIZE"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE without RANK"),
    ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "WORLD_SIZE without RANK"),
    (JOB | {"RANK": "4"}, "RANK=4 in the environment is not below WORLD_SIZE=4"),
    (JOB | {"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 in the environment is not below WORLD_SIZE=0"),
    (JOB | {"RANK": "x"}, "RANK=x in the environment: ranks and sizes must be whole numbers"),
    (JOB | {"RANK": "-1"}, "RANK=-1 in the environment: ranks and sizes must be whole numbers"),
    (JOB | {"RANK": ""}, "RANK= in the environment: ranks and sizes must be whole numbers"),
    (JOB | {"WORLD_SIZE": "4.0"}, "WORLD_SIZE=4.0 in the environment: ranks and sizes must be whole numbers"),
    (JOB | {"RANK": "a", "WORLD_SIZE": "b"}, "RANK=a and WORLD_SIZE=b in the environment"),
    (JOB | {"LOCAL_RANK": "two"}, "LOCAL_RANK=two in the environment"),
    (JOB | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=2 in the environment is not below LOCAL_WORLD"),
    (JOB | {"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8 in the environment is more than WORLD_SIZE=4"),
    (JOB | {"LOCAL_WORLD_SIZE": "none"}, "LOCAL_WORLD_SIZE=none in the environment"),
    (JOB | {"GROUP_RANK": "first"}, "GROUP_RANK=first in the environment"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "several ranks were started (2) but MASTER_ADDR and MASTER_PORT are not set"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT is not set; start with torchrun"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}, "MASTER_ADDR is not set; start with torchrun"),
    (JOB | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
    (JOB | {"MASTER_PORT": "http"}, "MASTER_PORT=http in the environment is no port"),
    (JOB | {"MASTER_PORT": "0"}, "MASTER_PORT=0 in the environment is no port"),
    (JOB | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536 in the environment is no port"),
    (JOB | {"MASTER_PORT": "-1"}, "MASTER_PORT=-1 in the environment is no port"),
    (JOB | {"MASTER_ADDR": "localhost", "LOCAL_WORLD_SIZE": "2"}, "only LOCAL_WORLD_SIZE=2 of the 4 ranks are on this"),
    (JOB | {"MASTER_ADDR": "127.0.0.1", "GROUP_RANK": "1"}, "on another node than rank 0 (GROUP_RANK=1)"),
    (JOB | {"MASTER_ADDR": "::1", "GROUP_RANK": "1"}, "MASTER_ADDR=::1 is every machine's name for itself"),
    (STEP | {"SLURM_PROCID": "4"}, "SLURM_PROCID=4 in the environment is not below SLURM_NTASKS=4"),
    (STEP | {"SLURM_PROCID": "one"}, "SLURM_PROCID=one in the environment"),
    (STEP | {"SLURM_NODEID": "n1"}, "SLURM_NODEID=n1 in the environment"),
    (STEP | {"SLURM_LOCALID": "-1"}, "SLURM_LOCALID=-1 in the environment"),
    (STEP | {"WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment, but srun started SLURM_NTASKS=4 tasks"),
    ({name: value for name, value in STEP.items() if name != "SLURM_JOB_ID"} | NODES, "MASTER_PORT is not set; export"),
    (STEP, "MASTER_ADDR is not set; export the first node's name"),
    (
        STEP | NODES | {"MASTER_ADDR": "localhost"},
        "the step has SLURM_STEP_NUM_NODES=2; give the name of rank 0's node",
    ),
    (STEP | NODES | {"SLURM_NODEID": "1", "MASTER_ADDR": "127.0.1.1"}, "on another node than rank 0 (SLURM_NODEID=1)"),
]

RIGHT = [
    {},
    {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # a batch script, which is no rank
    {"RANK": "0", "WORLD_SIZE": "1"},
    JOB,
    JOB | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"},
    JOB | {"MASTER_ADDR": "localhost", "LOCAL_WORLD_SIZE": "4"},
    JOB | {"MASTER_ADDR": "127.0.0.1", "GROUP_RANK": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"},
    STEP | NODES,
    STEP | {"MASTER_ADDR": "localhost"},
    STEP | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
]


@pytest.mark.parametrize(("env", "message"), WRONG)
def test_an_environment_that_cannot_be_right_is_told(env, message):
    problems = environment_problems(env)
    assert len(problems) == 1 and message in problems[0]


@pytest.mark.parametrize("env", RIGHT)
def test_an_environment_that_can_be_right_is_taken(env):
    assert environment_problems(env) == []


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[07-09,12]-b,login", "gpu07-b"),
        ("gpu[3]", "gpu3"),
        ("r[1-2]n[08,09]", "r1n08"),
        ("a-b.c[001-100].example", "a-b.c001.example"),
    ],
)
def test_the_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first


def test_a_step_exports_what_torch_reads_and_leaves_what_is_there():
    found = slurm_exports(STEP | NODES)
    assert found == {
        "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "gpu1", "MASTER_PORT": str(15000 + 56),
    }  # fmt: skip
    assert "MASTER_ADDR" not in slurm_exports(STEP | NODES | {"MASTER_ADDR": "other"})
    assert slurm_exports(JOB) == {} and slurm_exports({}) == {}
    assert slurm_exports(STEP | NODES | {"SLURM_STEP_ID": "1"})["MASTER_PORT"] != found["MASTER_PORT"]
