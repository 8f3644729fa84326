"""A simulation of active learning."""
