"""BiPVL Label: the parts of the app. `main.py` wires them together."""
