"""The MONAI Label app: its wiring, its command line and its web side."""
