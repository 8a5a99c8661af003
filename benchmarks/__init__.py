"""Measured against named peers, in one process and alternating, as ratios."""
