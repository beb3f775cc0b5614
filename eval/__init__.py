"""Evaluation: feature spaces, distances, diversity, and the tables made of them."""

if __name__ != "stepdistill.eval":
    raise ImportError("import stepdistill.eval, not eval")
