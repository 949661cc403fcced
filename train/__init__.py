"""Training: Lightning modules, data modules, the training command line and the export to checkpoints."""
