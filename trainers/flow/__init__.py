"""Flow matching and the methods that straighten it."""

if __name__ != "stepdistill.trainers.flow":
    raise ImportError("import stepdistill.trainers.flow, not trainers.flow")
