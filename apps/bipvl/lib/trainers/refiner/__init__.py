"""The second stage: a refiner, trained by simulated corrections on what the frozen network found."""
