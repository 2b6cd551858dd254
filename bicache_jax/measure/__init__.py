"""Measurements: similarity and boundary tables, accuracy, speed, compiled programs, pictures."""
