"""Losses as pure functions of tensors: no modules, no state, no randomness."""
