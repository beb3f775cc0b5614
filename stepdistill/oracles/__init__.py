"""Closed-form teachers: denoisers like any other, of which everything is known."""
