"""What a run would take on hardware that is not here, found by compiling its own step for it ahead of time."""
