"""Released checkpoints, one folder each; the package holds data only."""
