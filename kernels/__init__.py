"""The ops whose cost grows with the vocabulary or with attention, one folder each.

Every op has `api.py` (what the pipeline calls), `reference.py` (plain float32 JAX, which the others
are tested against), the implementations that it needs (`xla.py`, `pallas_tpu.py`), and `cases.py`
(shapes that tests and benchmarks share). Where an op has several implementations,
`implementation=None` takes the best on this device and always works; a named one raises where it
cannot run. Import this package as `gemma_grpo.kernels`: the bare name belongs to another package.
"""
