"""Log-probs of K completions of one prompt: a tree, K rows with the same head, plain transformers.

The peers are prefopt's own ``separate`` layout (a row for each completion, the head on completion
tokens only) and an ordinary transformers forward that keeps the logits of completion tokens only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measure import DEVICE, Settings, interleave, parser, report
from torch import Tensor
from transformers import LlamaForCausalLM

from prefopt.data.tree import Layout, PromptTree, collate_trees
from prefopt.models.forward import enable_trees
from prefopt.models.logprobs import sequence_log_probs

LENGTHS = {"base": (256, 128), "tiny": (32, 16)}  # tokens of the prompt and of each completion


def groups(settings: Settings, completions: int) -> list[PromptTree]:
    """A prompt with its completions for every step."""
    generator = torch.Generator().manual_seed(settings.seed)
    prompt, completion = LENGTHS[settings.size]

    def ids(length: int) -> list[int]:
        return torch.randint(2, settings.config.vocab_size, (length,), generator=generator).tolist()

    return [
        PromptTree(ids(prompt), [ids(completion) for _ in range(completions)])
        for _ in range(settings.steps)
    ]


def ours(model: LlamaForCausalLM, layout: Layout) -> Callable[[PromptTree], Tensor]:
    return lambda tree: sequence_log_probs(model, collate_trees([tree], layout=layout).to(DEVICE))


def plain(model: LlamaForCausalLM) -> Callable[[PromptTree], Tensor]:
    def log_probs(tree: PromptTree) -> Tensor:
        ids = torch.tensor([[*tree.prompt, *c] for c in tree.completions], device=DEVICE)
        length = len(tree.completions[0])
        output = model(input_ids=ids, use_cache=False, logits_to_keep=length + 1)
        table = output.logits[:, :-1].float().log_softmax(-1)
        return table.gather(-1, ids[:, -length:, None])[..., 0].sum(1)

    return log_probs


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser("Times log-probs of the completions of one prompt.")
    options.add_argument("--completions", type=int, default=8, help="of each prompt")
    args = options.parse_args(argv)
    settings = Settings(args.size, 1, args.steps, args.seed)
    torch.manual_seed(settings.seed)
    reference = LlamaForCausalLM(settings.config).to(DEVICE).eval()
    model = copy.deepcopy(reference)
    enable_trees(model)
    trees = groups(settings, args.completions)
    models = {"tree": model, "rows": model, "transformers": reference}
    ways = {
        "tree": ours(model, "tree"),
        "rows": ours(model, "separate"),
        "transformers": plain(reference),
    }

    def forward(way: str, tree: PromptTree) -> Tensor:
        with torch.no_grad():
            return ways[way](tree)

    def backward(way: str, tree: PromptTree) -> None:
        ways[way](tree).sum().backward()

    def clear(way: str) -> None:
        models[way].zero_grad()

    def gradient(way: str) -> Tensor:
        clear(way)
        backward(way, trees[0])
        return torch.cat([p.grad.flatten() for p in models[way].parameters()])

    runs = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for mode, run, value in (
            ("no gradient", forward, lambda way: forward(way, trees[0])),
            ("with gradient", backward, gradient),
        ):
            difference = _differences({way: value(way) for way in ways})  # the warm-up too
            timed = {way: lambda i, way=way, run=run: run(way, trees[i]) for way in ways}
            times = interleave(timed, settings.steps, settings.seed, prepare=clear)
            labels = {"mode": mode, "threads": threads}
            runs.append(labels | times | {"relative_difference": difference})
    prompt, completion = LENGTHS[args.size]
    return report("group", args, settings, runs=runs, tokens=[prompt, completion])


def _differences(values: dict[str, Tensor]) -> dict[str, float]:
    """Of the peers' values to the tree's, relative, in the L2 norm."""
    expected = values.pop("tree")
    return {way: ((v - expected).norm() / expected.norm()).item() for way, v in values.items()}


if __name__ == "__main__":
    main()
