"""`python -m jaxlm.evaluate`: a finished model through lm-eval's tasks, or over a corpus."""
