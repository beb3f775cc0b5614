"""Images for training and evaluation: sources, the order of use, and the loader."""
