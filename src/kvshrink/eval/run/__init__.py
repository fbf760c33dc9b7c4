"""Running a comparison: entries, samples and rounds, one exact prefill each, outcomes found again, fidelity."""
