"""``hyaena eval``: tasks of lm-evaluation-harness on the native engine."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from hyaena import files
from hyaena.cli.formatting import json_text
from hyaena.cli.model_options import add_model_options, choose_device
from hyaena.errors import InputError

HELP = "evaluate a model on tasks of lm-evaluation-harness"
EXAMPLES = (
    "hyaena eval --model togethercomputer/StripedHyena-Hessian-7B --suite readme --output scores.json",
    "hyaena eval --model cub --tasks piqa,lambada_openai --limit 200",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; what is not given is as the tasks have it."""
    parser.add_argument("--tasks", metavar="NAMES", help="tasks, groups or tags of the harness, separated by commas")
    parser.add_argument("--suite", metavar="NAME", help="tasks with published figures, printed beside them: readme")
    parser.add_argument("--include-path", metavar="FOLDER", help="a folder with YAML files of tasks of your own")
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples in front of each question (the task's number)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    parser.add_argument("--batch-size", type=int, metavar="N", help="prompts that are continued together (32)")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of a window (the model's maximum)")
    parser.add_argument("--output", metavar="FILE", help="write all results as JSON")

    group = parser.add_argument_group("model")
    add_model_options(group)


def run(args: argparse.Namespace) -> int:
    """Find the tasks, load the model, evaluate, print a table."""
    from hyaena.evals.suites import SUITES

    if (args.tasks is None) == (args.suite is None):
        raise InputError("name tasks by --tasks, or a suite by --suite, and one of the two only")
    if args.suite is not None and args.suite not in SUITES:
        raise InputError(f"unknown suite {args.suite!r}: choose {', '.join(SUITES)}")
    if args.output is not None:
        files.check_place(Path(args.output))
    suite = None if args.suite is None else SUITES[args.suite]
    names = suite.tasks if suite is not None else [name.strip() for name in args.tasks.split(",") if name.strip()]
    shots = args.num_fewshot if args.num_fewshot is not None or suite is None else suite.num_fewshot

    from hyaena import hub
    from hyaena.evals import run as evals

    numbers = {"limit": args.limit, "batch_size": args.batch_size, "max_length": args.max_length}
    evals.check_options(num_fewshot=shots, **numbers)
    tasks = evals.find_tasks(names, args.include_path)  # before weights are read

    model, tokenizer = hub.load(
        args.model,
        device=choose_device(args),
        dtype=args.dtype,
        revision=args.revision,
        config=args.config,
        fp8=args.fp8,
        weights=args.weights,
        cache_dtype=args.cache_dtype,
    )
    began = time.perf_counter()
    results = evals.evaluate(
        model,
        tokenizer,
        tasks,
        num_fewshot=shots,
        **numbers,
    )
    seconds = time.perf_counter() - began
    references = () if suite is None else suite.references
    document = {
        "model": args.model,
        "seconds": seconds,
        "limit": args.limit,
        "references": [{"task": r.task, "metric": r.metric, "value": r.value} for r in references],
        **{key: results[key] for key in ("results", "groups", "n-shot", "versions", "n-samples") if key in results},
    }
    text = json_text(document) + "\n"
    try:  # hours of work: where one of the two cannot be written, the other one is
        if args.output is not None:
            files.write_atomically(Path(args.output), lambda file: file.write(text.encode()))
    finally:
        print(evals.table(results, references, "" if suite is None else suite.source))
    return 0
