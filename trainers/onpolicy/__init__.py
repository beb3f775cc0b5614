"""Methods that train a student on the states or images that it reaches itself."""

if __name__ != "stepdistill.trainers.onpolicy":
    raise ImportError("import stepdistill.trainers.onpolicy, not trainers.onpolicy")
