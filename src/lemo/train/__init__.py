"""Training: data, loss rows, adapters, the Trainer's logging, checkpoints, and whole runs."""
