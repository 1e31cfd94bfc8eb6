"""How tests compile: quickly, since nearly all of their programs run once or a few times."""

from importlib.metadata import version

# Newer ones do not know it, and a flag that XLA does not know ends the process.
KNOWS_EMITTERS = version("jaxlib").startswith("0.10.")
# For XLA_FLAGS: a quarter of the time to compile. Results differ in their last bits.
QUICKLY = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false" if KNOWS_EMITTERS else "",
    ]
)
# `compiler_options` of `jax.jit`, for what runs longer than it compiles.
OPTIMIZED = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    **({"xla_cpu_use_fusion_emitters": True} if KNOWS_EMITTERS else {}),
}
