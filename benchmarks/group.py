"""Log-probs of K completions of one prompt: a tree, K rows with the same head, plain transformers.

The peers are prefopt's own ``separate`` layout (a row for each completion, the head on completion
tokens only) and an ordinary transformers forward with logits for the completion tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measure import DEVICE, SIZES, Settings, interleave, parser, report
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
    options = parser("Times log-probs of the completions of one prompt.", steps=10)
    options.add_argument("--completions", type=int, default=8, help="of each prompt")
    args = options.parse_args(argv)
    settings = Settings(args.size, 1, args.steps, args.seed, "")
    torch.manual_seed(settings.seed)
    reference = LlamaForCausalLM(settings.config).to(DEVICE).eval()
    model = copy.deepcopy(reference)
    enable_trees(model)
    ways = {
        "tree": (model, ours(model, "tree")),
        "rows": (model, ours(model, "separate")),
        "transformers": (reference, plain(reference)),
    }
    trees = groups(settings, args.completions)

    def forward(way: str, i: int) -> Tensor:
        with torch.no_grad():
            return ways[way][1](trees[i])

    def backward(way: str, i: int) -> Tensor:
        owner, log_probs = ways[way]
        owner.zero_grad()
        log_probs(trees[i]).sum().backward()
        return torch.cat([p.grad.flatten() for p in owner.parameters()])

    runs = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for mode, run in (("no gradient", forward), ("with gradient", backward)):
            values = {way: run(way, 0) for way in ways}  # the warm-up too
            timed = {way: (lambda i, w=way, run=run: run(w, i)) for way in ways}
            runs.append(
                {"mode": mode, "threads": threads}
                | interleave(timed, settings.steps, settings.seed)
                | {"relative_difference": {w: difference(values, w) for w in ("rows", "transformers")}}
            )
    lengths = dict(zip(("prompt", "completion"), LENGTHS[args.size], strict=True))
    return report("group", args, settings, runs=runs, group=lengths | {"K": args.completions})


def difference(values: dict[str, Tensor], way: str) -> float:
    """Of log-probs or gradients to the tree's, relative, in the L2 norm."""
    return ((values[way] - values["tree"]).norm() / values["tree"].norm()).item()


if __name__ == "__main__":
    main()
