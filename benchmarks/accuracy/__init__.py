"""Accuracy on labelled data sets."""
