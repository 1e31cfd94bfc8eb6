"""What the commands share: signals, closed streams, encodings and errors are one line each."""

import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import jax
import pytest
import tyro

from gemma_grpo import __main__ as door
from gemma_grpo import (
    ablation,
    cli,
    config,
    evaluate,
    generate,
    presets,
    pretrain,
    rescore,
    runtime,
    train,
    view,
)
from gemma_grpo.devices import preflight
from gemma_grpo.errors import UserError
from gemma_grpo.records import origin
from gemma_grpo.weights import assets

ROOT = Path(__file__).parents[1]


def start(body: str, *, closed: str = "", **streams) -> subprocess.Popen:
    """A process that runs `body` as a command does; `closed`: streams, as the shell closes them."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    script = f"import os, sys, time\nfrom gemma_grpo import cli\ndef main():\n{lines}    return 7\n"
    script += "cli.start(main, hint='; a hint')"
    shell = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, script]
    return subprocess.Popen(shell, cwd=ROOT, text=True, **streams)


def test_pretraining_refuses_a_folder_that_is_there_before_it_begins(capsys, tmp_path):
    (tmp_path / "kept").touch()
    assert pretrain.main([str(tmp_path)]) == 2
    assert "there already" in capsys.readouterr().err


def test_a_bare_resume_takes_the_run_that_was_begun_last(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run in runs/; name one with --run-dir"):
        train._run_dir(train.Options(resume=True))
    for began, name in enumerate(["b", "c", "a"]):
        path = train.RUNS / name / "config.yaml"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (began, began))
    assert train._run_dir(train.Options(resume=True)) == train.RUNS / "a"
    given = Path("elsewhere")
    assert train._run_dir(train.Options(resume=True, run_dir=given)) == given
    copy = train.Options(resume_from=tmp_path / "input" / "first")
    assert train._run_dir(copy) == train.RUNS / "first"


def test_one_flag_chooses_what_stands_where_no_flag_is_given(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("grpo:\n  num_steps: 7\n")
    of = lambda *arguments: cli.default_run(arguments, "gemma3-1b")
    assert of("--seed", "3") == presets.preset("gemma3-1b")
    assert of("--preset=gemma3-nano") == presets.preset("gemma3-nano")
    assert of("--config", str(path)).grpo.num_steps == 7
    with pytest.raises(UserError, match="^--config and --preset and --resume: each chooses all"):
        cli.default_run(["--preset", "x", "--config", "y"], "gemma3-1b", ["--resume"])


def test_a_signal_is_one_line_and_its_status_even_where_an_exception_would_be_lost():
    body = "print('ready', flush=True)\nwhile True:\n    try:\n        time.sleep(60)\n"
    body += "    except BaseException:\n        pass"
    process = start(body, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    try:
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130 and said == "\nstopped by SIGINT; a hint\n"


def test_without_streams_and_in_an_ascii_terminal_a_command_runs_and_keeps_its_files_apart(
    tmp_path,
):
    """`2>&- <&-`: a file that is opened next would get their numbers, and all that is printed."""
    body = f"""file = open({str(tmp_path / "weights")!r}, "w")
print("Größe \\u2028")
print("said", file=sys.stderr)
assert sys.stdin.read() == "" and file.fileno() > 2
os.write(2, b"XLA's own words")"""
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = start(body, closed="<&- 2>&-", stdout=subprocess.PIPE, env=env)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 7 and output == "Gr\\xf6\\xdfe \\u2028\n"
    assert (tmp_path / "weights").read_text() == ""


@pytest.mark.parametrize(
    "error, status, words",
    [
        (MemoryError(), 2, "out of memory on the host; lower grpo.pack_tokens"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes."),
            2,
            "out of memory on the device (it tried to allocate 123 bytes); lower grpo.pack_tokens",
        ),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Attempting to allocate 1.50G."),
            2,
            "out of memory on the device (it tried to allocate 1.50G); lower grpo.pack_tokens",
        ),
        (OSError("no name"), 2, "error: no name"),
        (PermissionError(13, "Permission denied", "x"), 2, "error: x: Permission denied"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT"),
    ],
)
def test_what_a_command_dies_of_is_one_line(capsys, error, status, words):
    def command():
        raise error

    assert cli.guarded(command) == status
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_an_error_is_one_line_also_of_a_name_with_line_breaks_and_escapes(capsys):
    def command():
        raise UserError("no file a\nb\u2028\x1b[31m" + "x" * 5000 + ": name another")

    assert cli.guarded(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no file a\\nb\\u2028\\x1b[31mxx") and said.count("\n") == 1
    assert said.endswith("x: name another\n") and len(said) < 1100


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("UNAVAILABLE: Connection closed by peer"),
        ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"),
    ],
)
def test_a_collective_that_fails_is_a_lost_process_and_alone_a_bug(capsys, monkeypatch, error):
    def command():
        raise error

    with pytest.raises(type(error)):
        cli.guarded(command)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="3"):
        cli.guarded(command)
    assert "process 0 of 1 lost the others" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, flags, words",
    [
        (train, "--grpo.pack-tokens 9223372036854775808", "grpo.pack_tokens=9223372036854775808"),
        (train, "--sft.optimizer.learning-rate 1e10", "sft.optimizer.learning_rate=10000000000.0"),
        (train, "--reward.end.trace -1e300", "reward"),
        (train, "--grpo.optimizer.max-grad-norm nan", "max_grad_norm=nan"),
        (
            generate,
            "--prompt x --max-completion-length 4294967296",
            "--max-completion-length 42949",
        ),
        (evaluate, "gemma3-nano --temperature nan", "temperature"),
        (pretrain, "out --steps -1", "--steps"),
        (pretrain, "out --learning-rate nan", "--learning-rate nan"),
        (pretrain, "out --length 1", "--length"),
    ],
)
def test_numbers_that_no_run_can_have_are_refused_before_anything_is_loaded(
    capsys, monkeypatch, command, flags, words
):
    monkeypatch.setattr(runtime, "load_model", lambda *_, **__: pytest.fail("was loaded"))
    assert command.main(flags.split()) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_gradient_norm_may_be_infinite():
    config.from_text("grpo: {optimizer: {max_grad_norm: .inf}}")


def test_a_pipe_that_was_closed_is_no_error(capsys, monkeypatch):
    monkeypatch.setattr(os, "dup2", lambda *_: None)

    def command():
        raise BrokenPipeError(32, "Broken pipe")

    assert cli.guarded(command) == 141 and capsys.readouterr().err == ""


def test_what_is_wrong_with_a_tpu_is_still_said_first():
    assert "out of memory" not in (preflight.explain("TPU is already in use") or "")


@pytest.mark.parametrize("arguments, status", [([], 0), (["--help"], 0), (["trian"], 2)])
def test_asking_the_package_for_help_is_no_error(arguments, status, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gemma_grpo", *arguments])
    assert door.main() == status


@pytest.mark.parametrize(
    "given, fix", [("train", "python -m gemma_grpo.train"), ("trian", "one of the commands above")]
)
def test_a_command_written_with_a_space_is_told_its_dot(given, fix, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gemma_grpo", given, "--quiet"])
    assert door.main() == 2
    assert capsys.readouterr().err == f"error: unknown argument '{given}'; use {fix}\n"


def test_the_package_itself_lists_its_commands(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gemma_grpo"])
    assert door.main() == 0
    listed = capsys.readouterr().out
    folder = Path(door.__file__).parent
    commands = {path.stem for path in folder.glob("*.py") if "__main__" in path.read_text()}
    commands.discard("__main__")
    commands |= {path.parent.name for path in folder.glob("*/__main__.py")}
    assert commands == door.COMMANDS.keys()
    assert all(f"\n  {name} " in listed for name in commands)


def test_every_command_starts_and_ends_through_the_same_door():
    package = ROOT / "gemma_grpo"
    commands = [path for path in package.rglob("*.py") if "\nif __name__ ==" in path.read_text()]
    commands.remove(package / "__main__.py")  # which only lists them
    assert len(commands) == 10
    for path in commands:
        last = path.read_text().rstrip().splitlines()[-1]
        assert last.strip().removeprefix("cli.").startswith("start(main"), path


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_is_wrong_with_a_flag_is_said_without_the_parsers_frame(encoding):
    run = [sys.executable, "-m", "gemma_grpo.export", "--nope"]
    env = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "---" not in done.stderr.replace("--help", "")


@pytest.mark.parametrize("command", [ablation, rescore, view])
def test_a_command_without_jax_says_a_wrong_flag_in_one_line(command, capsys):
    assert command.main(["--no-such-flag"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "--help lists all" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "given", "line"),
    [
        (
            "train",
            "--lr 1e-4",
            "no flag --lr; perhaps you meant --grpo.optimizer.learning-rate or "
            "--sft.optimizer.learning-rate",
        ),
        (
            "train",
            "--batch_size=8",
            "no flag --batch-size; perhaps you meant "
            "--grpo.prompts-per-step or --sft.batch-size or --evaluation.batch-size",
        ),
        ("train", "--kl-coef 0.1", "no flag --kl-coef; perhaps you meant --grpo.loss.beta"),
        ("train", "--dtype bfloat16", "no flag --dtype; perhaps you meant --model.dtype"),
        (
            "train",
            "--deepspeed x --model y",
            "no flag --deepspeed; no flag --model; perhaps you meant --model.weights",
        ),
        ("train", "lr=3", "lr=3: unexpected; a flag begins with --"),
        ("evaluate", "--model x", "no flag --model; perhaps you meant --weights"),
        ("evaluate", "-n 4", "no flag -n; perhaps you meant --num-samples or --num"),
        ("evaluate", "--run-dir x", "no flag --run-dir; perhaps you meant the argument RUN"),
        ("evaluate", "--data.source x", "no flag --data.source; perhaps you meant --task"),
        ("evaluate", "--lr 1e-4", "no flag --lr"),
        ("evaluate", "--instructions x", "no flag --instructions; perhaps you meant --instruction"),
        (
            "generate",
            "--max-new-tokens 9",
            "no flag --max-new-tokens; perhaps you meant --max-completion-length",
        ),
        (
            "generate",
            "--grpo.temperature 1",
            "no flag --grpo.temperature; perhaps you meant --temperature",
        ),
        (
            "generate",
            "--system-prompt x",
            "no flag --system-prompt; perhaps you meant --instruction",
        ),
        ("export", "RUN OUT --bf16", "no flag --bf16; perhaps you meant --dtype"),
        ("view", "RUN --problems 3", "no flag --problems; perhaps you meant --problem"),
        (
            "rescore",
            "RUN --rewards x --foo",
            "no flag --rewards; perhaps you meant --reward; no flag --foo",
        ),
    ],
)
def test_a_flag_that_a_command_lacks_is_answered_with_the_one_that_is_meant(
    command, given, line, capsys
):
    assert importlib.import_module(f"gemma_grpo.{command}").main(given.split()) == 2
    said = capsys.readouterr().err
    assert said == f"error: {line}; python -m gemma_grpo.{command} --help lists all\n"


def test_what_other_programs_flags_are_called_here_is_a_flag_of_some_command(capsys):
    helps = ""
    for command in ("train", "evaluate", "generate", "export", "pretrain"):
        with pytest.raises(SystemExit):
            importlib.import_module(f"gemma_grpo.{command}").main(["--help"])
        helps += capsys.readouterr().out
    ours = {name for names in cli._OTHER_NAMES.values() for name in names}
    assert ours - set(re.findall(r"--[a-z][\w.-]*|RUN|OUT", helps)) == set()


def test_in_a_terminal_with_colours_what_is_wrong_with_a_flag_has_none(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert evaluate.main(["--seed", "x"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: Error parsing --seed: ") and "\\x1b" not in said


def test_a_flag_without_a_name_is_no_folder():
    def command(out: tyro.conf.Positional[Path]) -> int:
        return 0

    with pytest.raises(UserError, match="--=x: names no flag"):
        cli.parse(command, ["--=x"], command="x", description=None)


def test_a_flag_that_is_not_utf_8_is_one_line():
    def command(name: str = "") -> int:
        return 0

    with pytest.raises(UserError, match="not UTF-8"):
        cli.parse(command, ["--name", "Gr\udcf6\udcdfe"], command="x", description=None)


def test_a_path_with_a_tilde_that_no_shell_saw_is_in_the_users_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    got = []

    def command(out: Path | None = None) -> int:
        got.append(out)
        return 0

    for arguments in (["--out=~/x"], ["--out", "y"], []):
        cli.parse(command, arguments, command="x", description=None)
    assert got == [tmp_path / "x", Path("y"), None]


def test_a_value_that_may_be_left_out_is_plain_in_help_and_checked(capsys):
    got = []

    def command(rate: float | None = 1.0, kind: Literal["a", "b"] | None = None) -> int:
        got.append((rate, kind))
        return 0

    lines = ("--rate 2 --kind=b", "--rate None", "--rate none", "--kind None")
    for arguments in lines:
        cli.parse(command, arguments.split(), command="x", description=None)
    assert got == [(2.0, "b"), (None, None), (None, None), (1.0, None)]
    with pytest.raises(UserError, match="--rate: could not convert string to float: 'x'; python"):
        cli.parse(command, ["--rate", "x"], command="x", description=None)
    with pytest.raises(UserError, match="invalid choice 'c' for argument '--kind'"):
        cli.parse(command, ["--kind", "c"], command="x", description=None)
    with pytest.raises(SystemExit):
        cli.parse(command, ["--help"], command="x", description=None)
    said = capsys.readouterr().out
    assert "--rate FLOAT" in said and "--kind {a,b}" in said


@pytest.mark.parametrize(
    "settings, line",
    [
        (
            {"grpo.loss.distill_weight": 2.0},
            "grpo.loss.distill_weight has no effect: name a grpo.te",
        ),
        (
            {"sft.own.shots": 2, "sft.own.temperature": 1.0},
            "sft.own.temperature, sft.own.shots have no effect: set sft.demonstrations to own, or "
            "leave them out",
        ),
        (
            {"sft.demonstrations": "own", "sft.own.shots": 0, "sft.own.shots_length": 9},
            "own.shots a",
        ),
        ({"grpo.guard.max_kl": 2.0}, "set grpo.guard.action to stop or rollback, or leave it out"),
        ({"grpo.guard.action": "stop", "grpo.guard.rollbacks": 2}, "grpo.guard.action to rollback"),
        ({"grpo.guard.action": "stop", "grpo.guard.max_kl": 2.0}, "set grpo.loss.beta above 0, or"),
        ({"grpo.loss.kl_estimator": "k2"}, "set grpo.loss.beta above 0, or name a grpo.teacher"),
        ({"grpo.loss.tis_level": "sequence"}, "set grpo.loss.tis_cap"),
        ({"grpo.loss.epsilon_high": 0.3}, "set grpo.num_iterations above 1"),
        (
            {"stages": "sft", "grpo.num_steps": 5},
            "grpo.num_steps has no effect: add grpo to stages",
        ),
        ({"stages": "grpo", "sft.demonstrations": "own"}, "add sft to stages"),
        (
            {"evaluation.num_samples": 0, "evaluation.top_p": 0.9},
            "set evaluation.num_samples above",
        ),
        ({"evaluation.snapshot_problems": 9}, "set evaluation.every above 0"),
        ({"model.lora.alpha": 8.0}, "set model.lora.rank above 0"),
        (
            {"sft.optimizer.decay": "constant", "sft.optimizer.final_rate": 0.5},
            "sft.optimizer.decay",
        ),
        (
            {"grpo.optimizer.decay": "constant", "grpo.optimizer.final_rate": 0.5},
            "to linear or cos",
        ),
        ({"reward.rubric.timeout": 9.0}, "give a rubric and a judge"),
    ],
)
def test_changed_settings_that_have_no_effect_are_named_with_what_they_need(settings, line):
    default = config.RunConfig()
    (said,) = config.without_effect(default, default.replace(settings))
    assert line in said


@pytest.mark.parametrize(
    "settings",
    [
        {"grpo.teacher": "x", "grpo.loss.distill_weight": 2.0, "grpo.loss.kl_estimator": "k2"},
        {"sft.demonstrations": "own", "sft.own.shots_length": 9},
        {"grpo.guard.action": "rollback", "grpo.guard.rollbacks": 2, "grpo.guard.patience": 5},
        {"grpo.loss.beta": 0.1, "grpo.loss.kl_estimator": "k2"},
        {"grpo.loss.tis_cap": 2.0, "grpo.loss.tis_level": "sequence"},
        {"grpo.num_iterations": 2, "grpo.loss.epsilon": 0.3},
        {"evaluation.every": 5, "evaluation.snapshot_problems": 9, "evaluation.top_p": 0.9},
        {"model.lora.rank": 2, "model.lora.alpha": 8.0},
        {"stages": "sft", "sft.num_steps": 5, "reward.end.trace": 0.1},
    ],
)
def test_settings_that_have_an_effect_and_those_of_the_default_are_not_named(settings):
    default = config.RunConfig()
    after = default.replace(settings)
    assert config.without_effect(default, after) == []
    # What was there before is not the user's: back from own to given, sft.own stays as it was.
    off = {"grpo.teacher": "", "sft.demonstrations": "given", "grpo.guard.action": "none"}
    assert config.without_effect(after, after.replace(off)) == []


def test_train_says_which_flags_have_no_effect(capsys, tmp_path):
    arguments = ["--dry-run", "--run-dir", str(tmp_path / "run"), "--model.lora.alpha", "8"]
    arguments += ["--grpo.prompts-per-step", "8"]
    assert train.main(arguments) == 0
    line = "warning: model.lora.alpha has no effect: set model.lora.rank above 0, or leave it out\n"
    assert capsys.readouterr().err.count(line) == 1


def test_what_a_command_that_is_a_function_says_on_stderr_is_seen(capsys):
    def command(name: str = "") -> int:
        print(f"warning: {name}", file=sys.stderr)
        return 3

    assert cli.parse(command, ["--name", "x"], command="x", description=None) == 3
    assert capsys.readouterr().err == "warning: x\n"


def test_without_a_home_the_cache_is_refused_by_the_variable(monkeypatch):
    monkeypatch.delenv(assets.CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 987654)
    with pytest.raises(UserError, match="set HOME"):
        assets.cache()


def test_adapters_are_not_used_over_a_base_that_has_changed(tmp_path):
    lora = "model: {lora: {rank: 2}}\n"
    (tmp_path / "config.yaml").write_text(lora)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "sft.safetensors").touch()
    assert cli.trained(str(tmp_path))[1] == tmp_path / "weights" / "sft.safetensors"
    origin.note(tmp_path, {"base weights": "another digest"})
    with pytest.raises(UserError, match="its base weights are not what the run began with"):
        cli.trained(str(tmp_path))


@pytest.mark.parametrize("command", sorted(door.COMMANDS))
def test_a_line_of_help_ends_only_where_the_next_word_has_no_room(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        importlib.import_module(f"gemma_grpo.{command}").main(["--help"])
    description, _, flags = capsys.readouterr().out.partition("-h, --help")
    unwrapped = [line for line in description.splitlines() if not line.startswith("usage:")]
    assert max(map(len, unwrapped)) <= 100  # the parser prints each paragraph as one line
    lines = [line.strip("│").rstrip() for line in flags.splitlines()]
    for line, following in zip(lines, lines[1:], strict=False):
        indent = len(following) - len(following.lstrip())
        is_continued = indent >= 7 and line[indent - 2 : indent] == "  " and line[indent:]
        room = 77 - len(line)
        assert not is_continued or len(following.split()[0]) + 1 > room, (line, following)


@pytest.mark.parametrize(
    ("flag", "sentences"),
    [
        (
            "--weights",
            {
                "evaluate": "The model: a run directory (its last finished stage), gemma3-nano",
                "generate": "The model: a run directory (its last finished stage), gemma3-nano",
                "rescore": "the weights of reward components (not a model), at all steps",
            },
        ),
        (
            "--num",
            {
                "evaluate": "Number of held-out problems, at most",
                "generate": "Number of completions of each prompt",
            },
        ),
        (
            "--out",
            {
                "evaluate": "A new folder for result.json (figures and their protocol) and ",
                "generate": "A new file for the JSON lines, which are then not printed.",
                "view": "a file for the page, replaced if it is there",
            },
        ),
    ],
)
def test_a_flag_of_several_commands_says_in_one_form_what_it_is_in_each(
    flag, sentences, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    for command in sorted(door.COMMANDS):
        with pytest.raises(SystemExit):
            importlib.import_module(f"gemma_grpo.{command}").main(["--help"])
        said = " ".join(
            capsys.readouterr().out.partition("-h, --help")[2].replace("│", " ").split()
        )
        found = re.search(rf" {flag} \S+ (.*)", said)
        assert (found is not None) == (command in sentences), command
        assert found is None or found[1].startswith(sentences[command])


def test_help_waits_for_no_device_library_and_for_nothing_that_a_run_alone_needs():
    """In one process, so that whatever a command imports before it has read its flags is seen."""
    commands = "train generate evaluate export plan view rescore ablation verify_kernels pretrain"
    script = f"""import contextlib, importlib, io, sys
for name in {commands.split()!r}:
    command = importlib.import_module("gemma_grpo." + name)
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:
        command.main(["--help"])
    assert "--" in said.getvalue(), name
heavy = "jax jaxlib flax optax orbax scipy datasets pyarrow tensorstore matplotlib"
print(*sorted(set(heavy.split()) & sys.modules.keys()))"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
