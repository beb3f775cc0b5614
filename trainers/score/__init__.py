"""Methods that match the score of the student's samples to the teacher's."""

if __name__ != "stepdistill.trainers.score":
    raise ImportError("import stepdistill.trainers.score, not trainers.score")
