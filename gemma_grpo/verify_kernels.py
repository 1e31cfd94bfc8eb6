"""The first command on a new device: compares every op of `kernels/` with its reference there.

python -m gemma_grpo.verify_kernels              tables of errors; exit status 1 if one is off
"""

from typing import Literal

from gemma_grpo import cli
from gemma_grpo.model import CONFIGS, check_seed

MOST_ROWS = 1 << 20


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return cli.guarded(
        lambda: cli.parse(verify, arguments, command="verify_kernels", description=__doc__)
    )


def verify(
    size: Literal["nano", "270m", "1b"] = "nano",
    rows: int = 64,
    seed: int = 0,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> int:
    """Compare every op with its reference on the device present.

    Args:
        size: model whose sizes are used; take 1b on a TPU.
        rows: number of hidden states.
        seed: random seed of the inputs and the draws.
        dtype: dtype of the inputs, as a run's --model.dtype.

    Returns:
        0 if all are within tolerance, else 1.
    """
    if not 1 <= rows <= MOST_ROWS:
        raise cli.UserError(f"--rows {rows}: must be from 1 to {MOST_ROWS:,}")
    check_seed(seed)
    cli.check_tpu()
    import jax  # --help does not wait for it

    from gemma_grpo.model import kernel_checks

    device, config = jax.devices()[0], CONFIGS[f"gemma3-{size}"]
    V, D = config.vocab_size, config.embed_dim
    print(
        f"{device.device_kind}, jax {jax.__version__}, {size} in {dtype}: V {V}, D {D}, {rows} rows"
    )
    print(f"{'op':20}{'setting':16}{'quantity':24}{'error':>10}{'allowed':>10}")
    findings = list(kernel_checks.compare(config, rows, seed, dtype))
    for found in findings:
        verdict = "" if found.passes else "  OFF"
        print(
            f"{found.op:20}{found.setting:16}{found.quantity:24}{found.error:10.1e}"
            f"{found.allowed:10.1e}{verdict}"
        )
    return 0 if all(found.passes for found in findings) else 1


if __name__ == "__main__":
    cli.start(main)
