"""The SLURM script, with what a cluster has in place of commands that write down their words."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path("recipes/slurm/online_dpo.sbatch")
STUBS = {
    "getent": 'echo "10.0.0.${2#n} STREAM $2"',
    "scontrol": 'printf "n%s\\n" 1 2 3 4',
    # runs the command once a task, as srun does
    "srun": """
        tasks=1
        while [[ $1 == --* ]]; do
          [[ $1 == --ntasks=* ]] && tasks=${1#*=}
          note="$note $1"
          shift
        done
        echo "srun$note" >>log
        for ((task = 0; task < tasks; task++)); do SLURM_PROCID=$task "$@" || exit $?; done""",
    "vllm": '[[ -e crash ]] && exit 1; echo "vllm $VLLM_SERVER_DEV_MODE $*" >>log; exec sleep 20',
    "curl": 'echo "curl ${@: -1}" >>log; [[ ! -e deaf ]]',
    "accelerate": 'echo "accelerate $(printf "%q " "$@")" >>log; exit 3',
}


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    stubs = folder / "bin"
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (stubs / name).chmod(0o755)
    told = {"PATH": f"{stubs}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-4]"} | environment
    return subprocess.run(
        ["bash", str(SCRIPT.resolve()), *arguments],
        cwd=folder,
        env=told,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_last_nodes_generate_and_the_others_train(tmp_path: Path) -> None:
    arguments = ["r.yaml", "model.lora={r: 16}"]
    done = run(tmp_path, *arguments, MODEL="a/model", GENERATION_NODES="2", GPUS_PER_NODE="4")
    assert done.returncode == 3, done.stderr  # that of the training
    lines = (tmp_path / "log").read_text().splitlines()
    for node in ("n3", "n4"):
        serve = (
            f"vllm 1 serve a/model --host 10.0.0.{node[1]} --port 8000 --generation-config vllm "
            "--logprobs-mode processed_logprobs --max-model-len 4096 --tensor-parallel-size 4"
        )
        assert lines.count(serve) == 1
        assert f"srun --nodes=1 --ntasks=1 --nodelist={node}" in lines
        assert f"curl http://{node}:8000/health" in lines
    train = "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 --nodelist=n1,n2"
    assert train in lines
    (first,) = [line for line in lines if line.startswith("accelerate")]  # it failed at once
    assert shlex.split(first)[1:] == [
        "launch", "--machine_rank", "0", "--config_file", "recipes/accelerate/multinode.yaml",
        "--num_machines", "2", "--num_processes", "8",
        "--main_process_ip", "n1", "--main_process_port", "29500",
        "-m", "prefopt", "train", "r.yaml", "model.lora={r: 16}", "model.path=a/model",
        "rollout.engine=vllm_server", "rollout.servers=[http://n3:8000, http://n4:8000]",
    ]  # fmt: skip


def test_every_training_node_says_its_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STUBS, "accelerate", 'echo "rank $3" >>log')
    assert run(tmp_path, "r.yaml", MODEL="m").returncode == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line for line in lines if line.startswith("rank")] == ["rank 0", "rank 1", "rank 2"]


@pytest.mark.parametrize(
    ("file", "arguments", "environment", "words"),
    [
        ("", [], {"MODEL": "m"}, "found no recipe"),
        ("", ["r.yaml"], {}, "MODEL is not set"),
        ("", ["r.yaml"], {"MODEL": "m", "GENERATION_NODES": "4"}, "one more to train on"),
        (
            "deaf",
            ["r.yaml"],
            {"MODEL": "m", "SERVER_TIMEOUT": "1"},
            "http://n4:8000/health did not answer within 1 s",
        ),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_trained(
    file: str, arguments: list[str], environment: dict[str, str], words: str, tmp_path: Path
) -> None:
    if file:
        (tmp_path / file).touch()
    done = run(tmp_path, *arguments, **environment)
    assert done.returncode == 2
    assert words in done.stderr
    log = tmp_path / "log"
    assert not log.exists() or "accelerate" not in log.read_text()


def test_a_server_that_ended_is_not_waited_for(tmp_path: Path) -> None:
    for file in ("deaf", "crash"):
        (tmp_path / file).touch()
    done = run(tmp_path, "r.yaml", MODEL="m")
    assert done.returncode == 2
    assert "vllm serve on n4 has ended; see vllm-n4.log" in done.stderr
