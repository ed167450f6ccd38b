"""Studies: what a paper claims, tried on language models small enough to train here in minutes."""
