"""A whole iteration of online DPO, prefopt against TRL: sample, judge and optimise.

Both sides sample two completions for each of the same prompts from the same model, have them scored
by the same reward model, and take the same number of optimiser steps on the pairs. TRL samples
inside every micro-batch; prefopt samples a round at a time, which may be as short as one step.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from dpo import tokenizer, words
from measure import DEVICE, EOS, RANGES, Settings, interleave, parser, peak_mib, report
from torch import nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, Trainer
from transformers.trainer_callback import PrinterCallback

SAMPLES = 2  # of each prompt: TRL knows no other number
TEMPERATURE = 1.0
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Task:
    """One iteration, and how it is cut up.

    Attributes:
        settings: Model and prompts; ``settings.batch_size`` prompts in all.
        pairs_per_step: The global batch of an optimiser step.
        micro_batch: Pairs of a forward and backward pass.
        steps_per_round: Optimiser steps that prefopt samples for at once.
        engine: What prefopt samples with.
        seed: Of the samples.
    """

    settings: Settings
    pairs_per_step: int
    micro_batch: int
    steps_per_round: int
    engine: str
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """What both trainers are told."""
        return {
            "output_dir": tempfile.mkdtemp(dir=self.settings.scratch),
            "per_device_train_batch_size": self.micro_batch,
            "per_device_eval_batch_size": self.micro_batch,
            "gradient_accumulation_steps": self.pairs_per_step // self.micro_batch,
            "num_train_epochs": 1,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "beta": 0.1,
            "seed": self.seed,
            "gradient_checkpointing": False,
            "bf16": DEVICE == "cuda",
            "dataloader_pin_memory": DEVICE == "cuda",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }


@dataclass
class Iteration:
    """A trainer that is ready for one iteration, and what is found out about it meanwhile.

    Attributes:
        trainer: Its ``train`` is the iteration.
        seconds: Wall and CPU time of each phase, less what phases inside it took.
        lengths: Tokens of every completion drawn.
    """

    trainer: Trainer
    seconds: dict[str, np.ndarray] = field(default_factory=lambda: defaultdict(lambda: np.zeros(2)))
    lengths: list[int] = field(default_factory=list)

    def run(self) -> None:
        """The iteration; ``rest`` is clipping, the optimiser, logs, files and the like."""
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.training_step = self.timed("optimise", self.trainer.training_step)
        self.timed("rest", self.trainer.train)()

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which adds to a phase what it takes."""

        def call(*args: Any, **kwargs: Any) -> Any:
            before, begun = sum(self.seconds.values()), clocks()
            try:
                return function(*args, **kwargs)
            finally:
                inside = sum(self.seconds.values()) - before
                self.seconds[phase] += clocks() - begun - inside

        return call


def clocks() -> np.ndarray:
    """Wall and CPU time, in seconds, once the device has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


def policy(settings: Settings) -> LlamaForCausalLM:
    """A random model whose completions end: EOS has the same probability everywhere, but for noise.

    Lengths are geometric, with the mean of the size's log-normal ones, and cut at their longest.
    """
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(settings.config)
    head = model.lm_head
    model.lm_head = nn.Linear(head.in_features, head.out_features)
    nn.init.zeros_(model.lm_head.bias)
    low, high = RANGES[settings.size][1]
    with torch.no_grad():
        model.lm_head.weight.copy_(head.weight)
        model.lm_head.bias[EOS] = math.log(head.out_features / math.sqrt(low * high))
    return model.to(DEVICE)


def judge(settings: Settings) -> LlamaForSequenceClassification:
    """A reward model of the policy's shape."""
    torch.manual_seed(settings.seed + 1)
    return LlamaForSequenceClassification(settings.config).to(DEVICE).eval()


def prompts(settings: Settings) -> list[dict[str, str]]:
    """Rows of a prompt as text; the space at its end parts it from the answer."""
    vocabulary = words(settings)
    return [{"prompt": "".join(f"{vocabulary[i]} " for i in row.prompt)} for row in settings.rows()]


def max_new_tokens(settings: Settings) -> int:
    return RANGES[settings.size][1][1]


def prefopt(task: Task) -> Iteration:
    from prefopt.reward_models import RewardModel
    from prefopt.rollout.engine import SamplingSettings
    from prefopt.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    settings = task.settings
    model, words_of = policy(settings), tokenizer(settings)
    args = OnlineDPOConfig(
        **task.arguments(),
        rounds=None,
        prompts_per_round=task.steps_per_round * task.pairs_per_step,
        optimizer_state="continue",
        ties="keep",  # as TRL does, so that every prompt gives a pair
        max_prompt_length=None,
        max_length=None,
    )
    trainer = OnlineDPOTrainer(
        model,
        args,
        prompts(settings),
        judge=RewardModel(judge(settings), words_of),
        sampling=SamplingSettings(
            max_new_tokens=max_new_tokens(settings),
            temperature=TEMPERATURE,
            samples_per_prompt=SAMPLES,
        ),
        engine=engine(task.engine, model, words_of, settings),
        processing_class=words_of,
    )
    iteration = Iteration(trainer)
    source = trainer.engine
    generate = iteration.timed("generate", source.generate)

    def counted(*args: Any, **kwargs: Any) -> Any:
        groups = generate(*args, **kwargs)
        iteration.lengths += [len(answer.token_ids) for group in groups for answer in group]
        return groups

    source.generate = counted
    trainer.judge.score = iteration.timed("judge", trainer.judge.score)
    trainer.round_dataset = iteration.timed("reference", trainer.round_dataset)
    return iteration


def engine(name: str, model: Any, words_of: Any, settings: Settings) -> Any:
    """What prefopt samples with; None is its trainer's own."""
    if name == "transformers":
        return None
    from prefopt.data.template import stop_token_ids
    from prefopt.rollout.vllm_engine import VLLMEngine

    return VLLMEngine(
        model.config,
        words_of,
        stop_token_ids=stop_token_ids(words_of, model.generation_config),
        context_length=settings.config.max_position_embeddings,
        dtype="float32",
    )


def trl(task: Task) -> Iteration:
    import datasets
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    datasets.disable_progress_bars()
    settings = task.settings
    words_of = tokenizer(settings)
    args = OnlineDPOConfig(
        **task.arguments(),
        max_new_tokens=max_new_tokens(settings),
        max_length=settings.config.max_position_embeddings,
        temperature=TEMPERATURE,
    )
    trainer = OnlineDPOTrainer(
        policy(settings),
        reward_funcs=judge(settings),
        args=args,
        train_dataset=datasets.Dataset.from_list(prompts(settings)),
        processing_class=words_of,
        reward_processing_classes=words_of,
    )
    iteration = Iteration(trainer)
    generate = iteration.timed("generate", trainer._generate)

    def counted(*args: Any) -> Any:
        found = generate(*args)
        iteration.lengths += found[3].sum(1).tolist()  # the mask of the completions
        return found

    trainer._generate = counted
    score = trainer._calculate_rewards_from_functions
    trainer._calculate_rewards_from_functions = iteration.timed("judge", score)
    forward = trainer._forward

    def forward_of(model: nn.Module, *args: Any) -> Any:
        of_reference = model is trainer.ref_model
        return (iteration.timed("reference", forward) if of_reference else forward)(model, *args)

    trainer._forward = forward_of
    return iteration


BUILDERS: dict[str, Callable[[Task], Iteration]] = {"prefopt": prefopt, "trl": trl}

MODES = ("rounds", "on-policy", "large batch")


def task_of(mode: str, settings: Settings, args: Any) -> Task:
    """How an iteration is cut up in a mode.

    ``rounds``: prefopt samples for all steps at once, and micro-batches are small, as where memory
    is short. ``large batch``: the same, but a micro-batch is a whole global batch, which is the
    best that TRL can be given. ``on-policy``: large batches, and prefopt samples for each step as
    it comes, so that both run the same algorithm.
    """
    steps = settings.batch_size // args.pairs
    return Task(
        settings,
        pairs_per_step=args.pairs,
        micro_batch=args.micro_batch if mode == "rounds" else args.pairs,
        steps_per_round=1 if mode == "on-policy" else steps,
        engine=args.engine,
    )


def compare(task: Task, repeats: int) -> dict[str, Any]:
    """Lets both sides run the iteration in turns, each time from the same weights."""
    done: dict[str, list[Iteration]] = {name: [] for name in BUILDERS}

    def prepare(name: str) -> None:
        done[name].append(BUILDERS[name](replace(task, seed=len(done[name]))))

    one_step = replace(task.settings, batch_size=task.pairs_per_step)
    for build in BUILDERS.values():  # the warm-up
        build(replace(task, settings=one_step, steps_per_round=1)).run()
    runs = {name: (lambda i, name=name: done[name][-1].run()) for name in BUILDERS}
    result = interleave(runs, repeats, task.settings.seed, prepare=prepare)
    return result | {
        "phases": {name: phases(iterations) for name, iterations in done.items()},
        "completions": {name: [len(i.lengths) for i in its] for name, its in done.items()},
        "tokens": {name: [sum(i.lengths) for i in its] for name, its in done.items()},
        "longest": {name: [max(i.lengths) for i in its] for name, its in done.items()},
        "optimiser_steps": {
            name: [i.trainer.state.global_step for i in its] for name, its in done.items()
        },
        "arguments": task.arguments() | {"output_dir": None},
    }


def phases(iterations: Sequence[Iteration]) -> dict[str, dict[str, float]]:
    """The medians of wall and CPU time of each phase."""
    return {
        phase: dict(
            zip(("wall", "cpu"), np.median([i.seconds[phase] for i in iterations], 0), strict=True)
        )
        for phase in iterations[0].seconds
    }


def peak_memory(name: str, task: Task) -> float:
    """Peak memory of set-up and one iteration in a process of its own, in MiB."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_run_and_peak, name, task).result()


def _run_and_peak(name: str, task: Task) -> float:
    BUILDERS[name](task).run()
    return peak_mib()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser("Times one whole iteration of online DPO of prefopt and of TRL.")
    options.set_defaults(steps=3, threads=[1])
    options.add_argument("--prompts", type=int, default=32, help="in an iteration")
    options.add_argument("--pairs", type=int, default=8, help="in an optimiser step")
    options.add_argument("--micro-batch", type=int, default=2, help="pairs, where memory is short")
    options.add_argument("--modes", choices=MODES, nargs="+", default=MODES)
    options.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    options.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    args = options.parse_args(argv)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    logging.getLogger("prefopt").setLevel(logging.ERROR)
    runs, memory = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        settings = Settings(args.size, args.prompts, 1, args.seed, scratch)
        for mode in args.modes:
            task = task_of(mode, settings, args)
            if not args.no_memory:
                memory[mode] = {name: peak_memory(name, task) for name in BUILDERS}
            for threads in args.threads:
                torch.set_num_threads(threads)
                runs.append({"mode": mode, "threads": threads} | compare(task, args.steps))
    return report("online_dpo", args, settings, runs=runs, peak_memory_mib=memory)


if __name__ == "__main__":
    main()
