"""Architectures in SAELens, each with its training twin: the binary autoencoder and transcoders."""
