"""Language models as pure functions (`jaxlm.contract.LM`); Flax NNX stays behind this door."""
