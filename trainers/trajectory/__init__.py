"""Methods that follow the teacher's trajectories."""

if __name__ != "stepdistill.trainers.trajectory":
    raise ImportError("import stepdistill.trainers.trajectory, not trainers.trajectory")
