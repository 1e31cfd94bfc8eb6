"""Rubrics: yes/no criteria for the completions of each domain, and the reward that a judge's
verdicts make. After Rubrics as Rewards, arXiv 2507.17746. Does not import jax.

A rubric is a YAML file, for each domain of the data a list of criteria:

    explanation:
      - ask: Does it say that half of what is left is thrown away at each look?
        weight: 2
      - Does it say that the list must be sorted?
"""

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gemma_grpo.errors import UNREADABLE, UserError, one_line, shown
from gemma_grpo.rewards.judge import Question
from gemma_grpo.rewards.sample import Sample
from gemma_grpo.rewards.verdicts import Verdicts


@dataclass(frozen=True)
class Criterion:
    """A yes/no question about a completion, "yes" being good, and its share in the score."""

    ask: str
    weight: float = 1.0


Rubric = dict[str, tuple[Criterion, ...]]  # by domain


def load_rubric(path: Path, domains: Collection[str]) -> Rubric:
    """The rubric in a file.

    Args:
        domains: those of the data.

    Raises:
        UserError: no such file, not YAML, a domain that the data does not have, one without
            criteria, or a criterion that is no question or whose weight is no number above 0.
    """
    values = _read(path)
    if not isinstance(values, dict) or not values:
        raise UserError(f"rubric {path}: has no criteria; write a domain and a list under it")
    rubric = {}
    for domain, criteria in values.items():
        where = f"rubric {path}, domain {domain!r}"
        if domain not in domains:
            known = ", ".join(sorted(domains)[:8])
            raise UserError(f"{where}: no problem is of this domain; the data has {known}")
        if not isinstance(criteria, list) or not criteria:
            raise UserError(f"{where}: has no criteria; write a list of yes/no questions under it")
        rubric[domain] = tuple(
            _criterion(value, f"{where}, criterion {number}")
            for number, value in enumerate(criteria, start=1)
        )
        if len({criterion.ask for criterion in rubric[domain]}) < len(criteria):
            raise UserError(f"{where}: asks the same twice; leave one out or give it more weight")
    return rubric


def _read(path: Path) -> Any:
    """What is in the YAML file. Raises UserError if it cannot be read, or has a domain twice."""
    if path.exists() and not path.is_file():
        raise UserError(f"rubric {path}: not a file")
    try:
        text = path.read_text(encoding="utf-8")
        values, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"rubric {path}: {reason}") from error
    except (yaml.YAMLError, *UNREADABLE) as error:
        raise UserError(f"rubric {path}: not YAML ({one_line(str(error), 200)})") from error
    if isinstance(values, dict) and len(values) < len(tree.value):
        raise UserError(f"rubric {path}: has a domain twice; write its criteria in one list")
    return values


def _criterion(value: Any, where: str) -> Criterion:
    fields = value if isinstance(value, dict) else {"ask": value}
    if unknown := fields.keys() - {"ask", "weight"}:
        raise UserError(
            f"{where}: has no field {min(map(str, unknown))!r}; it has ask and weight; a text with "
            "a colon needs quotes"
        )
    ask, weight = fields.get("ask"), fields.get("weight", 1.0)
    if not isinstance(ask, str) or not ask.strip():
        raise UserError(f"{where}: is {shown(ask)}; write a yes/no question, in quotes")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not (is_number and 0 < weight < sys.float_info.max):  # false for NaN too
        raise UserError(f"{where}: weight is {shown(weight)}; give a number above 0")
    return Criterion(ask.strip(), float(weight))


@dataclass(frozen=True)
class JudgedReward:
    """The reward of a judge: the weighted mean of its verdicts on a completion's criteria.

    It takes all samples of a step at once. The value is None for a completion without a verdict on
    one of its criteria: criteria differ in how often they are met, so a mean of those that happen
    to have been judged would not compare with that of another completion. It is also None in
    domains that the rubric does not have. `scores.score` says what None pays.

    Attributes:
        name: the judge's.
        rubric: its criteria, by domain.
        verdicts: the judge's.
    """

    name: str
    rubric: Rubric
    verdicts: Verdicts
    takes_batch: bool = True
    may_be_missing: bool = True

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """The values; where verdicts are missing, a line on stderr says how many and why."""
        values, reason = self.judged(samples)
        if num_missing := self.num_missing(samples, values):
            print(
                f"warning: judge {self.name}: {num_missing} of {len(samples)} completions were not "
                f"judged ({reason})",
                file=sys.stderr,
            )
        return values

    def judged(self, samples: Sequence[Sample]) -> tuple[list[float | None], str]:
        """The values, and why the first that is missing is."""
        criteria = [self.rubric.get(sample.domain, ()) for sample in samples]
        questions = [
            Question(sample.prompt, sample.completion, sample.answer, criterion.ask)
            for sample, asked in zip(samples, criteria, strict=True)
            for criterion in asked
        ]
        verdicts, reason = self.verdicts.of(questions)
        left = iter(verdicts)
        return [_mean(asked, [next(left) for _ in asked]) for asked in criteria], reason

    def num_missing(self, samples: Sequence[Sample], values: Sequence[float | None]) -> int:
        """How many completions should have been judged and were not."""
        return sum(
            value is None and sample.domain in self.rubric
            for sample, value in zip(samples, values, strict=True)
        )


def _mean(criteria: Sequence[Criterion], verdicts: Sequence[float | None]) -> float | None:
    """The weighted mean of the verdicts; None if there are no criteria, or one has no verdict."""
    given = [verdict for verdict in verdicts if verdict is not None]
    if not criteria or len(given) < len(criteria):
        return None
    weights = [criterion.weight for criterion in criteria]
    return sum(w * v for w, v in zip(weights, given, strict=True)) / sum(weights)
