"""This machine: devices and what they can do, files that survive a crash, clocks and CUDA graphs; it knows no model."""
