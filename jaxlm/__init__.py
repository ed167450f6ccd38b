"""jaxlm: train language models in JAX, one idea a file."""

__version__ = "0.1.0"
