"""Trainers: the common loop in base.py, one folder a family, one short file a method."""

if __name__ != "stepdistill.trainers":
    raise ImportError("import stepdistill.trainers, not trainers")
