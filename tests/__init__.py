"""A package, so that no other package named `tests` (torch-fidelity brings one) is taken for it."""
