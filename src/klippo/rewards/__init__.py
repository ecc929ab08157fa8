"""Rewards: anything that gives a response a number, with NaN for "could not be scored"."""
