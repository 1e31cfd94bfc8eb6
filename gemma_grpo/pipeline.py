"""One run from base model to report: base -> SFT -> GRPO, each measured on the same held-out
problems.

The files of a finished stage (its weights, its evaluation) each appear complete or not at all, so
that a killed run goes on from the last one.
"""

import contextlib
import json
import platform
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import jax
from jaxtyping import PyTree

from gemma_grpo import config, weights
from gemma_grpo.config import RunConfig
from gemma_grpo.data import curriculum, jsonl, sources, splits
from gemma_grpo.data.problem import Problem
from gemma_grpo.devices import processes
from gemma_grpo.errors import UserError, expanded
from gemma_grpo.evaluation.evaluator import Evaluator, compare, make_evaluator, pay_of
from gemma_grpo.planning import programs
from gemma_grpo.planning.ahead import Ahead
from gemma_grpo.records import (
    compile_clock,
    evaluations,
    files,
    metrics,
    origin,
    read,
    report,
    rollbacks,
    trackers,
)
from gemma_grpo.records import run_dir as run_dirs
from gemma_grpo.records import summary as summaries
from gemma_grpo.rewards import GivenRewards, Reward, custom, golds
from gemma_grpo.runtime import ModelConfig, Params, Runtime, Teacher, load_model, load_teacher
from gemma_grpo.training import demonstrations, draw, extra_rewards, grpo, saving, sft
from gemma_grpo.training.deadline import Deadline, OutOfTimeError
from gemma_grpo.training.guard import CollapsedError, guard_of
from gemma_grpo.training.interrupt import Interrupt, can_catch_signals
from gemma_grpo.training.loop import RunFiles, Snapshots
from gemma_grpo.training.saving import StageCheckpoints, stage_checkpoints


@dataclass(frozen=True)
class Given:
    """Python objects passed to a run; its config.yaml only records that there were some.

    Attributes:
        rewards: functions by name.
        problems, held_out: to train on and to measure on; None where the config names a source.
            Without `held_out`, about a tenth of `problems` is held out.
    """

    rewards: Mapping[str, Reward] = field(default_factory=dict)
    problems: list[Problem] | None = None
    held_out: list[Problem] | None = None

    def load_problems(self, run: RunConfig) -> tuple[list[Problem], list[Problem]]:
        """Training and held-out problems, which are disjoint. Raises UserError."""
        data = run.data
        # The held-out problems have a fixed seed: runs of all seeds are measured on the same ones.
        return (
            self._load_split(data, "train", num=data.num_train, seed=run.seed),
            self._load_split(data, "test", num=data.num_test, seed=0),
        )

    def _load_split(
        self, data: config.DataConfig, split: curriculum.Split, *, num: int, seed: int
    ) -> list[Problem]:
        wanted = data.difficulty_list
        if self.problems is None:
            return sources.load(data.source, split=split, num=num, seed=seed, difficulties=wanted)
        given = sources.of_session(self.problems, self.held_out, split)
        return splits.pick(splits.of_difficulties(given, wanted, "problems"), num, seed)


NOTHING_GIVEN = Given()

# What each --allow-changed-KIND lets differ when a run is resumed: digests in origin.json, by the
# beginnings of their names.
CHANGES = {
    "data": ("training problems", "held-out problems"),
    "base": ("base weights", "tokenizer", "teacher weights"),
    "rewards": ("reward ", "judge ", "rubric"),
}


def given_objects(
    rewards: Sequence[Reward] | Mapping[Reward, float],
    problems: Iterable | None,
    held_out: Iterable | None,
) -> tuple[tuple[str, ...], Given]:
    """The rewards as a config records them (`RewardConfig.extra`), and all objects.

    Raises:
        UserError: a reward without a name, a row that is no problem, or held_out without problems.
    """
    if held_out is not None and problems is None:
        raise UserError("held_out goes with problems: give both, or data.source for both")
    specs, functions = custom.session_specs(rewards)
    listed = lambda rows: None if rows is None else jsonl.problems_from(rows)
    return specs, Given(functions, listed(problems), listed(held_out))


def to_measure(
    problems: Iterable | str, num: int | None, run: RunConfig, given: Given
) -> tuple[RunConfig, Given]:
    """The run and its objects with other problems to measure on: at most `num` of `problems`, or of
    the source of that name, of all difficulties. Raises UserError."""
    if isinstance(problems, str):
        problems = sources.to_measure(
            problems,
            num=num,
            trained_on=run.data.source,
            load_train=lambda: given.load_problems(run)[0],
        )
    others = replace(given, problems=[], held_out=jsonl.problems_from(problems))
    data = replace(run.data, num_test=num or 0, difficulties=config.DataConfig.difficulties)
    return replace(run, data=data), others


def with_objects(run: RunConfig, specs: tuple[str, ...], given: Given) -> RunConfig:
    """The run's settings, which record that it is given these objects."""
    if given.problems is not None:
        run = replace(run, data=replace(run.data, source=sources.SESSION))
    return replace(run, reward=replace(run.reward, extra=(*run.reward.extra, *specs)))


def require_objects(run: RunConfig, given: Given) -> None:
    """Raises UserError for an object that the run was not begun with; missing ones are found when
    they are loaded."""
    known = {spec.removeprefix(custom.SESSION).partition("=")[0] for spec in run.reward.extra}
    if others := given.rewards.keys() - known:
        raise UserError(f"the run was begun without the reward {min(others)!r}: leave it out")
    if given.problems is not None and run.data.source != sources.SESSION:
        raise UserError(f"the run was begun with {run.data.source}: leave problems out")


@dataclass(frozen=True)
class Task:
    """What a run loads and checks before it starts.

    Attributes:
        runtime: how the model is run.
        base: the weights it starts from.
        train, test: disjoint problems.
        rewards: what a completion is paid for, and the functions of a Python session.
    """

    runtime: Runtime
    base: PyTree
    train: list[Problem]
    test: list[Problem]
    rewards: GivenRewards


def load_task(run: RunConfig, given: Given = NOTHING_GIVEN) -> Task:
    """Loads and checks what a run needs. Raises UserError in all processes for the first fault in
    any of them."""
    source = processes.in_all(partial(weights.open_source, run.model.weights))
    train, test = processes.in_all(partial(given.load_problems, run))
    rewards = processes.in_all(partial(GivenRewards, run.reward, given.rewards))
    runtime, base = load_model(run.model, seed=run.seed, source=source)
    if run.has_teacher:
        runtime = replace(runtime, teacher=_load_teacher(run, runtime))
    task = Task(runtime, base, train, test, rewards)
    processes.in_all(partial(_check, run, task))
    return task


def _load_teacher(run: RunConfig, student: Runtime) -> Teacher:
    """Raises UserError, which names the setting, if the teacher is missing, damaged or misfits."""
    try:
        return load_teacher(*_teacher_files(run), student)
    except UserError as error:
        raise UserError(f"grpo.teacher: {error}") from error


def _teacher_files(run: RunConfig) -> tuple[ModelConfig, Path | None]:
    """The teacher's base model and, if it is a run, the weights that the run has trained."""
    settings, run_dir = config.teacher_model(run), expanded(run.grpo.teacher)
    if not (run_dir / run_dirs.CONFIG).is_file():
        return settings, None
    if settings.lora.rank:
        origin.check(run_dir, {"base weights": weights.digest(settings.weights)})
    return settings, read.last_weights(run_dir)


def _check(run: RunConfig, task: Task) -> None:
    """Raises UserError now for what would otherwise stop the run midway, and prints warnings."""
    runtime, train, test = task.runtime, task.train, task.test
    extra_rewards.check_rewards(task.rewards, runtime, train)
    trackers.require(run.tracker)
    if processes.is_primary():
        for line in _warnings(run, train, test):
            print(f"warning: {line}", file=sys.stderr)
    for kind, problems in (("training ", train), ("held-out ", test)):
        runtime.encode_prompts(problems, kind=kind)
    if run.samples_demonstrations:
        demonstrations.check(run.sft.own, runtime, train)
    elif "sft" in run.stage_list:
        runtime.encode_completions(train)
    runtime.check_rows(run.batch_sizes)
    if "sft" in run.stage_list:
        sft.make_packing(run.sft, runtime.lengths, runtime.mesh.size)
    if "grpo" in run.stage_list:
        grpo.make_packing(run.grpo, runtime.lengths, runtime.mesh.size)


def _warnings(run: RunConfig, train: list[Problem], test: list[Problem]) -> list[str]:
    """A line for each choice of problems and settings that works but surprises."""
    lines = [sources.fields_not_read(run.data.source), golds.warning(train + test)]
    if "sft" in run.stage_list and not run.samples_demonstrations:
        lines += golds.completions_warnings(train)
    if "grpo" in run.stage_list:
        lines.append(draw.warning(run.grpo, train))
    if run.model.weights == weights.NANO and run.data.source != "curriculum":
        lines.append(
            f"{weights.NANO} knows only the words of its own curriculum: for other problems take "
            "another model, such as --preset gemma3-270m"
        )
    return [line for line in lines if line]


def execute(
    run: RunConfig,
    run_dir: Path,
    deadline: Deadline | None = None,
    given: Given = NOTHING_GIVEN,
    may_change: Collection[str] = (),
    *,
    quiet: bool = False,
) -> dict:
    """Starts or resumes a run in its directory, and returns the summary that it wrote there.

    Args:
        run: its settings.
        run_dir: its folder, with its config.yaml.
        deadline: when it must stop.
        given: the Python objects passed to it.
        may_change: kinds of `CHANGES` that may differ from when the run began.
        quiet: print warnings alone on stderr, no progress.

    The summary's "unfinished" is None, or has the "stage", "step" and "num_steps" at which the
    deadline stopped the run; --resume goes on from there. If the guard stopped it, "step" is that
    of the last good checkpoint, and "collapse" says in words what was seen.

    Raises:
        UserError: bad input; what the run had is kept.
        InterruptedRunError: a signal came; everything is saved, and --resume goes on.
    """
    if not can_catch_signals() and processes.is_primary():
        print("warning: not in the main thread: no signal stops the run in order", file=sys.stderr)
    stages, unfinished = ["base", *run.stage_list], None
    with compile_clock.running() as clock, Ahead() as ahead:
        session = _Session(run, run_dir, deadline or Deadline(), given, may_change, quiet, ahead)
        session.deadline.note_earlier_sessions(run_dir)
        try:
            session.run_stages()
        except (OutOfTimeError, CollapsedError) as stop:
            unfinished = {"stage": stop.stage, "step": stop.step, "num_steps": stop.num_steps}
            if isinstance(stop, CollapsedError):
                unfinished["collapse"] = stop.why
            if stop.step:
                stages.append(run_dirs.partial_name(stop.stage, stop.step))
    processes.run_on_primary(lambda: summaries.add_seconds(run_dir, "compile", clock.seconds))
    return processes.broadcast_from_primary(lambda: _summarize(run, stages, run_dir, unfinished))


@dataclass(frozen=True)
class _Session:
    """One process's part of a session: what is left of a run, until the deadline."""

    run: RunConfig
    run_dir: Path
    deadline: Deadline
    given: Given
    may_change: Collection[str] = ()
    quiet: bool = False
    ahead: Ahead = field(default_factory=Ahead)

    def run_stages(self) -> None:
        """Trains and measures the stages in order; the results are in the run's directory.

        Raises:
            OutOfTimeError: the deadline is near; what there is has been saved and evaluated.
            CollapsedError: the guard stopped the run; what is good has been saved and evaluated.
        """
        run, run_dir = self.run, self.run_dir
        _require_shared(run_dir)
        self._require_time("base")
        self._say(f"loading {run.model.weights} and the problems")
        with origin.begun_elsewhere(run_dir):
            task = load_task(run, self.given)
        digests = processes.in_all(partial(_digests, run, task))
        processes.require_same(digests, fix="give all processes the same files")
        processes.run_on_primary(partial(_check_origin, run, run_dir, digests, self.may_change))
        self._compile_ahead(task)
        pay = pay_of(run.reward, self.given.rewards)
        evaluator = make_evaluator(run.evaluation, task.runtime, pay)
        evaluate = partial(self._evaluate, evaluator, task.test)
        params = task.base
        is_compiled = evaluate("base", params)
        for stage in run.stage_list:
            path = run_dir / "weights" / f"{stage}.safetensors"
            if not processes.broadcast_from_primary(path.exists):
                train, snapshots = self._train_fn(stage, task, params), Snapshots()
                if stage == "grpo" and run.evaluation.every:
                    if not is_compiled:  # nothing may be in mid-stage; one problem fills a batch
                        self._say("compiling the program that takes snapshots")
                        evaluator.run_first(1, params, task.test)
                    take = partial(self._take_snapshot, evaluator, task.test)
                    snapshots = Snapshots(run.evaluation.every, take)
                try:
                    self._train_stage(stage, train, params, snapshots)
                except (OutOfTimeError, CollapsedError) as stop:
                    self._keep_partial(stop, evaluate)
                    raise
            # Read back even if just written, so that a resumed run and this one hold the same bits.
            params = weights.load(path, task.base)
            if not run.keep_checkpoints:  # nor those left by a run that was killed before this line
                processes.run_on_primary(self._checkpoints(stage).remove)
            processes.run_on_primary(partial(run_dirs.remove_partial_weights, run_dir, stage))
            is_compiled |= evaluate(stage, params)

    def _compile_ahead(self, task: Task) -> None:
        """Starts to compile the programs of the stages that are left, those that are needed first
        before the others. Not with several processes, whose compilers may wait for one another."""
        stages, runtime = stages_left(self.run, self.run_dir), task.runtime
        if not stages or jax.process_count() > 1:
            return
        # The number of problems is in the shape of a batch.
        data = replace(self.run.data, num_test=len(task.test))
        source, tokenizer = weights.open_source(self.run.model.weights), runtime.tokenizer
        ids = programs.SpecialIds(tokenizer.stop_ids, tokenizer.pad_id)
        run = replace(self.run, data=data)
        found = programs.of_run(run, source.config, runtime.mesh, ids, stages)
        if evaluations.read_back(self.run_dir / "evaluations", "base"):  # next is a stage
            found.sort(key=lambda program: program.name in programs.OF_EVALUATION)
        # Not `state`: a stage makes that function anew, and would not find what is compiled here.
        self.ahead.start(program for program in found if program.name != "state")

    def _train_fn(
        self, stage: str, task: Task, params: PyTree
    ) -> Callable[[PyTree, RunFiles], PyTree]:
        """The function (params, files) -> params that trains a stage; it begins with `params`."""
        run, runtime = self.run, task.runtime
        if stage == "grpo":
            return partial(grpo.train, run.grpo, task.rewards, runtime, task.train)
        problems = task.train
        if run.samples_demonstrations:
            problems = self._own_demonstrations(task, params)
        return partial(sft.train, run.sft, runtime, problems)

    def _own_demonstrations(self, task: Task, params: PyTree) -> list[Problem]:
        """The training problems with the model's own answers, sampled unless they are on file.
        Raises OutOfTimeError as `run_stages`, and UserError if they are too few, which then stay on
        file."""
        sft_config, run_dir = self.run.sft, self.run_dir
        read_back = partial(demonstrations.read_back, run_dir)
        on_file = processes.broadcast_from_primary(read_back)
        if on_file is None:
            self._say("sampling demonstrations from the model itself")
            self.ahead.wait(["own"])
            started = time.monotonic()
            own = demonstrations.sample(
                sft_config.own, task.runtime, task.train, params, self._require_time_for_sft
            )
            self._say("own demonstrations: " + demonstrations.in_words(own.figures))
            seconds = time.monotonic() - started
            record = partial(summaries.add_seconds, run_dir, "demonstrations", seconds)
            processes.run_on_primary(record)
            processes.run_on_primary(partial(demonstrations.write, run_dir, own))
            # Read back even if just written, like a stage's weights.
            on_file = processes.broadcast_from_primary(read_back)
        assert on_file is not None
        demonstrations.require_enough(on_file, sft_config.batch_size, run_dir)
        return on_file.problems

    def _require_time_for_sft(self) -> None:
        """Raises OutOfTimeError if no time is left, as if before the stage's first step."""
        if not self._allows():
            raise OutOfTimeError("sft", 0, self.run.sft.num_steps)

    def _train_stage(
        self,
        stage: str,
        train: Callable[[PyTree, RunFiles], PyTree],
        params: PyTree,
        snapshots: Snapshots,
    ) -> None:
        """Runs `train`, which writes the stage's records, checkpoints and weights."""
        started = time.monotonic()
        self._say(f"{stage}: begins when its programs are compiled")

        def open_writer() -> metrics.MetricsWriter:
            newest = self._checkpoints(stage).newest()
            done = int(newest.name) if newest else 0
            resume_from = {"stage": stage, "step": done}
            return metrics.MetricsWriter(self.run_dir, resume_from, self.run.tracker)

        with Interrupt() as interrupt:
            writer = processes.run_on_primary(open_writer)
            try:
                run_files = RunFiles(
                    self.run_dir,
                    writer,
                    interrupt,
                    self.deadline,
                    self.run.checkpoint,
                    keep_last=self.run.keep_checkpoints,
                    write_weights=partial(self._write_weights, stage),
                    snapshots=snapshots,
                    quiet=self.quiet,
                )
                self.ahead.wait(programs.OF_STAGE[stage])
                train(params, run_files)
            finally:
                if writer is not None:
                    writer.close()
                    summaries.add_seconds(self.run_dir, stage, time.monotonic() - started)

    def _keep_partial(
        self, stop: OutOfTimeError | CollapsedError, evaluate: Callable[[str, PyTree], bool]
    ) -> None:
        """Writes and measures the weights of a stage that was cut short, if there is time left."""
        if isinstance(stop, CollapsedError):  # an earlier session may have left collapsed weights
            remove = partial(run_dirs.remove_partial_weights, self.run_dir, stop.stage, stop.step)
            processes.run_on_primary(remove)
        if not stop.step or not self._allows("save", "evaluate"):
            return
        name = run_dirs.partial_name(stop.stage, stop.step)
        processes.run_on_primary(partial(run_dirs.remove_partial_weights, self.run_dir, stop.stage))
        self._write_weights(name, stop.params)
        with contextlib.suppress(OutOfTimeError):  # `stop` says why the stage ended
            evaluate(name, stop.params)

    def _write_weights(self, name: str, params: PyTree) -> None:
        path = self.run_dir / "weights" / f"{name}.safetensors"
        weights.save(path, params, dtype=self.run.weights_dtype)

    def _checkpoints(self, stage: str) -> StageCheckpoints:
        return stage_checkpoints(self.run_dir, stage, self.run.checkpoint)

    def _evaluate(
        self, evaluator: Evaluator, problems: list[Problem], name: str, params: PyTree
    ) -> bool:
        """Measures a model unless its evaluation is on file; returns whether it did. Raises
        OutOfTimeError as `run_stages`."""
        folder, num = self.run_dir / "evaluations", len(problems)

        def is_on_file() -> bool:  # a snapshot of the same step has fewer problems
            found = evaluations.read_back(folder, name)
            return found is not None and found[0]["n"] == num

        if processes.broadcast_from_primary(is_on_file):
            return False
        self._require_time(name)
        self._say(f"measuring {name} on {num} problems")
        started = time.monotonic()
        self.ahead.wait(programs.OF_EVALUATION)
        # The time of a first evaluation is not known before, so it checks the clock as it goes.
        result, rows, drawn = evaluator.run(
            params, problems, before_batch=partial(self._require_time, name, ())
        )
        seconds = time.monotonic() - started
        self.deadline.note("evaluate", seconds)

        def write() -> None:
            summaries.add_seconds(self.run_dir, f"evaluate_{name}", seconds)
            metrics.write_evaluation(self.run_dir, name, result, self.run.tracker)
            evaluations.write(folder, name, result, rows, drawn)

        processes.run_on_primary(write)
        return True

    def _take_snapshot(
        self, evaluator: Evaluator, problems: list[Problem], step: int, params: PyTree
    ) -> dict:
        """Measures a few problems after a GRPO step; returns metrics for the step's record."""
        started, num = time.monotonic(), self.run.evaluation.snapshot_problems
        result, rows, drawn = evaluator.run_first(num, params, problems)
        seconds = time.monotonic() - started
        self.deadline.note("snapshot", seconds)
        folder, name = self.run_dir / "evaluations", run_dirs.partial_name("grpo", step)
        processes.run_on_primary(lambda: evaluations.write(folder, name, result, rows, drawn))
        return metrics.evaluation_numbers(result) | {"time/snapshot_s": seconds}

    def _say(self, line: str) -> None:
        """Prints a line of progress on stderr, in the primary process, unless quiet."""
        if processes.is_primary() and not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def _require_time(self, name: str, kinds: tuple[str, ...] = ("evaluate",)) -> None:
        """Raises OutOfTimeError if these kinds of work do not fit in the time left."""
        if not self._allows(*kinds):
            raise OutOfTimeError(name)

    def _allows(self, *kinds: str) -> bool:
        """Whether they fit in the time left: the primary process's answer, in all processes."""
        return processes.broadcast_from_primary(lambda: self.deadline.allows(*kinds))


def _require_shared(run_dir: Path) -> None:
    """Raises UserError if a process does not see the run's folder, which the primary made."""
    seen = processes.gather_from_all((run_dir / run_dirs.CONFIG).is_file)
    if not all(seen):
        raise UserError(
            f"process {seen.index(False)} does not see {run_dir}: --run-dir must lie on a file "
            "system that all processes share"
        )


def _digests(run: RunConfig, task: Task) -> dict[str, str]:
    """The digests of everything that a run begins with, by name."""
    digests = {
        "training problems": origin.of_rows(task.train),
        "held-out problems": origin.of_rows(task.test),
        "base weights": weights.digest(run.model.weights),
        "tokenizer": origin.of_files(task.runtime.tokenizer.path),
    }
    if run.has_teacher:
        model, trained = _teacher_files(run)
        trained_digest = "" if trained is None else origin.of_files(trained)
        digests["teacher weights"] = f"{weights.digest(model.weights)} {trained_digest}".strip()
    return digests | extra_rewards.digests_of(run.reward)


def _check_origin(
    run: RunConfig, run_dir: Path, digests: dict[str, str], may_change: Collection[str] = ()
) -> None:
    """Records what the run begins with. On resume, raises UserError if something differs that may
    not, and deletes the results that depend on what may: made again, they compare like with like.
    """
    allowed = tuple(name for kind in may_change for name in CHANGES[kind])
    fixed = {name: digest for name, digest in digests.items() if not name.startswith(allowed)}
    refused = origin.changed(run_dir, fixed)
    flags = [
        f"--allow-changed-{kind}"
        for kind, names in CHANGES.items()
        if any(name.startswith(names) for name in refused)
    ]
    origin.check(run_dir, fixed, way_out=f"go on all the same with {' and '.join(flags)}")
    _delete_stale(run, run_dir, set(origin.changed(run_dir, digests)))
    origin.note(run_dir, digests)


def _delete_stale(run: RunConfig, run_dir: Path, changed: set[str]) -> None:
    """Deletes evaluations and demonstrations made with what has changed, named as in `_digests`."""
    stale = ""
    of_rewards = any(name.startswith("reward ") for name in changed)
    if of_rewards or changed & {"held-out problems", "tokenizer"}:
        stale = "*.json"
    elif "base weights" in changed:
        stale = "*.json" if run.model.lora.rank else "base.json"  # adapters are added to the base
    for path in (run_dir / "evaluations").glob(stale) if stale else ():
        path.unlink()
    if changed & {"training problems", "tokenizer", "base weights"}:
        _delete_demonstrations(run, run_dir)


def _delete_demonstrations(run: RunConfig, run_dir: Path) -> None:
    """Deletes own demonstrations, to be sampled again, unless SFT has begun with them."""
    figures = run_dir / run_dirs.DEMONSTRATIONS[1]
    has_weights = (run_dir / "weights" / "sft.safetensors").is_file()
    if not run.samples_demonstrations or not figures.is_file() or has_weights:
        return
    if stage_checkpoints(run_dir, "sft", run.checkpoint).newest():
        print(
            "warning: SFT goes on with the demonstrations that were sampled before the change; "
            "a new run samples its own",
            file=sys.stderr,
        )
    else:
        figures.unlink()


def measure(run: RunConfig, runtime: Runtime, params: Params, given: Given = NOTHING_GIVEN) -> dict:
    """The figures (`evaluator.summarize`) of a model, as `load_model` gives it, on the run's
    held-out problems.

    Raises:
        UserError: a prompt over the budget, or a batch that does not split over the devices.
    """
    _, problems = given.load_problems(run)
    runtime.encode_prompts(problems)
    runtime.check_rows(run.batch_sizes)
    warn = lambda line: print(f"warning: {line}", file=sys.stderr)
    pay = pay_of(run.reward, given.rewards, without=warn)
    figures, *_ = make_evaluator(run.evaluation, runtime, pay).run(params, problems)
    return figures


def new_run_dir(run_dir: Path, run: RunConfig) -> None:
    """Makes the directory with its config.yaml, and claims the separate folder of checkpoints.

    Raises:
        UserError: something is there already, or cannot be written.
    """
    saving.claim_folder(run_dir, run.checkpoint)
    run_dirs.write_config(run_dir, config.to_yaml(run))


def copy_run_dir(source: Path, run_dir: Path, run: RunConfig, *, restart_stage: bool) -> None:
    """Copies into `run_dir` what `run` needs to go on from `source`, which is only read.

    Args:
        restart_stage: begin a stage again if its checkpoints are lost.

    Raises:
        UserError: something is there already, checkpoints are lost or damaged, or the disk is full.
    """
    settings = config.from_yaml(source / run_dirs.CONFIG).checkpoint
    saving.require_folder(source, settings, run.stage_list, restart_stage=restart_stage)
    settings = saving.as_found(source, settings)
    saving.claim_folder(run_dir, run.checkpoint)
    copied = {}
    for stage in stages_left(run, source):
        checkpoints = stage_checkpoints(source, stage, settings)
        if newest := checkpoints.newest():
            target = stage_checkpoints(run_dir, stage, run.checkpoint).running.directory
            copied[target / newest.name] = newest
            if stage == "grpo" and run.grpo.guard.is_on:
                guard = guard_of(run.grpo.guard, run.grpo.checkpoint_every, source, stage)
                last = int(newest.name)
                found = {step: path for step, path in checkpoints.paths().items() if step <= last}
                if good := found.get(guard.best(found)):
                    copied[target / good.name] = good
    run_dirs.copy(source, run_dir, config.to_yaml(run), copied)


def stages_left(run: RunConfig, run_dir: Path) -> list[str]:
    """The stages that the run in this folder has not finished; all if there is no such folder."""
    is_done = lambda stage: (run_dir / "weights" / f"{stage}.safetensors").exists()
    return [stage for stage in run.stage_list if not is_done(stage)]


def resume_run_dir(run_dir: Path, run: RunConfig, *, restart_stage: bool) -> None:
    """Checks that a run which goes on in its own folder has its checkpoints. Raises UserError as
    `copy_run_dir`."""
    if stages_left(run, run_dir):
        run_dirs.require_readable(run_dir)
    saving.require_folder(run_dir, run.checkpoint, run.stage_list, restart_stage=restart_stage)
    if saving.as_found(run_dir, run.checkpoint) != run.checkpoint:
        saving.claim_folder(run_dir, run.checkpoint)


def _summarize(run: RunConfig, stages: list[str], run_dir: Path, unfinished: dict | None) -> dict:
    """Writes summary.json and curves.png from the stages' results so far; returns the summary."""
    folder = run_dir / "evaluations"
    read_back = {stage: evaluations.read_back(folder, stage) for stage in stages}
    found = {stage: evaluation for stage, evaluation in read_back.items() if evaluation is not None}
    # A stage that was stopped may have only a snapshot, which has fewer problems.
    most = max((len(rows) for _, rows in found.values()), default=0)
    results = {stage: result for stage, (result, rows) in found.items() if len(rows) == most}
    stages, rows = list(results), {stage: found[stage][1] for stage in results}
    device = jax.devices()[0]
    summary = {
        "weights": run.model.weights,
        "seed": run.seed,
        "device": f"{jax.device_count()} x {device.device_kind} ({platform.machine()})",
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "unfinished": unfinished,
        "rollbacks": [asdict(each) for each in rollbacks.read(run_dir)],
        "demonstrations": files.read_json(run_dir / demonstrations.FIGURES),
        "stages": results,
        "paired": {
            f"{after}_vs_{before}": compare(rows[before], rows[after])
            for before, after in zip(stages, stages[1:], strict=False)
        },
        "seconds": summaries.seconds_of(run_dir),
    }
    files.write_text(run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
    if (run_dir / "metrics.jsonl").exists():
        note = "" if unfinished is None else f"unfinished: {summaries.unfinished_at(unfinished)}"
        report.plot_curves(run_dir, note=note)
    return summary
