"""The device check passes where the ops are right, and fails where one is not."""

import jax.numpy as jnp
import pytest

from gemma_grpo import verify_kernels
from gemma_grpo.model import kernel_checks


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_all_ops_pass_here(capsys, dtype):
    assert verify_kernels.main(["--rows", "16", "--dtype", dtype]) == 0
    table = capsys.readouterr().out
    assert "OFF" not in table
    for op in ("fused_sampling", "truncated_sampling", "lm_head_logps", "packed_attention"):
        assert op in table


def test_an_op_that_is_off_is_named_and_the_status_is_1(capsys, monkeypatch):
    for others in ("compare_truncated", "compare_logps", "compare_attention"):
        monkeypatch.setattr(kernel_checks, others, lambda *_: [])
    honest = kernel_checks.fused_sampling

    def off(*arguments, **settings):
        drawn = honest(*arguments, **settings)
        return drawn._replace(logps=drawn.logps + 0.01)

    monkeypatch.setattr(kernel_checks, "fused_sampling", off)
    assert verify_kernels.main(["--rows", "16"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("OFF")]
    assert len(lines) == 3 and all("fused_sampling" in line for line in lines)


def test_no_rows_and_no_seed_of_jaxs_are_refused(capsys):
    for arguments, named in (
        (["--rows", "0"], "--rows 0"),
        (["--rows", "x"], "--rows"),
        (["--seed", "-1"], "-1"),
    ):
        assert verify_kernels.main(arguments) == 2
        error = capsys.readouterr().err
        assert named in error and error.count("\n") == 1


def test_an_error_that_is_no_number_does_not_pass():
    assert not kernel_checks.Finding("op", "", "", float(jnp.nan), 1.0).passes
