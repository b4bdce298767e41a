"""Proof of value: what the mixture teaches beside rejection sampling, rationalisation and plain SFT. docs/proof.md."""
