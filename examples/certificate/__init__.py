"""The smallest certified bound on the true error of a digit classifier: ``python -m examples.certificate``."""
