"""What a run writes survives kills and full disks, and reads the same whether it was resumed."""

import io
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from gemma_grpo.errors import UserError
from gemma_grpo.records import metrics
from gemma_grpo.records.metrics import MetricsWriter, NotFiniteError, truncate_after

ROOT = Path(__file__).parents[2]


def write_steps(writer, stage, steps):
    for step in steps:
        writer.write(stage, step, {"loss": 1 / step, "phase": "easy"})
        writer.write_rollouts(stage, step, [{"completion": f"{step} ½", "reward": step}])


def contents(run_dir):
    """Every file of the run but TensorBoard's, whose names and times differ by nature."""
    files = [run_dir / "metrics.jsonl", *(run_dir / "rollouts").iterdir()]
    return {str(file.relative_to(run_dir)): file.read_bytes() for file in files}


def masked_crc(data):
    """TFRecord's check sum: CRC-32C (polynomial 0x82F63B78, bit by bit), rotated and shifted."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def events(directory):
    """The events of a TensorBoard directory in the order TensorBoard reads them.

    TFRecord: length (8 bytes), its check sum (4), the event, its check sum (4).
    """
    for file in sorted(directory.iterdir()):
        data = file.read_bytes()
        while data:
            length, length_crc = struct.unpack("<QI", data[:12])
            event, event_crc = data[12 : 12 + length], data[12 + length : 16 + length]
            assert length_crc == masked_crc(data[:8])
            assert struct.unpack("<I", event_crc) == (masked_crc(event),)
            yield Event.FromString(event)
            data = data[16 + length :]


def scalars(directory):
    return [
        (event.step, value.tag, value.simple_value)
        for event in events(directory)
        for value in event.summary.value
        if value.HasField("simple_value")
    ]


def texts(directory):
    return [
        (event.step, value.tag, value.tensor.string_val[0].decode())
        for event in events(directory)
        for value in event.summary.value
        if value.HasField("tensor")
    ]


def test_a_line_holds_stage_step_and_the_metrics_in_order(tmp_path):
    writer = MetricsWriter(tmp_path)
    values = {
        "loss": jnp.float32(0.5),
        "reward/mean": np.float64(0.25),
        "zero_signal_groups": np.int64(3),
        "phase": "hard",
        "kl": None,
        "truncated": jnp.array(2),
    }
    writer.write("grpo", 7, values)
    # Read before close: the line does not wait in a buffer that a kill would empty.
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"stage": "grpo", "step": 7, "loss": 0.5, "reward/mean": 0.25, "zero_signal_groups": 3, '
        '"phase": "hard", "kl": null, "truncated": 2}\n'
    )
    writer.close()


@pytest.mark.parametrize("broken, word", [(np.nan, "nan"), (jnp.inf, "inf"), (-np.inf, "-inf")])
def test_a_broken_metric_is_written_as_null_and_then_named(tmp_path, broken, word):
    writer = MetricsWriter(tmp_path)
    with pytest.raises(UserError, match=rf"^grad_norm is {word} at sft step 3; lower the learning"):
        writer.write("sft", 3, {"loss": 1.5, "grad_norm": jnp.float32(broken)})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"stage": "sft", "step": 3, "loss": 1.5, "grad_norm": None}
    writer.close()


def test_rollouts_are_one_file_a_step_and_valid_json(tmp_path):
    writer = MetricsWriter(tmp_path)
    rows = [{"completion": "½ < 1", "logps": [np.float32(-0.5), -np.inf]}, {"reward": np.int64(1)}]
    writer.write_rollouts("grpo", 12, rows)
    writer.close()
    (file,) = (tmp_path / "rollouts").iterdir()
    assert file.name == "grpo-000012.jsonl"
    lines = [
        json.loads(line, parse_constant=pytest.fail)
        for line in file.read_text("utf-8").split("\n")[:-1]
    ]
    assert lines == [{"completion": "½ < 1", "logps": [-0.5, None]}, {"reward": 1}]


@pytest.mark.parametrize(
    "stage, step, written",  # how far the killed run had come beyond its checkpoint
    [
        ("sft", 2, ("sft", 4)),
        ("sft", 5, ("grpo", 3)),
        ("grpo", 2, ("grpo", 4)),
        ("sft", 0, ("grpo", 1)),
    ],
)
def test_a_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path, stage, step, written):
    plan = [("sft", n) for n in range(1, 6)] + [("grpo", n) for n in range(1, 6)]
    straight = MetricsWriter(tmp_path / "straight")
    for at in plan:
        write_steps(straight, at[0], [at[1]])
    straight.close()
    killed = MetricsWriter(tmp_path / "killed")
    for at in plan[: plan.index(written) + 1]:
        write_steps(killed, at[0], [at[1]])
    killed.close()
    resumed = MetricsWriter(tmp_path / "killed", {"stage": stage, "step": step})
    for at in plan[plan.index((stage, step)) + 1 if step else 0 :]:
        write_steps(resumed, at[0], [at[1]])
    resumed.close()
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def test_a_checkpoint_at_the_start_of_a_stage_keeps_the_stage_before(tmp_path):
    writer = MetricsWriter(tmp_path)
    write_steps(writer, "sft", [1, 2])
    kept = contents(tmp_path)
    write_steps(writer, "grpo", [1])
    writer.close()
    MetricsWriter(tmp_path, {"stage": "grpo", "step": 0}).close()
    assert contents(tmp_path) == kept
    assert (tmp_path / "tensorboard" / "sft").exists()
    assert not (tmp_path / "tensorboard" / "grpo").exists()


def test_without_a_checkpoint_to_resume_from_the_run_begins_anew(tmp_path):
    writer = MetricsWriter(tmp_path)
    write_steps(writer, "sft", [1, 2])
    writer.close()
    MetricsWriter(tmp_path).close()
    assert contents(tmp_path) == {"metrics.jsonl": b""}
    assert list((tmp_path / "tensorboard").iterdir()) == []


def test_a_torn_last_line_and_half_written_rollouts_are_dropped(tmp_path):
    writer = MetricsWriter(tmp_path)
    write_steps(writer, "sft", [1, 2])
    writer.close()
    whole = contents(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "sft", "step": 2, "lo')
    (tmp_path / "rollouts" / "sft-000002.jsonl.tmp").write_text("{")
    truncate_after(tmp_path, "sft", 2)
    assert contents(tmp_path) == whole


def test_a_line_that_is_not_ours_is_named_by_file_and_number(tmp_path):
    MetricsWriter(tmp_path).close()
    good, no_step = '{"stage": "sft", "step": 1}\n', '{"stage": "sft", "step": null}\n'
    for bad in ("not json\n", '{"step": 1}\n', '{"stage": "eval", "step": 1}\n', "[]\n", no_step):
        (tmp_path / "metrics.jsonl").write_text(good + bad)
        with pytest.raises(UserError, match=r"metrics.jsonl line 2 is no metrics line; delete it"):
            MetricsWriter(tmp_path, {"stage": "sft", "step": 9})


def test_files_of_other_makers_stay(tmp_path):
    MetricsWriter(tmp_path).close()
    (tmp_path / "rollouts" / "notes-000001.jsonl").write_text("mine")
    MetricsWriter(tmp_path).close()
    assert (tmp_path / "rollouts" / "notes-000001.jsonl").read_text() == "mine"


def test_an_unknown_stage_is_refused(tmp_path):
    writer = MetricsWriter(tmp_path)
    with pytest.raises(ValueError, match="stage='eval' is not one of"):
        writer.write("eval", 1, {})
    writer.close()


def test_tensorboard_gets_the_numbers_of_each_line_at_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write("sft", 1, {"loss": 0.5, "phase": "easy", "kl": None})
    writer.write("grpo", 1, {"loss": 0.25, "truncated": 3})
    board = tmp_path / "tensorboard"
    assert scalars(board / "sft") == [(1, "loss", 0.5)]
    assert scalars(board / "grpo") == [(1, "loss", 0.25), (1, "truncated", 3.0)]
    writer.close()


def test_tensorboard_gets_the_settings_once_and_a_completion_a_step(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    writer = MetricsWriter(tmp_path)
    rows = [{"prompt": "1 + 1?", "completion": "a\n# b", "reward": 0.5}, {"completion": "other"}]
    writer.write_rollouts("grpo", 1, rows)
    writer.write("grpo", 1, {"loss": 0.5})
    writer.close()
    resumed = MetricsWriter(tmp_path, {"stage": "grpo", "step": 1})
    resumed.write_rollouts("grpo", 2, [{"completion": "x" * 10**5}])
    resumed.close()
    config, sample, later = texts(tmp_path / "tensorboard" / "grpo")
    assert config == (0, "config/text_summary", "    seed: 3")
    shown = "    1 + 1?\n    \n    a\n    # b\n    \n    reward 0.5"
    assert sample == (1, "sample/text_summary", shown)
    assert later[0] == 2 and len(later[2]) < 3000


def test_tensorboard_gets_the_figures_of_each_evaluation(tmp_path):
    for name, accuracy in (("base", 0.0), ("sft", 0.5), ("grpo-step-000003", 0.75)):
        metrics.write_evaluation(tmp_path, name, {"accuracy": accuracy, "by_domain": {}})
    board = sorted(scalars(tmp_path / "tensorboard" / "evaluation"))
    assert board == [(n, "evaluation/accuracy", v) for n, v in enumerate((0.0, 0.5, 0.75))]


def test_a_resumed_run_tells_tensorboard_which_steps_to_forget(tmp_path):
    writer = MetricsWriter(tmp_path)
    write_steps(writer, "sft", [1, 2])
    write_steps(writer, "grpo", [1, 2, 3])
    writer.close()
    resumed = MetricsWriter(tmp_path, {"stage": "grpo", "step": 2})
    write_steps(resumed, "grpo", [3])
    resumed.close()
    board = tmp_path / "tensorboard"
    assert len(list((board / "grpo").iterdir())) == 2
    starts = [event.step for event in events(board / "grpo") if event.HasField("session_log")]
    assert starts == [3]  # TensorBoard drops older events from this step on
    assert [step for step, *_ in scalars(board / "grpo")] == [1, 2, 3, 3]
    assert all(
        event.session_log.status == SessionLog.START
        for event in events(board / "grpo")
        if event.HasField("session_log")
    )
    assert [step for step, *_ in scalars(board / "sft")] == [1, 2]


@pytest.mark.parametrize("step", [2, 0])
def test_a_writer_that_goes_back_leaves_the_files_of_one_that_never_went_on(tmp_path, step):
    straight, turned = MetricsWriter(tmp_path / "straight"), MetricsWriter(tmp_path / "turned")
    write_steps(straight, "sft", [1])
    write_steps(straight, "grpo", [1, 2, 3])
    write_steps(turned, "sft", [1])
    write_steps(turned, "grpo", [1, 2, 3, 4, 5])
    turned.go_back("grpo", step)
    write_steps(turned, "grpo", range(step + 1, 4))
    for writer in (straight, turned):
        writer.close()
    assert contents(tmp_path / "turned") == contents(tmp_path / "straight")
    board = tmp_path / "turned" / "tensorboard" / "grpo"
    starts = [event.step for event in events(board) if event.HasField("session_log")]
    assert starts == ([step + 1] if step else [])
    assert [at for at, *_ in scalars(board)] == [1, 2, 3, 4, 5][: 5 * bool(step)] + [
        *range(step + 1, 4)
    ]


def test_a_stage_that_begins_after_the_resume_has_nothing_to_forget(tmp_path):
    MetricsWriter(tmp_path).close()
    resumed = MetricsWriter(tmp_path, {"stage": "sft", "step": 2})
    write_steps(resumed, "grpo", [1])
    resumed.close()
    assert not any(
        event.HasField("session_log") for event in events(tmp_path / "tensorboard" / "grpo")
    )


def test_a_line_taken_only_in_part_is_a_full_disk():
    class AlmostFull(io.RawIOBase):
        def write(self, data):
            return len(data) - 1

    with pytest.raises(UserError, match="cannot write metrics.jsonl: No space left on device"):
        metrics._append(AlmostFull(), Path("metrics.jsonl"), b"line")


FULL_DISK = """
from gemma_grpo.errors import UserError
from gemma_grpo.records.metrics import MetricsWriter
writer = MetricsWriter("DIRECTORY/run")
try:
    for step in range(1, 10_000):
        if LINES:
            writer.write("sft", step, {"loss": 0.5, "text": "x" * 999})
        else:
            writer.write_rollouts("sft", step, [{"completion": "x" * 9999}])
except UserError as error:
    print(error)
MetricsWriter("DIRECTORY/run", {"stage": "sft", "step": 20}).close()
print(len(open("DIRECTORY/run/metrics.jsonl").readlines()))
"""


@pytest.mark.parametrize(
    "lines, named", [(True, r"metrics\.jsonl|sft"), (False, r"sft-\d+\.jsonl|sft")]
)
def test_a_full_disk_is_named_and_what_was_written_can_be_resumed(tmp_path, lines, named):
    disk = tmp_path / "disk"
    disk.mkdir()
    if not shutil.which("unshare"):
        pytest.skip("no unshare on this machine: no way to make a small disk")
    script = FULL_DISK.replace("DIRECTORY", str(disk)).replace("LINES", str(lines))
    mount = f'mount -t tmpfs -o size=512k tmpfs "{disk}" || exit 77; exec "$0" -c "$1"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, sys.executable, script]
    child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if child.returncode == 77 or "unshare" in child.stderr:
        pytest.skip(f"this machine does not let us mount a small disk: {child.stderr.strip()}")
    message, kept = child.stdout.splitlines()
    reason = "No space left on device; free some space, then try again"
    assert re.match(rf"cannot write .*({named}): {reason}", message)
    assert kept == ("20" if lines else "0")


def test_importing_metrics_loads_neither_tensorboard_nor_tqdm():
    heavy = "{'tensorboardX', 'tqdm', 'matplotlib', 'orbax'}"
    script = (
        "import sys; from gemma_grpo.records import checkpoint, metrics, report; "
        f"print({heavy} & {{name.split('.')[0] for name in sys.modules}})"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert child.stdout == "set()\n", child.stderr


@pytest.mark.parametrize("steps, lacks", [((), True), ((1,), True), ((1, 2), False)])
def test_lines_that_are_missing_before_the_step_to_go_on_from_are_said(
    tmp_path, capsys, steps, lacks
):
    lines = "".join(f'{{"stage": "sft", "step": {step}}}\n' for step in steps)
    (tmp_path / "metrics.jsonl").write_text(lines)
    MetricsWriter(tmp_path, {"stage": "sft", "step": 2}).close()
    assert ("lacks lines before sft step 2" in capsys.readouterr().err) == lacks


def test_a_resumed_run_loses_the_snapshots_beyond_its_checkpoint_and_no_other_evaluation(tmp_path):
    folder = tmp_path / "evaluations"
    folder.mkdir()
    names = ["base", "sft", "sft-step-000009", "grpo-step-000002", "grpo-step-000004"]
    for name in names:
        for suffix in ("json", "jsonl", "npz"):
            (folder / f"{name}.{suffix}").write_text("{}")
    (folder / "grpo-step-000004.json.tmp").write_text("torn")
    (folder / "curriculum-seed=1").mkdir()
    MetricsWriter(tmp_path, {"stage": "grpo", "step": 2}).close()
    left = {path.stem for path in folder.iterdir()}
    assert left == {*names[:4], "curriculum-seed=1"}
    assert len(list(folder.iterdir())) == 4 * 3 + 1
    MetricsWriter(tmp_path, {"stage": "sft", "step": 9}).close()
    assert {path.stem for path in folder.iterdir()} == {*names[:3], "curriculum-seed=1"}


@pytest.mark.parametrize(
    "step, words", [(1, "the weights that the stage began with"), (2, "lower the learning rate")]
)
def test_a_figure_that_is_no_number_says_where_to_look(tmp_path, step, words):
    with pytest.raises(NotFiniteError, match=f"loss is nan at grpo step {step}; .*{words}"):
        MetricsWriter(tmp_path).write("grpo", step, {"loss": float("nan")})
