"""Pairs of noise and image: what they are, their files, their making, their reading."""
