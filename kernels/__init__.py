"""The ops over Gemma's 262 144 words, one folder each. Knows no model, rollout or loss.

Every op has `api.py` (what the pipeline calls), `reference.py` (plain float32 jax, the law),
`xla.py` and `pallas_tpu.py` (the implementations), and `cases.py` (shapes that tests and benchmarks
share). `implementation=None` takes what is best on this device and always works; a named one raises
if it cannot. Import it as `gemma_grpo.kernels`: the bare name belongs to another package.
"""
