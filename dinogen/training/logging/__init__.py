"""What a stage logs and leaves for people: curves, samples, results."""
