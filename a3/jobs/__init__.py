"""Estimates of the cost of jobs, and clean-up after a killed run."""
