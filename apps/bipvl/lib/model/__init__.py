"""The model: the networks, their losses, prediction, checkpoints, versions and reports."""
