"""The accelerate files that ship, and the command that starts several processes with them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import StateDictType
from transformers import LlamaForCausalLM

from prefopt import launch
from prefopt.cli import main, parse
from prefopt.errors import PrefoptError

CONFIGS = launch.shipped_configs()


def environment_of(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What accelerate's launcher tells the processes it starts under a configuration."""
    words = ["--config_file", str(CONFIGS[name]), "--num_processes", "2", "-m", "prefopt"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    args.main_process_port = 0  # the default may be taken
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(args)
    else:
        environment = prepare_multi_gpu_env(args)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    return environment


def test_all_configurations_ship() -> None:
    assert list(CONFIGS) == ["ddp", "fsdp2", "multinode", "zero2", "zero3"]


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_every_configuration(name: str) -> None:
    config: Any = load_config_from_file(str(CONFIGS[name]))
    assert config.mixed_precision == "bf16"
    expected = {"ddp": "MULTI_GPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type.value == expected.get(name, "FSDP")
    assert config.num_machines == (2 if name == "multinode" else 1)


@pytest.mark.parametrize("name", ["fsdp2", "multinode"])
def test_fsdp_is_what_the_file_says(
    name: str, monkeypatch: pytest.MonkeyPatch, tiny_llama: Any
) -> None:
    environment_of(name, monkeypatch)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
    assert not plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing
    model: LlamaForCausalLM = tiny_llama()
    plugin.set_auto_wrap_policy(model)  # finds the decoder layer without being told its class
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3)])
def test_deepspeed_is_what_the_file_says(
    name: str, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment_of(name, monkeypatch)
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision("bf16")
    config = plugin.deepspeed_config
    assert config["zero_optimization"]["stage"] == stage
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "none"
    assert config["bf16"]["enabled"] is True
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert config[key] == "auto", key
    assert plugin.zero3_init_flag is False
    assert plugin.zero3_save_16bit_model is (stage == 3)


def test_ddp_shards_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = environment_of("ddp", monkeypatch)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert not {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & environment.keys()


def test_the_command_of_a_shipped_configuration() -> None:
    words = ["train", "r.yaml", "seed=1", "--json"]
    expected = [sys.executable, "-m", "accelerate.commands.launch"]
    expected += ["--config_file", str(CONFIGS["fsdp2"]), "--num_processes", "8"]
    expected += ["-m", "prefopt", *words]
    assert launch.launch_command(words, "fsdp2", 8, devices=8) == expected
    assert launch.launch_command(words, "fsdp2", None, devices=8) == expected


def test_a_file_of_ones_own_says_how_many_processes(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(CONFIGS["ddp"].read_text())
    command = launch.launch_command(["train", "r.yaml"], str(own), None, devices=4)
    assert str(own) in command
    assert "--num_processes" not in command


def test_without_a_gpu_torchrun_starts_the_processes() -> None:
    command = launch.launch_command(["train", "r.yaml"], "ddp", 2, devices=0)
    assert command[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert command[6:] == ["-m", "prefopt", "train", "r.yaml"]


@pytest.mark.parametrize(
    ("config", "processes", "devices", "words"),
    [
        ("fdsp2", 2, 2, "did you mean 'fsdp2'? expected ddp, fsdp2, multinode, zero2, zero3"),
        ("nowhere.yaml", 2, 2, "or the path of an accelerate configuration"),
        ("fsdp2", 2, 0, "found no GPU on this machine"),
        ("ddp", None, 0, "--num-processes N"),
        ("multinode", 2, 2, "--machine_rank 0 --main_process_ip HOST -m prefopt train r.yaml"),
    ],
)
def test_what_cannot_be_launched_is_refused(
    config: str, processes: int | None, devices: int, words: str
) -> None:
    with pytest.raises(PrefoptError) as caught:
        launch.launch_command(["train", "r.yaml"], config, processes, devices)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_command_line_reaches_the_launcher(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[Any] = []

    def execve(path: str, command: list[str], environment: dict[str, str]) -> None:
        called.append((path, command))
        raise SystemExit(7)  # as another program would end

    monkeypatch.setattr(os, "execve", execve)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {path: m}\ndata: {path: d}\ntrainer: {algorithm: dpo}\n")
    words = ["train", str(recipe), "seed=1", "--num-processes", "2", "trainer.beta=0.2", "--json"]
    with pytest.raises(SystemExit):
        main(words)
    ((path, command),) = called
    assert path == sys.executable
    assert command[-6:] == ["prefopt", "train", str(recipe), "seed=1", "trainer.beta=0.2", "--json"]
    # mistakes in a recipe are one line, before anything is started
    assert main([*words, "trainer.betta=1"]) == 2
    assert "did you mean 'trainer.beta'" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert main(words) == 2
    assert "a launcher has started already" in capsys.readouterr().err
    assert len(called) == 1


def test_overrides_may_stand_behind_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["train", "r.yaml", "a=1", "--json", "b=2"]).overrides == ["a=1", "b=2"]
    for words in (["train", "r.yaml", "--jsn"], ["report", "run", "more"]):
        with pytest.raises(SystemExit):
            parse(words)
        assert f"unrecognized arguments: {words[-1]}" in capsys.readouterr().err
