"""The evaluation command: how good is a run's model, or a weights file, on held-out problems.

python -m gemma_grpo.evaluate RUN_OR_WEIGHTS [--data.source file.jsonl] [--json]
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from gemma_grpo import cli, pipeline, report
from gemma_grpo.config import DataConfig
from gemma_grpo.data import sources
from gemma_grpo.evaluation import EvaluationConfig, evaluation_prompts, make_evaluator


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return cli.guarded(lambda: tyro.cli(_evaluate, args=arguments, description=__doc__))


def _evaluate(
    run_or_weights: tyro.conf.Positional[Path],
    data: Annotated[DataConfig, tyro.conf.arg(name="data")] = DataConfig(),  # noqa: B008 (frozen)
    evaluation: EvaluationConfig = EvaluationConfig(),  # noqa: B008 (frozen)
    out: Path | None = None,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Measure a model.

    Args:
        run_or_weights: a run directory (its last finished stage) or a gemma3-nano safetensors file.
        data: the held-out problems; only `source` and `num_test` matter here.
        evaluation: what is measured.
        out: file for every greedy completion, one JSON line a problem.
        json_output: print the result as JSON instead of a table.
    """
    run = cli.trained(run_or_weights)
    cli.split_cpu(0, evaluation_prompts(evaluation))
    cli.use_compilation_cache(run_or_weights.parent)
    problems = sources.load(data.source, split="test", num=data.num_test, seed=0)
    runtime, params = pipeline.load_model(run.model, seed=run.seed)
    result, rows = make_evaluator(evaluation, runtime).run(params, problems)
    if out is not None:
        out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if json_output:
        print(json.dumps(result))
        return 0
    print(report.before_after_table({"stages": {run_or_weights.name: result}}))
    for name in ("lenient_accuracy", "truncation_rate", "pass_at_k", "maj_at_k"):
        if name in result:
            print(f"{name} {result[name]:.1%}")
    for label, share in (result["by_difficulty"] | result["by_domain"]).items():
        print(f"  {label}: {share['accuracy']:.1%} of {share['n']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
