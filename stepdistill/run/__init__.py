"""What a run stands on: errors, randomness, configuration, players, checkpoints and logs."""
