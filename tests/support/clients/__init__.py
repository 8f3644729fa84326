"""Clients at work: 3D Slicer, a browser, annotators without a pause, and attackers."""
