"""Writes trl_losses.json: the loss and gradient that TRL's own GRPOTrainer gives on small arrays.

The suite reads the JSON only, so it needs neither torch nor TRL. To write it again:

    python -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0
    trl/bin/python tests/oracles/make_trl_losses.py

A CPU build of torch will do; each case takes milliseconds.

`GRPOTrainer._compute_loss` is called unbound, on a stand-in that holds the settings it reads and
hands it our log-probs in place of a model's. Everything from the ratio to the scalar is TRL's code.
Numbers are float64 and inputs have four decimals, so rounding plays no part in the comparison.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import trl
from trl import GRPOTrainer

MAX_COMPLETION_LENGTH = 9  # distinct from T = 6
EPSILON, EPSILON_HIGH, CISPO_CAP, BETA, TIS_CAP = 0.2, 0.3, 1.4, 0.07, 1.6

CASES = {  # name: (loss_type, level, on_policy, settings)
    "grpo": ("grpo", "token", False, {}),
    "grpo_on_policy": ("grpo", "token", True, {"beta": BETA}),
    "grpo_k3": ("grpo", "token", False, {"beta": BETA}),
    "grpo_unbiased_k3": ("grpo", "token", False, {"beta": BETA, "unbiased": True}),
    "grpo_tis": ("grpo", "token", False, {"beta": BETA, "tis_cap": TIS_CAP}),
    "bnpo": ("bnpo", "token", False, {}),
    "dapo": ("dapo", "token", False, {"beta": BETA}),
    "dr_grpo": ("dr_grpo", "token", False, {"beta": BETA}),
    "gspo": ("grpo", "sequence", False, {}),
    "gspo_k3": ("grpo", "sequence", False, {"beta": BETA}),
    "gspo_on_policy": ("grpo", "sequence", True, {}),
    "cispo": ("cispo", "token", False, {}),
    "cispo_k3": ("cispo", "token", False, {"beta": BETA}),
}


def make_inputs() -> dict[str, list]:
    """Ten rows: each sign of advantage below, inside, above and far above the clip range; A = 0."""
    generator = np.random.default_rng(7)
    lengths_B = [6, 3, 5, 1, 4, 6, 2, 5, 3, 4]
    mask_BT = (np.arange(6)[None] < np.array(lengths_B)[:, None]).astype(float)
    old_BT = generator.uniform(-4.0, -1.3, mask_BT.shape)  # so that all logps stay below 0
    step_B1 = np.log([0.6, 1.1, 1.5, 3.2] * 2 + [1.4, 0.9])[:, None]
    logps_BT = old_BT + step_B1 + generator.uniform(-0.04, 0.04, mask_BT.shape)
    arrays = {
        "logps": logps_BT,
        "old_logps": old_BT,
        "ref_logps": np.minimum(logps_BT + generator.normal(0, 0.4, mask_BT.shape), -0.01),
        "sampler_logps": np.minimum(old_BT + generator.normal(0, 0.5, mask_BT.shape), -0.01),
        "advantages": np.array([1.3, 0.9, 0.6, 1.1, -0.7, -1.2, -0.5, -1.5, 0.0, -0.3]),
        "mask": mask_BT,
    }
    return {name: np.round(array, 4).tolist() for name, array in arrays.items()}


def stand_in(logps_BT, loss_type, level, settings) -> SimpleNamespace:
    """What `_compute_loss` reads of its trainer: one process, one micro-batch, no extras."""
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            logps_BT,
            torch.zeros_like(logps_BT),
            None,
        ),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        args=SimpleNamespace(
            use_bias_correction_kl=settings.get("unbiased", False),
            delta=None,
            steps_per_generation=1,
        ),
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=settings.get("beta", 0.0),
        epsilon_low=EPSILON,
        epsilon_high=CISPO_CAP if loss_type == "cispo" else EPSILON_HIGH,
        use_vllm="tis_cap" in settings,
        vllm_importance_sampling_correction=True,
        max_completion_length=MAX_COMPLETION_LENGTH,
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )


def run_case(inputs, loss_type, level, on_policy, settings) -> dict:
    """TRL's loss, its gradient by the log-probs, and the two metrics that we report too."""
    arrays = {name: torch.tensor(value, dtype=torch.float64) for name, value in inputs.items()}
    logps_BT = arrays["logps"].clone().requires_grad_()
    trainer = stand_in(logps_BT, loss_type, level, settings)
    batch = {
        "prompt_ids": torch.zeros(10, 1, dtype=torch.long),
        "prompt_mask": torch.ones(10, 1),
        "completion_ids": torch.zeros(10, 6, dtype=torch.long),
        "completion_mask": arrays["mask"],
        "advantages": arrays["advantages"],
        "ref_per_token_logps": arrays["ref_logps"],
        "num_items_in_batch": arrays["mask"].sum(),
    }
    if not on_policy:
        batch["old_per_token_logps"] = arrays["old_logps"]
    if "tis_cap" in settings:  # TRL truncates when it scores a rollout, far from the loss
        rho_BT = torch.exp(arrays["old_logps"] - arrays["sampler_logps"])
        batch["importance_sampling_ratio"] = rho_BT.clamp(max=settings["tis_cap"])
    loss = GRPOTrainer._compute_loss(trainer, None, batch)
    loss.backward()
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return {
        "loss_type": loss_type,
        "level": level,
        "on_policy": on_policy,
        "settings": settings,
        "loss": round(loss.item(), 10),
        "gradient": np.round(logps_BT.grad.numpy(), 10).tolist(),
        "kl": metrics.get("kl"),
        "clip_fraction": metrics.get("clip_ratio/region_mean"),
    }


def main() -> None:
    inputs = make_inputs()
    document = {
        "versions": {"trl": trl.__version__, "torch": torch.__version__},
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "epsilon": EPSILON,
        "epsilon_high": EPSILON_HIGH,
        "cispo_cap": CISPO_CAP,
        "inputs": inputs,
        "cases": {name: run_case(inputs, *case) for name, case in CASES.items()},
    }
    path = Path(__file__).with_name("trl_losses.json")
    path.write_text(json.dumps(document, indent=None, separators=(",", ":")) + "\n")
    print(f"{path.name}: {len(CASES)} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
