"""Decoders of public model families: architecture, Flax Linen module, checkpoint readers and writers."""
