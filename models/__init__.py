"""LLaMA and OPT in Flax NNX."""
