"""What the commands do, for Python and notebooks: `fit` a run, `resume` or `load` one, ask its
model.

`import gemma_grpo` offers these names without importing this module before one is used; see
docs/api.md.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from gemma_grpo import cli, pipeline
from gemma_grpo.errors import InterruptedRunError, UserError, expanded
from gemma_grpo.generation.config import SamplingConfig
from gemma_grpo.generation.generator import make_generator
from gemma_grpo.pipeline import CHANGES, NOTHING_GIVEN, Deadline, Given, RunConfig
from gemma_grpo.records import files, lock, model_card, read, report
from gemma_grpo.records import run_dir as run_dirs
from gemma_grpo.records import summary as summaries
from gemma_grpo.runtime import (
    ModelConfig,
    Params,
    Runtime,
    check_seed,
    hub_name,
    load_model,
    write_adapters,
    write_model,
)
from gemma_grpo.view import page

RUNS = Path("runs")
EXPORTED = ("float32", "bfloat16", "float16")
BATCH = 16  # prompts that `Result.generate` completes at a time

_kept: dict[tuple[ModelConfig, Path, int], tuple[Runtime, Params]] = {}  # the model used last

Rewards = Sequence[Callable[..., Any]] | Mapping[Callable[..., Any], float]
Problems = Iterable[Any]


@dataclass(frozen=True)
class Picture:
    """A PNG file, which a notebook shows."""

    path: Path

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


@dataclass(frozen=True)
class Result:
    """A run on disk, and what can be asked of its model.

    Attributes:
        run_dir: its folder.
        run: its settings.
        given: the Python objects that it was given.
    """

    run_dir: Path
    run: RunConfig
    given: Given = field(default=NOTHING_GIVEN, repr=False)

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json: the figures of each stage with 95 % intervals, their paired differences,
        the seconds, and what a deadline or the guard left `unfinished`, or None.

        Raises:
            UserError: the run has not come that far.
        """
        summary = files.read_json(self.run_dir / "summary.json")
        if summary is None:
            raise UserError(f"{self.run_dir} has no summary yet: gemma_grpo.resume goes on with it")
        return summary

    def __str__(self) -> str:
        """The before/after table."""
        return report.before_after_table(self.summary)

    def curves(self) -> Picture:
        """The learning curves, drawn from what the run has recorded so far."""
        return Picture(report.plot_curves(self.run_dir))

    def view(self, *, megabytes: int | float = 4, height: int = 800) -> page.Inline:
        """Every completion, on a page that a notebook shows (docs/see.md). A run still being
        written can be viewed too.

        Args:
            megabytes: of the page's data at most; beyond it problems and training steps are left
                out evenly.
            height: of the frame, pixels.
        """
        if not megabytes > 0:
            raise UserError(f"megabytes={megabytes}: give a number above 0")
        return page.Inline(page.html([self.run_dir], megabytes), height)

    def metrics(self, stage: str = "grpo") -> list[dict[str, Any]]:
        """The metrics of each step of a stage, sft or grpo (docs/metrics.md)."""
        if stage not in run_dirs.STAGES:
            raise UserError(f"no stage is named {stage!r}: use {' or '.join(run_dirs.STAGES)}")
        return [row for row in self._rows("metrics.jsonl") if row.get("stage") == stage]

    def rollouts(self, step: int) -> list[dict[str, Any]]:
        """Every completion of a GRPO step, from 1, with each of its rewards."""
        return self._rows(f"rollouts/grpo-{step:06d}.jsonl")

    def evaluations(self, stage: str) -> list[dict[str, Any]]:
        """Every completion of the held-out problems by "base", "sft" or "grpo"."""
        return self._rows(f"evaluations/{stage}.jsonl")

    def evaluate(
        self,
        problems: Problems | str | None = None,
        *,
        num: int | None = None,
        instruction: str | None = None,
    ) -> dict[str, Any]:
        """Measures the last stage's model: the figures of summary.json, with their intervals.

        Args:
            problems: problems or rows, or the name of a source (docs/training.md), of which a file
                is taken whole; the run's own held-out ones if None.
            num: at most this many of them; 0 for all. None takes data.num_test of the run's own
                problems, all of others, and 400 of a source that generates them.
            instruction: put before each question; None takes the run's own.

        Raises:
            UserError: bad input, or no stage has finished.
        """
        run, given = self.run, self.given
        if problems is not None:
            run, given = pipeline.to_measure(problems, num, run, given)
        elif num is not None:
            run = run.replace({"data.num_test": num})
        if instruction is not None:
            run = run.replace({"model.instruction": instruction})
        with cli.user_errors():
            loaded = _loaded(run.model, run.seed, self._trained())
            return pipeline.measure(run, *loaded, given)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        temperature: float = 0.0,
        seed: int = 0,
        instruction: str | None = None,
    ) -> list[str]:
        """The last stage's completion of each question.

        Args:
            temperature: 0 takes the likeliest token each time.
            seed: of the sampling.
            instruction: put before each question; None takes the run's own.

        Raises:
            UserError: a prompt over model.max_prompt_length, or no stage has finished.
        """
        if isinstance(prompts, str):
            raise UserError('prompts: give a list of questions, such as ["What is 2 + 2?"]')
        for number, prompt in enumerate(prompts, start=1):
            if not isinstance(prompt, str):
                raise UserError(
                    f"prompt {number} is of type {type(prompt).__name__}: give the question as "
                    "text; the turn of the chat is put around it"
                )
        if not prompts:
            return []
        settings = replace(self.run.model, rollout_layout="data")
        if instruction is not None:
            settings = replace(settings, instruction=instruction)
        with cli.user_errors():
            runtime, params = _loaded(settings, seed, self._trained())
            sampling = SamplingConfig(temperature)
            generator = make_generator(runtime, params, num=1, sampling=sampling)
            encoded = [runtime.encode_question(prompt) for prompt in prompts]
            groups = generator.complete_all(encoded, runtime.key, BATCH)
            return [completion.text for (completion,) in groups]

    def export(
        self, out: str | Path, *, stage: str = "", dtype: str = "float32", adapter: bool = False
    ) -> Path:
        """Writes the model for others to load: a Hugging Face folder, or PEFT's adapters.

        Args:
            out: the folder to make.
            stage: whose model; the last finished one if "".
            dtype: stored in: float32 (every bit of what was trained), bfloat16 or float16.
            adapter: the LoRA adapters alone.

        Returns:
            The folder.

        Raises:
            UserError: something is there already, no stage has finished, or there are no adapters.
        """
        out = expanded(out)
        files.require_new_folder(out)
        if dtype not in EXPORTED:
            raise UserError(f"dtype={dtype!r}: use one of {', '.join(EXPORTED)}")
        if adapter and dtype != "float32":
            raise UserError(f"dtype={dtype!r}: adapters are written as trained, float32")
        trained = self._trained()
        if stage:
            there = sorted(path.stem for path in trained.parent.glob("*.safetensors"))
            if stage not in there:
                raise UserError(
                    f"stage={stage!r}: {self.run_dir} has weights of {', '.join(there)} alone"
                )
            trained = trained.with_name(f"{stage}.safetensors")
        if cut := model_card.unfinished(self.run_dir, trained.stem):
            goes_on = "--resume (in Python gemma_grpo.resume) goes on"
            print(f"warning: {cut}; {goes_on}", file=sys.stderr)
        model = replace(self.run.model, dtype="float32", rollout_layout="data")
        if adapter and not model.lora.rank:
            raise UserError(
                f"{self.run_dir} trained all weights and has no adapters; export without --adapter"
            )
        with cli.user_errors():
            runtime, params = _loaded(model, self.run.seed, trained)
            card = model_card.model_card(
                self.run_dir,
                trained.stem,
                base=Path(model.weights).name,
                of_gemma=model.of_gemma,
                hub_name=hub_name(model.weights),
                use=model_card.Use(
                    runtime.question(model_card.QUESTION), model.max_completion_length, adapter
                ),
            )
            texts = {"README.md": card}
            if adapter:
                if warning := write_adapters(out, runtime, params, model.weights, texts=texts):
                    print(f"warning: {warning}", file=sys.stderr)
                return out
            write_model(out, runtime, params, model.weights, dtype=dtype, texts=texts)
        return out

    def unload(self) -> None:
        """Frees the memory of the model that `generate`, `evaluate` and `export` keep loaded, as
        `fit` and `resume` do before they train."""
        _kept.clear()

    def copy(self, run_dir: str | Path, settings: Mapping[str, Any] | None = None) -> "Result":
        """Copies what `resume` needs into a new folder. The run itself is only read: it may lie on
        a read-only disk, as a run attached on Kaggle does.

        Args:
            run_dir: the new folder.
            settings: changes, as for `RunConfig.replace`, to what a resumed run may change: where
                the model, tokenizer, data, teacher and reward files are, checkpoint.folder, and the
                settings of grpo.guard.

        Raises:
            UserError: something is there already, another setting would change, checkpoints are
                lost or damaged, or the disk is full.
        """
        run_dir, run = expanded(run_dir).absolute(), self.run.replace(settings or {})
        cli.check_unchanged(self.run, run, "copy with other settings")
        with cli.user_errors(), _new_folder(run_dir, run):
            pipeline.copy_run_dir(self.run_dir, run_dir, run, restart_stage=False)
            run_dirs.copy_cache(self.run_dir, run_dir.parent)
        return Result(run_dir, run, self.given)

    def _trained(self) -> Path:
        """The weights of the last stage. Raises UserError if none has finished."""
        _, trained = cli.trained(str(self.run_dir))
        assert trained is not None  # of a run directory
        return trained

    def _rows(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of a file; a run still writing may be within its last."""
        path = self.run_dir / name
        if not path.is_file():
            raise UserError(f"{path} is not there (yet)")
        return read.json_lines(path)[0]


def fit(
    run: RunConfig,
    *,
    rewards: Rewards = (),
    problems: Problems | None = None,
    held_out: Problems | None = None,
    run_dir: str | Path | None = None,
    hours: float | None = None,
) -> Result:
    """Trains: base -> SFT -> GRPO, each measured on the same held-out problems.

    The stop button, Ctrl-C and SIGTERM save a stage first; `resume` then goes on to the same bits.
    An evaluation that they end is made again.

    Args:
        run: the settings; see `preset`.
        rewards: functions of a `Sample`, added to the built-in ones: a list, each of weight 1, or
            the weight of each.
        problems: `Problem`s, or rows with prompt and answer (a list of dicts, a data set), instead
            of `data.source`; SFT needs a `completion` in each.
        held_out: those to measure on; about a tenth of `problems` if None.
        run_dir: a new folder; runs/DATE-TIME if None.
        hours: since the process began, before which the run stops in time, saved.

    Raises:
        UserError: bad input, in one line that names the fix.
        InterruptedRunError: it was stopped, and is saved.
    """
    if not isinstance(run, RunConfig):
        raise UserError('run: give settings, such as gemma_grpo.preset("gemma3-nano")')
    deadline = Deadline(hours)
    specs, given = pipeline.given_objects(rewards, problems, held_out)
    run = pipeline.with_objects(run, specs, given)
    if run_dir is None:
        run_dir = run_dirs.unused(RUNS / time.strftime("%Y%m%d-%H%M%S"))
    run_dir = expanded(run_dir).absolute()
    with cli.user_errors(), _new_folder(run_dir, run):
        pipeline.new_run_dir(run_dir, run)
        return _execute(Result(run_dir, run, given), deadline)


def resume(
    run_dir: str | Path,
    *,
    rewards: Rewards = (),
    problems: Problems | None = None,
    held_out: Problems | None = None,
    hours: float | None = None,
    may_change: Sequence[Literal["data", "base", "rewards"]] = (),
) -> Result:
    """Goes on with a run that was stopped or killed, as it was begun.

    Args:
        run_dir: its folder; of a read-only one, resume a copy (`Result.copy`).
        rewards, problems, held_out: the Python objects that it was begun with, which its files
            cannot hold.
        hours: as for `fit`.
        may_change: "data", if the problems may be others than the run began with, "base", if base
            weights and tokenizer may, "rewards", if the files of own rewards, judges and rubric
            may.

    Raises:
        UserError, InterruptedRunError: as for `fit`.
    """
    run_dir, deadline = expanded(run_dir).absolute(), Deadline(hours)
    if others := {may_change} if isinstance(may_change, str) else {*may_change} - {*CHANGES}:
        known = ", ".join(map(repr, CHANGES))
        raise UserError(f"may_change: {others.pop()!r}; give a list of some of {known}")
    run = cli.config_of(run_dir)
    specs, given = pipeline.given_objects(rewards, problems, held_out)
    pipeline.require_objects(run, given)
    if isinstance(rewards, Mapping) and (others := {*specs} - {*run.reward.extra}):
        raise UserError(f"{min(others)}: the run was begun with another weight of that reward")
    with cli.user_errors(), lock.hold(run_dir):
        pipeline.resume_run_dir(run_dir, run, restart_stage=False)
        with run_dirs.hold_checkpoints(run.checkpoint.folder, is_new=False):
            return _execute(Result(run_dir, run, given), deadline, may_change)


def load(run_dir: str | Path) -> Result:
    """A run on disk, finished or not. Raises UserError if there is none."""
    run_dir = expanded(run_dir).absolute()
    if not (run_dir / "config.yaml").is_file():
        fault = f"{run_dir}: not a run directory (it has no config.yaml)"
        if (run_dir / "config.json").is_file():
            fault += (
                f"; an exported or Hugging Face model: python -m gemma_grpo.generate --weights "
                f"{run_dir}, or evaluate --weights {run_dir}"
            )
        raise UserError(fault)
    return Result(run_dir, cli.config_of(run_dir))


@contextlib.contextmanager
def _new_folder(run_dir: Path, run: RunConfig) -> Iterator[None]:
    """Makes a run's folder and holds its locks during the block. A folder in which a UserError left
    nothing is removed. Raises UserError if it, or the folder for checkpoints, is in use."""
    folder = run.checkpoint.folder
    run_dirs.require_apart(folder, run_dir)
    run_dirs.require_free(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with lock.hold(run_dir), run_dirs.hold_checkpoints(folder, is_new=True):
        try:
            yield
        except UserError:
            run_dirs.remove_unused(run_dir)
            raise


def _loaded(settings: ModelConfig, seed: int, trained: Path) -> tuple[Runtime, Params]:
    """As `load_model`, but reads the files only if another model was used last, or the trained
    weights were written since."""
    check_seed(seed)
    key = (replace(settings, instruction=""), trained, trained.stat().st_mtime_ns)
    found = _kept.get(key)
    if found is None:
        _kept.clear()  # before the next one takes its memory
        found = _kept[key] = load_model(settings, seed=seed, trained=trained)
    runtime, params = found
    return replace(runtime, instruction=settings.instruction, seed=seed), params


def _execute(result: Result, deadline: Deadline, may_change: Sequence[str] = ()) -> Result:
    """The run, its folder made and its lock held."""
    _kept.clear()
    run = result.run
    for warning in run.grpo.check():
        print(f"warning: {warning}", file=sys.stderr)
    cli.split_cpu(run.model.cpu_devices, *run.batch_sizes.values())
    cli.check_tpu()
    cli.use_compilation_cache(result.run_dir.parent)
    try:
        summary = pipeline.execute(run, result.run_dir, deadline, result.given, may_change)
    except InterruptedRunError:
        place = str(result.run_dir)
        print(f"everything is saved: gemma_grpo.resume({place!r}) goes on", file=sys.stderr)
        raise
    except KeyboardInterrupt:  # between stages: an evaluation begins again
        place = str(result.run_dir)
        print(f"stopped: gemma_grpo.resume({place!r}) goes on", file=sys.stderr)
        raise
    unfinished = summary["unfinished"]
    if unfinished is not None and "collapse" in unfinished:
        print(f"stopped by the guard: {summaries.collapsed(unfinished)}", file=sys.stderr)
    elif unfinished is not None:
        where = summaries.unfinished_at(unfinished)
        print(f"stopped for the deadline: {where}; gemma_grpo.resume goes on", file=sys.stderr)
    return result
