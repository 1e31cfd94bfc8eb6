"""One bit flipped in each kind of file that the package has written and reads again: a line that
says so, or the same result; never another one in silence.

Files from outside (a download, a GGUF, data) have no digest of ours: a flipped bit of a weight is
another weight. Their structure is what `fuzz` tries. Nor have metrics.jsonl and rollouts, of which
no model is made.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma_grpo import cli, config, pipeline, weights
from gemma_grpo import model as gemma3
from gemma_grpo.errors import UserError
from gemma_grpo.model import CONFIGS
from gemma_grpo.records import evaluations, origin
from gemma_grpo.records.checkpoint import Checkpoints
from gemma_grpo.runtime import ModelConfig, load_model, write_model


@dataclass(frozen=True)
class Subject:
    """A file to flip bits of, and what the package makes of it."""

    kind: str
    path: Path
    read: Callable[[], Any]


def flips(folder: Path, number: int, seed: int = 0) -> Iterator[dict]:
    """A line for each bit that changed a result in silence, and one for all."""
    with contextlib.redirect_stderr(io.StringIO()):
        subjects = list(_subjects(folder))
    wanted = {subject.path: _outcome(subject.read) for subject in subjects}
    if refused := [str(path) for path, (what, _) in wanted.items() if what == "refused"]:
        raise RuntimeError(f"refused as they are: {refused}")
    draw, counts = random.Random(seed), Counter()
    for flip in range(number):
        subject = subjects[flip % len(subjects)]
        content = subject.path.read_bytes()
        # Half of them in the first 2,000 bytes, where formats keep what matters most.
        end = len(content) if flip // len(subjects) % 2 else min(len(content), 2000)
        at, bit = draw.randrange(end), draw.randrange(8)
        flipped = bytearray(content)
        flipped[at] ^= 1 << bit
        subject.path.write_bytes(flipped)
        what, result = _outcome(subject.read)
        subject.path.write_bytes(content)
        if what == "read":
            what = "the same" if result == wanted[subject.path][1] else "changed in silence"
        counts[what] += 1
        counts[f"{what}: {subject.kind}"] += 1
        if what not in ("refused", "the same"):
            yield {"kind": subject.kind, "byte": at, "bit": bit, "what": what, "said": str(result)}
    yield {"flips": number, "subjects": len(subjects)} | dict(sorted(counts.items()))


def _outcome(read: Callable[[], Any]) -> tuple[str, Any]:
    """("read", digest), ("refused", line) or ("traceback", error)."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), cli.user_errors():
            result = read()
    except UserError as error:
        line = str(error)
        return ("refused" if "\n" not in line else "several lines"), line
    except Exception as error:
        return "traceback", repr(error)
    if result is None:  # passed over; a warning says so
        return ("refused" if "damaged" in said.getvalue() else "read"), None
    return "read", result


def _subjects(folder: Path) -> Iterator[Subject]:
    base = ModelConfig()
    runtime, params = load_model(base, seed=0)
    # What a stage leaves.
    stage = folder / "grpo.safetensors"
    weights.save(stage, params)
    yield Subject("a stage's weights", stage, lambda: _digest(weights.load(stage, params)))
    # The same with adapters.
    adapter = gemma3.init_adapter(
        CONFIGS[base.weights], gemma3.LoRAConfig(rank=4, alpha=8.0), seed=1
    )
    adapters = folder / "adapter.safetensors"
    weights.save(adapters, adapter)
    yield Subject("adapters", adapters, lambda: _digest(weights.load(adapters, adapter)))
    # An exported folder.
    out = folder / "exported"
    write_model(out, runtime, params, base.weights, texts={"README.md": "A model.\n"})
    for name in ("config.json", "model.safetensors", "tokenizer.model", "SHA256SUMS"):
        yield Subject(f"exported {name}", out / name, lambda: _exported(out))
    # Checkpoints: two, so that there is one to fall back to.
    checkpoints = Checkpoints(folder / "checkpoints")
    state = {"params": params, "count": jax.numpy.arange(3)}
    older = jax.tree.map(lambda leaf: leaf + 1, state)
    for step, saved in ((1, older), (2, state)):
        checkpoints.save(step, saved, {"stage": "grpo", "step": step})
    for path in sorted((folder / "checkpoints" / "000002").rglob("*")):
        if path.is_file() and path.stat().st_size:
            yield Subject("checkpoint", path, lambda: _newest(checkpoints, state))
    # A run's records.
    yield from _records(folder / "run")


def _records(run_dir: Path) -> Iterator[Subject]:
    run = config.RunConfig(data=config.DataConfig(num_train=20, num_test=8))
    pipeline.new_run_dir(run_dir, run)
    pipeline._check_origin(run, run_dir, pipeline._digests(run, pipeline.load_task(run)))

    def begun() -> str:
        """The settings that are bound, once the files that the others name have been compared."""
        settings = cli.config_of(run_dir)
        pipeline._check_origin(
            settings, run_dir, pipeline._digests(settings, pipeline.load_task(settings))
        )
        return str([line for line in config.changed_fields(run, settings) if not _may_change(line)])

    yield Subject("config.yaml", run_dir / "config.yaml", begun)
    yield Subject("origin.json", run_dir / origin.NAME, begun)
    rows = [{"greedy": True, "correctness": 1.0, "completion": f"text {i}"} for i in range(9)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    result = {"n": 9, "accuracy": 1.0, "accuracy_ci95": [0.7, 1.0]}
    folder = run_dir / "evaluations"
    folder.mkdir()
    (folder / "sft.jsonl").write_text(lines)
    sealed = result | {evaluations.SEAL: evaluations.seal(result, lines)}
    (folder / "sft.json").write_text(json.dumps(sealed, indent=1))
    for name in ("sft.json", "sft.jsonl"):
        yield Subject(f"evaluation .{name[4:]}", folder / name, lambda: _measured(folder))


def _may_change(line: str) -> bool:
    return line.startswith(cli._MAY_CHANGE)


def _measured(folder: Path) -> str | None:
    found = evaluations.read_back(folder, "sft")
    if found is None:
        return None
    result, rows = found  # a key that nobody reads is no figure
    return f"{[result.get(name) for name in ('n', 'accuracy', 'accuracy_ci95')]} {rows}"


def _newest(checkpoints: Checkpoints, like: Any) -> str | None:
    """The digest of the newest; None where an older one was taken, which a line says."""
    step = checkpoints.latest()
    state, host = checkpoints.restore(step, like)
    return f"{_digest(state)} {host}" if step == 2 else None


def _exported(out: Path) -> str:
    runtime, params = load_model(ModelConfig(weights=str(out)), seed=0)
    sizes = dataclasses.asdict(weights.open_source(str(out)).config)
    ids = runtime.tokenizer.encode_prompt("What is 12 + 7? <start_of_turn> Größe")
    return f"{_digest(params)} {sizes} {ids}"


def _digest(tree: Any) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
